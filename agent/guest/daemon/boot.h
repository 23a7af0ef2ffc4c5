/* From the kernel's first process to a system that can serve. Every function that cannot go on powers the machine off,
 * with the reason on the console: a half-started guest is worth nothing to its host. */
#ifndef CAPSULE_BOOT_H
#define CAPSULE_BOOT_H

#include <netinet/in.h>
#include <stdbool.h>
#include <stddef.h>

struct BootSettings {
    char root[64];          /* root=, the block device */
    struct in_addr address; /* capsule.address=A.B.C.D/N */
    struct in_addr netmask;
    struct in_addr gateway; /* capsule.gateway= */
};

/* Print the reason (with errno's text), sync, and restart or power off, whichever ends the machine. */
_Noreturn void boot_fail(const char *what);
/* The same without a reason: the guest asked for it. */
_Noreturn void boot_power_off(void);

/* initramfs.c: when /mods/order exists we are in the initramfs: load modules, mount the disk, make it the root. */
void boot_early_mounts(void);
void boot_settings(struct BootSettings *settings);
void boot_switch_root(const struct BootSettings *settings);
/* system.c: the mounts and links every Linux program expects. */
void boot_late_mounts(void);
/* control_groups.c: the group of freezer.h, and a namespace in which it is the root. A guest can do without. */
void boot_control_groups(void);
/* network.c */
void boot_network(const struct BootSettings *settings);

#endif
