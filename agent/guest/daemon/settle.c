#include "settle.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <unistd.h>

#include "child.h"
#include "fields.h"
#include "freezer.h"
#include "guest_limits.h"
#include "job.h"
#include "pack.h"

static struct Job *worker; /* of the settle that is under way */
static uint64_t thaw_at = NEVER;
static uint64_t thaw_after_ns;

/* --- in the child ------------------------------------------------------------------------------------------- */

struct Settle {
    bool freezing;
    uint64_t began;
    uint64_t freeze_deadline;
    uint64_t deadline;
};

/* sync(2) cannot be given up, so that somebody else has to wait for it. Killed, it still ends when the disk answers. */
static bool sync_until(uint64_t deadline) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return false;
    }
    pid_t pid = fork();
    if (pid == 0) {
        for (int fd = 0; fd <= CONTROL_FD; fd++) { /* the loop must not wait for these */
            close(fd);
        }
        sync();
        (void)!write(ends[1], "", 1);
        _exit(0);
    }
    close(ends[1]);
    uint8_t done;
    if (pid > 0 && worker_wait(ends[0], POLLIN, deadline) && read(ends[0], &done, 1) == 1) {
        return true;
    }
    if (pid > 0) {
        kill(pid, SIGKILL);
    }
    return false;
}

static void run(const void *argument) {
    const struct Settle *settle = argument;
    struct Bytes body = {0};
    bool frozen = settle->freezing && freezer_wait(EXTRA_FD, settle->freeze_deadline);
    bool synced = sync_until(settle->deadline);
    if (settle->freezing && !frozen) {
        frozen = freezer_wait(EXTRA_FD, 0); /* meanwhile, perhaps */
    }
    pack_map(&body, 3);
    pack_string(&body, "frozen");
    pack_bool(&body, frozen);
    pack_string(&body, "synced");
    pack_bool(&body, synced);
    pack_string(&body, "duration_ms");
    pack_integer(&body, (int64_t)((clock_monotonic_ns() - settle->began) / 1000000));
    worker_reply(&body);
}

/* --- in the loop -------------------------------------------------------------------------------------------- */

static void settle_finished(struct Job *job, bool answered) {
    if (worker != job) {
        return; /* settle_end has seen to it */
    }
    worker = NULL;
    if (!answered) {
        settle_end();
        return;
    }
    thaw_at = clock_monotonic_ns() + thaw_after_ns;
    connections_remember();
}

void settle_open(struct Connection *connection, const struct Frame *open) {
    struct Integer timeout_ms = {.value = SETTLE_TIMEOUT_MS};
    struct Integer thaw_after_ms = {.value = SETTLE_THAW_AFTER_MS};
    char error[FIELD_ERROR_BYTES];
    const struct Field fields[] = {
        {.name = "timeout_ms", .type = FIELD_INTEGER, .target = &timeout_ms, .low = 1, .high = 60000},
        {.name = "thaw_after_ms", .type = FIELD_INTEGER, .target = &thaw_after_ms, .low = 1, .high = 600000},
    };
    if (!fields_read(open->body, fields, sizeof fields / sizeof *fields, error)) {
        connection_fault(connection, open->stream, "invalid_argument", "%s", error);
        return;
    }
    if (worker != NULL) {
        connection_fault(connection, open->stream, "conflict", "the sandbox is being settled already");
        return;
    }
    /* By the loop itself: a child that is killed too late would freeze what has just been thawed. */
    struct Settle settle = {.freezing = freezer_freeze(), .began = clock_monotonic_ns()};
    settle.deadline = settle.began + (uint64_t)timeout_ms.value * 1000000;
    settle.freeze_deadline = settle.began + (uint64_t)timeout_ms.value * 500000;
    const struct Spawn spawn = {.kind = JOB_SYSTEM,
                                .extra = freezer_events(),
                                .finished = settle_finished,
                                .run = run,
                                .argument = &settle};
    worker = job_spawn(connection, open, &spawn);
    if (worker == NULL) {
        settle_end();
        return;
    }
    thaw_after_ns = (uint64_t)thaw_after_ms.value * 1000000;
    thaw_at = settle.deadline + thaw_after_ns; /* counted anew from the reply */
}

void thaw_open(struct Connection *connection, const struct Frame *open) {
    struct Bytes body = {0};
    settle_end();
    pack_map(&body, 0);
    connection_reply(connection, open->stream, &body);
    bytes_free(&body);
}

void settle_end(void) {
    struct Job *under_way = worker;
    worker = NULL;
    thaw_at = NEVER;
    freezer_thaw();
    connections_forget();
    if (under_way != NULL) {
        job_fault(under_way, "cancelled", "the sandbox was thawed before it was settled");
    }
}

void settle_resume(const struct Connection *current) {
    connections_end_remembered(current);
    settle_end();
}

void settle_advance(void) {
    if (thaw_at <= clock_monotonic_ns()) {
        printf("capsule-guest: settled for too long, going on\n");
        settle_end();
    }
}

uint64_t settle_deadline(void) { return thaw_at; }
