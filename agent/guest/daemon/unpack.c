#include "unpack.h"

#include <string.h>

static size_t left(const struct Reader *reader) { return (size_t)(reader->end - reader->at); }

static uint64_t big_endian(const uint8_t *at, size_t count) {
    uint64_t value = 0;
    for (size_t i = 0; i < count; i++) {
        value = value << 8 | at[i];
    }
    return value;
}

/* The `count` bytes after the type byte as a number; moves behind them. */
static bool take_number(struct Reader *reader, size_t count, uint64_t *value) {
    if (left(reader) < 1 + count) {
        return false;
    }
    *value = big_endian(reader->at + 1, count);
    reader->at += 1 + count;
    return true;
}

enum Kind unpack_kind(const struct Reader *reader) {
    if (left(reader) == 0) {
        return KIND_INVALID;
    }
    uint8_t type = *reader->at;
    if (type <= 0x7f || type >= 0xe0) {
        return KIND_INTEGER;
    }
    if (type <= 0x8f) {
        return KIND_MAP;
    }
    if (type <= 0x9f) {
        return KIND_ARRAY;
    }
    if (type <= 0xbf) {
        return KIND_STRING;
    }
    static const uint8_t kinds[0x20] = {
        [0x00] = KIND_NIL,     [0x02] = KIND_BOOL,    [0x03] = KIND_BOOL,    [0x04] = KIND_BINARY,
        [0x05] = KIND_BINARY,  [0x06] = KIND_BINARY,  [0x0a] = KIND_FLOAT,   [0x0b] = KIND_FLOAT,
        [0x0c] = KIND_INTEGER, [0x0d] = KIND_INTEGER, [0x0e] = KIND_INTEGER, [0x0f] = KIND_INTEGER,
        [0x10] = KIND_INTEGER, [0x11] = KIND_INTEGER, [0x12] = KIND_INTEGER, [0x13] = KIND_INTEGER,
        [0x19] = KIND_STRING,  [0x1a] = KIND_STRING,  [0x1b] = KIND_STRING,  [0x1c] = KIND_ARRAY,
        [0x1d] = KIND_ARRAY,   [0x1e] = KIND_MAP,     [0x1f] = KIND_MAP,
    };
    return (enum Kind)kinds[type - 0xc0]; /* the rest: extension types and 0xc1 */
}

bool unpack_integer(struct Reader *reader, int64_t low, int64_t high, int64_t *value) {
    if (unpack_kind(reader) != KIND_INTEGER) {
        return false;
    }
    uint8_t type = *reader->at;
    uint64_t raw;
    int64_t number;
    if (type <= 0x7f || type >= 0xe0) {
        reader->at++;
        number = (int8_t)type;
    } else if (type <= 0xcf) {
        if (!take_number(reader, (size_t)1 << (type - 0xcc), &raw) || raw > INT64_MAX) {
            return false;
        }
        number = (int64_t)raw;
    } else {
        size_t count = (size_t)1 << (type - 0xd0);
        if (!take_number(reader, count, &raw)) {
            return false;
        }
        number = count == 1   ? (int8_t)raw
                 : count == 2 ? (int16_t)raw
                 : count == 4 ? (int32_t)raw
                              : (int64_t)raw;
    }
    *value = number;
    return number >= low && number <= high;
}

bool unpack_bool(struct Reader *reader, bool *value) {
    if (unpack_kind(reader) != KIND_BOOL) {
        return false;
    }
    *value = *reader->at++ == 0xc3;
    return true;
}

static bool take_slice(struct Reader *reader, uint64_t count, struct Slice *value) {
    if (count > left(reader)) {
        return false;
    }
    *value = (struct Slice){.data = reader->at, .length = (size_t)count};
    reader->at += count;
    return true;
}

bool unpack_string(struct Reader *reader, struct Slice *value) {
    if (unpack_kind(reader) != KIND_STRING) {
        return false;
    }
    uint8_t type = *reader->at;
    uint64_t count;
    if (type <= 0xbf) {
        reader->at++;
        count = type & 0x1f;
    } else if (!take_number(reader, (size_t)1 << (type - 0xd9), &count)) {
        return false;
    }
    return take_slice(reader, count, value) && utf8_characters(*value) >= 0;
}

bool unpack_binary(struct Reader *reader, struct Slice *value) {
    uint64_t count;
    return unpack_kind(reader) == KIND_BINARY && take_number(reader, (size_t)1 << (*reader->at - 0xc4), &count) &&
           take_slice(reader, count, value);
}

static bool take_count(struct Reader *reader, uint8_t wide, size_t bytes_each, size_t *count) {
    uint8_t type = *reader->at;
    uint64_t number;
    if (type <= 0x9f) {
        reader->at++;
        number = type & 0x0f;
    } else if (!take_number(reader, type == wide ? 4 : 2, &number)) {
        return false;
    }
    *count = (size_t)number;
    return number <= left(reader) / bytes_each;
}

bool unpack_array(struct Reader *reader, size_t *count) {
    return unpack_kind(reader) == KIND_ARRAY && take_count(reader, 0xdd, 1, count);
}

bool unpack_map(struct Reader *reader, size_t *count) {
    return unpack_kind(reader) == KIND_MAP && take_count(reader, 0xdf, 2, count);
}

bool unpack_skip(struct Reader *reader, int depth) {
    int64_t integer;
    bool boolean;
    struct Slice slice;
    size_t count;
    uint64_t raw;
    switch (unpack_kind(reader)) {
    case KIND_NIL:
        reader->at++;
        return true;
    case KIND_BOOL:
        return unpack_bool(reader, &boolean);
    case KIND_INTEGER: /* a value no field of ours uses may be any uint64 */
        if (*reader->at == 0xcf) {
            return take_number(reader, 8, &raw);
        }
        return unpack_integer(reader, INT64_MIN, INT64_MAX, &integer);
    case KIND_FLOAT:
        return take_number(reader, *reader->at == 0xca ? 4 : 8, &raw);
    case KIND_STRING:
        return unpack_string(reader, &slice);
    case KIND_BINARY:
        return unpack_binary(reader, &slice);
    case KIND_ARRAY:
        if (depth == 0 || !unpack_array(reader, &count)) {
            return false;
        }
        while (count-- > 0) {
            if (!unpack_skip(reader, depth - 1)) {
                return false;
            }
        }
        return true;
    case KIND_MAP:
        if (depth == 0 || !unpack_map(reader, &count)) {
            return false;
        }
        while (count-- > 0) {
            if (!unpack_string(reader, &slice) || !unpack_skip(reader, depth - 1)) {
                return false;
            }
        }
        return true;
    case KIND_INVALID:
        break;
    }
    return false;
}

size_t utf8_character(const uint8_t *at, size_t left_over) {
    if (left_over == 0) {
        return 0;
    }
    if (at[0] < 0x80) {
        return 1;
    }
    size_t count = at[0] >= 0xc2 && at[0] <= 0xdf ? 2 : (at[0] & 0xf0) == 0xe0 ? 3 : at[0] >= 0xf0 && at[0] <= 0xf4 ? 4 : 0;
    if (count == 0 || left_over < count) {
        return 0;
    }
    for (size_t i = 1; i < count; i++) {
        if ((at[i] & 0xc0) != 0x80) {
            return 0;
        }
    }
    bool overlong = (at[0] == 0xe0 && at[1] < 0xa0) || (at[0] == 0xf0 && at[1] < 0x90);
    bool surrogate = at[0] == 0xed && at[1] > 0x9f;
    bool beyond = at[0] == 0xf4 && at[1] > 0x8f;
    return overlong || surrogate || beyond ? 0 : count;
}

long utf8_characters(struct Slice text) {
    long characters = 0;
    for (size_t at = 0; at < text.length; characters++) {
        size_t count = utf8_character(text.data + at, text.length - at);
        if (count == 0) {
            return -1;
        }
        at += count;
    }
    return characters;
}
