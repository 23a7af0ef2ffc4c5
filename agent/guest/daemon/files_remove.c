/* Recursive removal that never follows a symbolic link and keeps one descriptor however deep the tree is. */
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "child.h"
#include "files.h"
#include "pack.h"

/* A directory above the one being emptied: what to expect when going up, and what to remove there. */
struct Level {
    struct Level *up;
    dev_t device;
    ino_t inode;
    char name[]; /* of the directory below */
};

static int open_directory(int at, const char *name) {
    return openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* Removes what is not a directory from `fd` until it is empty or the first directory, whose name is put into `name`.
 * False when it is empty. */
static bool empty_until_directory(int fd, char *name, const char *path) {
    int copy = dup(fd);
    DIR *stream = copy >= 0 ? fdopendir(copy) : NULL;
    if (stream == NULL) {
        worker_errno(errno, path);
    }
    rewinddir(stream);
    bool found = false;
    for (struct dirent *item; !found && (item = readdir(stream)) != NULL;) {
        if (strcmp(item->d_name, ".") == 0 || strcmp(item->d_name, "..") == 0) {
            continue;
        }
        if (unlinkat(fd, item->d_name, 0) == 0 || errno == ENOENT) {
            continue;
        }
        struct stat status;
        int reason = errno;
        if (fstatat(fd, item->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISDIR(status.st_mode)) {
            worker_errno(reason, path);
        }
        strcpy(name, item->d_name);
        found = true;
    }
    closedir(stream);
    return found;
}

static struct Level *push(struct Level *up, int fd, const char *name, const char *path) {
    struct stat status;
    struct Level *level = malloc(sizeof *level + strlen(name) + 1);
    if (level == NULL) {
        worker_fault("internal", "the guest is out of memory");
    }
    if (fstat(fd, &status) != 0) {
        worker_errno(errno, path);
    }
    level->up = up;
    level->device = status.st_dev;
    level->inode = status.st_ino;
    strcpy(level->name, name);
    return level;
}

/* Up to the directory that `level` remembers; somebody may have moved the one we are in. */
static int go_up(int fd, const struct Level *level, const char *path) {
    struct stat status;
    int up = open_directory(fd, "..");
    if (up < 0 || fstat(up, &status) != 0) {
        worker_errno(errno, path);
    }
    if (status.st_dev != level->device || status.st_ino != level->inode) {
        worker_fault("conflict", "%s was moved while it was being removed", path);
    }
    close(fd);
    return up;
}

static void remove_tree(int parent, const char *top, const char *path) {
    char name[NAME_MAX + 1];
    struct Level *level = push(NULL, parent, top, path);
    int fd = open_directory(parent, top);
    if (fd < 0) {
        worker_errno(errno, path);
    }
    while (level != NULL) {
        if (empty_until_directory(fd, name, path)) {
            level = push(level, fd, name, path);
            int below = open_directory(fd, name);
            if (below < 0) {
                worker_errno(errno, path);
            }
            close(fd);
            fd = below;
            continue;
        }
        fd = go_up(fd, level, path);
        if (unlinkat(fd, level->name, AT_REMOVEDIR) != 0 && errno != ENOENT) {
            worker_errno(errno == ENOTEMPTY || errno == EEXIST ? EBUSY : errno, path);
        }
        struct Level *up = level->up;
        free(level);
        level = up;
    }
    close(fd);
}

void files_remove_run(const void *argument) {
    const struct FileRequest *request = argument;
    const char *path = request->path;
    const char *name = base_name(path);
    char parent[PATH_BUFFER];
    size_t length = (size_t)(name - path);
    memcpy(parent, path, length);
    parent[length] = '\0';
    struct Bytes body = {0};
    struct stat status;
    int fd = open(parent, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0 || fstatat(fd, name, &status, AT_SYMLINK_NOFOLLOW) != 0) {
        worker_errno(errno == ENOTDIR ? ENOENT : errno, path);
    }
    if (S_ISDIR(status.st_mode)) {
        remove_tree(fd, name, path);
    } else if (unlinkat(fd, name, 0) != 0) {
        worker_errno(errno, path);
    }
    pack_map(&body, 0);
    worker_reply(&body);
}
