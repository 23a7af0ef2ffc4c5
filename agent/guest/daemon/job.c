#include "job.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "guest_limits.h"

static struct Job *jobs;

struct Job *jobs_first(void) { return jobs; }

void jobs_add(struct Job *job) {
    job->next = jobs;
    jobs = job;
}

/* --- ending ------------------------------------------------------------------------------------------------- */

void job_kill(const struct Job *job, int signal) {
    /* Once reaped the number may be somebody else's. Before setsid there is no group, but no grandchild either. */
    if (!job->reaped && kill(-job->pid, signal) != 0) {
        kill(job->pid, signal);
    }
}

/* Nobody waits any more: what still runs is of no use. */
static void detach(struct Job *job, bool answered) {
    void (*finished)(struct Job *, bool) = job->finished;
    job->finished = NULL;
    if (finished != NULL) {
        finished(job, answered);
    }
    if (job->owner != NULL) {
        job->owner->streams--;
        job->owner = NULL;
    }
    job->deadline = job->timeout = job->patience = NEVER;
    job_kill(job, SIGKILL);
    job_close_pipes(job);
}

void job_fault(struct Job *job, const char *code, const char *message) {
    if (job->owner != NULL) {
        connection_fault(job->owner, job->stream, code, "%s", message);
        detach(job, false);
    }
}

void job_reply(struct Job *job, const struct Bytes *body) {
    if (job->owner == NULL) {
        return;
    }
    connection_reply(job->owner, job->stream, body);
    if (job->kind != JOB_BACKGROUND) {
        detach(job, true);
        return;
    }
    job->owner->streams--;
    job->owner = NULL;
    job->deadline = NEVER;
    loop_close(&job->in);
}

void jobs_abandon(const struct Connection *connection) {
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        if (job->owner == connection) {
            detach(job, false);
        }
    }
}

void jobs_abandon_all(void) {
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        detach(job, false);
    }
}

static struct Job *find(const struct Connection *connection, uint32_t stream) {
    struct Job *job = jobs;
    while (job != NULL && (job->owner != connection || job->stream != stream)) {
        job = job->next;
    }
    return job;
}

bool job_receive(struct Connection *connection, const struct Frame *frame) {
    struct Job *job = find(connection, frame->stream);
    if (job == NULL) {
        return true; /* retired: sent before the opener saw the last frame */
    }
    switch (frame->tag) {
    case TAG_DATA:
        return job_take_data(job, frame->data);
    case TAG_END:
        if (job->ended) {
            return false;
        }
        job_take_end(job);
        return true;
    case TAG_CREDIT:
        job->send_credit += frame->amount;
        return job->send_credit <= MAX_CREDIT;
    default:
        job_fault(job, "cancelled", "the request was cancelled");
        return true;
    }
}

void jobs_reap(void) {
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        struct Job *job = jobs;
        while (job != NULL && (job->pid != pid || job->reaped)) {
            job = job->next;
        }
        if (job != NULL) { /* else an orphan that ended up with us */
            job->reaped = true;
            job->status = status;
            job->ended_ns = clock_monotonic_ns();
        }
    }
}

/* --- moving along ------------------------------------------------------------------------------------------- */

static void remove_temporary(const void *argument) {
    unlink(argument);
    _exit(0);
}

/* A killed upload leaves its temporary file; removing it may block, so that is a child's work too. */
static void clean_up(struct Job *job) {
    struct Spawn spawn = {.kind = JOB_CLEANUP, .run = remove_temporary, .argument = job->temporary};
    if (job->temporary != NULL && !job->replied && job_spawn(NULL, NULL, &spawn) == NULL) {
        unlink(job->temporary);
    }
}

static void advance_exec(struct Job *job, uint64_t now) {
    if (job->timeout <= now && !job->reaped && !job->timed_out) {
        job->timed_out = true;
        job->patience = now + KILL_PATIENCE_NS;
        job_kill(job, SIGKILL);
    }
    if (job->reaped && job->kind == JOB_FOREGROUND) {
        if (job->grace == NEVER) {
            job->grace = job->ended_ns + EXIT_GRACE_NS;
        }
        if (job->grace <= now) {
            job_limit_output(job);
        }
    }
    if (job->kind == JOB_BACKGROUND) {
        if (job->control.fd < 0) {
            job_fault(job, "internal", "the process ended before it was started");
        }
        return;
    }
    bool ended = job->reaped && job->out.fd < 0 && job->errors.fd < 0;
    if (ended || job->patience <= now) {
        process_reply(job);
    }
}

static void advance_operation(struct Job *job) {
    if (job->replied && job->out.fd < 0) {
        job_reply(job, &job->result);
    } else if (!job->replied && job->control.fd < 0) {
        job_fault(job, "internal", "the guest's worker for this request died");
    }
}

static void advance(struct Job *job, uint64_t now) {
    if (job->owner == NULL) {
        return;
    }
    if (job->deadline <= now) {
        job_fault(job, "deadline_exceeded", "the request was not done by its deadline");
        return;
    }
    job_send_notice(job);
    if (job->process != NULL) {
        advance_exec(job, now);
    } else {
        advance_operation(job);
    }
}

static bool is_over(const struct Job *job) {
    return job->owner == NULL && job->reaped && job->control.fd < 0 && job->out.fd < 0 && job->errors.fd < 0;
}

static void bury(struct Job *job) {
    clean_up(job);
    job_close_pipes(job);
    bytes_free(&job->result);
    process_free(job->process);
    free(job->ring);
    free(job->temporary);
    loop_discard(job);
}

void jobs_advance(void) {
    uint64_t now = clock_monotonic_ns();
    struct Job *over = NULL;
    for (struct Job **at = &jobs; *at != NULL;) {
        struct Job *job = *at;
        advance(job, now);
        if (is_over(job)) {
            *at = job->next;
            job->next = over;
            over = job;
        } else {
            at = &job->next;
        }
    }
    while (over != NULL) { /* afterwards: burying may add a job to the list */
        struct Job *next = over->next;
        bury(over);
        over = next;
    }
}

void jobs_watch(void) {
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        job_watch(job);
    }
}

static uint64_t earlier(uint64_t left, uint64_t right) { return left < right ? left : right; }

uint64_t jobs_deadline(void) {
    uint64_t deadline = NEVER;
    for (const struct Job *job = jobs; job != NULL; job = job->next) {
        if (job->owner == NULL) {
            continue;
        }
        deadline = earlier(deadline, earlier(job->deadline, job->patience));
        if (!job->timed_out && !job->reaped) {
            deadline = earlier(deadline, job->timeout);
        }
        if (job->out_left == SIZE_MAX && job->errors_left == SIZE_MAX) {
            deadline = earlier(deadline, job->grace);
        }
    }
    return deadline;
}
