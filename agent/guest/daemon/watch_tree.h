/* What one watch covers: which watch descriptor is which directory, wherever it has been moved since. */
#ifndef CAPSULE_WATCH_TREE_H
#define CAPSULE_WATCH_TREE_H

#include <sys/stat.h>

#include "files.h"

/* A directory, or the root of the watch, which may be a file. */
struct Watched {
    int descriptor;
    int parent; /* its parent's descriptor; -1: the root */
    unsigned walk; /* the last walk that came by */
    char *name; /* NULL: the root */
};

/* Called for everything below a directory that a walk comes by. */
typedef void (*Found)(int parent, const char *name, bool directory);

/* Watch `path` alone. Faults when that is not possible. */
void tree_open(const char *path);
/* For poll and read. */
int tree_notifier(void);
int tree_root(void);
/* Whether what is at the path now is still what is watched. */
bool tree_root_stays(bool *directory);

const struct Watched *tree_find(int descriptor);
/* The path of `name` (NULL: of itself) in a directory; false when it has none any more, or one that is too long. */
bool tree_path(int descriptor, const char *name, char path[PATH_BUFFER]);

/* Watch the directory `name` in `parent`, and all below it; `found` (may be NULL) hears of what is there. Nothing when it
 * has gone. Faults beyond MAX_WATCHED directories. */
void tree_add(int parent, const char *name, Found found);
/* The same for all below the root, and drop what is not there any more. */
void tree_walk_again(void);
/* A directory was moved within the tree. False when it was none that is watched. */
bool tree_move(int from, const char *name, int to, const char *new_name);
/* It was moved out: watch nothing below it. */
void tree_drop(int parent, const char *name);
/* The kernel watches it no more. */
void tree_forget(int descriptor);

#endif
