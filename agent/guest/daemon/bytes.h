/* A growing byte buffer, consumed from the front. */
#ifndef CAPSULE_BYTES_H
#define CAPSULE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes somebody else owns. */
struct Slice {
    const uint8_t *data;
    size_t length;
};

/* `failed` sticks once memory ran out: writers need not check every append, the owner checks once. */
struct Bytes {
    uint8_t *data;
    size_t start;
    size_t length;
    size_t capacity;
    bool failed;
};

/* Make room for `count` bytes after the last one; false (and `failed`) when there is no memory. */
bool bytes_reserve(struct Bytes *bytes, size_t count);
void bytes_append(struct Bytes *bytes, const void *data, size_t count);
/* Drop `count` bytes from the front. An emptied large buffer gives its memory back. */
void bytes_consume(struct Bytes *bytes, size_t count);
void bytes_free(struct Bytes *bytes);

static inline uint8_t *bytes_front(const struct Bytes *bytes) { return bytes->data + bytes->start; }
static inline uint8_t *bytes_tail(const struct Bytes *bytes) { return bytes->data + bytes->start + bytes->length; }
static inline struct Slice bytes_slice(const struct Bytes *bytes) {
    return (struct Slice){.data = bytes->data ? bytes_front(bytes) : (const uint8_t *)"", .length = bytes->length};
}

/* A malloc'd C string of the slice; NULL when there is no memory. */
char *slice_string(struct Slice slice);
bool slice_is(struct Slice slice, const char *text);
bool slice_has_nul(struct Slice slice);

#endif
