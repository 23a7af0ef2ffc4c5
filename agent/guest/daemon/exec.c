/* exec: the child's side, between fork and execve. */
#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "child.h"
#include "guest_limits.h"
#include "terminal.h"
#include "users.h"

#define LOGIN_NAME_BYTES (ACCOUNT_TEXT_BYTES + 1)
#define DEFAULT_TERM "xterm-256color"
#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

extern char **environ;

static char *string(struct Slice slice) {
    char *text = slice_string(slice);
    if (text == NULL) {
        worker_fault("internal", "the guest is out of memory");
    }
    return text;
}

static void become(const struct Account *account) {
    gid_t groups[MAX_GROUPS];
    if (geteuid() != 0) { /* a daemon that serves without root, for tests: only as itself */
        if (account->uid != geteuid()) {
            worker_fault("permission_denied", "the guest daemon does not run as root");
        }
        return;
    }
    size_t count = account_groups(account, groups, MAX_GROUPS);
    if (setgroups(count, groups) != 0 || setgid(account->gid) != 0 || setuid(account->uid) != 0) {
        worker_fault("internal", "cannot become the user %s: %s", account->name, strerror(errno));
    }
}

static void set(const char *name, const char *value) {
    if (setenv(name, value, 1) != 0) {
        worker_fault("internal", "the guest is out of memory");
    }
}

static void set_all(struct Slice envs) {
    struct StringWalk walk = envs_walk(envs);
    for (struct Slice name, value; walk_next(&walk, &name) && walk_next(&walk, &value);) {
        char *name_text = string(name);
        char *value_text = string(value);
        set(name_text, value_text);
        free(name_text);
        free(value_text);
    }
}

static const char *shell_of(const struct Account *account) {
    return account->shell[0] != '\0' ? account->shell : "/bin/sh";
}

static void build_environment(const struct Exec *exec, const struct Account *account) {
    static char *nothing[] = {NULL};
    environ = nothing;
    set("PATH", DEFAULT_PATH);
    set("HOME", account->home);
    set("USER", account->name);
    set("LOGNAME", account->name);
    set("SHELL", shell_of(account));
    if (exec->terminal) {
        set("TERM", DEFAULT_TERM);
    }
    set_all(exec->default_envs);
    set_all(exec->envs);
}

static void enter_directory(const struct Exec *exec, const struct Account *account) {
    if (exec->cwd.data == NULL) {
        if (account->home[0] != '/' || chdir(account->home) != 0) {
            (void)!chdir("/");
        }
        return;
    }
    char *cwd = string(exec->cwd);
    if (chdir(cwd) == 0) {
        free(cwd);
        return;
    }
    if (errno == ENOENT || errno == ENOTDIR) {
        worker_fault("not_found", "the working directory %s does not exist", cwd);
    }
    worker_errno(errno, cwd);
}

/* `login` is the name a login shell gets, empty for any other program. */
static void report_start(const struct Account *account, const char *login) {
    char record[ACCOUNT_TEXT_BYTES + PATH_MAX + LOGIN_NAME_BYTES];
    size_t used = strlen(account->name) + 1;
    memcpy(record, account->name, used);
    if (getcwd(record + used, PATH_MAX) == NULL) {
        strcpy(record + used, "/");
    }
    used += strlen(record + used) + 1;
    strcpy(record + used, login);
    used += strlen(login) + 1;
    worker_record(RECORD_STARTED, (struct Slice){.data = (const uint8_t *)record, .length = used});
}

static char **arguments(const struct Exec *exec, char *command) {
    struct StringWalk walk = strings_walk(exec->arguments);
    char **list = calloc(walk.left + 4, sizeof *list);
    if (list == NULL) {
        worker_fault("internal", "the guest is out of memory");
    }
    size_t count = 0;
    if (exec->arguments.data == NULL) {
        list[count++] = "/bin/sh";
        list[count++] = "-c";
    }
    list[count++] = command;
    for (struct Slice text; walk_next(&walk, &text);) {
        list[count++] = string(text);
    }
    return list;
}

static _Noreturn void fail_start(const char *program) {
    int reason = errno;
    dprintf(STDERR_FILENO, "%s: %s\n", program, strerror(reason));
    _exit(reason == ENOENT ? 127 : 126);
}

/* The '-' makes a shell a login shell. */
static void name_login_shell(const struct Account *account, char name[LOGIN_NAME_BYTES]) {
    const char *path = shell_of(account);
    const char *slash = strrchr(path, '/');
    snprintf(name, LOGIN_NAME_BYTES, "-%s", slash != NULL ? slash + 1 : path);
}

static _Noreturn void run_login_shell(const struct Account *account, char *name) {
    const char *path = shell_of(account);
    char *list[] = {name, NULL};
    execve(path, list, environ);
    fail_start(path);
}

static _Noreturn void run_command(const struct Exec *exec) {
    char *command = string(exec->command);
    char **list = arguments(exec, command);
    if (exec->arguments.data == NULL) {
        execve("/bin/sh", list, environ);
        fail_start("/bin/sh");
    }
    execvp(command, list);
    fail_start(command);
}

void exec_run(const void *argument) {
    const struct Exec *exec = argument;
    struct Account account;
    char *user = exec->user.data != NULL ? string(exec->user) : "root";
    if (!account_find(user, &account)) {
        worker_fault("not_found", "there is no user %s in this sandbox", user);
    }
    if (exec->terminal && !terminal_take(account.uid)) {
        worker_fault("internal", "cannot give the process its terminal: %s", strerror(errno));
    }
    become(&account);
    build_environment(exec, &account);
    enter_directory(exec, &account);
    char login[LOGIN_NAME_BYTES] = "";
    if (exec->command.data == NULL) {
        name_login_shell(&account, login);
    }
    report_start(&account, login);
    if (exec->command.data == NULL) {
        run_login_shell(&account, login);
    }
    run_command(exec);
}
