/* configure: the guest learns who it is, on its first start and after every resume. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "child.h"
#include "fields.h"
#include "job.h"
#include "guest_limits.h"
#include "methods.h"
#include "pack.h"
#include "replace.h"
#include "settle.h"

/* <linux/random.h>, which musl's compiler wrapper does not find. */
#define RNDADDENTROPY _IOW('R', 0x03, int[2])
#define RNDRESEEDCRNG _IO('R', 0x07)
struct EntropyPool {
    int entropy_count; /* bits */
    int buf_size;
    uint8_t buf[MAX_ENTROPY_BYTES];
};

#define DBUS_MACHINE_ID "/var/lib/dbus/machine-id"

struct Configure {
    struct Slice hostname;
    struct Slice dns;
    struct Slice envs;
    struct Slice entropy;
    struct Slice machine_id;
    struct Integer time_ns;
};

static bool system_changes;
static int urandom = -1;
static struct Bytes default_envs;

void configure_system_changes(bool allowed) {
    system_changes = allowed;
    if (allowed && urandom < 0) { /* now, while the name leads to what it says */
        urandom = open("/dev/urandom", O_WRONLY | O_CLOEXEC);
    }
}

struct Slice configure_envs(void) {
    return default_envs.length > 0 ? bytes_slice(&default_envs) : (struct Slice){.data = NULL};
}

/* --- in the child ------------------------------------------------------------------------------------------- */

/* What could not be written: told, and no reason to leave a guest frozen whose disk is full. */
static struct Bytes failures;
static size_t failure_count;

static void replace(const char *path, const struct Bytes *content) {
    if (!replace_file(path, content)) {
        pack_string(&failures, path);
        failure_count++;
    }
}

static void write_line(const char *path, struct Slice text) {
    struct Bytes content = {0};
    bytes_append(&content, text.data, text.length);
    bytes_append(&content, "\n", 1);
    replace(path, &content);
}

static void apply_hostname(struct Slice hostname) {
    if (sethostname((const char *)hostname.data, hostname.length) != 0) {
        worker_fault("permission_denied", "cannot set the host name: %s", strerror(errno));
    }
    write_line("/etc/hostname", hostname);
}

static void apply_machine_id(struct Slice machine_id) {
    struct stat status;
    write_line("/etc/machine-id", machine_id);
    if (is_regular(DBUS_MACHINE_ID, &status)) { /* mostly a link to the other, or not there */
        write_line(DBUS_MACHINE_ID, machine_id);
    }
}

static void apply_dns(struct Slice dns) {
    struct Bytes content = {0};
    struct StringWalk walk = strings_walk(dns);
    for (struct Slice server; walk_next(&walk, &server);) {
        bytes_append(&content, "nameserver ", 11);
        bytes_append(&content, server.data, server.length);
        bytes_append(&content, "\n", 1);
    }
    replace("/etc/resolv.conf", &content);
}

static void apply_time(int64_t time_ns) {
    struct timespec now = {.tv_sec = time_ns / 1000000000, .tv_nsec = time_ns % 1000000000};
    if (clock_settime(CLOCK_REALTIME, &now) != 0) {
        worker_fault("permission_denied", "cannot set the clock: %s", strerror(errno));
    }
}

/* Two guests of one snapshot have the same pool: new bytes first, then a key made from them at once. */
static void apply_entropy(struct Slice entropy) {
    struct EntropyPool pool = {.entropy_count = (int)entropy.length * 8, .buf_size = (int)entropy.length};
    memcpy(pool.buf, entropy.data, entropy.length);
    if (ioctl(EXTRA_FD, RNDADDENTROPY, &pool) != 0) {
        worker_fault("permission_denied", "cannot add entropy: %s", strerror(errno));
    }
    ioctl(EXTRA_FD, RNDRESEEDCRNG); /* kernels before 4.14 do not have it */
}

static void run(const void *argument) {
    const struct Configure *configure = argument;
    struct Bytes body = {0};
    if (system_changes) {
        if (configure->time_ns.present) {
            apply_time(configure->time_ns.value);
        }
        if (configure->entropy.length > 0) {
            apply_entropy(configure->entropy);
        }
        if (configure->hostname.data != NULL) {
            apply_hostname(configure->hostname);
        }
        if (configure->machine_id.data != NULL) {
            apply_machine_id(configure->machine_id);
        }
        if (configure->dns.data != NULL) {
            apply_dns(configure->dns);
        }
    }
    pack_map(&body, failure_count > 0);
    if (failure_count > 0) {
        pack_string(&body, "failed");
        pack_array(&body, failure_count);
        bytes_append(&body, failures.data, failures.length);
    }
    worker_reply(&body);
}

/* --- in the loop -------------------------------------------------------------------------------------------- */

static bool is_hostname(struct Slice name) {
    for (size_t i = 0; i < name.length; i++) {
        uint8_t c = name.data[i];
        bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
        if (!letter && !((c == '-' || c == '.') && i > 0)) {
            return false;
        }
    }
    return name.length > 0;
}

/* machine-id(5) */
static bool is_machine_id(struct Slice id) {
    bool zero = true;
    for (size_t i = 0; i < id.length; i++) {
        uint8_t c = id.data[i];
        if (!((c >= '0' && c <= '9') || (c >= 'a' && c <= 'f'))) {
            return false;
        }
        zero &= c == '0';
    }
    return id.length == MACHINE_ID_CHARS && !zero;
}

static bool are_addresses(struct Slice dns) {
    struct StringWalk walk = strings_walk(dns);
    for (struct Slice server; walk_next(&walk, &server);) {
        char text[INET6_ADDRSTRLEN] = "";
        struct in6_addr address;
        if (server.length >= sizeof text) {
            return false;
        }
        memcpy(text, server.data, server.length);
        if (inet_pton(AF_INET, text, &address) != 1 && inet_pton(AF_INET6, text, &address) != 1) {
            return false;
        }
    }
    return true;
}

static bool read_configure(struct Slice body, struct Configure *configure, char *error) {
    const struct Field fields[] = {
        {.name = "hostname", .type = FIELD_STRING, .target = &configure->hostname, .high = MAX_HOSTNAME_BYTES},
        {.name = "dns", .type = FIELD_STRINGS, .target = &configure->dns, .high = MAX_NAMESERVERS},
        {.name = "envs", .type = FIELD_ENVS, .target = &configure->envs, .high = MAX_ENVS},
        {.name = "time_ns", .type = FIELD_INTEGER, .target = &configure->time_ns, .low = 0, .high = INT64_MAX},
        {.name = "machine_id", .type = FIELD_STRING, .target = &configure->machine_id, .high = MACHINE_ID_CHARS},
        {.name = "entropy", .type = FIELD_BINARY, .target = &configure->entropy, .high = MAX_ENTROPY_BYTES},
    };
    if (!fields_read(body, fields, sizeof fields / sizeof *fields, error)) {
        return false;
    }
    const char *wrong = NULL;
    if (configure->hostname.data != NULL && !is_hostname(configure->hostname)) {
        wrong = "hostname must be made of letters, digits, '-' and '.'";
    } else if (!are_addresses(configure->dns)) {
        wrong = "dns must hold IP addresses";
    } else if (configure->machine_id.data != NULL && !is_machine_id(configure->machine_id)) {
        wrong = "machine_id must be 32 lower-case hex digits, not all zero";
    } else if (configure->envs.length > MAX_DEFAULT_ENVS_BYTES) {
        wrong = "envs are larger than 128 KiB";
    }
    if (wrong != NULL) {
        strcpy(error, wrong);
    }
    return wrong == NULL;
}

static void configure_finished(struct Job *job, bool answered) {
    if (answered) {
        settle_resume(job->owner);
    }
}

void configure_open(struct Connection *connection, const struct Frame *open) {
    struct Configure configure = {0};
    char error[FIELD_ERROR_BYTES];
    if (!read_configure(open->body, &configure, error)) {
        connection_fault(connection, open->stream, "invalid_argument", "%s", error);
        return;
    }
    if (configure.envs.data != NULL) {
        struct Bytes envs = {0};
        bytes_append(&envs, configure.envs.data, configure.envs.length);
        if (envs.failed) {
            connection_fault(connection, open->stream, "internal", "the guest is out of memory");
            return;
        }
        bytes_free(&default_envs);
        default_envs = envs;
    }
    const struct Spawn spawn = {
        .kind = JOB_SYSTEM, .extra = urandom, .finished = configure_finished, .run = run, .argument = &configure};
    job_spawn(connection, open, &spawn);
}
