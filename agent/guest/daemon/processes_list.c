/* processes.list: bounded, however many there are and whatever they are called. */
#include <stdlib.h>
#include <string.h>

#include "fields.h"
#include "guest_limits.h"
#include "methods.h"
#include "pack.h"
#include "process.h"
#include "unpack.h"

/* Of an entry: everything but cmd, args, user and cwd, with the longest tag. */
#define ENTRY_BYTES (112 + MAX_TAG_BYTES)
/* Before a string or an array in msgpack. */
#define HEADER_BYTES 5

/* The longest beginning that takes `most` bytes when packed: whole characters, and U+FFFD for what is none. */
static struct Slice cut(struct Slice text, size_t most) {
    size_t at = 0;
    for (size_t packed = 0; at < text.length;) {
        size_t length = utf8_character(text.data + at, text.length - at);
        packed += length > 0 ? length : 3;
        if (packed > most) {
            break;
        }
        at += length > 0 ? length : 1;
    }
    return (struct Slice){.data = text.data, .length = at};
}

static struct Slice slice_of(const char *text) {
    return (struct Slice){.data = (const uint8_t *)text, .length = strlen(text)};
}

/* As an array of what fits into `room` bytes. */
static void pack_arguments(struct Bytes *bytes, struct Slice arguments, size_t room) {
    struct Bytes packed = {0};
    struct StringWalk walk = strings_walk(arguments);
    size_t count = 0;
    for (struct Slice text; room > HEADER_BYTES && walk_next(&walk, &text); count++) {
        text = cut(text, room - HEADER_BYTES);
        room -= text.length + HEADER_BYTES;
        pack_slice(&packed, text);
    }
    pack_array(bytes, count);
    bytes_append(bytes, packed.data, packed.length);
    bytes->failed |= packed.failed;
    bytes_free(&packed);
}

void process_remember(struct Process *process, struct Slice command, struct Slice arguments) {
    if (command.data != NULL) {
        process->command = slice_string(cut(command, LISTED_BYTES / 2));
        process->arguments.failed |= process->command == NULL;
    }
    if (arguments.data != NULL) {
        pack_arguments(&process->arguments, arguments, LISTED_BYTES);
    }
}

unsigned processes_count(void) {
    unsigned count = 0;
    for (const struct Job *job = jobs_first(); job != NULL; job = job->next) {
        count += process_is_alive(job);
    }
    return count;
}

static void pack_text(struct Bytes *bytes, const char *name, const char *text, size_t most) {
    pack_string(bytes, name);
    pack_slice(bytes, cut(slice_of(text), most));
}

/* `room` bytes for its texts. */
static void pack_process(struct Bytes *bytes, const struct Job *job, size_t room) {
    const struct Process *process = job->process;
    bool placed = process->user != NULL && process->cwd != NULL;
    bool argued = process->arguments.length > 0;
    process_pack_identity(bytes, job, 3 + argued + (placed ? 2 : 0));
    size_t before = bytes->length;
    if (placed) {
        pack_text(bytes, "user", process->user, room / 8);
        pack_text(bytes, "cwd", process->cwd, room / 4);
    }
    pack_text(bytes, "cmd", process->command != NULL ? process->command : "", argued ? room / 4 : room / 2);
    if (argued) {
        size_t used = bytes->length - before;
        pack_string(bytes, "args");
        pack_arguments(bytes, bytes_slice(&process->arguments), room > used ? room - used : 0);
    }
    pack_string(bytes, "background");
    pack_bool(bytes, job->kind == JOB_LASTING);
    pack_string(bytes, "started_ns");
    pack_integer(bytes, (int64_t)process->started_wall_ns);
}

void processes_list_open(struct Connection *connection, const struct Frame *open) {
    struct Bytes body = {0};
    unsigned count = processes_count();
    size_t room = count > 0 ? LIST_BYTES / count - ENTRY_BYTES : 0;
    room = room < 2 * LISTED_BYTES ? room : 2 * LISTED_BYTES;
    pack_map(&body, 1);
    pack_string(&body, "processes");
    pack_array(&body, count);
    for (const struct Job *job = jobs_first(); job != NULL; job = job->next) {
        if (process_is_alive(job)) {
            pack_process(&body, job, room);
        }
    }
    connection_reply(connection, open->stream, &body);
    bytes_free(&body);
}
