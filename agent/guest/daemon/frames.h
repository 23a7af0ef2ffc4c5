/* The protocol's frames (docs/protocol.md), as a server sees and sends them. */
#ifndef CAPSULE_FRAMES_H
#define CAPSULE_FRAMES_H

#include "bytes.h"

enum Tag {
    TAG_HELLO = 0,
    TAG_OPEN = 1,
    TAG_DATA = 2,
    TAG_END = 3,
    TAG_REPLY = 4,
    TAG_FAULT = 5,
    TAG_CREDIT = 6,
    TAG_CANCEL = 7,
    TAG_PING = 8,
    TAG_PONG = 9,
    TAG_GOAWAY = 10,
};

enum Channel { CHANNEL_STDIN = 0, CHANNEL_CONTENT = 0, CHANNEL_STDOUT = 1, CHANNEL_STDERR = 2, CHANNEL_NOTICE = 3 };

/* What the opener may send. Slices point into the payload it was decoded from. */
struct Frame {
    enum Tag tag;
    uint32_t stream;
    struct Slice method;     /* OPEN */
    struct Slice body;       /* OPEN: one msgpack map, checked as a whole */
    uint32_t timeout_ms;     /* OPEN */
    struct Slice data;       /* DATA */
    uint32_t version;        /* HELLO */
    uint32_t initial_credit; /* HELLO */
    uint32_t amount;         /* CREDIT */
    uint32_t nonce;          /* PING, PONG */
};

/* Decode a frame without its length prefix; false for anything an opener may not send. */
bool frame_decode(struct Slice payload, struct Frame *frame);

void frame_hello(struct Bytes *out);
void frame_reply(struct Bytes *out, uint32_t stream, struct Slice body);
/* `message` is cut to what a FAULT may hold; `detail`, when it is not NULL, is true in the details. */
void frame_fault(struct Bytes *out, uint32_t stream, const char *code, const char *message, const char *detail);
void frame_credit(struct Bytes *out, uint32_t stream, uint32_t amount);
void frame_pong(struct Bytes *out, uint32_t nonce);

/* DATA is read straight into the output: leave DATA_HEADER_BYTES at `header`, the payload behind, then fill it in. */
#define DATA_HEADER_BYTES 17
void frame_data_header(uint8_t *header, uint32_t stream, enum Channel channel, uint32_t length);

#endif
