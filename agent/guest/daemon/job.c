#include "job.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "child.h"
#include "guest_limits.h"

static struct Job *jobs;
static int null_fd = -1;

struct Job *jobs_first(void) { return jobs; }

bool jobs_open(void) {
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    return null_fd >= 0;
}

/* --- starting ----------------------------------------------------------------------------------------------- */

static const char *refusal(enum JobKind kind) {
    static const unsigned limits[] = {
        [JOB_FOREGROUND] = MAX_FOREGROUND,
        [JOB_BACKGROUND] = MAX_BACKGROUND,
        [JOB_OPERATION] = MAX_OPERATIONS,
        [JOB_CLEANUP] = MAX_OPERATIONS,
    };
    unsigned running = 0;
    for (const struct Job *job = jobs; job != NULL; job = job->next) {
        running += job->kind == kind;
    }
    if (running < limits[kind]) {
        return NULL;
    }
    return kind == JOB_FOREGROUND || kind == JOB_BACKGROUND ? "too_many_processes" : "busy";
}

/* `ends[0]` is the parent's, `ends[1]` the child's. A pipe the spawn does not ask for is /dev/null for the child. */
struct Ends {
    int in[2];
    int out[2];
    int errors[2];
    int control[2];
};

static bool make_pipe(int ends[2], bool wanted, int parent_side) {
    int made[2];
    ends[0] = -1;
    ends[1] = null_fd;
    if (!wanted) {
        return true;
    }
    if (pipe2(made, O_CLOEXEC) != 0) {
        return false;
    }
    ends[0] = made[parent_side];
    ends[1] = made[1 - parent_side];
    return fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0;
}

static void close_end(int fd) {
    if (fd >= 0 && fd != null_fd) {
        close(fd);
    }
}

static void close_ends(const struct Ends *ends, int side) {
    close_end(ends->in[side]);
    close_end(ends->out[side]);
    close_end(ends->errors[side]);
    close_end(ends->control[side]);
}

static pid_t start_child(const struct Spawn *spawn, struct Ends *ends) {
    *ends = (struct Ends){{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}};
    pid_t pid = -1;
    if (make_pipe(ends->in, spawn->input, 1) && make_pipe(ends->out, spawn->output, 0) &&
        make_pipe(ends->errors, spawn->errors, 0) &&
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends->control) == 0) {
        fflush(NULL);
        pid = fork();
    }
    if (pid == 0) {
        const int fds[4] = {ends->in[1], ends->out[1], ends->errors[1], ends->control[1]};
        child_enter(fds);
        spawn->run(spawn->argument);
        _exit(1);
    }
    close_ends(ends, 1);
    if (pid < 0) {
        close_ends(ends, 0);
    }
    return pid;
}

static void attach(struct Job *job, const struct Ends *ends) {
    job->in = (struct Watch){.fd = ends->in[0], .ready = job_in_ready, .owner = job};
    job->out = (struct Watch){.fd = ends->out[0], .ready = job_out_ready, .owner = job};
    job->errors = (struct Watch){.fd = ends->errors[0], .ready = job_errors_ready, .owner = job};
    job->control = (struct Watch){.fd = ends->control[0], .ready = job_control_ready, .owner = job};
    job->next = jobs;
    jobs = job;
}

static struct Job *new_job(struct Connection *owner, const struct Frame *open, enum JobKind kind) {
    struct Job *job = calloc(1, sizeof *job);
    if (job == NULL) {
        return NULL;
    }
    if (kind == JOB_BACKGROUND && (job->ring = malloc(sizeof *job->ring + RING_BYTES)) == NULL) {
        free(job);
        return NULL;
    }
    if (job->ring != NULL) {
        job->ring->total = 0;
    }
    job->kind = kind;
    job->owner = owner;
    job->started_ns = clock_monotonic_ns();
    job->out_left = job->errors_left = SIZE_MAX;
    job->receive_credit = INITIAL_CREDIT;
    job->deadline = job->timeout = job->grace = job->patience = NEVER;
    if (owner != NULL) {
        job->stream = open->stream;
        job->send_credit = owner->initial_credit;
        if (open->timeout_ms > 0) {
            job->deadline = job->started_ns + open->timeout_ms * 1000000ULL;
        }
    }
    return job;
}

struct Job *job_spawn(struct Connection *owner, const struct Frame *open, const struct Spawn *spawn) {
    const char *refused = refusal(spawn->kind);
    if (refused != NULL) {
        if (owner != NULL) {
            connection_fault(owner, open->stream, refused, "the sandbox is at its limit of these; wait for one to end");
        }
        return NULL;
    }
    struct Ends ends;
    struct Job *job = new_job(owner, open, spawn->kind);
    pid_t pid = job != NULL ? start_child(spawn, &ends) : -1;
    if (pid < 0) {
        if (owner != NULL) {
            connection_fault(owner, open->stream, "busy", "the guest cannot start a process: %s", strerror(errno));
        }
        if (job != NULL) {
            free(job->ring);
        }
        free(job);
        return NULL;
    }
    job->pid = pid;
    attach(job, &ends);
    if (owner != NULL) {
        owner->streams++;
    }
    return job;
}

/* --- ending ------------------------------------------------------------------------------------------------- */

void job_kill(const struct Job *job, int signal) {
    /* Once reaped the number may be somebody else's. Before setsid there is no group, but no grandchild either. */
    if (!job->reaped && kill(-job->pid, signal) != 0) {
        kill(job->pid, signal);
    }
}

/* Nobody waits any more: what still runs is of no use. */
static void detach(struct Job *job) {
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
        detach(job);
    }
}

void job_reply(struct Job *job, const struct Bytes *body) {
    if (job->owner == NULL) {
        return;
    }
    connection_reply(job->owner, job->stream, body);
    if (job->kind != JOB_BACKGROUND) {
        detach(job);
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
            detach(job);
        }
    }
}

void jobs_abandon_all(void) {
    for (struct Job *job = jobs; job != NULL; job = job->next) {
        detach(job);
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
