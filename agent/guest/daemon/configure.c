/* configure: the guest learns who it is, on its first start and after every resume. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>
#include <unistd.h>

#include "fields.h"
#include "guest_limits.h"
#include "identity.h"
#include "methods.h"
#include "pack.h"
#include "settle.h"

/* <linux/random.h>, which musl's compiler wrapper does not find. */
#define RNDADDENTROPY _IOW('R', 0x03, int[2])
#define RNDRESEEDCRNG _IO('R', 0x07)
struct EntropyPool {
    int entropy_count; /* bits */
    int buf_size;
    uint8_t buf[MAX_ENTROPY_BYTES];
};

struct Configure {
    struct Identity identity;
    struct Slice envs;
    struct Slice entropy;
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

/* --- effects ------------------------------------------------------------------------------------------------- */

static bool set_clock(int64_t time_ns) {
    struct timespec now = {.tv_sec = time_ns / 1000000000, .tv_nsec = time_ns % 1000000000};
    return clock_settime(CLOCK_REALTIME, &now) == 0;
}

/* Two guests of one snapshot have the same pool: new bytes first, then a key made from them at once. */
static bool add_entropy(struct Slice entropy) {
    struct EntropyPool pool = {.entropy_count = (int)entropy.length * 8, .buf_size = (int)entropy.length};
    memcpy(pool.buf, entropy.data, entropy.length);
    bool added = ioctl(urandom, RNDADDENTROPY, &pool) == 0;
    if (added) {
        ioctl(urandom, RNDRESEEDCRNG); /* kernels before 4.14 do not have it */
    }
    return added;
}

/* By the loop itself, as none of it can block. NULL, or what failed; errno says why. */
static const char *tell_kernel(const struct Configure *configure) {
    struct Slice hostname = configure->identity.parts[IDENTITY_HOSTNAME];
    if (configure->time_ns.present && !set_clock(configure->time_ns.value)) {
        return "set the clock";
    }
    if (configure->entropy.length > 0 && !add_entropy(configure->entropy)) {
        return "add entropy";
    }
    if (hostname.data != NULL && sethostname((const char *)hostname.data, hostname.length) != 0) {
        return "set the host name";
    }
    return NULL;
}

/* --- the request ---------------------------------------------------------------------------------------------- */

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
    struct Slice *hostname = &configure->identity.parts[IDENTITY_HOSTNAME];
    struct Slice *machine_id = &configure->identity.parts[IDENTITY_MACHINE_ID];
    struct Slice *dns = &configure->identity.parts[IDENTITY_DNS];
    const struct Field fields[] = {
        {.name = "hostname", .type = FIELD_STRING, .target = hostname, .high = MAX_HOSTNAME_BYTES},
        {.name = "dns", .type = FIELD_STRINGS, .target = dns, .high = MAX_NAMESERVERS},
        {.name = "envs", .type = FIELD_ENVS, .target = &configure->envs, .high = MAX_ENVS},
        {.name = "time_ns", .type = FIELD_INTEGER, .target = &configure->time_ns, .low = 0, .high = INT64_MAX},
        {.name = "machine_id", .type = FIELD_STRING, .target = machine_id, .high = MACHINE_ID_CHARS},
        {.name = "entropy", .type = FIELD_BINARY, .target = &configure->entropy, .high = MAX_ENTROPY_BYTES},
    };
    if (!fields_read(body, fields, sizeof fields / sizeof *fields, error)) {
        return false;
    }
    const char *wrong = NULL;
    if (hostname->data != NULL && !is_hostname(*hostname)) {
        wrong = "hostname must be made of letters, digits, '-' and '.'";
    } else if (!are_addresses(*dns)) {
        wrong = "dns must hold IP addresses";
    } else if (machine_id->data != NULL && !is_machine_id(*machine_id)) {
        wrong = "machine_id must be 32 lower-case hex digits, not all zero";
    } else if (configure->envs.length > MAX_DEFAULT_ENVS_BYTES) {
        wrong = "envs are larger than 128 KiB";
    }
    if (wrong != NULL) {
        strcpy(error, wrong);
    }
    return wrong == NULL;
}

static bool keep_envs(struct Slice given) {
    struct Bytes envs = {0};
    bytes_append(&envs, given.data, given.length);
    if (!envs.failed) {
        bytes_free(&default_envs);
        default_envs = envs;
    }
    return !envs.failed;
}

void configure_open(struct Connection *connection, const struct Frame *open) {
    struct Configure configure = {0};
    char error[FIELD_ERROR_BYTES];
    if (!read_configure(open->body, &configure, error)) {
        connection_fault(connection, open->stream, "invalid_argument", "%s", error);
        return;
    }
    if (configure.envs.data != NULL && !keep_envs(configure.envs)) {
        connection_fault(connection, open->stream, "internal", "the guest is out of memory");
        return;
    }
    bool changed = system_changes && identity_reduce(&configure.identity);
    const char *failed = system_changes ? tell_kernel(&configure) : NULL;
    if (failed != NULL) {
        connection_fault(connection, open->stream, "permission_denied", "cannot %s: %s", failed, strerror(errno));
    } else if (changed) {
        identity_write(connection, open, &configure.identity);
    } else {
        struct Bytes body = {0};
        pack_map(&body, 0);
        connection_reply(connection, open->stream, &body);
        bytes_free(&body);
        settle_resume(connection);
    }
}
