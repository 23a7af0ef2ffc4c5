#include "replace.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "child.h"

#define LARGEST_COMPARED 4096

bool is_regular(const char *path, struct stat *status) {
    return lstat(path, status) == 0 && S_ISREG(status->st_mode);
}

/* A resumed guest mostly is who it was: nothing to write, and a full disk does not matter. */
static bool holds(const char *path, const struct Bytes *content) {
    char old[LARGEST_COMPARED];
    struct stat status;
    if (!is_regular(path, &status) || (size_t)status.st_size != content->length || content->length > sizeof old) {
        return false;
    }
    int fd = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    ssize_t count = fd >= 0 ? read(fd, old, sizeof old) : -1;
    if (fd >= 0) {
        close(fd);
    }
    return count == (ssize_t)content->length && memcmp(old, content->data, content->length) == 0;
}

/* In place where what is there has the same size: to an emulated guest a new file costs 40 ms more, most of it for code
 * of its file system that nothing else has needed yet, and a full disk has no room for one. A reader sees either. */
static bool overwrite(const char *path, const struct Bytes *content) {
    struct stat status;
    if (!is_regular(path, &status) || status.st_nlink != 1 || (size_t)status.st_size != content->length ||
        content->length > LARGEST_COMPARED) {
        return false;
    }
    int fd = open(path, O_WRONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC);
    ssize_t count = fd >= 0 ? pwrite(fd, content->data, content->length, 0) : -1;
    if (fd >= 0) {
        close(fd);
    }
    return count == (ssize_t)content->length;
}

/* Replaced, not written through: it may be a symbolic link that leads to a daemon which is not there. */
static bool write_new(const char *path, const struct Bytes *content) {
    char temporary[64];
    snprintf(temporary, sizeof temporary, "%s.capsule", path);
    unlink(temporary);
    int fd = open(temporary, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0644);
    if (fd < 0) {
        return errno == ENOENT; /* an image without /etc has nobody who would read it */
    }
    bool written = !content->failed && write_all(fd, content->data, content->length) && rename(temporary, path) == 0;
    close(fd);
    if (!written) {
        unlink(temporary);
    }
    return written;
}

bool replace_file(const char *path, const struct Bytes *content) {
    return holds(path, content) || overwrite(path, content) || write_new(path, content);
}
