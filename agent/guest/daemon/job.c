#include "job.h"

#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include "attach.h"
#include "guest_limits.h"
#include "ring.h"
#include "terminal.h"

static struct Job *jobs;

struct Job *jobs_first(void) { return jobs; }

/* At the end: who goes through the list and has one added by what it does there meets it later. */
void jobs_add(struct Job *job) {
    struct Job **at = &jobs;
    while (*at != NULL) {
        at = &(*at)->next;
    }
    job->next = NULL;
    *at = job;
}

/* --- ending ------------------------------------------------------------------------------------------------- */

void job_kill(const struct Job *job, int signal) {
    /* Once reaped the number may be somebody else's. Before setsid there is no group, but no grandchild either. */
    if (!job->reaped && kill(-job->pid, signal) != 0) {
        kill(job->pid, signal);
    }
}

/* Those of a terminal may be in groups of their own (job control), and ignore its hang-up. */
void job_end(const struct Job *job) {
    const struct Spawn spawn = {.kind = JOB_CLEANUP, .run = terminal_kill_session, .argument = &job->pid};
    job_kill(job, SIGKILL);
    if (job->terminal && !job->reaped) {
        job_spawn(NULL, NULL, &spawn);
    }
}

/* Nobody waits any more: what still runs is of no use. */
static void abandon(struct Job *job, bool answered) {
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
    bool waited = job->owner != NULL || job->attachments != NULL;
    if (job->owner != NULL) {
        connection_fault(job->owner, job->stream, code, "%s", message);
    }
    attachments_fault(job, code, message);
    if (waited || job->ring != NULL) {
        job->forgotten = true;
        abandon(job, false);
    }
}

void job_reply(struct Job *job, const struct Bytes *body) {
    if (job->owner == NULL) {
        return;
    }
    connection_reply(job->owner, job->stream, body);
    if (job->kind != JOB_LASTING) {
        abandon(job, true);
        return;
    }
    job->owner->streams--;
    job->owner = NULL;
    job->deadline = NEVER;
}

void jobs_abandon(const struct Connection *connection) {
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        if (job->owner == connection) {
            job->forgotten = true;
            abandon(job, false);
        }
    }
    attachments_abandon(connection);
}

void jobs_abandon_all(void) {
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        abandon(job, false);
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
    bool kept = true;
    if (job == NULL) {
        attachments_receive(connection, frame, &kept);
        return kept; /* (neither: retired, sent before the opener saw the last frame) */
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

bool job_is_spent(const struct Job *job) {
    return job->owner == NULL && job->reaped && job->control.fd < 0 && job->out.fd < 0 && job->errors.fd < 0;
}

/* Of one that lasted: somebody may still want to know how it ended, or is being told. */
static bool is_kept(const struct Job *job, uint64_t now) {
    return job->ring != NULL && !job->forgotten &&
           (job->attachments != NULL || job->ended_ns + KEEP_ENDED_NS > now);
}

/* One of those that are too many; false when none is. */
static bool forget_oldest(void) {
    unsigned kept = 0;
    struct Job *oldest = NULL;
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        if (job->ring != NULL && !job->forgotten && job_is_spent(job)) {
            kept++;
            oldest = job->attachments == NULL && (oldest == NULL || job->ended_ns < oldest->ended_ns) ? job : oldest;
        }
    }
    if (kept <= MAX_ENDED || oldest == NULL) {
        return false;
    }
    return oldest->forgotten = true;
}

static void bury(struct Job *job) {
    clean_up(job);
    job_close_pipes(job);
    bytes_free(&job->result);
    process_free(job->process);
    ring_free(job->ring);
    free(job->temporary);
    loop_discard(job);
}

void jobs_advance(void) {
    uint64_t now = clock_monotonic_ns();
    struct Job *over = NULL;
    while (forget_oldest()) {
    }
    for (struct Job **at = &jobs; *at != NULL;) {
        struct Job *job = *at;
        job_advance(job, now);
        if (job_is_spent(job) && !is_kept(job, now)) {
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

void jobs_flow(void) {
    struct Job *served = NULL;
    struct Job **end = &served;
    struct Job **at = &jobs;
    while (*at != NULL) {
        struct Job *job = *at;
        if (job_flow(job)) { /* next time after the others: so who says little is always first */
            *at = job->next;
            job->next = NULL;
            *end = job;
            end = &job->next;
        } else {
            at = &job->next;
        }
    }
    *at = served;
}

void jobs_watch(void) {
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        job_watch(job);
    }
}

uint64_t jobs_deadline(void) {
    uint64_t deadline = NEVER;
    for (const struct Job *job = jobs; job != NULL; job = job->next) {
        uint64_t next = job_deadline(job);
        deadline = next < deadline ? next : deadline;
    }
    return deadline;
}
