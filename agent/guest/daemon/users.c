#include "users.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LINE_BYTES 4096
#define CACHE_ENTRIES 32

/* The next line with at least `wanted` colon-separated fields, split in place. Longer lines than LINE_BYTES are no
 * lines of ours. */
static bool next_line(FILE *file, char *line, char **fields, size_t wanted) {
    while (fgets(line, LINE_BYTES, file) != NULL) {
        size_t length = strlen(line);
        bool whole = length > 0 && line[length - 1] == '\n';
        if (!whole && !feof(file)) {
            int character;
            while ((character = fgetc(file)) != EOF && character != '\n') {
            }
            continue;
        }
        if (whole) {
            line[length - 1] = '\0';
        }
        size_t count = 0;
        char *rest = line;
        for (char *field; count < wanted && (field = strsep(&rest, ":")) != NULL; count++) {
            fields[count] = field;
        }
        if (count == wanted) {
            return true;
        }
    }
    return false;
}

static bool number(const char *text, unsigned long *value) {
    char *end;
    if (text[0] < '0' || text[0] > '9') {
        return false;
    }
    *value = strtoul(text, &end, 10);
    return *end == '\0' && *value < 0xffffffffUL; /* (uid_t)-1 means "no change" to the kernel */
}

static bool copy(char *target, const char *text) {
    size_t length = strlen(text);
    if (length >= ACCOUNT_TEXT_BYTES) {
        return false;
    }
    memcpy(target, text, length + 1);
    return true;
}

static bool fill(struct Account *account, char **fields) {
    unsigned long uid, gid;
    if (!number(fields[2], &uid) || !number(fields[3], &gid)) {
        return false;
    }
    account->uid = (uid_t)uid;
    account->gid = (gid_t)gid;
    return copy(account->name, fields[0]) && copy(account->home, fields[5]) && copy(account->shell, fields[6]);
}

static bool search(const char *who, bool by_number, struct Account *account) {
    char line[LINE_BYTES];
    char *fields[7];
    bool found = false;
    FILE *file = fopen("/etc/passwd", "re");
    if (file == NULL) {
        return false;
    }
    while (!found && next_line(file, line, fields, 7)) {
        found = strcmp(fields[by_number ? 2 : 0], who) == 0 && fill(account, fields);
    }
    fclose(file);
    return found;
}

bool account_find(const char *who, struct Account *account) {
    if (search(who, false, account) || search(who, true, account)) {
        return true;
    }
    if (strcmp(who, "root") != 0 && strcmp(who, "0") != 0) {
        return false;
    }
    *account = (struct Account){.name = "root", .home = "/root", .shell = "/bin/sh"};
    return true;
}

static bool is_member(char *members, const char *name) {
    for (char *member; (member = strsep(&members, ",")) != NULL;) {
        if (strcmp(member, name) == 0) {
            return true;
        }
    }
    return false;
}

size_t account_groups(const struct Account *account, gid_t *groups, size_t most) {
    char line[LINE_BYTES];
    char *fields[4];
    size_t count = 0;
    groups[count++] = account->gid;
    FILE *file = fopen("/etc/group", "re");
    while (file != NULL && count < most && next_line(file, line, fields, 4)) {
        unsigned long gid;
        if (number(fields[2], &gid) && gid != account->gid && is_member(fields[3], account->name)) {
            groups[count++] = (gid_t)gid;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return count;
}

/* Listings ask for the same few ids again and again. */
struct Name {
    bool known;
    unsigned id;
    char text[ACCOUNT_TEXT_BYTES];
};

static const char *name_of(struct Name *cache, const char *path, unsigned id) {
    struct Name *entry = &cache[id % CACHE_ENTRIES];
    if (entry->known && entry->id == id) {
        return entry->text;
    }
    char line[LINE_BYTES];
    char *fields[3];
    unsigned long other;
    entry->known = true;
    entry->id = id;
    snprintf(entry->text, sizeof entry->text, "%u", id);
    FILE *file = fopen(path, "re");
    while (file != NULL && next_line(file, line, fields, 3)) {
        if (number(fields[2], &other) && other == id && copy(entry->text, fields[0])) {
            break;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return entry->text;
}

const char *user_name(uid_t uid) {
    static struct Name cache[CACHE_ENTRIES];
    return name_of(cache, "/etc/passwd", uid);
}

const char *group_name(gid_t gid) {
    static struct Name cache[CACHE_ENTRIES];
    return name_of(cache, "/etc/group", gid);
}
