/* files.*: every operation runs in its own child, so that a dead disk costs one child and not the loop. */
#ifndef CAPSULE_FILES_H
#define CAPSULE_FILES_H

#include <sys/stat.h>

#include "bytes.h"
#include "fields.h"
#include "guest_limits.h"

#define PATH_BUFFER (MAX_PATH_BYTES + 1)
#define NAME_BUFFER 256

struct FileRequest {
    char path[PATH_BUFFER]; /* absolute, without "//", ".", "..", or a slash at its end */
    struct Integer offset;
    struct Integer length;
    struct Integer mode;
    struct Integer size;
    struct Integer depth;
    bool recursive;
};

/* In the child; none returns. */
void files_read_run(const void *request);
void files_write_run(const void *request);
void files_list_run(const void *request);
void files_stat_run(const void *request);
void files_mkdir_run(const void *request);
void files_remove_run(const void *request);
void files_watch_run(const void *request);

/* entry.c: one entry of docs/protocol.md. `name` is looked up in `directory` for a symlink's target. */
void pack_entry(struct Bytes *bytes, int directory, const char *name, const char *path, const struct stat *status);
/* Reply `{entry}` about `path`; faults when it is gone. */
_Noreturn void reply_entry(const char *path);
/* mkdir -p of every directory above the last component; 0 or an errno value. */
int make_parents(const char *path);
/* The last component; "/" for the root. */
const char *base_name(const char *path);

#endif
