#include "frames.h"

#include <string.h>

#include "guest_limits.h"
#include "pack.h"
#include "unpack.h"

#define PREFIX_BYTES 4

static bool number(struct Reader *reader, int64_t low, int64_t high, uint32_t *value) {
    int64_t wide;
    if (!unpack_integer(reader, low, high, &wide)) {
        return false;
    }
    *value = (uint32_t)wide;
    return true;
}

static bool text(struct Reader *reader, long least, long most, struct Slice *value) {
    if (!unpack_string(reader, value)) {
        return false;
    }
    long characters = utf8_characters(*value);
    return characters >= least && characters <= most;
}

static bool stream_id(struct Reader *reader, struct Frame *frame) {
    return number(reader, 1, MAX_STREAM_ID, &frame->stream);
}

static bool decode_hello(struct Reader *reader, struct Frame *frame) {
    size_t features;
    struct Slice name;
    if (!number(reader, 0, 1 << 16, &frame->version) || !unpack_array(reader, &features) || features > MAX_FEATURES) {
        return false;
    }
    while (features-- > 0) {
        if (!text(reader, 1, MAX_NAME_CHARS, &name)) {
            return false;
        }
    }
    uint32_t max_streams;
    return number(reader, 0, MAX_CREDIT, &frame->initial_credit) && number(reader, 0, 1 << 20, &max_streams);
}

static bool decode_open(struct Reader *reader, struct Frame *frame) {
    if (!stream_id(reader, frame) || !text(reader, 1, MAX_NAME_CHARS, &frame->method)) {
        return false;
    }
    const uint8_t *body = reader->at;
    if (unpack_kind(reader) != KIND_MAP || !unpack_skip(reader, MAX_DEPTH)) {
        return false;
    }
    frame->body = (struct Slice){.data = body, .length = (size_t)(reader->at - body)};
    return number(reader, 0, MAX_TIMEOUT_MS, &frame->timeout_ms);
}

static bool decode_data(struct Reader *reader, struct Frame *frame) {
    uint32_t channel;
    return stream_id(reader, frame) && number(reader, 0, 255, &channel) && unpack_binary(reader, &frame->data) &&
           frame->data.length >= 1 && frame->data.length <= MAX_DATA_BYTES;
}

static bool decode_goaway(struct Reader *reader) {
    struct Slice value;
    return text(reader, 1, MAX_NAME_CHARS, &value) && text(reader, 0, MAX_TEXT_CHARS, &value);
}

/* Elements of each frame's array, tag included; 0 for what only a server sends. */
static const uint8_t sizes[] = {
    [TAG_HELLO] = 5, [TAG_OPEN] = 5, [TAG_DATA] = 4, [TAG_END] = 2,    [TAG_CREDIT] = 3,
    [TAG_CANCEL] = 2, [TAG_PING] = 2, [TAG_PONG] = 2, [TAG_GOAWAY] = 3,
};

static bool decode_fields(struct Reader *reader, struct Frame *frame) {
    switch (frame->tag) {
    case TAG_HELLO:
        return decode_hello(reader, frame);
    case TAG_OPEN:
        return decode_open(reader, frame);
    case TAG_DATA:
        return decode_data(reader, frame);
    case TAG_END:
    case TAG_CANCEL:
        return stream_id(reader, frame);
    case TAG_CREDIT:
        return stream_id(reader, frame) && number(reader, 1, MAX_CREDIT, &frame->amount);
    case TAG_PING:
    case TAG_PONG:
        return number(reader, 0, UINT32_MAX, &frame->nonce);
    case TAG_GOAWAY:
        return decode_goaway(reader);
    case TAG_REPLY:
    case TAG_FAULT:
        break;
    }
    return false;
}

bool frame_decode(struct Slice payload, struct Frame *frame) {
    struct Reader reader = {.at = payload.data, .end = payload.data + payload.length};
    size_t count;
    uint32_t tag;
    *frame = (struct Frame){.tag = TAG_FAULT};
    if (!unpack_array(&reader, &count) || !number(&reader, 0, TAG_GOAWAY, &tag) || sizes[tag] != count) {
        return false;
    }
    frame->tag = (enum Tag)tag;
    return decode_fields(&reader, frame) && reader.at == reader.end;
}

static void put_length(uint8_t *at, size_t length) {
    for (int i = 0; i < PREFIX_BYTES; i++) {
        at[i] = (uint8_t)(length >> (8 * (PREFIX_BYTES - 1 - i)));
    }
}

/* Starts a frame; its length is filled in by `end_frame` with what this returned. */
static size_t begin_frame(struct Bytes *out, enum Tag tag, size_t fields) {
    size_t begin = out->length;
    bytes_append(out, "\0\0\0\0", PREFIX_BYTES);
    pack_array(out, 1 + fields);
    pack_integer(out, tag);
    return begin;
}

static void end_frame(struct Bytes *out, size_t begin) {
    if (!out->failed) {
        put_length(bytes_front(out) + begin, out->length - begin - PREFIX_BYTES);
    }
}

void frame_hello(struct Bytes *out) {
    size_t begin = begin_frame(out, TAG_HELLO, 4);
    pack_integer(out, PROTOCOL_VERSION);
    pack_array(out, 0);
    pack_integer(out, INITIAL_CREDIT);
    pack_integer(out, MAX_STREAMS);
    end_frame(out, begin);
}

void frame_reply(struct Bytes *out, uint32_t stream, struct Slice body) {
    size_t begin = begin_frame(out, TAG_REPLY, 2);
    pack_integer(out, stream);
    bytes_append(out, body.data, body.length);
    end_frame(out, begin);
}

void frame_fault(struct Bytes *out, uint32_t stream, const char *code, const char *message, const char *detail) {
    size_t begin = begin_frame(out, TAG_FAULT, 5);
    pack_integer(out, stream);
    pack_string(out, code);
    pack_slice(out, (struct Slice){.data = (const uint8_t *)message, .length = strnlen(message, MAX_TEXT_CHARS)});
    pack_bool(out, strcmp(code, "busy") == 0 || strcmp(code, "too_many_processes") == 0);
    pack_map(out, detail != NULL);
    if (detail != NULL) {
        pack_string(out, detail);
        pack_bool(out, true);
    }
    end_frame(out, begin);
}

void frame_credit(struct Bytes *out, uint32_t stream, uint32_t amount) {
    size_t begin = begin_frame(out, TAG_CREDIT, 2);
    pack_integer(out, stream);
    pack_integer(out, amount);
    end_frame(out, begin);
}

void frame_pong(struct Bytes *out, uint32_t nonce) {
    size_t begin = begin_frame(out, TAG_PONG, 1);
    pack_integer(out, nonce);
    end_frame(out, begin);
}

void frame_data_header(uint8_t *header, uint32_t stream, enum Channel channel, uint32_t length) {
    put_length(header, DATA_HEADER_BYTES - PREFIX_BYTES + length);
    header[4] = 0x94;
    header[5] = TAG_DATA;
    header[6] = 0xce;
    put_length(header + 7, stream);
    header[11] = (uint8_t)channel;
    header[12] = 0xc6;
    put_length(header + 13, length);
}
