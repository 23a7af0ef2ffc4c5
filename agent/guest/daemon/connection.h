/* Connections of openers: bytes in, frames out.
 *
 * Owns: every accepted socket and its buffers.   Owned by: the main loop.
 * Dies when: the opener closes, breaks the protocol, or says no HELLO in time; its jobs are killed with it.
 */
#ifndef CAPSULE_CONNECTION_H
#define CAPSULE_CONNECTION_H

#include <netinet/in.h>

#include "bytes.h"
#include "loop.h"

struct Connection {
    struct Connection *next; /* first: see loop_discard */
    struct Watch socket;
    struct Bytes in;
    struct Bytes out;
    uint64_t hello_deadline;
    uint64_t queued_before; /* bytes that ever left `out`: what makes positions in it absolute */
    uint64_t pong_at;       /* where the last PONG ends: another PING before that is sent breaks rule 7 */
    uint32_t initial_credit;
    uint32_t last_stream;
    unsigned streams;
    bool greeted;
    bool remembered; /* open when the guest was settled */
    bool broken; /* closed by the next connections_settle */
};

/* listener.c: listen on `address`; only peers with `peer` (network order) are accepted. Returns the port or 0 (errno is set). */
uint16_t connections_listen(struct in_addr address, uint16_t port, struct in_addr peer);
/* An accepted socket; closed at once when there are too many. */
void connection_add(int fd);
/* Send what is queued, decode what had to wait, close what is broken. True when another turn is due at once. */
bool connections_settle(void);
uint64_t connections_deadline(void);

/* The guest was settled: if it goes on somewhere else, the peers of today's connections stay behind. */
void connections_remember(void);
void connections_forget(void);
/* It went on somewhere else, and `keep` reaches it there: kill what the remembered others own, and close them. */
void connections_end_remembered(const struct Connection *keep);

/* Too much output waits: nothing more is read for this connection. */
bool connection_congested(const struct Connection *connection);
/* How much of a process's output or a file's content a stream may send now whose last DATA ended at `sent_end`, at most
 * MAX_DATA_BYTES. Little while others' waits, so that what a quiet stream says does not wait behind all that others could. */
size_t connection_allowance(const struct Connection *connection, uint64_t sent_end);
/* Where the output that is queued now ends, counted from the connection's first byte. */
static inline uint64_t connection_queued(const struct Connection *connection) {
    return connection->queued_before + connection->out.length;
}
void connection_reply(struct Connection *connection, uint32_t stream, const struct Bytes *body);
void connection_fault(struct Connection *connection, uint32_t stream, const char *code, const char *format, ...)
    __attribute__((format(printf, 4, 5)));
/* Send what is queued, and when all of it is gone, `count` bytes that are in the pipe, behind it; how many of those. The
 * socket may take fewer: the rest is still in the pipe. */
size_t connection_pass(struct Connection *connection, int pipe, size_t count);
/* The last frame of a stream whose process somebody else attached to. */
void connection_taken_over(struct Connection *connection, uint32_t stream);

#endif
