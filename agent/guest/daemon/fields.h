/* The fields of a method's body. Unknown keys are ignored, known ones are checked. */
#ifndef CAPSULE_FIELDS_H
#define CAPSULE_FIELDS_H

#include "bytes.h"

enum FieldType {
    FIELD_STRING,  /* struct Slice */
    FIELD_BINARY,  /* struct Slice */
    FIELD_INTEGER, /* struct Integer, within low … high */
    FIELD_BOOL,    /* bool */
    FIELD_STRINGS, /* struct Slice: the msgpack array, at most `high` elements */
    FIELD_ENVS,    /* struct Slice: the msgpack map of names and values, at most `high` pairs */
    FIELD_ANY,     /* struct Slice: the msgpack value */
};

struct Integer {
    bool present;
    int64_t value;
};

struct Field {
    const char *name;
    enum FieldType type;
    void *target; /* stays as it was when the key is absent; a Slice is absent when its data is NULL */
    bool required;
    int64_t low;
    int64_t high; /* for strings and binaries: most bytes, 0 for no bound but the frame's */
};

#define FIELD_ERROR_BYTES 160

/* Read `body` (one valid msgpack map); false with a message for the end user in `error`. No string holds a NUL. */
bool fields_read(struct Slice body, const struct Field *fields, size_t count, char error[FIELD_ERROR_BYTES]);

/* Walk a FIELD_STRINGS value: `*rest` starts as the whole array; false at its end. */
struct StringWalk {
    struct Slice rest;
    size_t left;
};
struct StringWalk strings_walk(struct Slice array);
struct StringWalk envs_walk(struct Slice map);
bool walk_next(struct StringWalk *walk, struct Slice *text);

#endif
