/* Starting a job: limits, pipes, fork. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#include "child.h"
#include "freezer.h"
#include "guest_limits.h"
#include "job.h"
#include "ring.h"
#include "terminal.h"

static int null_fd = -1;
static struct rlimit inherited; /* what children get: programs that use select() break with more than the usual */

bool jobs_open(void) {
    null_fd = open("/dev/null", O_RDWR | O_CLOEXEC);
    terminals_open();
    if (getrlimit(RLIMIT_NOFILE, &inherited) == 0 && inherited.rlim_cur < MAX_DESCRIPTORS) {
        rlim_t most = inherited.rlim_max < MAX_DESCRIPTORS ? inherited.rlim_max : MAX_DESCRIPTORS;
        const struct rlimit raised = {.rlim_cur = most, .rlim_max = inherited.rlim_max};
        setrlimit(RLIMIT_NOFILE, &raised);
    }
    return null_fd >= 0;
}

static bool is_user(enum JobKind kind) { return kind == JOB_FOREGROUND || kind == JOB_LASTING; }

static const char *refusal(enum JobKind kind) {
    static const unsigned limits[] = {
        [JOB_FOREGROUND] = MAX_FOREGROUND,
        [JOB_LASTING] = MAX_BACKGROUND,
        [JOB_OPERATION] = MAX_OPERATIONS,
        [JOB_SYSTEM] = MAX_SYSTEM,
        [JOB_WATCH] = MAX_WATCHES,
        [JOB_CLEANUP] = MAX_OPERATIONS,
    };
    unsigned running = 0;
    for (const struct Job *job = jobs_first(); job != NULL; job = job->next) {
        running += job->kind == kind && !job_is_spent(job);
    }
    if (running < limits[kind]) {
        return NULL;
    }
    return is_user(kind) || kind == JOB_WATCH ? "too_many_processes" : "busy";
}

/* `ends[0]` is the parent's, `ends[1]` the child's. A pipe the spawn does not ask for is /dev/null for the child. */
struct Ends {
    int in[2];
    int out[2];
    int errors[2];
    int control[2];
};

static bool make_pipe(int ends[2], bool wanted, int parent_side, bool bulk) {
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
    if (bulk) {
        fcntl(ends[0], F_SETPIPE_SZ, BULK_PIPE_BYTES); /* (else it is as large as others) */
    }
    return fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0;
}

/* The slave is the child's only once here: as descriptor 0, 1 and 2 it is placed later. */
static bool make_ends(const struct Spawn *spawn, struct Ends *ends) {
    if (spawn->terminal == NULL) {
        const bool content = spawn->kind == JOB_OPERATION;
        return make_pipe(ends->in, spawn->input, 1, content) &&
               make_pipe(ends->out, spawn->output, 0, content || spawn->kind == JOB_FOREGROUND) &&
               make_pipe(ends->errors, spawn->errors, 0, false);
    }
    return terminal_make(spawn->terminal, &ends->out[0], &ends->in[0], &ends->in[1]);
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

static _Noreturn void run_child(const struct Spawn *spawn, int extra) {
    if (inherited.rlim_max > 0) {
        setrlimit(RLIMIT_NOFILE, &inherited);
    }
    if (is_user(spawn->kind) && extra > 0 && !freezer_join(EXTRA_FD)) {
        worker_fault("invalid_state", "the sandbox stands still and cannot take a process");
    }
    spawn->run(spawn->argument);
    _exit(1);
}

static pid_t start_child(const struct Spawn *spawn, struct Ends *ends) {
    *ends = (struct Ends){{-1, -1}, {-1, -1}, {-1, -1}, {-1, -1}};
    pid_t pid = -1;
    int extra = spawn->extra;
    if (make_ends(spawn, ends) &&
        socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, ends->control) == 0) {
        fflush(NULL);
        pid = is_user(spawn->kind) ? freezer_fork(&extra) : fork();
    }
    if (pid == 0) {
        const int slave = ends->in[1];
        const bool terminal = spawn->terminal != NULL;
        const int fds[] = {ends->in[1], terminal ? slave : ends->out[1], terminal ? slave : ends->errors[1],
                           ends->control[1], extra};
        child_enter(fds, extra > 0 ? EXTRA_FD + 1 : EXTRA_FD);
        run_child(spawn, extra);
    }
    close_ends(ends, 1);
    if (pid < 0) {
        close_ends(ends, 0);
    }
    return pid;
}

static void take_ends(struct Job *job, const struct Ends *ends) {
    job->in = (struct Watch){.fd = ends->in[0], .ready = job_in_ready, .owner = job};
    job->out = (struct Watch){.fd = ends->out[0], .ready = job_out_ready, .owner = job};
    job->errors = (struct Watch){.fd = ends->errors[0], .ready = job_errors_ready, .owner = job};
    job->control = (struct Watch){.fd = ends->control[0], .ready = job_control_ready, .owner = job};
    jobs_add(job);
}

static struct Job *new_job(struct Connection *owner, const struct Frame *open, enum JobKind kind) {
    struct Job *job = calloc(1, sizeof *job);
    if (job == NULL) {
        return NULL;
    }
    if (kind == JOB_LASTING && (job->ring = ring_new()) == NULL) {
        free(job);
        return NULL;
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
            ring_free(job->ring);
        }
        free(job);
        return NULL;
    }
    job->pid = pid;
    job->finished = spawn->finished;
    job->terminal = spawn->terminal != NULL;
    take_ends(job, &ends);
    if (owner != NULL) {
        owner->streams++;
    }
    return job;
}
