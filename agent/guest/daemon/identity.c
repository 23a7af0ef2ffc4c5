#include "identity.h"

#include <string.h>
#include <sys/stat.h>

#include "child.h"
#include "fields.h"
#include "job.h"
#include "pack.h"
#include "replace.h"
#include "settle.h"

#define DBUS_MACHINE_ID "/var/lib/dbus/machine-id"

/* An empty one is unknown: no part is that short. */
static struct Bytes written[IDENTITY_PARTS];
static struct Bytes writing[IDENTITY_PARTS]; /* becomes `written` when `writer` has done it */
static const struct Job *writer;

/* --- in the child ------------------------------------------------------------------------------------------- */

/* What could not be written: told, and no reason to leave a guest frozen whose disk is full. */
static struct Bytes failures;
static size_t failure_count;

static void replace(const char *path, const struct Bytes *content) {
    if (!replace_file(path, content)) {
        pack_string(&failures, path);
        failure_count++;
    }
}

static void write_line(const char *path, struct Slice text) {
    struct Bytes content = {0};
    bytes_append(&content, text.data, text.length);
    bytes_append(&content, "\n", 1);
    replace(path, &content);
}

static void write_machine_id(struct Slice machine_id) {
    struct stat status;
    write_line("/etc/machine-id", machine_id);
    if (is_regular(DBUS_MACHINE_ID, &status)) { /* mostly a link to the other, or not there */
        write_line(DBUS_MACHINE_ID, machine_id);
    }
}

static void write_dns(struct Slice dns) {
    struct Bytes content = {0};
    struct StringWalk walk = strings_walk(dns);
    for (struct Slice server; walk_next(&walk, &server);) {
        bytes_append(&content, "nameserver ", 11);
        bytes_append(&content, server.data, server.length);
        bytes_append(&content, "\n", 1);
    }
    replace("/etc/resolv.conf", &content);
}

static void run(const void *argument) {
    const struct Slice *parts = ((const struct Identity *)argument)->parts;
    struct Bytes body = {0};
    if (parts[IDENTITY_HOSTNAME].data != NULL) {
        write_line("/etc/hostname", parts[IDENTITY_HOSTNAME]);
    }
    if (parts[IDENTITY_MACHINE_ID].data != NULL) {
        write_machine_id(parts[IDENTITY_MACHINE_ID]);
    }
    if (parts[IDENTITY_DNS].data != NULL) {
        write_dns(parts[IDENTITY_DNS]);
    }
    pack_map(&body, failure_count > 0);
    if (failure_count > 0) {
        pack_string(&body, "failed");
        pack_array(&body, failure_count);
        bytes_append(&body, failures.data, failures.length);
    }
    worker_reply(&body);
}

/* --- in the loop -------------------------------------------------------------------------------------------- */

static void forget(struct Bytes *part) {
    bytes_free(part);
    *part = (struct Bytes){0}; /* also that there was no memory once */
}

bool identity_reduce(struct Identity *identity) {
    bool left = false;
    for (size_t i = 0; i < IDENTITY_PARTS; i++) {
        struct Slice *part = &identity->parts[i];
        struct Slice known = bytes_slice(&written[i]);
        if (known.length > 0 && known.length == part->length && memcmp(known.data, part->data, part->length) == 0) {
            *part = (struct Slice){.data = NULL};
        }
        left |= part->data != NULL;
    }
    return left;
}

/* Whether a child may still write, also one that was killed while the disk did not answer. (A settle that is under way
 * counts as well: to remember too little costs a child, no more.) */
static bool is_written_now(void) {
    for (const struct Job *job = jobs_first(); job != NULL; job = job->next) {
        if (job->kind == JOB_SYSTEM && !job->reaped && !job->replied) {
            return true;
        }
    }
    return false;
}

static bool is_empty_map(const struct Bytes *body) { return body->length == 1 && *bytes_front(body) == 0x80; }

static void finished(struct Job *job, bool answered) {
    if (job == writer) {
        writer = NULL;
        for (size_t i = 0; i < IDENTITY_PARTS && answered && is_empty_map(&job->result); i++) {
            if (writing[i].length > 0) {
                forget(&written[i]);
                written[i] = writing[i];
                writing[i] = (struct Bytes){0};
            }
        }
    }
    if (answered) {
        settle_resume(job->owner);
    }
}

void identity_write(struct Connection *connection, const struct Frame *open, const struct Identity *identity) {
    bool alone = !is_written_now(); /* of two at once nobody knows who is last */
    const struct Spawn spawn = {.kind = JOB_SYSTEM, .finished = finished, .run = run, .argument = identity};
    const struct Job *job = job_spawn(connection, open, &spawn);
    writer = alone ? job : NULL;
    for (size_t i = 0; i < IDENTITY_PARTS; i++) {
        const struct Slice *part = &identity->parts[i];
        forget(&writing[i]);
        if (part->data != NULL) {
            forget(&written[i]); /* given up half-way, it may be either */
            bytes_append(&writing[i], part->data, part->length);
        }
    }
}
