/* Files of the system that are ours to write. In a child: it may block. */
#ifndef CAPSULE_REPLACE_H
#define CAPSULE_REPLACE_H

#include <stdbool.h>
#include <sys/stat.h>

#include "bytes.h"

/* Whether `path` is a file, and no link to one. */
bool is_regular(const char *path, struct stat *status);
/* Let `path` hold `content`, whole or as it was; true without writing when it does already, or when its directory is not
 * there. The path has at most 50 bytes. */
bool replace_file(const char *path, const struct Bytes *content);

#endif
