/* Control groups at boot: the user's processes get a group that looks like the whole machine to them. */
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/mount.h>
#include <unistd.h>

#include "boot.h"
#include "freezer.h"

#define MOUNT "/sys/fs/cgroup"
#define GROUP MOUNT "/capsule"

static bool write_text(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    bool written = fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text);
    if (fd >= 0) {
        close(fd);
    }
    return written;
}

/* What is not enabled here, nobody below can use. One by one: not every kernel lets every one be enabled. */
static void enable_controllers(void) {
    char controllers[512];
    int fd = open(MOUNT "/cgroup.controllers", O_RDONLY | O_CLOEXEC);
    ssize_t count = fd >= 0 ? read(fd, controllers, sizeof controllers - 1) : -1;
    if (fd >= 0) {
        close(fd);
    }
    controllers[count > 0 ? count : 0] = '\0';
    char *rest = controllers;
    for (char *name; (name = strsep(&rest, " \n")) != NULL;) {
        char enable[64];
        snprintf(enable, sizeof enable, "+%s", name);
        if (*name != '\0' && !write_text(MOUNT "/cgroup.subtree_control", enable)) {
            printf("capsule-guest: controller %s: %s\n", name, strerror(errno));
        }
    }
}

/* A namespace shows the group its maker is in as the root of all groups. We make it, and are in it only for that. */
static bool enter_namespace(void) {
    int outside = open(MOUNT "/cgroup.procs", O_WRONLY | O_CLOEXEC);
    bool entered = outside >= 0 && write_text(GROUP "/cgroup.procs", "0");
    bool made = entered && unshare(CLONE_NEWCGROUP) == 0;
    if (entered && write(outside, "0", 1) != 1) {
        boot_fail("leave the control group"); /* else we would freeze ourselves */
    }
    if (outside >= 0) {
        close(outside);
    }
    return made;
}

void boot_control_groups(void) {
    if (!freezer_open(GROUP)) {
        printf("capsule-guest: control group: %s: pausing will not stop processes first\n", strerror(errno));
        return;
    }
    enable_controllers();
    /* Mounted anew: the mount of before still shows everything. The descriptors of freezer.c go on to work. */
    if (!enter_namespace() || umount2(MOUNT, MNT_DETACH) != 0 ||
        mount("cgroup2", MOUNT, "cgroup2", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0) {
        printf("capsule-guest: control group namespace: %s\n", strerror(errno));
    }
}
