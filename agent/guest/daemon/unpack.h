/* Strict msgpack decoding. No function reads past `end`; every one returns false on anything but what it is named for. */
#ifndef CAPSULE_UNPACK_H
#define CAPSULE_UNPACK_H

#include "bytes.h"

struct Reader {
    const uint8_t *at;
    const uint8_t *end;
};

enum Kind { KIND_INVALID, KIND_NIL, KIND_BOOL, KIND_INTEGER, KIND_FLOAT, KIND_STRING, KIND_BINARY, KIND_ARRAY, KIND_MAP };

enum Kind unpack_kind(const struct Reader *reader);
/* Any integer encoding, value within low … high (as int64; unsigned beyond that is refused). */
bool unpack_integer(struct Reader *reader, int64_t low, int64_t high, int64_t *value);
bool unpack_bool(struct Reader *reader, bool *value);
/* Valid UTF-8 only. */
bool unpack_string(struct Reader *reader, struct Slice *value);
bool unpack_binary(struct Reader *reader, struct Slice *value);
/* Counts are checked against the bytes that are left. */
bool unpack_array(struct Reader *reader, size_t *count);
bool unpack_map(struct Reader *reader, size_t *count);
/* One whole value: arrays and maps at most `depth` deep, map keys are strings, no extension types. */
bool unpack_skip(struct Reader *reader, int depth);

/* Number of characters, or -1 when it is not UTF-8. */
long utf8_characters(struct Slice text);
/* Bytes (1-4) of the valid character at the front, 0 when there is none. */
size_t utf8_character(const uint8_t *at, size_t left);

#endif
