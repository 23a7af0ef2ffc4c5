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

/* Write to the whole disk and say how it went, then that we are still running. */
static void fill_disk(void) {
    static char block[1 << 16];
    load_modules();
    mount("devtmpfs", "/dev", "devtmpfs", 0, "");
    int disk = -1;
    for (int tries = 0; tries < 500 && disk < 0; tries++) {
        disk = open("/dev/vda", O_WRONLY);
        if (disk < 0) usleep(10000);
    }
    memset(block, 'x', sizeof block);
    while (write(disk, block, sizeof block) == sizeof block) {}
    if (fsync(disk) == 0) printf("disk: all written\n"); else printf("disk: %s\n", strerror(errno));
    printf("still running\n");
}

int main(void) {
    const char *mode = getenv("mode");
    if (!mode) mode = "idle";
    setvbuf(stdout, NULL, _IONBF, 0);
    printf("init runs: %s\n", mode);
    if (!strcmp(mode, "poweroff")) reboot(RB_POWER_OFF);
    if (!strcmp(mode, "restart")) reboot(RB_AUTOBOOT);
    if (!strcmp(mode, "panic")) return 7;
    if (!strcmp(mode, "flood")) for (;;) printf("all work and no play makes a guest a dull process \x1b[31m\n");
    if (!strcmp(mode, "fill")) fill_disk();
    for (;;) pause();
}
