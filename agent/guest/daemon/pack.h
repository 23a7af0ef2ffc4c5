/* msgpack encoding into a Bytes. Running out of memory sets its `failed`. */
#ifndef CAPSULE_PACK_H
#define CAPSULE_PACK_H

#include "bytes.h"

void pack_map(struct Bytes *bytes, size_t count);
void pack_array(struct Bytes *bytes, size_t count);
void pack_integer(struct Bytes *bytes, int64_t value);
void pack_bool(struct Bytes *bytes, bool value);
/* Names in a guest are any bytes, strings of the protocol are UTF-8: what is not becomes U+FFFD. */
void pack_slice(struct Bytes *bytes, struct Slice text);
void pack_string(struct Bytes *bytes, const char *text);

#endif
