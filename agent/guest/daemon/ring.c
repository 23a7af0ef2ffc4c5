#include "ring.h"

#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

struct Ring *ring_new(void) {
    void *memory = mmap(NULL, sizeof(struct Ring), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return memory != MAP_FAILED ? memory : NULL;
}

void ring_free(struct Ring *ring) {
    if (ring != NULL) {
        munmap(ring, sizeof *ring);
    }
}

static size_t smaller(size_t left, size_t right) { return left < right ? left : right; }

static bool is_error(const struct Ring *ring, size_t at) { return ring->errors[at / 8] >> (at % 8) & 1; }

/* (Bits of stdout, too: they were perhaps stderr's before. Nothing is written where they are right already: a terminal
 * never touches these pages.) */
static void mark(struct Ring *ring, size_t at, size_t count, bool errors) {
    for (size_t end = at + count; at < end;) {
        if (at % 8 == 0 && end - at >= 8) {
            if (ring->errors[at / 8] != (errors ? 0xff : 0)) {
                ring->errors[at / 8] = errors ? 0xff : 0;
            }
            at += 8;
            continue;
        }
        if (is_error(ring, at) != errors) {
            ring->errors[at / 8] ^= (uint8_t)(1 << (at % 8));
        }
        at++;
    }
}

ssize_t ring_read(struct Ring *ring, int fd, size_t most, enum Channel channel) {
    size_t at = ring->total % RING_BYTES;
    ssize_t count = read(fd, ring->bytes + at, smaller(most, RING_BYTES - at));
    if (count > 0) {
        mark(ring, at, (size_t)count, channel == CHANNEL_STDERR);
        ring->total += (size_t)count;
    }
    return count;
}

size_t ring_run(const struct Ring *ring, uint64_t position, size_t most, enum Channel *channel) {
    size_t at = position % RING_BYTES;
    bool errors = is_error(ring, at);
    size_t limit = smaller(most, (size_t)(ring->total - position));
    size_t count = 0;
    *channel = errors ? CHANNEL_STDERR : CHANNEL_STDOUT;
    while (count < limit && is_error(ring, at) == errors) {
        size_t step = at % 8 == 0 && ring->errors[at / 8] == (errors ? 0xff : 0) ? 8 : 1;
        at = (at + step) % RING_BYTES;
        count += step;
    }
    return smaller(count, limit);
}

void ring_copy(const struct Ring *ring, uint64_t position, size_t count, uint8_t *target) {
    size_t at = position % RING_BYTES;
    size_t piece = smaller(count, RING_BYTES - at);
    memcpy(target, ring->bytes + at, piece);
    memcpy(target + piece, ring->bytes, count - piece);
}
