/* What goes to a job's child, and the records that come from it. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "attach.h"
#include "child.h"
#include "job.h"
#include "guest_limits.h"

/* --- to the child ------------------------------------------------------------------------------------------- */

static void grant(struct Job *job, size_t count) {
    job->consumed += (uint32_t)count;
    if (job->consumed < CREDIT_STEP || job->owner == NULL) {
        return;
    }
    frame_credit(&job->owner->out, job->stream, job->consumed);
    job->receive_credit += job->consumed;
    job->consumed = 0;
}

static void finish_input(struct Job *job) {
    loop_close(&job->in);
    if (job->kind == JOB_OPERATION && job->control.fd >= 0) {
        const uint8_t commit = RECORD_COMMIT;
        send(job->control.fd, &commit, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
    }
}

/* What the child does not take at once stays; what it will never take counts as taken. Returns the bytes used up. */
static size_t feed(struct Job *job, const uint8_t *data, size_t count) {
    if (job->in.fd < 0) {
        return count;
    }
    ssize_t written = write(job->in.fd, data, count);
    if (written >= 0) { /* (A terminal that is full says 0 or EAGAIN.) */
        return (size_t)written;
    }
    if (errno == EAGAIN || errno == EINTR) {
        return 0;
    }
    loop_close(&job->in);
    return count;
}

size_t job_give(struct Job *job, struct Slice data) {
    if (job->ended) {
        return data.length;
    }
    size_t used = job->input.length == 0 ? feed(job, data.data, data.length) : 0;
    bytes_append(&job->input, data.data + used, data.length - used);
    return used;
}

bool job_take_data(struct Job *job, struct Slice data) {
    if (job->ended || data.length > job->receive_credit) {
        return false;
    }
    job->receive_credit -= (uint32_t)data.length;
    size_t used = job_give(job, data);
    if (job->input.failed) {
        job_fault(job, "internal", "the guest is out of memory");
        return true;
    }
    grant(job, used);
    return true;
}

void job_take_end(struct Job *job) {
    job->ended = true;
    if (job->input.length == 0) {
        finish_input(job);
    }
}

void job_in_ready(void *owner, uint32_t events) {
    (void)events;
    struct Job *job = owner;
    size_t used = feed(job, bytes_front(&job->input), job->input.length);
    if (job->in.fd < 0) {
        used = job->input.length;
    }
    bytes_consume(&job->input, used);
    if (job->ring != NULL) {
        attachments_took(job, used);
    } else {
        grant(job, used);
    }
    if (job->input.length == 0 && job->ended) {
        finish_input(job);
    }
}

/* --- notices ------------------------------------------------------------------------------------------------ */

void job_send_notice(struct Job *job) {
    size_t count = job->notice.length;
    if (count == 0 || job->owner == NULL || job->send_credit < count || connection_congested(job->owner)) {
        return;
    }
    uint8_t header[DATA_HEADER_BYTES];
    frame_data_header(header, job->stream, CHANNEL_NOTICE, (uint32_t)count);
    bytes_append(&job->owner->out, header, sizeof header);
    bytes_append(&job->owner->out, bytes_front(&job->notice), count);
    job->send_credit -= count;
    bytes_consume(&job->notice, count);
    job->announced = true;
}

/* --- records ------------------------------------------------------------------------------------------------ */

static void take_record(struct Job *job, uint8_t *record, size_t count) {
    struct Slice payload = {.data = record + 1, .length = count - 1};
    switch (record[0]) {
    case RECORD_STARTED:
        process_started(job, payload);
        break;
    case RECORD_NOTICE:
        if (job->owner != NULL) {
            bytes_append(&job->notice, payload.data, payload.length);
        }
        break;
    case RECORD_REPLY:
        bytes_append(&job->result, payload.data, payload.length);
        job->replied = true;
        break;
    case RECORD_FAULT:
        record[count] = '\0';
        job_fault(job, (const char *)payload.data,
                  (const char *)payload.data + strnlen((const char *)payload.data, payload.length - 1) + 1);
        break;
    case RECORD_TEMPORARY:
        free(job->temporary);
        job->temporary = slice_string(payload);
        break;
    default:
        break;
    }
}

void job_control_ready(void *owner, uint32_t events) {
    (void)events;
    struct Job *job = owner;
    static uint8_t record[MAX_RECORD_BYTES + 1];
    ssize_t count = recv(job->control.fd, record, MAX_RECORD_BYTES, MSG_DONTWAIT);
    if (count > 0) {
        take_record(job, record, (size_t)count);
    } else if (count == 0 || (errno != EAGAIN && errno != EINTR && errno != ECONNRESET)) {
        /* (ECONNRESET: it ended without reading our COMMIT; what it sent is still to come.) */
        loop_close(&job->control);
        job->announced |= job->process != NULL; /* died before it could start: its output still counts */
    }
}

/* --- interest ----------------------------------------------------------------------------------------------- */

void job_watch(struct Job *job) {
    loop_watch(&job->out, job_may_read(job, job->out_left) ? EPOLLIN : 0);
    loop_watch(&job->errors, job_may_read(job, job->errors_left) ? EPOLLIN : 0);
    loop_watch(&job->in, job->input.length > 0 ? EPOLLOUT : 0);
    loop_watch(&job->control, job->notice.length == 0 ? EPOLLIN : 0);
}

/* The control socket stays until its end: a RECORD_TEMPORARY may still be in it. */
void job_close_pipes(struct Job *job) {
    loop_close(&job->in);
    loop_close(&job->out);
    loop_close(&job->errors);
    bytes_free(&job->input);
    bytes_free(&job->notice);
}
