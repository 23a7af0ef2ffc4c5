#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "boot.h"
#include "guest_limits.h"

#define NEW_ROOT "/new"
#define COMMAND_LINE_BYTES 4096

static void open_console(void) {
    int fd = open("/dev/console", O_RDWR | O_NOCTTY);
    if (fd < 0) {
        fd = open("/dev/null", O_RDWR);
    }
    for (int target = 0; fd >= 0 && target < 3; target++) {
        dup2(fd, target);
    }
    if (fd > 2) {
        close(fd);
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
}

void boot_early_mounts(void) {
    mkdir("/dev", 0755);
    mkdir("/proc", 0555);
    mkdir("/sys", 0555);
    /* EBUSY: the kernel has mounted it already (CONFIG_DEVTMPFS_MOUNT) */
    bool devices = mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, "mode=0755") == 0 || errno == EBUSY;
    open_console();
    if (!devices) {
        boot_fail("mount /dev");
    }
    if (mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0 && errno != EBUSY) {
        boot_fail("mount /proc");
    }
    if (mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, NULL) != 0 && errno != EBUSY) {
        boot_fail("mount /sys");
    }
}

/* --- kernel command line ------------------------------------------------------------------------------------ */

static void parse_address(struct BootSettings *settings, const char *value) {
    char text[32];
    snprintf(text, sizeof text, "%s", value);
    char *slash = strchr(text, '/');
    long bits = 32;
    if (slash != NULL) {
        char *end;
        *slash = '\0';
        bits = strtol(slash + 1, &end, 10);
        if (*end != '\0' || end == slash + 1) {
            bits = -1;
        }
    }
    if (bits < 1 || bits > 32 || inet_pton(AF_INET, text, &settings->address) != 1) {
        errno = EINVAL;
        boot_fail("capsule.address");
    }
    settings->netmask.s_addr = htonl(~0U << (32 - bits));
}

static void parse_word(struct BootSettings *settings, const char *word) {
    if (strncmp(word, "root=", 5) == 0) {
        snprintf(settings->root, sizeof settings->root, "%s", word + 5);
    } else if (strncmp(word, "capsule.address=", 16) == 0) {
        parse_address(settings, word + 16);
    } else if (strncmp(word, "capsule.gateway=", 16) == 0 &&
               inet_pton(AF_INET, word + 16, &settings->gateway) != 1) {
        errno = EINVAL;
        boot_fail("capsule.gateway");
    }
}

void boot_settings(struct BootSettings *settings) {
    char line[COMMAND_LINE_BYTES];
    *settings = (struct BootSettings){.root = "/dev/vda"};
    parse_address(settings, "169.254.0.21/30");
    inet_pton(AF_INET, "169.254.0.22", &settings->gateway);
    int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
    ssize_t count = fd >= 0 ? read(fd, line, sizeof line - 1) : -1;
    if (count < 0) {
        boot_fail("read /proc/cmdline");
    }
    close(fd);
    line[count] = '\0';
    char *rest = line;
    for (char *word; (word = strsep(&rest, " \n")) != NULL;) {
        parse_word(settings, word);
    }
}

/* --- root file system --------------------------------------------------------------------------------------- */

static void load_module(const char *name) {
    char path[160];
    snprintf(path, sizeof path, "/mods/%s", name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || (syscall(SYS_finit_module, fd, "", 0) != 0 && errno != EEXIST)) {
        printf("capsule-guest: module %s: %s\n", name, strerror(errno)); /* the disk or the network will be missed */
    }
    if (fd >= 0) {
        close(fd);
    }
    unlink(path);
}

static void load_modules(FILE *order) {
    char line[128];
    while (fgets(line, sizeof line, order) != NULL) {
        line[strcspn(line, "\n")] = '\0';
        if (line[0] != '\0' && strchr(line, '/') == NULL) {
            load_module(line);
        }
    }
    fclose(order);
}

static void wait_for(const char *device) {
    struct stat status;
    for (int waited = 0; stat(device, &status) != 0; waited++) {
        if (waited == DISK_WAIT_MS) {
            boot_fail(device);
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

/* What the initramfs holds is memory the guest would pay for until it ends. */
static void free_initramfs(void) {
    unlink("/mods/order");
    rmdir("/mods");
    unlink("/init");
}

static void relocate_mount(const char *from, const char *to) {
    mkdir(to, 0755);
    if (mount(from, to, NULL, MS_MOVE, NULL) != 0) {
        boot_fail(to);
    }
}

void boot_switch_root(const struct BootSettings *settings) {
    FILE *order = fopen("/mods/order", "re");
    if (order == NULL) {
        return; /* started from the root file system itself */
    }
    load_modules(order);
    wait_for(settings->root);
    mkdir(NEW_ROOT, 0755);
    if (mount(settings->root, NEW_ROOT, "ext4", MS_NOATIME, NULL) != 0) {
        boot_fail("mount the root file system");
    }
    free_initramfs();
    relocate_mount("/dev", NEW_ROOT "/dev");
    relocate_mount("/proc", NEW_ROOT "/proc");
    relocate_mount("/sys", NEW_ROOT "/sys");
    if (chdir(NEW_ROOT) != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0) {
        boot_fail("switch to the root file system");
    }
}
