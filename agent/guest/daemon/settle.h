/* settle and thaw: everything the user runs stands still while its memory is copied.
 *
 * Owns: when the group of freezer.h is frozen, and when it thaws by itself.   Owned by: the main loop.
 */
#ifndef CAPSULE_SETTLE_H
#define CAPSULE_SETTLE_H

#include <stdint.h>

#include "connection.h"
#include "frames.h"

void settle_open(struct Connection *connection, const struct Frame *open);
void thaw_open(struct Connection *connection, const struct Frame *open);

/* Thaw whatever is frozen, end a settle that is under way. Harmless otherwise. */
void settle_end(void);
/* The guest has been told who it is now: end what belongs to the connections of before (all that were open when it was
 * settled, but for `current`), then thaw. */
void settle_resume(const struct Connection *current);

/* Once a turn: thaw when the host has forgotten to. */
void settle_advance(void);
uint64_t settle_deadline(void);

#endif
