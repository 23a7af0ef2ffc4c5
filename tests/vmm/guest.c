/* /init of the test guests. The kernel hands the `mode=` of its command line over as an environment variable. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <unistd.h>

static void load_modules(void) {
    char name[128], path[160];
    FILE *order = fopen("/mods/order", "r");
    while (order && fscanf(order, "%127s", name) == 1) {
        snprintf(path, sizeof path, "/mods/%s", name);
        int module = open(path, O_RDONLY);
        syscall(SYS_finit_module, module, "", 0);
        close(module);
    }
}

static int open_disk(int flags) {
    load_modules();
    mount("devtmpfs", "/dev", "devtmpfs", 0, "");
    for (int tries = 0; tries < 500; tries++) {
        int disk = open("/dev/vda", flags);
        if (disk >= 0) return disk;
        usleep(10000);
    }
    return -1;
}

/* Write to the whole disk and say how it went, then that we are still running. */
static void fill_disk(void) {
    static char block[1 << 16];
    int disk = open_disk(O_WRONLY);
    memset(block, 'x', sizeof block);
    while (write(disk, block, sizeof block) == sizeof block) {}
    if (fsync(disk) == 0) printf("disk: all written\n"); else printf("disk: %s\n", strerror(errno));
    printf("still running\n");
}

enum { CLUSTER = 1 << 16, CLUSTERS = 16 };

static int read_number(int disk, int tick) {
    static char block[4096] __attribute__((aligned(4096)));
    if (pread(disk, block, sizeof block, tick % CLUSTERS * CLUSTER) != sizeof block)
        printf("read: %s\n", strerror(errno));
    return atoi(block);
}

/* Count, in memory and on the disk, past every cache: each tick has a cluster of its own until all have been used.
 * "tick N disk M" has M as it was found in the place of the tick before, N-1 if all is well; "lost K" says that K is
 * not where it was written. After `last` ticks the rest of the mode is done. */
static void count(int last) {
    static char block[4096] __attribute__((aligned(4096)));
    int disk = open_disk(O_RDWR | O_DIRECT);
    for (int tick = 1; tick <= last; tick++) {
        int found = read_number(disk, tick - 1);
        for (int before = tick - 2; before > 0 && before > tick - CLUSTERS; before--)
            if (read_number(disk, before) != before) printf("lost %d\n", before);
        snprintf(block, sizeof block, "%d\n", tick);
        if (pwrite(disk, block, sizeof block, tick % CLUSTERS * CLUSTER) != sizeof block)
            printf("write: %s\n", strerror(errno));
        printf("tick %d disk %d\n", tick, found);
        usleep(50000);
    }
}

int main(void) {
    const char *mode = getenv("mode");
    if (!mode) mode = "idle";
    setvbuf(stdout, NULL, _IONBF, 0);
    printf("init runs: %s\n", mode);
    if (!strncmp(mode, "count-", 6)) {
        count(100); /* five seconds for who wants to save it before its end */
        mode += 6;
    }
    if (!strcmp(mode, "count")) count(1 << 30);
    if (!strcmp(mode, "poweroff")) reboot(RB_POWER_OFF);
    if (!strcmp(mode, "restart")) reboot(RB_AUTOBOOT);
    if (!strcmp(mode, "panic")) return 7;
    if (!strcmp(mode, "flood")) for (;;) printf("all work and no play makes a guest a dull process \x1b[31m\n");
    if (!strcmp(mode, "fill")) fill_disk();
    for (;;) pause();
}
