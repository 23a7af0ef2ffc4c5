/* files.watch: inotify, in words of its own. The kernel's queue is the only one: a reader that stalls stops us reading it,
 * and the kernel drops what does not fit and says so. */
#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "child.h"
#include "files.h"
#include "loop.h"
#include "pack.h"
#include "watch_tree.h"

/* The largest event: two paths, every byte of which became three. */
#define EVENT_BYTES (2 * 3 * MAX_PATH_BYTES + KIB)
#define EVENT_ROOM (sizeof(struct inotify_event) + 256)
/* A rename is two events. The second may take a moment, and a few others may come between. */
#define RENAME_WAIT_NS (20ULL * 1000000ULL)
#define RENAME_EVENTS 16
/* Between two batches: what happens often in between is told once. */
#define BATCH_PAUSE_NS (20ULL * 1000000ULL)

static bool recursive;
static bool removed;

/* --- what is told ------------------------------------------------------------------------------------------- */

static struct Bytes batch;
static struct Bytes last; /* the event before */
static size_t batched;
static bool overflow;

static _Noreturn void finish(const char *reason) {
    struct Bytes body = {0};
    pack_map(&body, 1);
    pack_string(&body, "reason");
    pack_string(&body, reason);
    worker_reply(&body);
}

/* END has come: nothing is read from the opener but its end. */
static void heed_end(void) {
    char ignored[4096];
    ssize_t count = read(STDIN_FILENO, ignored, sizeof ignored);
    if (count == 0 || (count < 0 && errno != EINTR && errno != EAGAIN)) {
        finish("ended");
    }
}

/* Wait for one of the descriptors (-1 for none), and for END meanwhile. False at the deadline. */
static bool wait_for(int fd, short events, uint64_t deadline) {
    for (;;) {
        uint64_t now = clock_monotonic_ns();
        struct pollfd waits[] = {{.fd = STDIN_FILENO, .events = POLLIN}, {.fd = fd, .events = events}};
        int timeout = deadline == NEVER ? -1 : deadline > now ? (int)((deadline - now + 999999) / 1000000) : 0;
        int ready = poll(waits, 2, timeout);
        if (ready > 0 && waits[0].revents != 0) {
            heed_end();
        }
        if (ready > 0 && waits[1].revents != 0) {
            return true;
        }
        if (ready == 0 && clock_monotonic_ns() >= deadline) {
            return false;
        }
    }
}

static void flush_batch(void) {
    struct Bytes body = {0};
    if (batched == 0 && !overflow) {
        return;
    }
    pack_map(&body, overflow ? 2 : 1);
    pack_string(&body, "events");
    pack_array(&body, batched);
    bytes_append(&body, bytes_front(&batch), batch.length);
    if (overflow) {
        pack_string(&body, "overflow");
        pack_bool(&body, true);
    }
    body.failed |= batch.failed;
    wait_for(CONTROL_FD, POLLOUT, NEVER);
    worker_notice(&body);
    bytes_free(&body);
    batch.length = last.length = batched = 0;
    overflow = false;
}

static void tell(const char *kind, const char *path, const char *to, bool directory) {
    static struct Bytes event;
    event.length = 0;
    pack_map(&event, to != NULL ? 4 : 3);
    pack_string(&event, "event");
    pack_string(&event, kind);
    pack_string(&event, "path");
    pack_string(&event, path);
    if (to != NULL) {
        pack_string(&event, "to");
        pack_string(&event, to);
    }
    pack_string(&event, "directory");
    pack_bool(&event, directory);
    if (event.failed) {
        worker_fault("internal", "the guest is out of memory");
    }
    if (event.length == last.length && memcmp(bytes_front(&event), bytes_front(&last), event.length) == 0) {
        return; /* written once more */
    }
    if (batch.length + event.length + KIB > NOTICE_BYTES) {
        flush_batch();
    }
    bytes_append(&batch, bytes_front(&event), event.length);
    batched++;
    last.length = 0;
    bytes_append(&last, bytes_front(&event), event.length);
}

static void tell_of(const char *kind, int directory, const char *name, bool is_directory) {
    char path[PATH_BUFFER];
    if (tree_path(directory, name, path)) {
        tell(kind, path, NULL, is_directory);
    }
}

/* --- what a walk has told before the kernel does ------------------------------------------------------------- */

static uint64_t told[MAX_TOLD]; /* hashes; 0 is none */
static size_t told_next;

static uint64_t hash_of(int directory, const char *name) {
    uint64_t hash = (14695981039346656037ULL ^ (uint64_t)directory) * 1099511628211ULL; /* FNV-1a */
    for (; *name != '\0'; name++) {
        hash = (hash ^ (uint8_t)*name) * 1099511628211ULL;
    }
    return hash | 1;
}

/* Whether the walk that added its directory has told of it; only once, for it may go and come again. */
static bool was_told(int directory, const char *name) {
    uint64_t hash = hash_of(directory, name);
    for (size_t i = 0; i < MAX_TOLD; i++) {
        if (told[i] == hash) {
            told[i] = 0;
            return true;
        }
    }
    return false;
}

static void found(int directory, const char *name, bool is_directory) {
    told[told_next++ % MAX_TOLD] = hash_of(directory, name);
    tell_of("create", directory, name, is_directory);
}

/* --- what the kernel says ----------------------------------------------------------------------------------- */

static _Alignas(struct inotify_event) char buffer[64 * KIB];
static size_t start;
static size_t end;

/* More events behind those that are there; false when there are none, or no room. */
static bool fill(void) {
    memmove(buffer, buffer + start, end - start);
    end -= start;
    start = 0;
    if (sizeof buffer - end < EVENT_ROOM) {
        return false;
    }
    ssize_t count = read(tree_notifier(), buffer + end, sizeof buffer - end);
    if (count < 0 && errno != EAGAIN && errno != EINTR) {
        worker_fault("io_error", "the watch broke: %s", strerror(errno));
    }
    end += count > 0 ? (size_t)count : 0;
    return count > 0;
}

static struct inotify_event *event_at(size_t at) { return (struct inotify_event *)(void *)(buffer + at); }

static size_t size_at(size_t at) { return sizeof(struct inotify_event) + event_at(at)->len; }

static struct inotify_event *find_target(uint32_t cookie, size_t *behind) {
    *behind = 0;
    for (size_t at = start; at < end; at += size_at(at), ++*behind) {
        if (event_at(at)->mask & IN_MOVED_TO && event_at(at)->cookie == cookie) {
            return event_at(at);
        }
    }
    return NULL;
}

/* The other half of a rename, if it stays within what is watched. */
static struct inotify_event *await_target(uint32_t cookie) {
    size_t behind;
    struct inotify_event *target = find_target(cookie, &behind);
    uint64_t deadline = clock_monotonic_ns() + RENAME_WAIT_NS;
    while (target == NULL && behind < RENAME_EVENTS && wait_for(tree_notifier(), POLLIN, deadline) && fill()) {
        target = find_target(cookie, &behind);
    }
    return target;
}

static void appear(int directory, const char *name, bool is_directory) {
    if (was_told(directory, name)) {
        return;
    }
    tell_of("create", directory, name, is_directory);
    if (is_directory && recursive) {
        tree_add(directory, name, found);
    }
}

static void move(int directory, const char *name, bool is_directory, uint32_t cookie) {
    char from[PATH_BUFFER];
    char to[PATH_BUFFER];
    struct inotify_event *target = await_target(cookie);
    bool known = tree_path(directory, name, from);
    was_told(directory, name);
    if (target == NULL || !known || !tree_path(target->wd, target->name, to)) {
        tell_of("remove", directory, name, is_directory);
        if (is_directory) {
            tree_drop(directory, name);
        }
        return;
    }
    target->mask = 0; /* done with it */
    was_told(target->wd, target->name);
    tell("rename", from, to, is_directory);
    if (is_directory && recursive && !tree_move(directory, name, target->wd, target->name)) {
        tree_add(target->wd, target->name, found);
    }
}

static void about_root(uint32_t mask) {
    bool directory;
    if (mask & (IN_DELETE_SELF | IN_MOVE_SELF | IN_UNMOUNT | IN_IGNORED) || !tree_root_stays(&directory)) {
        removed = true;
    } else if (mask & (IN_MODIFY | IN_ATTRIB)) {
        tell_of(mask & IN_MODIFY ? "write" : "chmod", tree_root(), NULL, directory);
    }
}

static void lose_track(void) {
    bool directory;
    overflow = true;
    memset(told, 0, sizeof told);
    removed |= !tree_root_stays(&directory);
    if (recursive) {
        tree_walk_again();
    }
}

static void handle(int directory, uint32_t mask, uint32_t cookie, const char *name) {
    bool is_directory = mask & IN_ISDIR;
    if (mask & IN_Q_OVERFLOW) {
        lose_track();
    } else if (tree_find(directory) == NULL) {
        return;
    } else if (directory == tree_root() && (name[0] == '\0' || mask & IN_IGNORED)) {
        about_root(mask);
    } else if (mask & IN_IGNORED) {
        tree_forget(directory);
    } else if (name[0] == '\0') {
        return; /* the directory above tells it, too */
    } else if (mask & IN_MOVED_FROM) {
        move(directory, name, is_directory, cookie);
    } else if (mask & (IN_CREATE | IN_MOVED_TO)) {
        appear(directory, name, is_directory);
    } else if (mask & IN_DELETE) {
        was_told(directory, name);
        tell_of("remove", directory, name, is_directory);
    } else if (mask & (IN_MODIFY | IN_ATTRIB)) {
        tell_of(mask & IN_MODIFY ? "write" : "chmod", directory, name, is_directory);
    }
}

static void handle_all(void) {
    fill();
    while (start < end && !removed) {
        struct inotify_event event = *event_at(start);
        char name[NAME_BUFFER] = "";
        if (event.len > 0) {
            strncpy(name, event_at(start)->name, sizeof name - 1);
        }
        start += sizeof event + event.len;
        handle(event.wd, event.mask, event.cookie, name);
    }
}

void files_watch_run(const void *argument) {
    const struct FileRequest *request = argument;
    struct Bytes empty = {0};
    recursive = request->recursive;
    if (!bytes_reserve(&batch, NOTICE_BYTES) || !bytes_reserve(&last, EVENT_BYTES)) {
        worker_fault("internal", "the guest is out of memory");
    }
    tree_open(request->path);
    if (recursive) {
        tree_walk_again();
    }
    pack_map(&empty, 0);
    worker_notice(&empty);
    while (!removed) {
        wait_for(tree_notifier(), POLLIN, NEVER);
        handle_all();
        flush_batch();
        if (!removed) {
            wait_for(-1, 0, clock_monotonic_ns() + BATCH_PAUSE_NS);
        }
    }
    finish("removed");
}
