/* Processes: what is known of what exec started, for the methods that name one. */
#ifndef CAPSULE_PROCESS_H
#define CAPSULE_PROCESS_H

#include <sys/ioctl.h>

#include "job.h"

/* (One whose start has failed is none, even while its child is on its way out.) */
static inline bool process_is_alive(const struct Job *job) {
    return job->process != NULL && !job->reaped && !(job->forgotten && job->process->user == NULL);
}
/* Of those that run; NULL when there is none. */
struct Job *process_with_tag(struct Slice tag);

/* Remember what processes.list shows of a command (absent: a login shell) and its arguments (absent: a command line). */
void process_remember(struct Process *process, struct Slice command, struct Slice arguments);
/* A map with pid, tag and room for `more` further pairs. */
void process_pack_identity(struct Bytes *bytes, const struct Job *job, size_t more);
/* `{cols, rows}`; false with a message. */
bool process_read_size(struct Slice body, struct winsize *size, char *error);

#endif
