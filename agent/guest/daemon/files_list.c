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

/* The largest entry: three names, every byte of which became three. */
#define ENTRY_BYTES (3 * (2 * MAX_PATH_BYTES + NAME_MAX) + 2 * KIB)
#define ENVELOPE_BYTES 16

static struct Bytes batch;
static size_t batched;
static uint64_t listed;

struct Names {
    char **items;
    size_t count;
    size_t capacity;
};

static void flush_batch(void) {
    struct Bytes body = {0};
    if (batched == 0) {
        return;
    }
    pack_map(&body, 1);
    pack_string(&body, "entries");
    pack_array(&body, batched);
    bytes_append(&body, bytes_front(&batch), batch.length);
    body.failed |= batch.failed;
    worker_notice(&body);
    bytes_free(&body);
    batch.length = 0;
    batched = 0;
}

static void add_entry(int directory, const char *name, const char *path, const struct stat *status) {
    static struct Bytes entry;
    entry.length = 0;
    pack_entry(&entry, directory, name, path, status);
    if (entry.failed) {
        worker_fault("internal", "the guest is out of memory");
    }
    if (batch.length + entry.length + ENVELOPE_BYTES > NOTICE_BYTES) {
        flush_batch();
    }
    bytes_append(&batch, bytes_front(&entry), entry.length);
    batched++;
    listed++;
}

static void add_name(struct Names *names, const char *name, const char *path) {
    if (names->count == MAX_DIRECTORY_NAMES) {
        worker_fault("too_large", "%s has more than %d entries", path, MAX_DIRECTORY_NAMES);
    }
    if (names->count == names->capacity) {
        names->capacity = names->capacity == 0 ? 64 : 2 * names->capacity;
        char **items = realloc(names->items, names->capacity * sizeof *items);
        if (items == NULL) {
            worker_fault("internal", "the guest is out of memory");
        }
        names->items = items;
    }
    if ((names->items[names->count++] = strdup(name)) == NULL) {
        worker_fault("internal", "the guest is out of memory");
    }
}

static int compare(const void *left, const void *right) {
    return strcmp(*(char *const *)left, *(char *const *)right);
}

/* Takes the descriptor over. */
static struct Names read_names(DIR *stream, const char *path) {
    struct Names names = {0};
    struct dirent *item;
    errno = 0;
    while ((item = readdir(stream)) != NULL) {
        if (strcmp(item->d_name, ".") != 0 && strcmp(item->d_name, "..") != 0) {
            add_name(&names, item->d_name, path);
        }
        errno = 0;
    }
    if (errno != 0) {
        worker_errno(errno, path);
    }
    if (names.count > 0) {
        qsort(names.items, names.count, sizeof *names.items, compare);
    }
    return names;
}

/* `path` is a buffer of PATH_BUFFER bytes that holds the directory's path; it is put back as it was. */
static void walk(int fd, char *path, int64_t depth) {
    DIR *stream = fdopendir(fd);
    if (stream == NULL) {
        worker_errno(errno, path);
    }
    struct Names names = read_names(stream, path);
    size_t length = strlen(path);
    for (size_t i = 0; i < names.count; i++) {
        const char *name = names.items[i];
        struct stat status;
        size_t used = length == 1 ? 0 : length; /* the root's path is its slash */
        bool fits = used + 1 + strlen(name) < PATH_BUFFER;
        if (fits && fstatat(fd, name, &status, AT_SYMLINK_NOFOLLOW) == 0) { /* else it has just gone */
            path[used] = '/';
            strcpy(path + used + 1, name);
            add_entry(fd, name, path, &status);
            int child = S_ISDIR(status.st_mode) && depth > 1
                            ? openat(fd, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC)
                            : -1;
            if (child >= 0) {
                walk(child, path, depth - 1);
            }
            path[length] = '\0';
        }
        free(names.items[i]);
    }
    free(names.items);
    closedir(stream);
}

void files_list_run(const void *argument) {
    const struct FileRequest *request = argument;
    static char path[PATH_BUFFER];
    struct Bytes body = {0};
    strcpy(path, request->path);
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (fd < 0) {
        worker_errno(errno, path);
    }
    if (!bytes_reserve(&batch, NOTICE_BYTES + ENTRY_BYTES)) {
        worker_fault("internal", "the guest is out of memory");
    }
    walk(fd, path, request->depth.value);
    flush_batch();
    pack_map(&body, 1);
    pack_string(&body, "count");
    pack_integer(&body, (int64_t)listed);
    worker_reply(&body);
}
