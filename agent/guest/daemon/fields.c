#include "fields.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "guest_limits.h"
#include "unpack.h"

__attribute__((format(printf, 2, 3))) static bool refuse(char *error, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error, FIELD_ERROR_BYTES, format, values);
    va_end(values);
    return false;
}

static bool read_text(struct Reader *reader, const struct Field *field, char *error) {
    struct Slice value;
    bool string = field->type == FIELD_STRING;
    if (!(string ? unpack_string(reader, &value) : unpack_binary(reader, &value))) {
        return refuse(error, "%s must be %s", field->name, string ? "a string" : "bytes");
    }
    if (field->high > 0 && value.length > (size_t)field->high) {
        return refuse(error, "%s is longer than %lld bytes", field->name, (long long)field->high);
    }
    if (string && slice_has_nul(value)) {
        return refuse(error, "%s holds a NUL character", field->name);
    }
    *(struct Slice *)field->target = value;
    return true;
}

static bool read_integer(struct Reader *reader, const struct Field *field, char *error) {
    struct Integer *target = field->target;
    if (!unpack_integer(reader, field->low, field->high, &target->value)) {
        return refuse(error, "%s must be an integer from %lld to %lld", field->name, (long long)field->low,
                      (long long)field->high);
    }
    target->present = true;
    return true;
}

static bool read_strings(struct Reader *reader, const struct Field *field, char *error) {
    const uint8_t *begin = reader->at;
    size_t count;
    if (!unpack_array(reader, &count) || count > (size_t)field->high) {
        return refuse(error, "%s must be a list of at most %lld strings", field->name, (long long)field->high);
    }
    for (struct Slice text; count > 0; count--) {
        if (!unpack_string(reader, &text) || slice_has_nul(text)) {
            return refuse(error, "%s must hold strings without NUL characters", field->name);
        }
    }
    *(struct Slice *)field->target = (struct Slice){.data = begin, .length = (size_t)(reader->at - begin)};
    return true;
}

static bool read_envs(struct Reader *reader, const struct Field *field, char *error) {
    const uint8_t *begin = reader->at;
    size_t count;
    if (!unpack_map(reader, &count) || count > (size_t)field->high) {
        return refuse(error, "%s must map at most %lld names to strings", field->name, (long long)field->high);
    }
    for (struct Slice name, value; count > 0; count--) {
        if (!unpack_string(reader, &name) || !unpack_string(reader, &value) || slice_has_nul(value)) {
            return refuse(error, "%s must map names to strings without NUL characters", field->name);
        }
        if (name.length == 0 || slice_has_nul(name) || memchr(name.data, '=', name.length) != NULL) {
            return refuse(error, "%s has a name that is empty or holds '=' or NUL", field->name);
        }
    }
    *(struct Slice *)field->target = (struct Slice){.data = begin, .length = (size_t)(reader->at - begin)};
    return true;
}

static bool read_field(struct Reader *reader, const struct Field *field, char *error) {
    const uint8_t *begin = reader->at;
    switch (field->type) {
    case FIELD_STRING:
    case FIELD_BINARY:
        return read_text(reader, field, error);
    case FIELD_INTEGER:
        return read_integer(reader, field, error);
    case FIELD_BOOL:
        return unpack_bool(reader, field->target) || refuse(error, "%s must be true or false", field->name);
    case FIELD_STRINGS:
        return read_strings(reader, field, error);
    case FIELD_ENVS:
        return read_envs(reader, field, error);
    case FIELD_ANY:
        if (!unpack_skip(reader, MAX_DEPTH)) {
            return refuse(error, "%s is malformed", field->name);
        }
        *(struct Slice *)field->target = (struct Slice){.data = begin, .length = (size_t)(reader->at - begin)};
        return true;
    }
    return false;
}

bool fields_read(struct Slice body, const struct Field *fields, size_t count, char error[FIELD_ERROR_BYTES]) {
    struct Reader reader = {.at = body.data, .end = body.data + body.length};
    size_t pairs;
    uint32_t seen = 0;
    if (!unpack_map(&reader, &pairs)) {
        return refuse(error, "the body must be a map");
    }
    for (struct Slice key; pairs > 0; pairs--) {
        size_t at = 0;
        if (!unpack_string(&reader, &key)) {
            return refuse(error, "a key of the body is not a string");
        }
        while (at < count && !slice_is(key, fields[at].name)) {
            at++;
        }
        if (at == count) {
            if (!unpack_skip(&reader, MAX_DEPTH)) {
                return refuse(error, "the body is malformed");
            }
            continue;
        }
        if (seen & 1U << at) {
            return refuse(error, "%s is given twice", fields[at].name);
        }
        seen |= 1U << at;
        if (!read_field(&reader, &fields[at], error)) {
            return false;
        }
    }
    for (size_t at = 0; at < count; at++) {
        if (fields[at].required && !(seen & 1U << at)) {
            return refuse(error, "%s is missing", fields[at].name);
        }
    }
    return true;
}

static struct StringWalk walk(struct Slice value, bool map) {
    struct Reader reader = {.at = value.data, .end = value.data + value.length};
    size_t count = 0;
    if (value.data == NULL || !(map ? unpack_map(&reader, &count) : unpack_array(&reader, &count))) {
        return (struct StringWalk){.left = 0};
    }
    struct Slice rest = {.data = reader.at, .length = (size_t)(reader.end - reader.at)};
    return (struct StringWalk){.rest = rest, .left = map ? 2 * count : count};
}

struct StringWalk strings_walk(struct Slice array) { return walk(array, false); }
struct StringWalk envs_walk(struct Slice map) { return walk(map, true); }

bool walk_next(struct StringWalk *walk, struct Slice *text) {
    struct Reader reader = {.at = walk->rest.data, .end = walk->rest.data + walk->rest.length};
    if (walk->left == 0 || !unpack_string(&reader, text)) {
        return false;
    }
    walk->left--;
    walk->rest = (struct Slice){.data = reader.at, .length = (size_t)(reader.end - reader.at)};
    return true;
}
