#include "freezer.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "child.h"
#include "guest_limits.h"

/* <linux/magic.h> and <linux/sched.h>, which musl's compiler wrapper does not find. */
#define CGROUP2_SUPER_MAGIC 0x63677270
#define CLONE_INTO_CGROUP 0x200000000ULL
struct CloneArguments {
    uint64_t flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid, set_tid_size, cgroup;
};

/* Opened once: what is mounted where is the user's to change. */
static int group = -1;
static int freeze = -1;
static int events = -1;
static int start = -1;       /* the group in the group, where processes start */
static int start_procs = -1; /* its cgroup.procs */
static bool active;

static void close_start(void) {
    if (start >= 0) {
        close(start);
    }
    if (start_procs >= 0) {
        close(start_procs);
    }
    start = start_procs = -1;
}

/* A group with processes in it cannot hand controllers on to groups below it. So processes start one level down, and
 * whoever manages groups of its own (a container engine) has the level above to itself. */
static bool open_start(unsigned number) {
    char name[32];
    snprintf(name, sizeof name, number == 0 ? "jobs" : "jobs-%u", number);
    close_start();
    if (mkdirat(group, name, 0755) != 0 && errno != EEXIST) {
        return false;
    }
    start = openat(group, name, O_DIRECTORY | O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
    start_procs = start >= 0 ? openat(start, "cgroup.procs", O_WRONLY | O_CLOEXEC) : -1;
    return start_procs >= 0;
}

static bool open_group(const char *path) {
    struct statfs system;
    if (mkdir(path, 0755) != 0 && errno != EEXIST) {
        return false;
    }
    group = open(path, O_DIRECTORY | O_RDONLY | O_CLOEXEC);
    if (group < 0 || fstatfs(group, &system) != 0) {
        return false;
    }
    if (system.f_type != CGROUP2_SUPER_MAGIC) {
        errno = EINVAL;
        return false;
    }
    freeze = openat(group, "cgroup.freeze", O_WRONLY | O_CLOEXEC);
    events = openat(group, "cgroup.events", O_RDONLY | O_CLOEXEC);
    return freeze >= 0 && events >= 0 && open_start(0);
}

bool freezer_open(const char *path) {
    if (open_group(path)) {
        freezer_thaw(); /* a daemon of before may have left it frozen */
        return true;
    }
    int reason = errno;
    int *opened[] = {&group, &freeze, &events};
    for (size_t i = 0; i < sizeof opened / sizeof *opened; i++) {
        if (*opened[i] >= 0) {
            close(*opened[i]);
        }
        *opened[i] = -1;
    }
    close_start();
    errno = reason;
    return false;
}

/* --- starting ----------------------------------------------------------------------------------------------- */

/* Not libc's fork: it cannot do this. The child has one thread and only execs or exits, so that libc's own thread id,
 * which is the parent's there, is never used. */
static pid_t clone_into(int cgroup) {
    struct CloneArguments arguments = {
        .flags = CLONE_INTO_CGROUP, .exit_signal = SIGCHLD, .cgroup = (uint64_t)cgroup};
    return (pid_t)syscall(SYS_clone3, &arguments, sizeof arguments);
}

/* What any fork may answer; every other reason is about the group. */
static bool is_shortage(int reason) { return reason == EAGAIN || reason == ENOMEM; }

pid_t freezer_fork(int *join) {
    *join = 0;
    if (group < 0) {
        return fork();
    }
    if (active) {
        /* Born frozen, it would hold a copy of every descriptor of ours until the thaw. It joins after closing them. */
        *join = start_procs;
        return fork();
    }
    pid_t pid = clone_into(start);
    for (unsigned number = 0; pid < 0 && !is_shortage(errno) && number < MAX_START_GROUPS; number++) {
        if (open_start(number)) { /* it was removed, or has processes no more: another one */
            pid = clone_into(start);
        }
    }
    if (pid < 0 && !is_shortage(errno)) {
        return fork(); /* its owner has broken the group, and may go on without */
    }
    return pid;
}

bool freezer_join(int procs) {
    bool joined = write(procs, "0", 1) == 1; /* frozen: stands still before this returns */
    close(procs);
    return joined;
}

/* --- freezing ----------------------------------------------------------------------------------------------- */

bool freezer_freeze(void) {
    active = freeze >= 0 && pwrite(freeze, "1", 1, 0) == 1;
    return active;
}

void freezer_thaw(void) {
    active = false;
    if (freeze >= 0) {
        (void)!pwrite(freeze, "0", 1, 0); /* (fails when the group is gone: nothing to thaw) */
    }
}

bool freezer_active(void) { return active; }
int freezer_events(void) { return events; }

static bool is_frozen(int fd) {
    char text[128];
    ssize_t count = pread(fd, text, sizeof text - 1, 0);
    text[count > 0 ? count : 0] = '\0';
    return strstr(text, "frozen 1") != NULL;
}

bool freezer_wait(int fd, uint64_t deadline) {
    while (!is_frozen(fd)) { /* POLLPRI: the file has changed since it was read */
        if (!worker_wait(fd, POLLPRI, deadline)) {
            return false;
        }
    }
    return true;
}
