#include "attach.h"

#include <stdlib.h>

#include "guest_limits.h"
#include "pack.h"
#include "ring.h"

/* --- coming and going --------------------------------------------------------------------------------------- */

static void end(struct Attachment **at) {
    struct Attachment *attachment = *at;
    *at = attachment->next;
    attachment->connection->streams--;
    bytes_free(&attachment->notice);
    free(attachment);
}

static struct Attachment *owner_of(const struct Job *job) {
    struct Attachment *attachment = job->attachments;
    while (attachment != NULL && attachment->observer) {
        attachment = attachment->next;
    }
    return attachment;
}

/* What the one before sent and the process has not read stays, but no more than one stream may send: else each that
 * takes over could add to it. */
static void take_over(struct Job *job) {
    for (struct Attachment **at = &job->attachments; *at != NULL;) {
        if ((*at)->observer) {
            at = &(*at)->next;
            continue;
        }
        connection_taken_over((*at)->connection, (*at)->stream);
        end(at);
    }
    if (job->input.length > INITIAL_CREDIT) {
        job->input.length = INITIAL_CREDIT;
    }
    job->strange = job->input.length;
}

struct Attachment *attachment_add(struct Job *job, struct Connection *connection, const struct Frame *open,
                                  bool observer, uint64_t position) {
    struct Attachment *attachment = calloc(1, sizeof *attachment);
    if (attachment == NULL) {
        return NULL;
    }
    if (!observer) {
        take_over(job);
    }
    *attachment = (struct Attachment){.next = job->attachments,
                                      .job = job,
                                      .connection = connection,
                                      .stream = open->stream,
                                      .observer = observer,
                                      .position = position,
                                      .deadline = NEVER,
                                      .send_credit = connection->initial_credit,
                                      .receive_credit = INITIAL_CREDIT};
    if (open->timeout_ms > 0) {
        attachment->deadline = clock_monotonic_ns() + open->timeout_ms * 1000000ULL;
    }
    job->attachments = attachment;
    connection->streams++;
    return attachment;
}

void attachments_abandon(const struct Connection *connection) {
    for (struct Job *job = jobs_first(); job != NULL; job = job->next) {
        for (struct Attachment **at = &job->attachments; *at != NULL;) {
            if ((*at)->connection == connection) {
                end(at);
            } else {
                at = &(*at)->next;
            }
        }
    }
}

void attachments_fault(struct Job *job, const char *code, const char *message) {
    while (job->attachments != NULL) {
        connection_fault(job->attachments->connection, job->attachments->stream, code, "%s", message);
        end(&job->attachments);
    }
}

/* --- from the opener ---------------------------------------------------------------------------------------- */

static void grant(struct Attachment *attachment, size_t count) {
    attachment->consumed += (uint32_t)count;
    if (attachment->consumed >= CREDIT_STEP) {
        frame_credit(&attachment->connection->out, attachment->stream, attachment->consumed);
        attachment->receive_credit += attachment->consumed;
        attachment->consumed = 0;
    }
}

void attachments_took(struct Job *job, size_t count) {
    size_t strange = count < job->strange ? count : job->strange;
    struct Attachment *owner = owner_of(job);
    job->strange -= strange;
    if (owner != NULL) {
        grant(owner, count - strange);
    }
}

static bool take_data(struct Attachment *attachment, struct Slice data) {
    if (attachment->ended || data.length > attachment->receive_credit) {
        return false;
    }
    attachment->receive_credit -= (uint32_t)data.length;
    if (attachment->observer) {
        grant(attachment, data.length);
        return true;
    }
    size_t used = job_give(attachment->job, data);
    /* (Bytes that found no memory are lost with the process that was to read them.) */
    if (attachment->job->input.failed) {
        job_fault(attachment->job, "internal", "the guest is out of memory");
        return true;
    }
    grant(attachment, used);
    return true;
}

static bool take_end(struct Attachment *attachment) {
    if (attachment->ended) {
        return false;
    }
    attachment->ended = true;
    if (!attachment->observer && !attachment->job->terminal && !attachment->job->ended) {
        job_take_end(attachment->job);
    }
    return true;
}

static struct Attachment **find(const struct Connection *connection, uint32_t stream) {
    for (struct Job *job = jobs_first(); job != NULL; job = job->next) {
        for (struct Attachment **at = &job->attachments; *at != NULL; at = &(*at)->next) {
            if ((*at)->connection == connection && (*at)->stream == stream) {
                return at;
            }
        }
    }
    return NULL;
}

bool attachments_receive(struct Connection *connection, const struct Frame *frame, bool *kept) {
    struct Attachment **at = find(connection, frame->stream);
    *kept = true;
    if (at == NULL) {
        return false;
    }
    switch (frame->tag) {
    case TAG_DATA:
        *kept = take_data(*at, frame->data);
        break;
    case TAG_END:
        *kept = take_end(*at);
        break;
    case TAG_CREDIT:
        (*at)->send_credit += frame->amount;
        *kept = (*at)->send_credit <= MAX_CREDIT;
        break;
    default:
        connection_fault(connection, frame->stream, "cancelled", "the request was cancelled");
        end(at);
    }
    return true;
}

/* --- to the opener ------------------------------------------------------------------------------------------ */

size_t attachments_room(const struct Job *job) {
    const struct Attachment *owner = owner_of(job);
    return owner != NULL ? RING_BYTES - (size_t)(job->ring->total - owner->position) : RING_BYTES;
}

static void append_data(struct Attachment *attachment, enum Channel channel, const struct Bytes *body) {
    struct Bytes *out = &attachment->connection->out;
    uint8_t header[DATA_HEADER_BYTES];
    frame_data_header(header, attachment->stream, channel, (uint32_t)body->length);
    bytes_append(out, header, sizeof header);
    bytes_append(out, bytes_front(body), body->length);
    attachment->send_credit -= body->length;
}

/* An observer that was too slow goes on where the ring begins now. False while it cannot be told. */
static bool skip(struct Attachment *attachment) {
    uint64_t oldest = ring_oldest(attachment->job->ring);
    if (attachment->position >= oldest) {
        return true;
    }
    struct Bytes body = {0};
    pack_map(&body, 1);
    pack_string(&body, "skipped");
    pack_integer(&body, (int64_t)(oldest - attachment->position));
    bool told = !body.failed && attachment->send_credit >= body.length;
    if (told) {
        append_data(attachment, CHANNEL_NOTICE, &body);
        attachment->position = oldest;
    }
    bytes_free(&body);
    return told;
}

/* One DATA frame of at most `most` bytes; the number sent. */
static size_t send_piece(struct Attachment *attachment, size_t most) {
    const struct Ring *ring = attachment->job->ring;
    struct Bytes *out = &attachment->connection->out;
    enum Channel channel;
    most = attachment->send_credit < most ? (size_t)attachment->send_credit : most;
    size_t count = ring_run(ring, attachment->position, most, &channel);
    if (count == 0 || !bytes_reserve(out, DATA_HEADER_BYTES + count)) {
        return 0;
    }
    uint8_t *header = bytes_tail(out);
    frame_data_header(header, attachment->stream, channel, (uint32_t)count);
    ring_copy(ring, attachment->position, count, header + DATA_HEADER_BYTES);
    out->length += DATA_HEADER_BYTES + count;
    attachment->send_credit -= count;
    attachment->position += count;
    return count;
}

static void announce(struct Attachment *attachment) {
    size_t count = attachment->notice.length;
    if (count > 0 && attachment->send_credit >= count && !connection_congested(attachment->connection)) {
        append_data(attachment, CHANNEL_NOTICE, &attachment->notice);
        bytes_free(&attachment->notice);
        attachment->announced = true;
    }
}

static size_t flow(struct Attachment *attachment) {
    struct Connection *connection = attachment->connection;
    size_t sent = 0;
    announce(attachment);
    size_t allowed = attachment->announced ? connection_allowance(connection, attachment->sent_end) : 0;
    /* (The ring holds little, but in frames of a byte each it would be a lot.) */
    while (sent < allowed && attachment->position < attachment->job->ring->total &&
           !connection_congested(connection) && skip(attachment)) {
        size_t count = send_piece(attachment, allowed - sent);
        if (count == 0) {
            break;
        }
        sent += count;
    }
    if (sent > 0) {
        attachment->sent_end = connection_queued(connection);
    }
    return sent;
}

bool attachments_flow(struct Job *job) {
    bool much = false;
    for (struct Attachment *attachment = job->attachments; attachment != NULL; attachment = attachment->next) {
        much |= flow(attachment) >= LIGHT_BYTES;
    }
    return much;
}

/* Whether the stream ended. */
static bool advance(struct Attachment *attachment, uint64_t now) {
    const struct Job *job = attachment->job;
    if (attachment->announced && job->complete && attachment->position == job->ring->total) {
        struct Bytes body = {0};
        process_pack_end(job, &body);
        connection_reply(attachment->connection, attachment->stream, &body);
        bytes_free(&body);
        return true;
    }
    if (attachment->deadline <= now) {
        connection_fault(attachment->connection, attachment->stream, "deadline_exceeded",
                         "the stream's deadline has passed; the process goes on");
        return true;
    }
    return false;
}

void attachments_advance(struct Job *job, uint64_t now) {
    for (struct Attachment **at = &job->attachments; *at != NULL;) {
        if (advance(*at, now)) {
            end(at);
        } else {
            at = &(*at)->next;
        }
    }
}

uint64_t attachments_deadline(const struct Job *job) {
    uint64_t deadline = NEVER;
    for (struct Attachment *attachment = job->attachments; attachment != NULL; attachment = attachment->next) {
        deadline = attachment->deadline < deadline ? attachment->deadline : deadline;
    }
    return deadline;
}
