/* Who the guest is, in files: its host name, its machine id, its resolver.
 *
 * Owns: the memory of what was last written of it.   Owned by: configure, in the main loop.
 *
 * A child costs a resume under emulation some 50 ms, and a resume mostly tells a guest what it has been told before.
 * So what was written once is not even looked at again until it is to be something else: whoever changes such a file in
 * the guest has it changed for good.
 */
#ifndef CAPSULE_IDENTITY_H
#define CAPSULE_IDENTITY_H

#include <stdbool.h>

#include "connection.h"
#include "frames.h"

enum IdentityPart { IDENTITY_HOSTNAME, IDENTITY_MACHINE_ID, IDENTITY_DNS, IDENTITY_PARTS };

/* Parts that are absent have no data. The resolver is a FIELD_STRINGS value. */
struct Identity {
    struct Slice parts[IDENTITY_PARTS];
};

/* Take away what was last written just so; whether anything is left. */
bool identity_reduce(struct Identity *identity);
/* Answer `open` with a child that writes what is left; then everything thaws, also when a file could not be written. */
void identity_write(struct Connection *connection, const struct Frame *open, const struct Identity *identity);

#endif
