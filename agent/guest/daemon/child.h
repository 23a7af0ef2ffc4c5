/* What runs on the child's side of a fork, and the records by which it talks to the loop.
 *
 * A child has four descriptors: 0 content or stdin, 1 content or stdout, 2 stderr, CONTROL_FD a SOCK_SEQPACKET socket on
 * which every message is one record: a kind and its payload. Some are given one more, EXTRA_FD.
 */
#ifndef CAPSULE_CHILD_H
#define CAPSULE_CHILD_H

#include "bytes.h"

#define CONTROL_FD 3
#define EXTRA_FD 4

enum Record {
    RECORD_STARTED = 'S',   /* exec only, just before execve: user NUL cwd NUL login shell's name NUL */
    RECORD_NOTICE = 'N',    /* a msgpack map for the notice channel */
    RECORD_REPLY = 'R',     /* the msgpack map of the REPLY; last */
    RECORD_FAULT = 'F',     /* code NUL message; last */
    RECORD_TEMPORARY = 'T', /* path of a file the loop removes when this child dies without a reply */
    RECORD_COMMIT = 'C',    /* to the child: END has come, the content is whole */
};

/* Make the calling child ready: descriptors (the first `count` of the above), signals, session. */
void child_enter(const int *fds, int count);

void worker_record(enum Record kind, struct Slice payload);
void worker_notice(const struct Bytes *body);
_Noreturn void worker_reply(const struct Bytes *body);
_Noreturn void worker_fault(const char *code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The fault that fits errno value `reason`, about `path`. */
_Noreturn void worker_errno(int reason, const char *path);
/* Wait for the loop's word that the content on descriptor 0 ended by END and not by the opener's death. */
bool worker_committed(void);
/* Called by worker_fault before it reports: undo what must not stay. */
extern void (*worker_cleanup)(void);

/* Wait for `events` (poll.h) of a descriptor; false when there were none until `deadline` (clock_monotonic_ns). */
bool worker_wait(int fd, short events, uint64_t deadline);
/* Write everything to a blocking descriptor; false with errno set. */
bool write_all(int fd, const void *data, size_t count);

#endif
