/* What an exec asks for, and what the child makes of it. */
#ifndef CAPSULE_EXEC_H
#define CAPSULE_EXEC_H

#include "bytes.h"
#include "fields.h"

/* Slices point into the OPEN frame; the child has its own copy of that memory. Absent: data is NULL. */
struct Exec {
    struct Slice command;
    struct Slice arguments;
    struct Slice envs;
    struct Slice default_envs;
    struct Slice cwd;
    struct Slice user;
    struct Slice tag;
    struct Integer timeout_ms;
    bool stdin_wanted;
    bool background;
    bool detach;
    bool terminal;
};

/* In the child: become the user, enter the directory, execve. Does not return. */
void exec_run(const void *exec);

#endif
