/* The image's /etc/passwd and /etc/group, read without libc's name services. Children only: reading may block. */
#ifndef CAPSULE_USERS_H
#define CAPSULE_USERS_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/types.h>

#define ACCOUNT_TEXT_BYTES 256

struct Account {
    char name[ACCOUNT_TEXT_BYTES];
    char home[ACCOUNT_TEXT_BYTES];
    char shell[ACCOUNT_TEXT_BYTES];
    uid_t uid;
    gid_t gid;
};

/* By name, else by number. An image without /etc/passwd still has root. */
bool account_find(const char *who, struct Account *account);
/* The groups of a user, its own first; at most `most`. */
size_t account_groups(const struct Account *account, gid_t *groups, size_t most);
/* Names for file entries; the number as text when there is none. Valid until the next call with another id. */
const char *user_name(uid_t uid);
const char *group_name(gid_t gid);

#endif
