#include "bytes.h"

#include <stdlib.h>
#include <string.h>

#include "guest_limits.h"

bool bytes_reserve(struct Bytes *bytes, size_t count) {
    if (bytes->failed || count > SIZE_MAX / 4 - bytes->length) {
        bytes->failed = true;
        return false;
    }
    if (bytes->start + bytes->length + count <= bytes->capacity) {
        return true;
    }
    if (bytes->length + count <= bytes->capacity && bytes->start >= bytes->length) { /* paid by what was consumed */
        memmove(bytes->data, bytes_front(bytes), bytes->length);
        bytes->start = 0;
        return true;
    }
    size_t wanted = bytes->length + count;
    size_t capacity = wanted < 256 ? 256 : wanted + wanted / 2;
    uint8_t *data = malloc(capacity);
    if (data == NULL) {
        bytes->failed = true;
        return false;
    }
    if (bytes->length > 0) {
        memcpy(data, bytes_front(bytes), bytes->length);
    }
    free(bytes->data);
    bytes->data = data;
    bytes->start = 0;
    bytes->capacity = capacity;
    return true;
}

void bytes_append(struct Bytes *bytes, const void *data, size_t count) {
    if (count > 0 && bytes_reserve(bytes, count)) {
        memcpy(bytes_tail(bytes), data, count);
        bytes->length += count;
    }
}

void bytes_consume(struct Bytes *bytes, size_t count) {
    bytes->start += count;
    bytes->length -= count;
    if (bytes->length > 0) {
        return;
    }
    bytes->start = 0;
    if (bytes->capacity > KEPT_BYTES) {
        bytes_free(bytes);
    }
}

void bytes_free(struct Bytes *bytes) {
    free(bytes->data);
    bool failed = bytes->failed;
    *bytes = (struct Bytes){.failed = failed};
}

char *slice_string(struct Slice slice) {
    char *text = malloc(slice.length + 1);
    if (text != NULL) {
        memcpy(text, slice.data, slice.length);
        text[slice.length] = '\0';
    }
    return text;
}

bool slice_is(struct Slice slice, const char *text) {
    return slice.length == strlen(text) && memcmp(slice.data, text, slice.length) == 0;
}

bool slice_has_nul(struct Slice slice) { return memchr(slice.data, '\0', slice.length) != NULL; }
