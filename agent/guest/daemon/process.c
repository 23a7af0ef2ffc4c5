/* exec: the loop's side. */
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>

#include "attach.h"
#include "exec.h"
#include "guest_limits.h"
#include "methods.h"
#include "pack.h"
#include "process.h"

static struct Process *new_process(const struct Exec *exec) {
    struct Process *process = calloc(1, sizeof *process);
    if (process == NULL) {
        return NULL;
    }
    process_remember(process, exec->command, exec->arguments);
    process->tag = exec->tag.data != NULL ? slice_string(exec->tag) : NULL;
    process->started_wall_ns = clock_wall_ns();
    if (process->arguments.failed || (exec->tag.data != NULL && process->tag == NULL)) {
        process_free(process);
        return NULL;
    }
    return process;
}

void process_free(struct Process *process) {
    if (process != NULL) {
        bytes_free(&process->arguments);
        free(process->command);
        free(process->tag);
        free(process->user);
        free(process->cwd);
        free(process);
    }
}

static const char *refusal(const struct Exec *exec) {
    if (exec->command.data == NULL && (!exec->terminal || exec->arguments.data != NULL)) {
        return "cmd is missing";
    }
    if (exec->command.data != NULL && exec->command.length == 0) {
        return "cmd is empty";
    }
    if (exec->cwd.data != NULL && (exec->cwd.length == 0 || exec->cwd.data[0] != '/')) {
        return "cwd must be an absolute path";
    }
    if (exec->tag.data != NULL && exec->tag.length == 0) {
        return "tag is empty";
    }
    return exec->background && exec->stdin_wanted ? "a background process has no stdin" : NULL;
}

static bool read_exec(const struct Frame *open, struct Exec *exec, struct winsize *size, char *error) {
    struct Slice terminal = {0};
    const struct Field fields[] = {
        {.name = "cmd", .type = FIELD_STRING, .target = &exec->command},
        {.name = "args", .type = FIELD_STRINGS, .target = &exec->arguments, .high = MAX_ARGUMENTS},
        {.name = "envs", .type = FIELD_ENVS, .target = &exec->envs, .high = MAX_ENVS},
        {.name = "cwd", .type = FIELD_STRING, .target = &exec->cwd, .high = MAX_PATH_BYTES - 1},
        {.name = "user", .type = FIELD_STRING, .target = &exec->user, .high = MAX_USER_BYTES},
        {.name = "stdin", .type = FIELD_BOOL, .target = &exec->stdin_wanted},
        {.name = "timeout_ms", .type = FIELD_INTEGER, .target = &exec->timeout_ms, .low = 0, .high = MAX_TIMEOUT_MS},
        {.name = "background", .type = FIELD_BOOL, .target = &exec->background},
        {.name = "detach", .type = FIELD_BOOL, .target = &exec->detach},
        {.name = "pty", .type = FIELD_ANY, .target = &terminal},
        {.name = "tag", .type = FIELD_STRING, .target = &exec->tag, .high = MAX_TAG_BYTES},
    };
    if (!fields_read(open->body, fields, sizeof fields / sizeof *fields, error)) {
        return false;
    }
    exec->terminal = terminal.data != NULL;
    if (exec->terminal && !process_read_size(terminal, size, error)) {
        return false;
    }
    const char *wrong = refusal(exec);
    if (wrong != NULL) {
        strcpy(error, wrong);
    }
    return wrong == NULL;
}

/* The stream becomes the first that is attached; until then it is the job's own, as of any other. */
static void attach_opener(struct Job *job, const struct Frame *open) {
    struct Connection *connection = job->owner;
    if (attachment_add(job, connection, open, false, 0) == NULL) {
        job_fault(job, "internal", "the guest is out of memory");
        return;
    }
    connection->streams--;
    job->owner = NULL;
    job->deadline = NEVER;
}

static void start(struct Connection *connection, const struct Frame *open, const struct Exec *exec,
                  const struct winsize *size) {
    bool lasting = exec->background || exec->detach || exec->terminal;
    struct Spawn spawn = {.kind = lasting ? JOB_LASTING : JOB_FOREGROUND,
                          .input = exec->stdin_wanted,
                          .output = true,
                          .errors = true,
                          .terminal = exec->terminal ? size : NULL,
                          .run = exec_run,
                          .argument = exec};
    struct Process *process = new_process(exec);
    if (process == NULL) {
        connection_fault(connection, open->stream, "internal", "the guest is out of memory");
        return;
    }
    struct Job *job = job_spawn(connection, open, &spawn);
    if (job == NULL) {
        process_free(process);
        return;
    }
    job->process = process;
    if (exec->timeout_ms.value > 0 && !exec->background) {
        job->timeout = job->started_ns + (uint64_t)exec->timeout_ms.value * 1000000ULL;
    }
    if (lasting && !exec->background) { /* (of a background one it is answered once the process has started) */
        attach_opener(job, open);
    }
}

void exec_open(struct Connection *connection, const struct Frame *open) {
    struct Exec exec = {.default_envs = configure_envs()};
    struct winsize size = {0};
    char error[FIELD_ERROR_BYTES];
    if (!read_exec(open, &exec, &size, error)) {
        connection_fault(connection, open->stream, "invalid_argument", "%s", error);
        return;
    }
    if (exec.tag.data != NULL && process_with_tag(exec.tag) != NULL) {
        connection_fault(connection, open->stream, "conflict", "a running process already has the tag %.*s",
                         (int)exec.tag.length, (const char *)exec.tag.data);
        return;
    }
    start(connection, open, &exec, &size);
}

void process_pack_identity(struct Bytes *bytes, const struct Job *job, size_t more) {
    pack_map(bytes, 1 + (job->process->tag != NULL) + more);
    pack_string(bytes, "pid");
    pack_integer(bytes, job->pid);
    if (job->process->tag != NULL) {
        pack_string(bytes, "tag");
        pack_string(bytes, job->process->tag);
    }
}

/* The string before the next NUL; NULL without one, or without memory. */
static char *next_string(struct Slice *record) {
    const struct Slice text = {.data = record->data, .length = strnlen((const char *)record->data, record->length)};
    if (text.length == record->length) {
        return NULL;
    }
    record->data += text.length + 1;
    record->length -= text.length + 1;
    return slice_string(text);
}

void process_started(struct Job *job, struct Slice record) {
    struct Process *process = job->process;
    if (process == NULL || process->user != NULL || job->forgotten) {
        return;
    }
    process->user = next_string(&record);
    process->cwd = next_string(&record);
    char *login = next_string(&record);
    if (process->command == NULL) {
        process->command = login;
    } else {
        free(login);
    }
    if (job->kind == JOB_FOREGROUND) {
        process_pack_identity(&job->notice, job, 0);
        return;
    }
    for (struct Attachment *attachment = job->attachments; attachment != NULL; attachment = attachment->next) {
        if (!attachment->announced && attachment->notice.length == 0) { /* the exec's own */
            process_pack_identity(&attachment->notice, job, 0);
        }
    }
    if (job->owner != NULL) {
        struct Bytes body = {0};
        process_pack_identity(&body, job, 0);
        job_reply(job, &body);
        bytes_free(&body);
    }
}

void process_pack_end(const struct Job *job, struct Bytes *body) {
    int number = !job->reaped ? SIGKILL : WIFSIGNALED(job->status) ? WTERMSIG(job->status) : 0;
    uint64_t ended = job->reaped ? job->ended_ns : clock_monotonic_ns();
    int code = number != 0 ? 128 + number : WEXITSTATUS(job->status);
    pack_map(body, 3 + (number != 0));
    pack_string(body, "exit_code");
    pack_integer(body, job->timed_out ? 128 + SIGKILL : code);
    if (number != 0) {
        pack_string(body, "signal");
        pack_integer(body, number);
    }
    pack_string(body, "duration_ms");
    pack_integer(body, (int64_t)((ended - job->started_ns) / 1000000));
    pack_string(body, "timed_out");
    pack_bool(body, job->timed_out);
}
