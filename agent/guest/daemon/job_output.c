/* What a job's child prints: to its stream at once, or into its ring, from where its attachments take it. */
#include <errno.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include "attach.h"
#include "guest_limits.h"
#include "job.h"
#include "ring.h"

/* Reads a turn of one terminal, which hands out 4 KiB at most. */
#define TERMINAL_READS 16

static bool would_block(ssize_t count) { return count < 0 && (errno == EAGAIN || errno == EINTR); }

/* --- into the ring ------------------------------------------------------------------------------------------ */

/* What grandchildren print after the end is nobody's, but must not block them. */
static void discard(struct Watch *watch) {
    uint8_t buffer[16 * KIB];
    ssize_t count = read(watch->fd, buffer, sizeof buffer);
    if (count <= 0 && !would_block(count)) {
        loop_close(watch);
    }
}

static void pull(struct Job *job, struct Watch *watch, enum Channel channel, size_t *left) {
    if (*left == 0) {
        discard(watch);
        return;
    }
    for (int reads = 0; reads < TERMINAL_READS && watch->fd >= 0; reads++) {
        size_t room = attachments_room(job);
        size_t most = *left < room ? *left : room;
        if (most == 0) {
            return;
        }
        ssize_t count = ring_read(job->ring, watch->fd, most, channel);
        if (would_block(count)) {
            *left = job->terminal && *left != SIZE_MAX ? 0 : *left; /* that was the rest */
            return;
        }
        if (count <= 0) { /* (EIO: nobody has the terminal open any more) */
            loop_close(watch);
            return;
        }
        if (*left != SIZE_MAX) {
            *left -= (size_t)count;
        }
        if (!job->terminal) {
            return;
        }
    }
}

/* --- to the stream ------------------------------------------------------------------------------------------ */

static size_t allowance(const struct Job *job) {
    if (job->owner == NULL || !job->announced || job->notice.length > 0) {
        return 0;
    }
    size_t allowed = connection_allowance(job->owner, job->sent_end);
    return job->send_credit < allowed ? (size_t)job->send_credit : allowed;
}

/* How much a pipe holds. */
static size_t held(int fd) {
    int waiting = 0;
    return ioctl(fd, FIONREAD, &waiting) == 0 && waiting > 0 ? (size_t)waiting : 0;
}

/* A frame of `count` bytes that are in the pipe: past the daemon's memory as far as the socket takes them, then through
 * the connection's output. */
static void pass(struct Job *job, int pipe, enum Channel channel, size_t count) {
    struct Connection *connection = job->owner;
    uint8_t header[DATA_HEADER_BYTES];
    frame_data_header(header, job->stream, channel, (uint32_t)count);
    bytes_append(&connection->out, header, sizeof header);
    size_t left = count - connection_pass(connection, pipe, count);
    while (left > 0 && bytes_reserve(&connection->out, left)) {
        ssize_t got = read(pipe, bytes_tail(&connection->out), left);
        if (got < 0 && errno != EAGAIN) { /* (a file's page that cannot be read after all) */
            connection->broken = true;
            return;
        }
        if (got <= 0) { /* (somebody else reads the process's pipe, too, and took what was promised) */
            memset(bytes_tail(&connection->out), 0, left);
            got = (ssize_t)left;
        }
        connection->out.length += (size_t)got;
        left -= (size_t)got;
    }
}

/* One DATA frame, read from the pipe straight into the connection's output; the number of bytes. */
static ssize_t copy(struct Job *job, int pipe, enum Channel channel, size_t most) {
    struct Bytes *out = &job->owner->out;
    if (!bytes_reserve(out, DATA_HEADER_BYTES + most)) {
        errno = EAGAIN;
        return -1;
    }
    uint8_t *header = bytes_tail(out);
    ssize_t count = read(pipe, header + DATA_HEADER_BYTES, most);
    if (count > 0) {
        frame_data_header(header, job->stream, channel, (uint32_t)count);
        out->length += DATA_HEADER_BYTES + (size_t)count;
    }
    return count;
}

/* One DATA frame; the number of bytes. */
static size_t forward(struct Job *job, struct Watch *watch, enum Channel channel, size_t *left) {
    size_t most = allowance(job);
    most = *left < most ? *left : most;
    if (most == 0 || watch->fd < 0) {
        return 0;
    }
    size_t whole = job->owner->out.length == 0 && most >= SPLICE_BYTES ? held(watch->fd) : 0;
    ssize_t count = (ssize_t)(whole < most ? whole : most);
    if (count >= SPLICE_BYTES) {
        pass(job, watch->fd, channel, (size_t)count);
    } else {
        count = copy(job, watch->fd, channel, most);
    }
    if (would_block(count)) {
        return 0;
    }
    if (count <= 0) {
        loop_close(watch);
        return 0;
    }
    job->send_credit -= (uint64_t)count;
    job->sent_end = connection_queued(job->owner);
    if (*left != SIZE_MAX && (*left -= (size_t)count) == 0) {
        loop_close(watch);
    }
    return (size_t)count;
}

/* Only noted: who may send first is decided when all that are ready are known. */
void job_out_ready(void *owner, uint32_t events) {
    (void)events;
    ((struct Job *)owner)->out_ready = true;
}

void job_errors_ready(void *owner, uint32_t events) {
    (void)events;
    ((struct Job *)owner)->errors_ready = true;
}

bool job_may_read(const struct Job *job, size_t left) {
    if (job->ring != NULL) {
        return left == 0 || attachments_room(job) > 0;
    }
    return allowance(job) > 0;
}

bool job_flow(struct Job *job) {
    bool out = job->out_ready && job->out.fd >= 0;
    bool errors = job->errors_ready && job->errors.fd >= 0;
    size_t sent = 0;
    job->out_ready = job->errors_ready = false;
    if (job->ring != NULL) {
        if (out) {
            pull(job, &job->out, CHANNEL_STDOUT, &job->out_left);
        }
        if (errors) {
            pull(job, &job->errors, CHANNEL_STDERR, &job->errors_left);
        }
        return attachments_flow(job);
    }
    if (out) {
        enum Channel channel = job->process != NULL ? CHANNEL_STDOUT : CHANNEL_CONTENT;
        sent += forward(job, &job->out, channel, &job->out_left);
    }
    if (errors) {
        sent += forward(job, &job->errors, CHANNEL_STDERR, &job->errors_left);
    }
    return sent >= LIGHT_BYTES;
}

/* --- the rest ----------------------------------------------------------------------------------------------- */

/* A terminal does not say how much it holds, but that it is empty. */
static void limit_terminal(struct Job *job) {
    if (job->out_left == SIZE_MAX) {
        job->out_left = TERMINAL_REST_BYTES;
    }
    if (job->out.fd >= 0 && job->out_left > 0) {
        pull(job, &job->out, CHANNEL_STDOUT, &job->out_left);
    }
}

static void limit(const struct Job *job, struct Watch *watch, size_t *left) {
    if (watch->fd < 0 || *left != SIZE_MAX) {
        return;
    }
    *left = held(watch->fd);
    if (*left == 0 && job->ring == NULL) {
        loop_close(watch);
    }
}

void job_limit_output(struct Job *job) {
    if (job->terminal) {
        limit_terminal(job);
        return;
    }
    limit(job, &job->out, &job->out_left);
    limit(job, &job->errors, &job->errors_left);
}

bool job_output_done(const struct Job *job) {
    return (job->out.fd < 0 || job->out_left == 0) && (job->errors.fd < 0 || job->errors_left == 0);
}
