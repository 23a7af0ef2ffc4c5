/* The last RING_BYTES of a process's output, each byte with its channel. */
#ifndef CAPSULE_RING_H
#define CAPSULE_RING_H

#include <sys/types.h>

#include "frames.h"
#include "guest_limits.h"

/* Positions count output bytes from the process's first. A byte's place is its position modulo RING_BYTES. */
struct Ring {
    uint64_t total; /* bytes ever written */
    uint8_t bytes[RING_BYTES];
    uint8_t errors[RING_BYTES / 8]; /* a bit for each byte: it came from stderr */
};

/* NULL when there is no address space. It takes memory only as it fills. */
struct Ring *ring_new(void);
void ring_free(struct Ring *ring);

/* The position of the oldest byte that is still there. */
static inline uint64_t ring_oldest(const struct Ring *ring) {
    return ring->total > RING_BYTES ? ring->total - RING_BYTES : 0;
}

/* read(2) at most `most` (at least 1) bytes of `fd`; they take the place of the oldest. */
ssize_t ring_read(struct Ring *ring, int fd, size_t most, enum Channel channel);
/* How many bytes from `position` (oldest … total) on are of one channel, at most `most`. */
size_t ring_run(const struct Ring *ring, uint64_t position, size_t most, enum Channel *channel);
void ring_copy(const struct Ring *ring, uint64_t position, size_t count, uint8_t *target);

#endif
