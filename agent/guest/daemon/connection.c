#include "connection.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "frames.h"
#include "job.h"
#include "guest_limits.h"
#include "methods.h"

#define PREFIX_BYTES 4

static struct Connection *connections;
static unsigned connection_count;

bool connection_congested(const struct Connection *connection) {
    return connection->broken || connection->out.length >= OUTPUT_HIGH_WATER;
}

size_t connection_allowance(const struct Connection *connection, uint64_t sent_end) {
    if (connection_congested(connection)) {
        return 0;
    }
    if (connection->out.length < BULK_WATER) {
        return MAX_DATA_BYTES;
    }
    return sent_end <= connection->queued_before ? LIGHT_BYTES : 0;
}

void connection_reply(struct Connection *connection, uint32_t stream, const struct Bytes *body) {
    if (body->failed) {
        connection_fault(connection, stream, "internal", "the guest is out of memory");
        return;
    }
    frame_reply(&connection->out, stream, bytes_slice(body));
}

void connection_fault(struct Connection *connection, uint32_t stream, const char *code, const char *format, ...) {
    char message[MAX_TEXT_CHARS + 256];
    va_list values;
    va_start(values, format);
    vsnprintf(message, sizeof message, format, values);
    va_end(values);
    frame_fault(&connection->out, stream, code, message, NULL);
}

void connection_taken_over(struct Connection *connection, uint32_t stream) {
    frame_fault(&connection->out, stream, "conflict", "somebody else attached to the process", "taken_over");
}

/* --- frames ------------------------------------------------------------------------------------------------- */

static bool receive_hello(struct Connection *connection, const struct Frame *frame) {
    if (connection->greeted || frame->tag != TAG_HELLO || frame->version != PROTOCOL_VERSION) {
        return false;
    }
    connection->greeted = true;
    connection->initial_credit = frame->initial_credit;
    return true;
}

static bool receive_open(struct Connection *connection, const struct Frame *frame) {
    if (frame->stream <= connection->last_stream || connection->streams >= MAX_STREAMS) {
        return false;
    }
    connection->last_stream = frame->stream;
    methods_open(connection, frame);
    return true;
}

static bool receive_ping(struct Connection *connection, const struct Frame *frame) {
    if (connection->pong_at > connection->queued_before) {
        return false;
    }
    frame_pong(&connection->out, frame->nonce);
    connection->pong_at = connection_queued(connection);
    return true;
}

/* False when the frame breaks the protocol. */
static bool receive_frame(struct Connection *connection, const struct Frame *frame) {
    if (!connection->greeted || frame->tag == TAG_HELLO) {
        return receive_hello(connection, frame);
    }
    switch (frame->tag) {
    case TAG_OPEN:
        return receive_open(connection, frame);
    case TAG_PING:
        return receive_ping(connection, frame);
    case TAG_GOAWAY: /* the opener opens no more; open streams go on */
        return true;
    case TAG_DATA:
    case TAG_END:
    case TAG_CREDIT:
    case TAG_CANCEL:
        return frame->stream <= connection->last_stream && job_receive(connection, frame);
    default: /* PONG: we never ask */
        return false;
    }
}

static void process_input(struct Connection *connection) {
    struct Bytes *in = &connection->in;
    while (!connection_congested(connection) && in->length >= PREFIX_BYTES) {
        const uint8_t *front = bytes_front(in);
        size_t length = (size_t)front[0] << 24 | (size_t)front[1] << 16 | (size_t)front[2] << 8 | front[3];
        if (length == 0 || length > MAX_FRAME_BYTES) {
            connection->broken = true;
            return;
        }
        if (in->length < PREFIX_BYTES + length) {
            connection->broken = !bytes_reserve(in, PREFIX_BYTES + length - in->length);
            return;
        }
        struct Frame frame;
        struct Slice payload = {.data = front + PREFIX_BYTES, .length = length};
        if (!frame_decode(payload, &frame) || !receive_frame(connection, &frame)) {
            connection->broken = true;
            return;
        }
        bytes_consume(in, PREFIX_BYTES + length);
    }
}

/* --- bytes -------------------------------------------------------------------------------------------------- */

static void receive_bytes(struct Connection *connection) {
    struct Bytes *in = &connection->in;
    if (!bytes_reserve(in, READ_BYTES)) {
        connection->broken = true;
        return;
    }
    size_t room = in->capacity - in->start - in->length;
    ssize_t count = recv(connection->socket.fd, bytes_tail(in), room, MSG_DONTWAIT);
    if (count > 0) {
        in->length += (size_t)count;
        process_input(connection);
    } else if (count == 0 || (errno != EAGAIN && errno != EINTR)) {
        connection->broken = true;
    }
}

/* `flags`: MSG_MORE when something follows at once. */
static void send_bytes(struct Connection *connection, int flags) {
    struct Bytes *out = &connection->out;
    flags |= MSG_DONTWAIT | MSG_NOSIGNAL;
    while (out->length > 0 && !out->failed) {
        ssize_t count = send(connection->socket.fd, bytes_front(out), out->length, flags);
        if (count < 0) {
            connection->broken |= errno != EAGAIN && errno != EINTR;
            break;
        }
        bytes_consume(out, (size_t)count);
        connection->queued_before += (uint64_t)count;
    }
    connection->broken |= out->failed;
}

/* (An error of the socket's is the next send's, too.) */
size_t connection_pass(struct Connection *connection, int pipe, size_t count) {
    size_t passed = 0;
    send_bytes(connection, MSG_MORE);
    while (passed < count && connection->out.length == 0 && !connection->broken) {
        ssize_t moved = splice(pipe, NULL, connection->socket.fd, NULL, count - passed, SPLICE_F_NONBLOCK);
        if (moved <= 0) {
            break;
        }
        passed += (size_t)moved;
    }
    connection->queued_before += passed;
    return passed;
}

static void connection_ready(void *owner, uint32_t events) {
    struct Connection *connection = owner;
    if (connection->broken) {
        return;
    }
    if (events & EPOLLIN) {
        receive_bytes(connection);
    } else if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR)) {
        connection->broken = true;
    }
}

static void close_connection(struct Connection *connection) {
    jobs_abandon(connection);
    loop_close(&connection->socket);
    bytes_free(&connection->in);
    bytes_free(&connection->out);
    connection_count--;
    loop_discard(connection);
}

/* True when something changed that jobs wait for: output went away that had held them up, or input was acted on. */
static bool settle_connection(struct Connection *connection) {
    bool held_up = connection->out.length >= BULK_WATER;
    uint64_t sent = connection->queued_before;
    size_t waiting = connection->in.length;
    send_bytes(connection, 0);
    if (!connection->broken) {
        process_input(connection);
    }
    bool acted = connection->in.length != waiting;
    if (!connection->greeted && clock_monotonic_ns() >= connection->hello_deadline) {
        connection->broken = true;
    }
    if (connection->broken) {
        return true;
    }
    uint32_t events = EPOLLRDHUP;
    events |= connection_congested(connection) ? 0 : EPOLLIN;
    events |= connection->out.length > 0 ? EPOLLOUT : 0;
    loop_watch(&connection->socket, events);
    return acted || (held_up && connection->queued_before > sent);
}

bool connections_settle(void) {
    bool again = false;
    for (struct Connection **at = &connections; *at != NULL;) {
        struct Connection *connection = *at;
        again |= settle_connection(connection);
        if (connection->broken) {
            *at = connection->next;
            close_connection(connection);
        } else {
            at = &connection->next;
        }
    }
    return again;
}

uint64_t connections_deadline(void) {
    uint64_t deadline = NEVER;
    for (struct Connection *connection = connections; connection != NULL; connection = connection->next) {
        if (!connection->greeted && connection->hello_deadline < deadline) {
            deadline = connection->hello_deadline;
        }
    }
    return deadline;
}

void connections_remember(void) {
    for (struct Connection *connection = connections; connection != NULL; connection = connection->next) {
        connection->remembered = true;
    }
}

void connections_forget(void) {
    for (struct Connection *connection = connections; connection != NULL; connection = connection->next) {
        connection->remembered = false;
    }
}

void connections_end_remembered(const struct Connection *keep) {
    for (struct Connection *connection = connections; connection != NULL; connection = connection->next) {
        if (connection->remembered && connection != keep) {
            connection->broken = true;
            jobs_abandon(connection);
        }
    }
}

void connection_add(int fd) {
    struct Connection *connection = connection_count < MAX_CONNECTIONS ? calloc(1, sizeof *connection) : NULL;
    if (connection == NULL) {
        close(fd);
        return;
    }
    connection->socket = (struct Watch){.fd = fd, .ready = connection_ready, .owner = connection};
    connection->hello_deadline = clock_monotonic_ns() + HELLO_TIMEOUT_NS;
    connection->next = connections;
    connections = connection;
    connection_count++;
    frame_hello(&connection->out);
}
