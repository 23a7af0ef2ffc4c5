/* Terminals: pairs of a master, which the daemon reads and writes, and a slave, which a session has as its own. */
#ifndef CAPSULE_TERMINAL_H
#define CAPSULE_TERMINAL_H

#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/types.h>

/* Take hold of /dev/pts while its name leads to what it says; call once, before anything of the user's runs. */
void terminals_open(void);
/* A new terminal of that size. `*reader` and `*writer` are the master, twice; all do not block. False with errno. */
bool terminal_make(const struct winsize *size, int *reader, int *writer, int *slave);
/* In the child, which leads a session and has the slave as descriptor 0: make it the session's. False with errno. */
bool terminal_take(uid_t owner);
/* SIGKILL for every process of a session, also for those in groups of their own. A child's work: it reads /proc. */
void terminal_kill_session(const void *leader_pid);

#endif
