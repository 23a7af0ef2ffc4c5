#include "terminal.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

/* <linux/openat2.h>, which musl's compiler wrapper does not find. */
#define RESOLVE_NO_XDEV 0x01
#define RESOLVE_NO_SYMLINKS 0x04
struct OpenHow {
    uint64_t flags, mode, resolve;
};

/* Passes over the processes: one that forks while it is being killed is found by the next. */
#define KILL_PASSES 8

static int devpts = -1;

void terminals_open(void) { devpts = open("/dev/pts", O_PATH | O_DIRECTORY | O_CLOEXEC); }

static int open_master(void) {
    const int flags = O_RDWR | O_NOCTTY | O_NONBLOCK | O_CLOEXEC;
    if (geteuid() != 0) { /* a daemon for tests: the other one is only for root on most machines */
        return open("/dev/ptmx", flags);
    }
    /* What root in the guest mounts over the name could block us, or not be a terminal. */
    struct OpenHow how = {.flags = (uint64_t)flags, .resolve = RESOLVE_NO_XDEV | RESOLVE_NO_SYMLINKS};
    return (int)syscall(SYS_openat2, devpts, "ptmx", &how, sizeof how);
}

bool terminal_make(const struct winsize *size, int *reader, int *writer, int *slave) {
    int unlocked = 0;
    int master = open_master();
    *reader = *writer = *slave = -1;
    if (master < 0) {
        return false;
    }
    int peer = -1;
    int again = -1;
    if (ioctl(master, TIOCSPTLCK, &unlocked) == 0 && ioctl(master, TIOCSWINSZ, size) == 0) {
        peer = ioctl(master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
        again = fcntl(master, F_DUPFD_CLOEXEC, 0); /* epoll watches a descriptor for reading or writing apart */
    }
    if (peer < 0 || again < 0) {
        int reason = errno;
        close(master);
        if (peer >= 0) {
            close(peer);
        }
        if (again >= 0) {
            close(again);
        }
        errno = reason;
        return false;
    }
    *reader = master;
    *writer = again;
    *slave = peer;
    return true;
}

bool terminal_take(uid_t owner) {
    struct termios mode;
    if (ioctl(STDIN_FILENO, TIOCSCTTY, 0) != 0 || tcgetattr(STDIN_FILENO, &mode) != 0) {
        return false;
    }
    mode.c_iflag |= IUTF8; /* erasing takes a character, not a byte */
    if (tcsetattr(STDIN_FILENO, TCSANOW, &mode) != 0) {
        return false;
    }
    return geteuid() != 0 || fchown(STDIN_FILENO, owner, (gid_t)-1) == 0; /* its programs open it by name */
}

static unsigned kill_pass(pid_t session) {
    unsigned found = 0;
    DIR *directory = opendir("/proc");
    for (struct dirent *entry; directory != NULL && (entry = readdir(directory)) != NULL;) {
        pid_t pid = (pid_t)atol(entry->d_name);
        if (pid > 1 && getsid(pid) == session && kill(pid, SIGKILL) == 0) {
            found++;
        }
    }
    if (directory != NULL) {
        closedir(directory);
    }
    return found;
}

void terminal_kill_session(const void *leader_pid) {
    pid_t session = *(const pid_t *)leader_pid;
    const struct timespec pause = {.tv_nsec = 1000000};
    for (int pass = 0; pass < KILL_PASSES && kill_pass(session) > 0; pass++) {
        nanosleep(&pause, NULL); /* the killed are found again until they have been reaped */
    }
    _exit(0);
}
