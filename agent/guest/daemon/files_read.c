#include <errno.h>
#include <fcntl.h>
#include <unistd.h>

#include "child.h"
#include "files.h"
#include "pack.h"

static uint8_t buffer[MAX_DATA_BYTES];

static void refuse_irregular(const char *path, const struct stat *status) {
    if (S_ISDIR(status->st_mode)) {
        worker_fault("is_a_directory", "%s is a directory", path);
    }
    if (!S_ISREG(status->st_mode)) {
        worker_fault("not_a_file", "%s is not a regular file", path);
    }
}

/* Looked at before it is opened: opening a device can do things. */
static int open_file(const char *path, struct stat *status) {
    if (stat(path, status) != 0) {
        worker_errno(errno == ENOTDIR ? ENOENT : errno, path);
    }
    refuse_irregular(path, status);
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, status) != 0) {
        worker_errno(errno, path);
    }
    refuse_irregular(path, status);
    return fd;
}

static size_t read_some(int fd, size_t at, size_t most, const char *path) {
    ssize_t count;
    do {
        count = read(fd, buffer + at, most);
    } while (count < 0 && errno == EINTR);
    if (count < 0) {
        worker_errno(errno == EINVAL || errno == EAGAIN ? EIO : errno, path);
    }
    return (size_t)count;
}

static void pack_number(struct Bytes *body, const char *key, int64_t value) {
    pack_string(body, key);
    pack_integer(body, value);
}

/* `size`: of what comes, where that is known. `status`: of the file, if what it says is true. */
static void announce(bool known, uint64_t size, const struct stat *status) {
    struct Bytes body = {0};
    pack_map(&body, (known ? 1 : 0) + (status != NULL ? 3 : 0));
    if (known) {
        pack_number(&body, "size", (int64_t)size);
    }
    if (status != NULL) {
        pack_number(&body, "file_size", status->st_size);
        pack_number(&body, "mtime_ns", (int64_t)status->st_mtim.tv_sec * 1000000000 + status->st_mtim.tv_nsec);
        pack_number(&body, "inode", (int64_t)status->st_ino);
    }
    worker_notice(&body);
}

static _Noreturn void finish(uint64_t size) {
    struct Bytes body = {0};
    close(STDOUT_FILENO);
    pack_map(&body, 1);
    pack_string(&body, "size");
    pack_integer(&body, (int64_t)size);
    worker_reply(&body);
}

/* From the page cache into the pipe without a copy; false where the file system has no such thing. What changes in the
 * file until the loop reads it is read as it is then, as of any file that changes. */
static bool splice_some(int fd, uint64_t most, const char *path, size_t *sent) {
    ssize_t count;
    do {
        count = splice(fd, NULL, STDOUT_FILENO, NULL, most < BULK_PIPE_BYTES ? (size_t)most : BULK_PIPE_BYTES, 0);
    } while (count < 0 && errno == EINTR);
    if (count < 0 && errno == EPIPE) {
        _exit(1);
    }
    if (count < 0 && errno != EINVAL) {
        worker_errno(errno == EAGAIN ? EIO : errno, path);
    }
    *sent = count > 0 ? (size_t)count : 0;
    return count >= 0;
}

static void send_content(size_t count) {
    if (!write_all(STDOUT_FILENO, buffer, count)) {
        _exit(1);
    }
}

/* Files of procfs and the like say size 0: read ahead to find out, and go on without a size when there is more. */
static _Noreturn void read_unsized(int fd, uint64_t most, const struct stat *status, const char *path) {
    size_t held = 0;
    bool whole = false;
    while (held < sizeof buffer && held < most && !whole) {
        size_t room = sizeof buffer - held;
        size_t count = read_some(fd, held, most - held < room ? (size_t)(most - held) : room, path);
        whole = count == 0;
        held += count;
    }
    /* Nothing from its beginning on: it is empty, no matter what kind of file. */
    bool empty = whole && held == 0 && lseek(fd, 0, SEEK_CUR) == 0;
    whole |= held == most;
    announce(whole, held, empty ? status : NULL);
    send_content(held);
    uint64_t total = held;
    while (!whole && total < most) {
        size_t count = read_some(fd, 0, most - total < sizeof buffer ? (size_t)(most - total) : sizeof buffer, path);
        whole = count == 0;
        send_content(count);
        total += count;
    }
    finish(total);
}

void files_read_run(const void *argument) {
    const struct FileRequest *request = argument;
    struct stat status;
    int fd = open_file(request->path, &status);
    uint64_t offset = (uint64_t)request->offset.value;
    uint64_t most = request->length.present ? (uint64_t)request->length.value : UINT64_MAX;
    if (offset > 0 && lseek(fd, (off_t)offset, SEEK_SET) < 0) {
        if (errno != EINVAL) {
            worker_errno(errno, request->path);
        }
        announce(true, 0, status.st_size > 0 ? &status : NULL); /* where no file of this file system can have bytes */
        finish(0);
    }
    if (status.st_size == 0) {
        read_unsized(fd, most, &status, request->path);
    }
    uint64_t size = (uint64_t)status.st_size > offset ? (uint64_t)status.st_size - offset : 0;
    size = size < most ? size : most;
    announce(true, size, &status);
    for (uint64_t left = size; left > 0;) {
        size_t count;
        if (!splice_some(fd, left, request->path, &count)) {
            count = read_some(fd, 0, left < sizeof buffer ? (size_t)left : sizeof buffer, request->path);
            send_content(count);
        }
        if (count == 0) {
            worker_fault("io_error", "%s became shorter while it was read", request->path);
        }
        left -= count;
    }
    finish(size);
}
