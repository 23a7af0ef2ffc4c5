/* exec and processes.*: the loop's side. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#include "exec.h"
#include "job.h"
#include "guest_limits.h"
#include "methods.h"
#include "pack.h"
#include "unpack.h"

/* --- exec --------------------------------------------------------------------------------------------------- */

static bool is_alive(const struct Job *job) { return job->process != NULL && !job->reaped; }

static struct Job *find_tag(struct Slice tag) {
    struct Job *job = jobs_first();
    while (job != NULL && !(is_alive(job) && job->process->tag != NULL && slice_is(tag, job->process->tag))) {
        job = job->next;
    }
    return job;
}

static struct Slice cut(struct Slice text, size_t most) {
    return (struct Slice){.data = text.data, .length = text.length < most ? text.length : most};
}

/* cmd and args as processes.list shows them: the first LISTED_BYTES of them. */
static void list_command(struct Process *process, const struct Exec *exec) {
    struct Slice command = cut(exec->command, LISTED_BYTES / 2);
    pack_string(&process->listed, "cmd");
    pack_slice(&process->listed, command);
    process->listed_pairs = 1;
    if (exec->arguments.data == NULL) {
        return;
    }
    struct Bytes packed = {0};
    struct StringWalk walk = strings_walk(exec->arguments);
    size_t count = 0;
    size_t room = LISTED_BYTES - command.length;
    for (struct Slice text; room > 0 && walk_next(&walk, &text); count++) {
        text = cut(text, room - 1);
        room -= text.length + 1;
        pack_slice(&packed, text);
    }
    pack_string(&process->listed, "args");
    pack_array(&process->listed, count);
    bytes_append(&process->listed, packed.data, packed.length);
    process->listed_pairs = 2;
    bytes_free(&packed);
}

static struct Process *new_process(const struct Exec *exec) {
    struct Process *process = calloc(1, sizeof *process);
    if (process == NULL) {
        return NULL;
    }
    list_command(process, exec);
    process->tag = exec->tag.data != NULL ? slice_string(exec->tag) : NULL;
    process->started_wall_ns = clock_wall_ns();
    if (process->listed.failed || (exec->tag.data != NULL && process->tag == NULL)) {
        process_free(process);
        return NULL;
    }
    return process;
}

void process_free(struct Process *process) {
    if (process != NULL) {
        bytes_free(&process->listed);
        free(process->tag);
        free(process->user);
        free(process->cwd);
        free(process);
    }
}

static bool read_exec(const struct Frame *open, struct Exec *exec, char *error) {
    const struct Field fields[] = {
        {.name = "cmd", .type = FIELD_STRING, .target = &exec->command, .required = true},
        {.name = "args", .type = FIELD_STRINGS, .target = &exec->arguments, .high = MAX_ARGUMENTS},
        {.name = "envs", .type = FIELD_ENVS, .target = &exec->envs, .high = MAX_ENVS},
        {.name = "cwd", .type = FIELD_STRING, .target = &exec->cwd, .high = MAX_PATH_BYTES - 1},
        {.name = "user", .type = FIELD_STRING, .target = &exec->user, .high = MAX_USER_BYTES},
        {.name = "stdin", .type = FIELD_BOOL, .target = &exec->stdin_wanted},
        {.name = "timeout_ms", .type = FIELD_INTEGER, .target = &exec->timeout_ms, .low = 0, .high = MAX_TIMEOUT_MS},
        {.name = "background", .type = FIELD_BOOL, .target = &exec->background},
        {.name = "tag", .type = FIELD_STRING, .target = &exec->tag, .high = MAX_TAG_BYTES},
    };
    if (!fields_read(open->body, fields, sizeof fields / sizeof *fields, error)) {
        return false;
    }
    const char *wrong = NULL;
    if (exec->command.length == 0) {
        wrong = "cmd is empty";
    } else if (exec->cwd.data != NULL && (exec->cwd.length == 0 || exec->cwd.data[0] != '/')) {
        wrong = "cwd must be an absolute path";
    } else if (exec->tag.data != NULL && exec->tag.length == 0) {
        wrong = "tag is empty";
    } else if (exec->background && exec->stdin_wanted) {
        wrong = "a background process has no stdin";
    }
    if (wrong != NULL) {
        strcpy(error, wrong);
    }
    return wrong == NULL;
}

void exec_open(struct Connection *connection, const struct Frame *open) {
    struct Exec exec = {.default_envs = configure_envs()};
    char error[FIELD_ERROR_BYTES];
    if (!read_exec(open, &exec, error)) {
        connection_fault(connection, open->stream, "invalid_argument", "%s", error);
        return;
    }
    if (exec.tag.data != NULL && find_tag(exec.tag) != NULL) {
        connection_fault(connection, open->stream, "conflict", "a running process already has the tag %.*s",
                         (int)exec.tag.length, (const char *)exec.tag.data);
        return;
    }
    struct Process *process = new_process(&exec);
    if (process == NULL) {
        connection_fault(connection, open->stream, "internal", "the guest is out of memory");
        return;
    }
    struct Spawn spawn = {.kind = exec.background ? JOB_BACKGROUND : JOB_FOREGROUND,
                          .input = exec.stdin_wanted,
                          .output = true,
                          .errors = true,
                          .run = exec_run,
                          .argument = &exec};
    struct Job *job = job_spawn(connection, open, &spawn);
    if (job == NULL) {
        process_free(process);
        return;
    }
    job->process = process;
    if (exec.timeout_ms.value > 0 && !exec.background) {
        job->timeout = job->started_ns + (uint64_t)exec.timeout_ms.value * 1000000ULL;
    }
}

static void pack_identity(struct Bytes *bytes, const struct Job *job, size_t more) {
    pack_map(bytes, 1 + (job->process->tag != NULL) + more);
    pack_string(bytes, "pid");
    pack_integer(bytes, job->pid);
    if (job->process->tag != NULL) {
        pack_string(bytes, "tag");
        pack_string(bytes, job->process->tag);
    }
}

void process_started(struct Job *job, struct Slice record) {
    struct Process *process = job->process;
    if (process == NULL || process->user != NULL || job->owner == NULL) {
        return;
    }
    size_t user = strnlen((const char *)record.data, record.length);
    if (user + 1 >= record.length) {
        return;
    }
    process->user = slice_string((struct Slice){.data = record.data, .length = user});
    process->cwd = slice_string((struct Slice){.data = record.data + user + 1, .length = record.length - user - 2});
    if (job->kind == JOB_FOREGROUND) {
        pack_identity(&job->notice, job, 0);
        return;
    }
    struct Bytes body = {0};
    pack_identity(&body, job, 0);
    job_reply(job, &body);
    bytes_free(&body);
}

void process_reply(struct Job *job) {
    struct Bytes body = {0};
    int number = !job->reaped ? SIGKILL : WIFSIGNALED(job->status) ? WTERMSIG(job->status) : 0;
    uint64_t ended = job->reaped ? job->ended_ns : clock_monotonic_ns();
    int code = number != 0 ? 128 + number : WEXITSTATUS(job->status);
    pack_map(&body, 3 + (number != 0));
    pack_string(&body, "exit_code");
    pack_integer(&body, job->timed_out ? 128 + SIGKILL : code);
    if (number != 0) {
        pack_string(&body, "signal");
        pack_integer(&body, number);
    }
    pack_string(&body, "duration_ms");
    pack_integer(&body, (int64_t)((ended - job->started_ns) / 1000000));
    pack_string(&body, "timed_out");
    pack_bool(&body, job->timed_out);
    job_reply(job, &body);
    bytes_free(&body);
}

/* --- processes.* -------------------------------------------------------------------------------------------- */

unsigned processes_count(void) {
    unsigned count = 0;
    for (const struct Job *job = jobs_first(); job != NULL; job = job->next) {
        count += is_alive(job);
    }
    return count;
}

static void pack_process(struct Bytes *bytes, const struct Job *job) {
    const struct Process *process = job->process;
    bool placed = process->user != NULL && process->cwd != NULL;
    pack_identity(bytes, job, process->listed_pairs + 2 + (placed ? 2 : 0));
    bytes_append(bytes, process->listed.data, process->listed.length);
    if (placed) {
        pack_string(bytes, "user");
        pack_string(bytes, process->user);
        pack_string(bytes, "cwd");
        pack_string(bytes, process->cwd);
    }
    pack_string(bytes, "background");
    pack_bool(bytes, job->kind == JOB_BACKGROUND);
    pack_string(bytes, "started_ns");
    pack_integer(bytes, (int64_t)process->started_wall_ns);
}

void processes_list_open(struct Connection *connection, const struct Frame *open) {
    struct Bytes body = {0};
    pack_map(&body, 1);
    pack_string(&body, "processes");
    pack_array(&body, processes_count());
    for (const struct Job *job = jobs_first(); job != NULL; job = job->next) {
        if (is_alive(job)) {
            pack_process(&body, job);
        }
    }
    connection_reply(connection, open->stream, &body);
    bytes_free(&body);
}

/* NULL and `*malformed` when `which` is neither a pid nor a tag. */
static struct Job *find_process(struct Slice which, bool *malformed) {
    struct Reader reader = {.at = which.data, .end = which.data + which.length};
    struct Slice tag;
    int64_t pid;
    *malformed = false;
    if (unpack_kind(&reader) == KIND_STRING && unpack_string(&reader, &tag)) {
        return slice_has_nul(tag) ? NULL : find_tag(tag);
    }
    if (!unpack_integer(&reader, 1, INT32_MAX, &pid)) {
        *malformed = true;
        return NULL;
    }
    struct Job *job = jobs_first();
    while (job != NULL && !(is_alive(job) && job->pid == pid)) {
        job = job->next;
    }
    return job;
}

void processes_signal_open(struct Connection *connection, const struct Frame *open) {
    struct Slice which = {0};
    struct Integer number = {0};
    char error[FIELD_ERROR_BYTES] = "process must be a pid or a tag";
    const struct Field fields[] = {
        {.name = "process", .type = FIELD_ANY, .target = &which, .required = true},
        {.name = "signal", .type = FIELD_INTEGER, .target = &number, .required = true, .low = 1, .high = 64},
    };
    bool malformed = !fields_read(open->body, fields, sizeof fields / sizeof *fields, error);
    struct Job *job = malformed ? NULL : find_process(which, &malformed);
    if (malformed) {
        connection_fault(connection, open->stream, "invalid_argument", "%s", error);
        return;
    }
    if (job == NULL) {
        connection_fault(connection, open->stream, "not_found", "no such process is running");
        return;
    }
    job_kill(job, (int)number.value);
    struct Bytes body = {0};
    pack_map(&body, 0);
    connection_reply(connection, open->stream, &body);
    bytes_free(&body);
}
