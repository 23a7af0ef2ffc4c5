/* The control group (v2) in which everything lives that exec starts, and its freezer.
 *
 * The daemon is not in it, nor are its workers. Root in the guest may take the group apart: then its processes are no
 * longer frozen, and nothing else happens. Without control groups v2 all of this does nothing.
 */
#ifndef CAPSULE_FREEZER_H
#define CAPSULE_FREEZER_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

/* Make the group `path`, in a mounted cgroup2 file system, and a group in it where processes start. False (errno is
 * set) when that cannot be done. */
bool freezer_open(const char *path);
/* fork() for a process of the user's: in the group from its first instruction. When `*join` is positive afterwards, the
 * child still has to join by freezer_join: it does so before it runs anything that is not ours. */
pid_t freezer_fork(int *join);
/* In the child, with the descriptor of freezer_fork: enter the group, and stand still there if it is frozen. */
bool freezer_join(int procs);

/* Begin to freeze; false when there is no group. */
bool freezer_freeze(void);
void freezer_thaw(void);
/* Whether the group was told to freeze, by us. */
bool freezer_active(void);
/* For freezer_wait in a child; -1 when there is no group. */
int freezer_events(void);
/* In a child: wait until every process of the group stands still, at most until `deadline` (clock_monotonic_ns). */
bool freezer_wait(int events, uint64_t deadline);

#endif
