/* A job: a forked child that works for one stream, or lasts: a process that outlives the streams attached to it.
 *
 * Owns: the child, the parent's ends of its pipes or its terminal, what is on its way in either direction.
 * Owned by: the main loop; `owner` is the connection whose stream waits for the last frame, NULL when nobody does.
 * Dies when: its child is reaped and nobody waits any more. Time-out, CANCEL and a lost connection kill the child's
 * process group; nothing here ever waits for a child. Of a job that lasts only the time-out does, and its end and last
 * output are kept for a while.
 */
#ifndef CAPSULE_JOB_H
#define CAPSULE_JOB_H

#include <sys/types.h>

#include "connection.h"
#include "frames.h"

struct Attachment;
struct Ring;
struct winsize;

enum JobKind {
    JOB_FOREGROUND, /* an exec */
    JOB_LASTING,    /* an exec that outlives its streams: `background`, `detach`, `pty` */
    JOB_OPERATION,  /* anything that may touch a file system */
    JOB_SYSTEM,     /* the same, for the host's own purposes */
    JOB_WATCH,      /* waits for changes of files */
    JOB_CLEANUP,    /* removes what a killed operation left */
};

/* What processes.list tells about an exec. */
struct Process {
    char *tag; /* NULL when none was given */
    char *command; /* as far as processes.list may show it; NULL for a login shell */
    struct Bytes arguments; /* the same; a msgpack array, empty when none was given */
    char *user; /* NULL until the child has started */
    char *cwd;
    uint64_t started_wall_ns;
};

struct Job {
    struct Job *next; /* first: see loop_discard */
    enum JobKind kind;
    struct Connection *owner;
    uint32_t stream;

    pid_t pid;
    bool reaped;
    int status;
    uint64_t started_ns;
    uint64_t ended_ns;

    struct Watch in;
    struct Watch out;
    struct Watch errors;
    struct Watch control;
    bool terminal;     /* `in` and `out` are one */
    bool out_ready;    /* there is something to read, or was */
    bool errors_ready;

    struct Bytes input;      /* from the opener, not yet taken by the child */
    uint32_t receive_credit; /* what the opener may still send */
    uint32_t consumed;       /* taken, not yet granted again */
    bool ended;              /* END has come */

    uint64_t send_credit;
    uint64_t sent_end;   /* where the last DATA ends in the connection's output (connection_queued) */
    struct Bytes notice; /* waits for credit; nothing more is taken from the child before it is sent */
    bool announced;      /* the first notice is out: output may follow */
    size_t out_left;     /* after the exit grace: what was in the pipe then; before, SIZE_MAX */
    size_t errors_left;

    uint64_t deadline; /* the opener's: FAULT */
    uint64_t timeout;  /* the exec's: killed, and told so */
    uint64_t grace;    /* when grandchildren that hold the pipes are no longer waited for */
    uint64_t patience; /* when a killed child that does not die is answered for */
    bool timed_out;

    /* Called once, when the last frame was queued or nobody waits for it any more; `answered`: it was a REPLY. Not for
     * execs. */
    void (*finished)(struct Job *job, bool answered);

    struct Bytes result; /* of RECORD_REPLY */
    bool replied;
    char *temporary; /* of RECORD_TEMPORARY */

    struct Process *process; /* of an exec */
    /* Of one that lasts. */
    struct Ring *ring;
    struct Attachment *attachments; /* at most one that is no observer */
    size_t strange;                 /* of `input`: from streams of before */
    bool complete;                  /* it has ended, and all its output is in the ring */
    bool forgotten;                 /* nothing of it is kept */
};

struct Spawn {
    enum JobKind kind;
    bool input;  /* a pipe to descriptor 0, else /dev/null */
    bool output; /* a pipe from descriptor 1 */
    bool errors; /* a pipe from descriptor 2 */
    const struct winsize *terminal; /* instead of all three: a terminal of this size */
    int extra;   /* what the child has as EXTRA_FD; nothing unless it is positive */
    void (*run)(const void *argument); /* in the child; does not return */
    const void *argument;
    void (*finished)(struct Job *job, bool answered); /* see Job; may be NULL */
};

/* job_spawn.c: take the descriptors that children get, and room for those of all jobs; call once, before anything of the
 * user's runs. False when /dev/null cannot be opened. */
bool jobs_open(void);

/* Start a child for the stream that `open` opened (NULL: for nobody). Answers with a FAULT itself and returns NULL when
 * there are too many of its kind or the guest has no room. */
struct Job *job_spawn(struct Connection *owner, const struct Frame *open, const struct Spawn *spawn);
/* A DATA, END, CREDIT or CANCEL; false when it breaks the protocol. */
bool job_receive(struct Connection *connection, const struct Frame *frame);
/* The connection is gone: kill what it owned. */
void jobs_abandon(const struct Connection *connection);
/* The daemon ends: kill everything that was started. */
void jobs_abandon_all(void);
/* Signal the whole process group. */
void job_kill(const struct Job *job, int signal);
/* It neither runs nor holds descriptors, and nobody waits for its last frame. */
bool job_is_spent(const struct Job *job);
/* SIGKILL; with a terminal for all of its session. */
void job_end(const struct Job *job);

/* Once a turn, in this order: reap children, send what they have printed, move every job's state along, watch what may
 * flow now. */
void jobs_reap(void);
void jobs_flow(void);
void jobs_advance(void);
void jobs_watch(void);
uint64_t jobs_deadline(void);
struct Job *jobs_first(void);
void jobs_add(struct Job *job);

/* job_pipes.c: */
void job_in_ready(void *owner, uint32_t events);
void job_control_ready(void *owner, uint32_t events);
void job_watch(struct Job *job);
void job_send_notice(struct Job *job);
bool job_take_data(struct Job *job, struct Slice data);
/* Input from a stream that counts its credit itself: how much of it the child has taken already. */
size_t job_give(struct Job *job, struct Slice data);
void job_take_end(struct Job *job);
void job_close_pipes(struct Job *job);

/* job_output.c: */
void job_out_ready(void *owner, uint32_t events);
void job_errors_ready(void *owner, uint32_t events);
/* Whether output may be read now, of which `left` is left. */
bool job_may_read(const struct Job *job, size_t left);
/* Send what has come; whether that was much. */
bool job_flow(struct Job *job);
/* After the exit grace: only what is in the pipes by now is still delivered. */
void job_limit_output(struct Job *job);
/* Whether it was. */
bool job_output_done(const struct Job *job);

/* job_advance.c: deadlines, and the last frame once the work is done. */
void job_advance(struct Job *job, uint64_t now);
/* When it is to be called again. */
uint64_t job_deadline(const struct Job *job);

/* job.c: the last frame of the job's stream; afterwards nobody waits for it. */
void job_fault(struct Job *job, const char *code, const char *message);
void job_reply(struct Job *job, const struct Bytes *body);

/* process.c: */
void process_free(struct Process *process);
void process_started(struct Job *job, struct Slice record);
/* The body of the REPLY that tells how an exec ended. */
void process_pack_end(const struct Job *job, struct Bytes *body);

#endif
