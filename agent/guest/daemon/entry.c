/* File entries, and the small operations that answer with one. */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <unistd.h>

#include "child.h"
#include "files.h"
#include "pack.h"
#include "users.h"

static const char *type_name(mode_t mode) {
    return S_ISREG(mode) ? "file" : S_ISDIR(mode) ? "directory" : S_ISLNK(mode) ? "symlink" : "other";
}

static void pack_number(struct Bytes *bytes, const char *key, int64_t value) {
    pack_string(bytes, key);
    pack_integer(bytes, value);
}

static void pack_text(struct Bytes *bytes, const char *key, const char *value) {
    pack_string(bytes, key);
    pack_string(bytes, value);
}

void pack_entry(struct Bytes *bytes, int directory, const char *name, const char *path, const struct stat *status) {
    char target[PATH_BUFFER];
    ssize_t length = S_ISLNK(status->st_mode) ? readlinkat(directory, name, target, sizeof target - 1) : -1;
    pack_map(bytes, length >= 0 ? 11 : 10);
    pack_text(bytes, "name", base_name(path));
    pack_text(bytes, "path", path);
    pack_text(bytes, "type", type_name(status->st_mode));
    pack_number(bytes, "size", status->st_size);
    pack_number(bytes, "mode", status->st_mode & 07777);
    pack_text(bytes, "owner", user_name(status->st_uid));
    pack_text(bytes, "group", group_name(status->st_gid));
    pack_number(bytes, "uid", status->st_uid);
    pack_number(bytes, "gid", status->st_gid);
    pack_number(bytes, "mtime_ns", (int64_t)status->st_mtim.tv_sec * 1000000000 + status->st_mtim.tv_nsec);
    if (length >= 0) {
        target[length] = '\0';
        pack_text(bytes, "symlink_target", target);
    }
}

void reply_entry(const char *path) {
    struct stat status;
    struct Bytes body = {0};
    if (lstat(path, &status) != 0) {
        worker_errno(errno == ENOTDIR ? ENOENT : errno, path);
    }
    pack_map(&body, 1);
    pack_string(&body, "entry");
    pack_entry(&body, AT_FDCWD, path, path, &status);
    worker_reply(&body);
}

const char *base_name(const char *path) {
    const char *slash = strrchr(path, '/');
    return slash != NULL && slash[1] != '\0' ? slash + 1 : path;
}

int make_parents(const char *path) {
    char prefix[PATH_BUFFER];
    for (const char *slash = strchr(path + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
        memcpy(prefix, path, (size_t)(slash - path));
        prefix[slash - path] = '\0';
        if (mkdir(prefix, 0755) != 0 && errno != EEXIST) {
            struct stat status; /* on a read-only file system what exists may answer EROFS */
            int reason = errno;
            if (stat(prefix, &status) != 0) {
                return reason;
            }
        }
    }
    return 0;
}

void files_stat_run(const void *argument) {
    const struct FileRequest *request = argument;
    reply_entry(request->path);
}

void files_mkdir_run(const void *argument) {
    const struct FileRequest *request = argument;
    mode_t mode = request->mode.present ? (mode_t)request->mode.value : 0755;
    int reason = make_parents(request->path);
    if (reason != 0) {
        worker_errno(reason, request->path);
    }
    if (mkdir(request->path, mode) != 0) {
        worker_errno(errno, request->path);
    }
    if (request->mode.present && chmod(request->path, mode) != 0) { /* the umask does not apply to what was asked for */
        worker_errno(errno, request->path);
    }
    reply_entry(request->path);
}
