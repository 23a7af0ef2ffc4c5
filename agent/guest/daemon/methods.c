#include "methods.h"

#include <unistd.h>

#include "child.h"
#include "freezer.h"
#include "job.h"
#include "pack.h"
#include "settle.h"

#ifndef CAPSULE_VERSION
#define CAPSULE_VERSION "unversioned"
#endif

static uint64_t boot_ns;

void info_ready_now(void) { boot_ns = clock_boot_ns(); }
uint64_t info_boot_ns(void) { return boot_ns; }

static void info_open(struct Connection *connection, const struct Frame *open) {
    struct Bytes body = {0};
    pack_map(&body, 5);
    pack_string(&body, "version");
    pack_string(&body, CAPSULE_VERSION);
    pack_string(&body, "boot_ns");
    pack_integer(&body, (int64_t)boot_ns);
    pack_string(&body, "uptime_ns");
    pack_integer(&body, (int64_t)clock_boot_ns());
    pack_string(&body, "processes");
    pack_integer(&body, processes_count());
    pack_string(&body, "frozen");
    pack_bool(&body, freezer_active());
    connection_reply(connection, open->stream, &body);
    bytes_free(&body);
}

static void run_sync(const void *argument) {
    (void)argument;
    struct Bytes body = {0};
    sync();
    pack_map(&body, 0);
    worker_reply(&body);
}

static void sync_open(struct Connection *connection, const struct Frame *open) {
    const struct Spawn spawn = {.kind = JOB_OPERATION, .run = run_sync};
    job_spawn(connection, open, &spawn);
}

static const struct {
    const char *name;
    void (*open)(struct Connection *connection, const struct Frame *open);
} methods[] = {
    {"exec", exec_open},
    {"info", info_open},
    {"sync", sync_open},
    {"settle", settle_open},
    {"thaw", thaw_open},
    {"configure", configure_open},
    {"processes.attach", processes_attach_open},
    {"processes.list", processes_list_open},
    {"processes.resize", processes_resize_open},
    {"processes.signal", processes_signal_open},
    {"files.read", files_open},
    {"files.write", files_open},
    {"files.list", files_open},
    {"files.stat", files_open},
    {"files.mkdir", files_open},
    {"files.remove", files_open},
    {"files.watch", files_open},
};

void methods_open(struct Connection *connection, const struct Frame *open) {
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++) {
        if (slice_is(open->method, methods[i].name)) {
            methods[i].open(connection, open);
            return;
        }
    }
    connection_fault(connection, open->stream, "unknown_method", "the guest has no method %.*s",
                     (int)open->method.length, (const char *)open->method.data);
}
