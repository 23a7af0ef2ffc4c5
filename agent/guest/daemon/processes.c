/* processes.signal, resize and attach: what is done to a process that somebody names. */
#include <signal.h>
#include <stdio.h>
#include <sys/ioctl.h>

#include "attach.h"
#include "fields.h"
#include "guest_limits.h"
#include "methods.h"
#include "pack.h"
#include "process.h"
#include "ring.h"
#include "unpack.h"

/* --- finding one -------------------------------------------------------------------------------------------- */

/* A pid or a tag. */
struct Name {
    struct Slice tag; /* absent: data is NULL */
    int64_t pid;
};

static bool read_name(struct Slice value, struct Name *name, char *error) {
    struct Reader reader = {.at = value.data, .end = value.data + value.length};
    *name = (struct Name){.pid = 0};
    if (unpack_kind(&reader) == KIND_STRING && unpack_string(&reader, &name->tag)) {
        return true;
    }
    if (unpack_integer(&reader, 1, INT32_MAX, &name->pid)) {
        return true;
    }
    snprintf(error, FIELD_ERROR_BYTES, "process must be a pid or a tag");
    return false;
}

static bool is_named(const struct Job *job, const struct Name *name) {
    if (name->tag.data == NULL) {
        return job->pid == name->pid;
    }
    return job->process->tag != NULL && !slice_has_nul(name->tag) && slice_is(name->tag, job->process->tag);
}

static struct Job *find_alive(const struct Name *name) {
    struct Job *job = jobs_first();
    while (job != NULL && !(process_is_alive(job) && is_named(job, name))) {
        job = job->next;
    }
    return job;
}

struct Job *process_with_tag(struct Slice tag) {
    const struct Name name = {.tag = tag};
    return find_alive(&name);
}

/* The last one, as pids and tags come again. */
static struct Job *find_ended(const struct Name *name) {
    struct Job *last = NULL;
    for (struct Job *job = jobs_first(); job != NULL; job = job->next) {
        bool kept = job->ring != NULL && job->reaped && !job->forgotten;
        if (kept && is_named(job, name) && (last == NULL || job->ended_ns > last->ended_ns)) {
            last = job;
        }
    }
    return last;
}

/* Answers with a FAULT itself and returns false when the body is wrong. */
static bool read_body(struct Connection *connection, const struct Frame *open, const struct Field *fields, size_t count,
                      const struct Slice *which, struct Name *name) {
    char error[FIELD_ERROR_BYTES];
    if (fields_read(open->body, fields, count, error) && read_name(*which, name, error)) {
        return true;
    }
    connection_fault(connection, open->stream, "invalid_argument", "%s", error);
    return false;
}

static void reply_nothing(struct Connection *connection, const struct Frame *open) {
    struct Bytes body = {0};
    pack_map(&body, 0);
    connection_reply(connection, open->stream, &body);
    bytes_free(&body);
}

/* --- the methods -------------------------------------------------------------------------------------------- */

void processes_signal_open(struct Connection *connection, const struct Frame *open) {
    struct Name name;
    struct Slice which = {0};
    struct Integer number = {0};
    const struct Field fields[] = {
        {.name = "process", .type = FIELD_ANY, .target = &which, .required = true},
        {.name = "signal", .type = FIELD_INTEGER, .target = &number, .required = true, .low = 1, .high = 64},
    };
    if (!read_body(connection, open, fields, sizeof fields / sizeof *fields, &which, &name)) {
        return;
    }
    struct Job *job = find_alive(&name);
    if (job == NULL) {
        connection_fault(connection, open->stream, "not_found", "no such process is running");
        return;
    }
    if (number.value == SIGKILL) {
        job_end(job);
    } else {
        job_kill(job, (int)number.value);
    }
    reply_nothing(connection, open);
}

static struct Field size_field(struct Integer *target, const char *name) {
    return (struct Field){
        .name = name, .type = FIELD_INTEGER, .target = target, .required = true, .low = 1, .high = MAX_TERMINAL_CELLS};
}

bool process_read_size(struct Slice body, struct winsize *size, char *error) {
    struct Integer columns = {0};
    struct Integer rows = {0};
    const struct Field fields[] = {size_field(&columns, "cols"), size_field(&rows, "rows")};
    if (!fields_read(body, fields, sizeof fields / sizeof *fields, error)) {
        return false;
    }
    *size = (struct winsize){.ws_col = (unsigned short)columns.value, .ws_row = (unsigned short)rows.value};
    return true;
}

void processes_resize_open(struct Connection *connection, const struct Frame *open) {
    struct Name name;
    struct Slice which = {0};
    struct Integer columns = {0};
    struct Integer rows = {0};
    const struct Field fields[] = {
        {.name = "process", .type = FIELD_ANY, .target = &which, .required = true},
        size_field(&columns, "cols"),
        size_field(&rows, "rows"),
    };
    if (!read_body(connection, open, fields, sizeof fields / sizeof *fields, &which, &name)) {
        return;
    }
    struct Job *job = find_alive(&name);
    if (job == NULL) {
        connection_fault(connection, open->stream, "not_found", "no such process is running");
        return;
    }
    if (!job->terminal) {
        connection_fault(connection, open->stream, "invalid_argument", "the process has no terminal");
        return;
    }
    const struct winsize size = {.ws_col = (unsigned short)columns.value, .ws_row = (unsigned short)rows.value};
    ioctl(job->out.fd >= 0 ? job->out.fd : job->in.fd, TIOCSWINSZ, &size); /* (closed: nobody has it open) */
    reply_nothing(connection, open);
}

static void announce(struct Attachment *attachment, uint64_t asked) {
    const struct Job *job = attachment->job;
    struct Bytes *notice = &attachment->notice;
    process_pack_identity(notice, job, 5);
    pack_string(notice, "pty");
    pack_bool(notice, job->terminal);
    pack_string(notice, "offset");
    pack_integer(notice, (int64_t)attachment->position);
    pack_string(notice, "skipped");
    pack_integer(notice, (int64_t)(attachment->position - asked));
    pack_string(notice, "replay");
    pack_integer(notice, (int64_t)(job->ring->total - attachment->position));
    pack_string(notice, "ended");
    pack_bool(notice, job->complete);
}

static void attach(struct Connection *connection, const struct Frame *open, struct Job *job, bool observe,
                   const struct Integer *offset) {
    uint64_t oldest = ring_oldest(job->ring);
    uint64_t asked = offset->present ? (uint64_t)offset->value : oldest; /* who does not say misses nothing */
    if (asked > job->ring->total) {
        connection_fault(connection, open->stream, "invalid_argument",
                         "offset is beyond the %llu bytes that the process has printed",
                         (unsigned long long)job->ring->total);
        return;
    }
    struct Attachment *attachment = attachment_add(job, connection, open, observe, asked > oldest ? asked : oldest);
    if (attachment == NULL) {
        connection_fault(connection, open->stream, "internal", "the guest is out of memory");
        return;
    }
    announce(attachment, asked);
}

void processes_attach_open(struct Connection *connection, const struct Frame *open) {
    struct Name name;
    struct Slice which = {0};
    struct Integer offset = {0};
    bool observe = false;
    const struct Field fields[] = {
        {.name = "process", .type = FIELD_ANY, .target = &which, .required = true},
        {.name = "offset", .type = FIELD_INTEGER, .target = &offset, .low = 0, .high = INT64_MAX},
        {.name = "observe", .type = FIELD_BOOL, .target = &observe},
    };
    if (!read_body(connection, open, fields, sizeof fields / sizeof *fields, &which, &name)) {
        return;
    }
    struct Job *job = find_alive(&name);
    job = job != NULL ? job : find_ended(&name);
    if (job == NULL || job->forgotten) {
        connection_fault(connection, open->stream, "not_found", "there is no such process, or its end is forgotten");
        return;
    }
    if (job->ring == NULL) {
        connection_fault(connection, open->stream, "invalid_argument", "the process was not started with detach, background or pty");
        return;
    }
    attach(connection, open, job, observe, &offset);
}
