#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <unistd.h>

#include "boot.h"

void boot_power_off(void) {
    fflush(NULL);
    sync();
    /* A restart, not a power-off: a microVM has no power button its kernel knows, but every VMM of ours ends on a
     * reset (QEMU with -no-reboot, Firecracker always). */
    reboot(RB_AUTOBOOT);
    for (;;) {
        pause();
    }
}

void boot_fail(const char *what) {
    printf("CAPSULE-FAILED %s: %s\n", what, strerror(errno));
    boot_power_off();
}

struct Mount {
    const char *type;
    const char *path;
    unsigned long flags;
    const char *options;
};

/* None is worth failing for: an image that lacks the directory on a full disk still runs programs. */
static const struct Mount mounts[] = {
    {"devpts", "/dev/pts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
    {"tmpfs", "/dev/shm", MS_NOSUID | MS_NODEV, "mode=1777"},
    {"tmpfs", "/run", MS_NOSUID | MS_NODEV, "mode=0755"},
    {"cgroup2", "/sys/fs/cgroup", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL},
};

static const struct {
    const char *target;
    const char *path;
} links[] = {
    {"/proc/self/fd", "/dev/fd"},
    {"/proc/self/fd/0", "/dev/stdin"},
    {"/proc/self/fd/1", "/dev/stdout"},
    {"/proc/self/fd/2", "/dev/stderr"},
};

/* (Nothing about the OOM killer: it takes no PID 1, and what we start must not inherit an exemption.) */
void boot_late_mounts(void) {
    umask(022);
    for (size_t i = 0; i < sizeof mounts / sizeof *mounts; i++) {
        const struct Mount *wanted = &mounts[i];
        mkdir(wanted->path, 0755);
        if (mount(wanted->type, wanted->path, wanted->type, wanted->flags, wanted->options) != 0 && errno != EBUSY) {
            printf("capsule-guest: mount %s: %s\n", wanted->path, strerror(errno));
        }
    }
    for (size_t i = 0; i < sizeof links / sizeof *links; i++) {
        (void)!symlink(links[i].target, links[i].path);
    }
    if (mkdir("/tmp", 01777) == 0) { /* on the disk, as its size is the sandbox's; the umask took bits away */
        chmod("/tmp", 01777);
    }
}
