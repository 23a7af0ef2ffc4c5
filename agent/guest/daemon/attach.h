/* Attachments: the streams that a lasting process (job.h) has at the moment.
 *
 * Owns: a position in the process's ring, the stream's credit in both directions.   Owned by: the job.
 * Dies when: the process has ended and its output was delivered, at CANCEL, with the connection, or when another takes
 * over. None of that ends the process.
 */
#ifndef CAPSULE_ATTACH_H
#define CAPSULE_ATTACH_H

#include "job.h"

struct Attachment {
    struct Attachment *next;
    struct Job *job;
    struct Connection *connection;
    uint32_t stream;
    bool observer;     /* has no input, and holds nobody up */
    uint64_t position; /* of the next byte of output to send */
    uint64_t deadline;

    struct Bytes notice; /* the first one; no output before it is sent */
    bool announced;
    uint64_t send_credit;
    uint64_t sent_end; /* see Job */

    uint32_t receive_credit;
    uint32_t consumed;
    bool ended;
};

/* The stream that `open` opened joins `job`, from `position` on; who was attached before is told, unless `observer`.
 * NULL: there is no memory, and nothing has happened. */
struct Attachment *attachment_add(struct Job *job, struct Connection *connection, const struct Frame *open,
                                  bool observer, uint64_t position);

/* A frame for a stream that is attached: false when there is none such; `*kept` whether it kept the protocol. */
bool attachments_receive(struct Connection *connection, const struct Frame *frame, bool *kept);
void attachments_abandon(const struct Connection *connection);
/* The last frame of all streams of a job. */
void attachments_fault(struct Job *job, const char *code, const char *message);

/* How many bytes of output the job may bring now. */
size_t attachments_room(const struct Job *job);
/* Send what may be sent, the first notice before all; whether that was much. */
bool attachments_flow(struct Job *job);
/* The process has taken `count` bytes of its input. */
void attachments_took(struct Job *job, size_t count);
/* Deadlines and the end. */
void attachments_advance(struct Job *job, uint64_t now);
uint64_t attachments_deadline(const struct Job *job);

#endif
