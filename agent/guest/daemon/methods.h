/* The guest methods of docs/protocol.md: each checks its body, then answers at once or starts a job. */
#ifndef CAPSULE_METHODS_H
#define CAPSULE_METHODS_H

#include "connection.h"
#include "frames.h"

void methods_open(struct Connection *connection, const struct Frame *open);

/* What `configure` may change. A daemon that serves on a developer's machine must leave that machine alone. */
void configure_system_changes(bool allowed);
/* Boot to READY, for `info`. */
void info_ready_now(void);
uint64_t info_boot_ns(void);

/* process.c */
void exec_open(struct Connection *connection, const struct Frame *open);

/* processes_list.c */
void processes_list_open(struct Connection *connection, const struct Frame *open);
unsigned processes_count(void);

/* processes.c */
void processes_attach_open(struct Connection *connection, const struct Frame *open);
void processes_resize_open(struct Connection *connection, const struct Frame *open);
void processes_signal_open(struct Connection *connection, const struct Frame *open);

/* configure.c */
void configure_open(struct Connection *connection, const struct Frame *open);
/* The envs of the last `configure`, as a FIELD_ENVS value. */
struct Slice configure_envs(void);

/* files.c */
void files_open(struct Connection *connection, const struct Frame *open);

#endif
