#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "guest_limits.h"
#include "loop.h"

#define FIRST_FREE_FD 10

void (*worker_cleanup)(void);

static void close_from(unsigned first) {
    if (syscall(SYS_close_range, first, ~0U, 0) == 0) {
        return;
    }
    long limit = sysconf(_SC_OPEN_MAX); /* a kernel before 5.9 */
    for (long fd = first; fd < (limit > 0 ? limit : 1024); fd++) {
        close((int)fd);
    }
}

static void place_descriptors(const int *fds, int count) {
    int high[EXTRA_FD + 1];
    for (int i = 0; i < count; i++) { /* out of the way first: the targets may be among the sources */
        high[i] = fcntl(fds[i], F_DUPFD, FIRST_FREE_FD);
        if (high[i] < 0) {
            _exit(126);
        }
    }
    for (int i = 0; i < count; i++) {
        if (dup2(high[i], i) < 0) {
            _exit(126);
        }
    }
    fcntl(CONTROL_FD, F_SETFD, FD_CLOEXEC);
    close_from((unsigned)count);
}

static void reset_signals(void) {
    for (int number = 1; number < NSIG; number++) {
        signal(number, SIG_DFL);
    }
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
}

void child_enter(const int *fds, int count) {
    setsid();
    place_descriptors(fds, count);
    reset_signals();
    umask(022);
}

void worker_record(enum Record kind, struct Slice payload) {
    uint8_t record[MAX_RECORD_BYTES];
    if (payload.length >= sizeof record) {
        _exit(1);
    }
    record[0] = (uint8_t)kind;
    memcpy(record + 1, payload.data, payload.length);
    while (send(CONTROL_FD, record, payload.length + 1, MSG_NOSIGNAL) < 0) {
        if (errno != EINTR) {
            _exit(1);
        }
    }
}

void worker_notice(const struct Bytes *body) {
    if (body->failed) {
        worker_fault("internal", "the guest is out of memory");
    }
    worker_record(RECORD_NOTICE, bytes_slice(body));
}

void worker_reply(const struct Bytes *body) {
    if (body->failed) {
        worker_fault("internal", "the guest is out of memory");
    }
    worker_record(RECORD_REPLY, bytes_slice(body));
    _exit(0);
}

void worker_fault(const char *code, const char *format, ...) {
    char record[MAX_TEXT_CHARS + 256];
    size_t used = strlen(code) + 1;
    memcpy(record, code, used);
    va_list values;
    va_start(values, format);
    int length = vsnprintf(record + used, sizeof record - used, format, values);
    va_end(values);
    if (length < 0) {
        length = 0;
    }
    size_t total = used + (size_t)length < sizeof record ? used + (size_t)length : sizeof record - 1;
    if (worker_cleanup != NULL) {
        worker_cleanup();
    }
    worker_record(RECORD_FAULT, (struct Slice){.data = (const uint8_t *)record, .length = total});
    _exit(0);
}

void worker_errno(int reason, const char *path) {
    switch (reason) {
    case ENOENT:
        worker_fault("not_found", "%s does not exist", path);
    case ENOTDIR:
        worker_fault("not_a_directory", "a component of %s is not a directory", path);
    case EISDIR:
        worker_fault("is_a_directory", "%s is a directory", path);
    case EEXIST:
        worker_fault("conflict", "%s already exists", path);
    case EBUSY:
        worker_fault("conflict", "%s is in use", path);
    case EACCES:
    case EPERM:
        worker_fault("permission_denied", "no permission for %s", path);
    case EROFS:
        worker_fault("permission_denied", "%s is on a read-only file system", path);
    case ENOSPC:
    case EDQUOT:
        worker_fault("disk_full", "no space left for %s", path);
    case EFBIG:
        worker_fault("too_large", "%s is too large for the file system", path);
    case ENAMETOOLONG:
        worker_fault("invalid_argument", "%s is too long for the file system", path);
    case ELOOP:
        worker_fault("invalid_argument", "%s goes through too many symbolic links", path);
    case ENOMEM:
        worker_fault("internal", "the guest is out of memory");
    default:
        worker_fault("io_error", "%s: %s", path, strerror(reason));
    }
}

bool worker_committed(void) {
    uint8_t kind = 0;
    ssize_t count;
    do {
        count = recv(CONTROL_FD, &kind, 1, 0);
    } while (count < 0 && errno == EINTR);
    return count == 1 && kind == RECORD_COMMIT;
}

bool worker_wait(int fd, short events, uint64_t deadline) {
    for (;;) {
        uint64_t now = clock_monotonic_ns();
        struct pollfd wait = {.fd = fd, .events = events};
        int ready = poll(&wait, 1, deadline > now ? (int)((deadline - now + 999999) / 1000000) : 0);
        if (ready > 0 || (ready < 0 && errno != EINTR) || now >= deadline) {
            return ready > 0;
        }
    }
}

bool write_all(int fd, const void *data, size_t count) {
    const uint8_t *at = data;
    while (count > 0) {
        ssize_t written = write(fd, at, count);
        if (written < 0 && errno != EINTR) {
            return false;
        }
        if (written > 0) {
            at += written;
            count -= (size_t)written;
        }
    }
    return true;
}
