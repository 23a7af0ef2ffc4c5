#include "files.h"

#include <string.h>

#include "job.h"
#include "methods.h"

/* Copies the path without its redundant parts; what is wrong with it, or NULL. */
static const char *normalize(struct Slice path, char *out) {
    size_t length = 0;
    if (path.length == 0 || path.data[0] != '/') {
        return "path must be absolute";
    }
    for (size_t at = 0; at < path.length;) {
        size_t end = at + 1;
        while (end < path.length && path.data[end] != '/') {
            end++;
        }
        struct Slice component = {.data = path.data + at + 1, .length = end - at - 1};
        if (slice_is(component, "..")) {
            return "path must not have '..' components";
        }
        if (component.length > 0 && !slice_is(component, ".")) {
            memcpy(out + length, path.data + at, end - at);
            length += end - at;
        }
        at = end;
    }
    if (length == 0) {
        out[length++] = '/';
    }
    out[length] = '\0';
    return NULL;
}

struct Operation {
    const char *method;
    void (*run)(const void *request);
    enum JobKind kind;
    bool input;
    bool output;
    bool not_root;
};

static const struct Operation operations[] = {
    {.method = "files.read", .run = files_read_run, .kind = JOB_OPERATION, .output = true},
    {.method = "files.write", .run = files_write_run, .kind = JOB_OPERATION, .input = true},
    {.method = "files.list", .run = files_list_run, .kind = JOB_OPERATION},
    {.method = "files.stat", .run = files_stat_run, .kind = JOB_OPERATION},
    {.method = "files.mkdir", .run = files_mkdir_run, .kind = JOB_OPERATION},
    {.method = "files.remove", .run = files_remove_run, .kind = JOB_OPERATION, .not_root = true},
    {.method = "files.watch", .run = files_watch_run, .kind = JOB_WATCH, .input = true},
};

static const struct Operation *find_operation(struct Slice method) {
    const struct Operation *operation = operations;
    while (!slice_is(method, operation->method)) { /* methods.c only sends the names above */
        operation++;
    }
    return operation;
}

void files_open(struct Connection *connection, const struct Frame *open) {
    const struct Operation *operation = find_operation(open->method);
    struct FileRequest request = {.depth.value = 1};
    struct Slice path = {0};
    char error[FIELD_ERROR_BYTES];
    const struct Field fields[] = {
        {.name = "path", .type = FIELD_STRING, .target = &path, .required = true, .high = MAX_PATH_BYTES},
        {.name = "offset", .type = FIELD_INTEGER, .target = &request.offset, .low = 0, .high = INT64_MAX},
        {.name = "length", .type = FIELD_INTEGER, .target = &request.length, .low = 0, .high = INT64_MAX},
        {.name = "mode", .type = FIELD_INTEGER, .target = &request.mode, .low = 0, .high = 07777},
        {.name = "size", .type = FIELD_INTEGER, .target = &request.size, .low = 0, .high = INT64_MAX},
        {.name = "recursive", .type = FIELD_BOOL, .target = &request.recursive},
        {.name = "depth", .type = FIELD_INTEGER, .target = &request.depth, .low = 1, .high = MAX_LIST_DEPTH},
    };
    bool valid = fields_read(open->body, fields, sizeof fields / sizeof *fields, error);
    const char *wrong = valid ? normalize(path, request.path) : error;
    if (wrong == NULL && operation->not_root && strcmp(request.path, "/") == 0) {
        wrong = "the root directory cannot be removed";
    }
    if (wrong != NULL) {
        connection_fault(connection, open->stream, "invalid_argument", "%s", wrong);
        return;
    }
    const struct Spawn spawn = {.kind = operation->kind,
                                .input = operation->input,
                                .output = operation->output,
                                .run = operation->run,
                                .argument = &request};
    job_spawn(connection, open, &spawn);
}
