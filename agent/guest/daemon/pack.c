#include "pack.h"

#include <string.h>

#include "unpack.h"

static const uint8_t replacement[3] = {0xef, 0xbf, 0xbd};

static void put(struct Bytes *bytes, uint8_t type, uint64_t value, size_t count) {
    uint8_t raw[9] = {type};
    for (size_t i = 0; i < count; i++) {
        raw[1 + i] = (uint8_t)(value >> (8 * (count - 1 - i)));
    }
    bytes_append(bytes, raw, 1 + count);
}

void pack_map(struct Bytes *bytes, size_t count) {
    if (count < 16) {
        put(bytes, (uint8_t)(0x80 | count), 0, 0);
    } else {
        put(bytes, 0xdf, count, 4);
    }
}

void pack_array(struct Bytes *bytes, size_t count) {
    if (count < 16) {
        put(bytes, (uint8_t)(0x90 | count), 0, 0);
    } else {
        put(bytes, 0xdd, count, 4);
    }
}

void pack_integer(struct Bytes *bytes, int64_t value) {
    if (value >= 0 && value < 0x80) {
        put(bytes, (uint8_t)value, 0, 0);
    } else if (value >= 0 && value <= UINT32_MAX) {
        put(bytes, 0xce, (uint64_t)value, 4);
    } else {
        put(bytes, 0xd3, (uint64_t)value, 8);
    }
}

void pack_bool(struct Bytes *bytes, bool value) { put(bytes, value ? 0xc3 : 0xc2, 0, 0); }

static size_t clean_length(struct Slice text) {
    size_t total = 0;
    for (size_t at = 0; at < text.length;) {
        size_t count = utf8_character(text.data + at, text.length - at);
        total += count > 0 ? count : sizeof replacement;
        at += count > 0 ? count : 1;
    }
    return total;
}

void pack_slice(struct Bytes *bytes, struct Slice text) {
    size_t total = clean_length(text);
    if (total < 32) {
        put(bytes, (uint8_t)(0xa0 | total), 0, 0);
    } else {
        put(bytes, 0xdb, total, 4);
    }
    for (size_t at = 0; at < text.length;) {
        size_t count = utf8_character(text.data + at, text.length - at);
        bytes_append(bytes, count > 0 ? text.data + at : replacement, count > 0 ? count : sizeof replacement);
        at += count > 0 ? count : 1;
    }
}

void pack_string(struct Bytes *bytes, const char *text) {
    pack_slice(bytes, (struct Slice){.data = (const uint8_t *)text, .length = strlen(text)});
}
