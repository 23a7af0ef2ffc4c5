#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

#include "child.h"
#include "files.h"

#define MAX_LINKS 40
#define TEMPORARY_NAME_BYTES 48

/* Where the content goes: `name` in the directory that `directory` has open, whose real path is `path`. */
struct Target {
    int directory;
    char path[PATH_BUFFER];
    char name[NAME_MAX + 2];
    bool exists;
    struct stat status;
};

static int temporary_directory = -1;
static char temporary_name[TEMPORARY_NAME_BYTES];

static void remove_temporary(void) {
    if (temporary_directory >= 0) {
        unlinkat(temporary_directory, temporary_name, 0);
    }
}

/* Follows `path` itself through symbolic links, also to a target that is not there yet. */
static void resolve_links(char path[PATH_BUFFER]) {
    char link[PATH_BUFFER];
    for (int links = 0;; links++) {
        ssize_t length = readlink(path, link, sizeof link - 1);
        if (length < 0) {
            return; /* not a link, or not there: opening will tell */
        }
        if (links == MAX_LINKS) {
            worker_errno(ELOOP, path);
        }
        link[length] = '\0';
        size_t kept = link[0] == '/' ? 0 : (size_t)(base_name(path) - path);
        if (kept + (size_t)length >= PATH_BUFFER) {
            worker_errno(ENAMETOOLONG, path);
        }
        memcpy(path + kept, link, (size_t)length + 1);
    }
}

static void open_target(const char *wanted, struct Target *target) {
    char path[PATH_BUFFER];
    strcpy(path, wanted);
    resolve_links(path);
    const char *name = base_name(path);
    if (strcmp(path, "/") == 0 || strcmp(name, ".") == 0 || strcmp(name, "..") == 0 || path[strlen(path) - 1] == '/') {
        worker_errno(EISDIR, wanted);
    }
    if (strlen(name) > NAME_MAX) {
        worker_errno(ENAMETOOLONG, wanted);
    }
    strcpy(target->name, name);
    int reason = make_parents(path);
    if (reason != 0) {
        worker_errno(reason, wanted);
    }
    size_t parent = (size_t)(name - path);
    path[parent > 1 ? parent - 1 : parent] = '\0';
    char *real = realpath(path, NULL);
    if (real == NULL || strlen(real) >= sizeof target->path) {
        worker_errno(real == NULL ? errno : ENAMETOOLONG, wanted);
    }
    strcpy(target->path, real);
    free(real);
    target->directory = open(target->path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    if (target->directory < 0) {
        worker_errno(errno, wanted);
    }
    target->exists = fstatat(target->directory, target->name, &target->status, AT_SYMLINK_NOFOLLOW) == 0;
    if (!target->exists && errno != ENOENT) {
        worker_errno(errno, wanted);
    }
    if (target->exists && S_ISDIR(target->status.st_mode)) {
        worker_errno(EISDIR, wanted);
    }
    if (target->exists && !S_ISREG(target->status.st_mode)) {
        worker_fault("not_a_file", "%s is not a regular file", wanted);
    }
}

/* The loop hears of the name before the file exists: should this child be killed, it removes the file. */
static int create_temporary(const struct Target *target, const char *wanted) {
    unsigned char random[16];
    char path[PATH_BUFFER + TEMPORARY_NAME_BYTES];
    if (getrandom(random, sizeof random, 0) != sizeof random) {
        worker_errno(EIO, wanted);
    }
    strcpy(temporary_name, ".capsule-");
    for (size_t i = 0; i < sizeof random; i++) {
        snprintf(temporary_name + strlen(temporary_name), 3, "%02x", random[i]);
    }
    int length = snprintf(path, sizeof path, "%s/%s", target->path, temporary_name);
    worker_record(RECORD_TEMPORARY, (struct Slice){.data = (const uint8_t *)path, .length = (size_t)length});
    int fd = openat(target->directory, temporary_name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0) {
        worker_errno(errno, wanted);
    }
    temporary_directory = target->directory;
    worker_cleanup = remove_temporary;
    return fd;
}

static void check_size(const struct FileRequest *request, uint64_t total, bool whole) {
    uint64_t size = (uint64_t)request->size.value;
    if (request->size.present && (total > size || (whole && total != size))) {
        worker_fault("size_mismatch", "%s: %llu bytes were announced, %s%llu came", request->path,
                     (unsigned long long)size, whole ? "" : "at least ", (unsigned long long)total);
    }
}

/* (Not by splice(2): that holds the pipe's lock for as long as the file system takes, and the daemon, which writes into
 * the pipe, would stand still with it.) */
static void copy_content(int fd, const struct FileRequest *request) {
    static uint8_t buffer[MAX_DATA_BYTES];
    uint64_t total = 0;
    for (;;) {
        ssize_t count = read(STDIN_FILENO, buffer, sizeof buffer);
        if (count < 0 && errno == EINTR) {
            continue;
        }
        if (count <= 0) {
            break;
        }
        total += (uint64_t)count;
        check_size(request, total, false);
        if (!write_all(fd, buffer, (size_t)count)) {
            worker_errno(errno, request->path);
        }
    }
    if (!worker_committed()) {
        worker_fault("cancelled", "the upload of %s broke off", request->path);
    }
    check_size(request, total, true);
}

static void publish(int fd, const struct Target *target, const struct FileRequest *request) {
    const struct stat *old = &target->status;
    mode_t mode = target->exists ? old->st_mode & 07777 : request->mode.present ? (mode_t)request->mode.value : 0644;
    if (target->exists && fchown(fd, old->st_uid, old->st_gid) != 0) {
        worker_errno(errno, request->path);
    }
    if (fchmod(fd, mode) != 0 || fsync(fd) != 0 || close(fd) != 0 ||
        renameat(target->directory, temporary_name, target->directory, target->name) != 0) {
        worker_errno(errno, request->path);
    }
    worker_cleanup = NULL;
    if (fsync(target->directory) != 0) {
        worker_errno(errno, request->path);
    }
}

void files_write_run(const void *argument) {
    const struct FileRequest *request = argument;
    static struct Target target;
    open_target(request->path, &target);
    int fd = create_temporary(&target, request->path);
    copy_content(fd, request);
    publish(fd, &target, request);
    char path[PATH_BUFFER + NAME_MAX + 2];
    snprintf(path, sizeof path, "%s/%s", strcmp(target.path, "/") == 0 ? "" : target.path, target.name);
    reply_entry(path);
}
