#include "watch_tree.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <unistd.h>

#include "child.h"

#define EVENTS                                                                                                         \
    (IN_CREATE | IN_MODIFY | IN_ATTRIB | IN_DELETE | IN_MOVED_FROM | IN_MOVED_TO | IN_DELETE_SELF | IN_MOVE_SELF |     \
     IN_EXCL_UNLINK)

static int notifier = -1;
static int root;
static char root_path[PATH_BUFFER];
static struct stat root_status;
static struct Watched *watched; /* by descriptor: the kernel hands out growing ones */
static size_t count;
static size_t capacity;
static unsigned walk; /* the current one: a directory that is mounted within itself is looked at once */

int tree_notifier(void) { return notifier; }

int tree_root(void) { return root; }

/* Where it is, or would be. */
static size_t position(int descriptor) {
    size_t low = 0;
    for (size_t high = count; low < high;) {
        size_t middle = low + (high - low) / 2;
        if (watched[middle].descriptor < descriptor) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

static struct Watched *lookup(int descriptor) {
    size_t at = position(descriptor);
    return at < count && watched[at].descriptor == descriptor ? &watched[at] : NULL;
}

const struct Watched *tree_find(int descriptor) { return lookup(descriptor); }

static struct Watched *lookup_child(int parent, const char *name) {
    for (size_t i = 0; i < count; i++) {
        if (watched[i].parent == parent && watched[i].name != NULL && strcmp(watched[i].name, name) == 0) {
            return &watched[i];
        }
    }
    return NULL;
}

static char *copy(const char *name) {
    char *text = strdup(name);
    if (text == NULL) {
        worker_fault("internal", "the guest is out of memory");
    }
    return text;
}

static struct Watched *insert(int descriptor, int parent, const char *name) {
    if (count == MAX_WATCHED) {
        worker_fault("too_large", "there are more than %d directories below %s; watch fewer of them", MAX_WATCHED,
                     root_path);
    }
    if (count == capacity) {
        capacity = capacity == 0 ? 64 : 2 * capacity;
        watched = realloc(watched, capacity * sizeof *watched);
        if (watched == NULL) {
            worker_fault("internal", "the guest is out of memory");
        }
    }
    size_t at = position(descriptor);
    memmove(watched + at + 1, watched + at, (count - at) * sizeof *watched);
    count++;
    watched[at] = (struct Watched){.descriptor = descriptor, .parent = parent, .name = name != NULL ? copy(name) : NULL};
    return &watched[at];
}

void tree_forget(int descriptor) {
    size_t at = position(descriptor);
    if (at < count && watched[at].descriptor == descriptor) {
        free(watched[at].name);
        memmove(watched + at, watched + at + 1, (count - at - 1) * sizeof *watched);
        count--;
    }
}

/* Written from its end; every directory names the one above it. */
bool tree_path(int descriptor, const char *name, char path[PATH_BUFFER]) {
    char reversed[PATH_BUFFER];
    size_t at = sizeof reversed - 1;
    reversed[at] = '\0';
    const struct Watched *node = lookup(descriptor);
    while (name != NULL) {
        size_t length = strlen(name);
        if (node == NULL || length + 1 > at) {
            return false;
        }
        at -= length;
        memcpy(reversed + at, name, length);
        reversed[--at] = '/';
        name = node->name;
        node = node->name != NULL ? lookup(node->parent) : node;
    }
    if (node == NULL) {
        return false;
    }
    if (node->name != NULL) { /* itself was asked for */
        return tree_path(node->parent, node->name, path);
    }
    size_t used = strcmp(root_path, "/") == 0 && reversed[at] != '\0' ? 0 : strlen(root_path);
    if (used + strlen(reversed + at) >= PATH_BUFFER) {
        return false;
    }
    memcpy(path, root_path, used);
    strcpy(path + used, reversed + at);
    return true;
}

static _Noreturn void refuse_more(void) {
    worker_fault("too_large", "the sandbox's kernel watches as many directories as it can; watch fewer of them");
}

void tree_open(const char *path) {
    strcpy(root_path, path);
    notifier = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (notifier < 0) {
        worker_fault("too_many_processes", "the sandbox's kernel has no room for another watch");
    }
    root = inotify_add_watch(notifier, path, EVENTS);
    if (root < 0 && errno == ENOSPC) {
        refuse_more();
    }
    if (root < 0 || stat(path, &root_status) != 0) {
        worker_errno(errno == ENOTDIR ? ENOENT : errno, path);
    }
    insert(root, -1, NULL);
}

bool tree_root_stays(bool *directory) {
    struct stat status;
    *directory = S_ISDIR(root_status.st_mode);
    return stat(root_path, &status) == 0 && status.st_dev == root_status.st_dev && status.st_ino == root_status.st_ino;
}

/* --- walking ------------------------------------------------------------------------------------------------ */

/* Descriptors of directories that are watched and still to be looked into. */
static struct Queue {
    int *items;
    size_t first;
    size_t end;
    size_t capacity;
} queue;

static void enqueue(int descriptor) {
    if (queue.end == queue.capacity) {
        queue.capacity = queue.capacity == 0 ? 64 : 2 * queue.capacity;
        queue.items = realloc(queue.items, queue.capacity * sizeof *queue.items);
        if (queue.items == NULL) {
            worker_fault("internal", "the guest is out of memory");
        }
    }
    queue.items[queue.end++] = descriptor;
}

/* Watch it before anybody looks into it: what appears after the look is told by the kernel. */
static void watch_directory(int parent, const char *name) {
    char path[PATH_BUFFER];
    if (!tree_path(parent, name, path)) {
        return;
    }
    int descriptor = inotify_add_watch(notifier, path, EVENTS | IN_ONLYDIR | IN_DONT_FOLLOW);
    if (descriptor < 0) {
        if (errno == ENOSPC) {
            refuse_more();
        }
        return; /* gone, or something else by now */
    }
    struct Watched *node = lookup(descriptor);
    if (node == NULL) {
        node = insert(descriptor, parent, name);
    } else if (node->walk == walk || node->name == NULL) {
        return;
    } else {
        free(node->name);
        node->name = copy(name);
        node->parent = parent;
    }
    node->walk = walk;
    enqueue(descriptor);
}

static bool is_directory(int directory, const struct dirent *item) {
    struct stat status;
    if (item->d_type != DT_UNKNOWN) {
        return item->d_type == DT_DIR;
    }
    return fstatat(directory, item->d_name, &status, AT_SYMLINK_NOFOLLOW) == 0 && S_ISDIR(status.st_mode);
}

static void look_into(int descriptor, Found found) {
    char path[PATH_BUFFER];
    if (!tree_path(descriptor, NULL, path)) {
        return;
    }
    int fd = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (descriptor == root ? 0 : O_NOFOLLOW));
    DIR *stream = fd >= 0 ? fdopendir(fd) : NULL;
    for (struct dirent *item; stream != NULL && (item = readdir(stream)) != NULL;) {
        if (strcmp(item->d_name, ".") == 0 || strcmp(item->d_name, "..") == 0) {
            continue;
        }
        bool directory = is_directory(fd, item);
        if (found != NULL) {
            found(descriptor, item->d_name, directory);
        }
        if (directory) {
            watch_directory(descriptor, item->d_name);
        }
    }
    if (stream != NULL) {
        closedir(stream);
    } else if (fd >= 0) {
        close(fd);
    }
}

static void work_off(Found found) {
    while (queue.first < queue.end) {
        look_into(queue.items[queue.first++], found);
    }
    queue.first = queue.end = 0;
}

void tree_add(int parent, const char *name, Found found) {
    walk++;
    watch_directory(parent, name);
    work_off(found);
}

void tree_walk_again(void) {
    walk++;
    struct Watched *top = lookup(root);
    if (top == NULL || !S_ISDIR(root_status.st_mode)) {
        return;
    }
    top->walk = walk;
    enqueue(root);
    work_off(NULL);
    for (size_t i = count; i-- > 0;) {
        if (watched[i].walk != walk) {
            inotify_rm_watch(notifier, watched[i].descriptor);
            tree_forget(watched[i].descriptor);
        }
    }
}

/* --- moves -------------------------------------------------------------------------------------------------- */

bool tree_move(int from, const char *name, int to, const char *new_name) {
    struct Watched *node = lookup_child(from, name);
    if (node == NULL) {
        return false;
    }
    int descriptor = node->descriptor;
    bool taken = lookup_child(to, new_name) != NULL;
    free(node->name);
    node->name = copy(new_name);
    node->parent = to;
    if (taken) { /* replaced, or exchanged with it: only the file system knows */
        tree_walk_again();
    }
    return lookup(descriptor) != NULL;
}

static bool is_below(const struct Watched *node, int descriptor) {
    for (size_t steps = 0; node != NULL && steps <= count; steps++) {
        if (node->descriptor == descriptor) {
            return true;
        }
        node = node->name != NULL ? lookup(node->parent) : NULL;
    }
    return false;
}

void tree_drop(int parent, const char *name) {
    struct Watched *node = lookup_child(parent, name);
    if (node == NULL) {
        return;
    }
    int top = node->descriptor;
    walk++; /* marks what goes */
    for (size_t i = 0; i < count; i++) {
        if (is_below(&watched[i], top)) {
            watched[i].walk = walk;
        }
    }
    for (size_t i = count; i-- > 0;) {
        if (watched[i].walk == walk) {
            inotify_rm_watch(notifier, watched[i].descriptor);
            tree_forget(watched[i].descriptor);
        }
    }
}
