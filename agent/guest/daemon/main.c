/* capsule-guest: the only process of ours in a sandbox.
 *
 *   as PID 1                           initramfs' /init, then init of the guest and its daemon (boot.h)
 *   capsule-guest --serve HOST:PORT    serve only: tests and the benchmark, on any machine
 */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <unistd.h>

#include "boot.h"
#include "connection.h"
#include "freezer.h"
#include "job.h"
#include "methods.h"
#include "settle.h"

#define SERVICE_PORT 5000

static struct Watch signals = {.fd = -1};
static bool stop_asked;

static void signal_ready(void *owner, uint32_t events) {
    (void)owner;
    (void)events;
    struct signalfd_siginfo info;
    while (read(signals.fd, &info, sizeof info) == (ssize_t)sizeof info) {
        stop_asked |= info.ssi_signo != SIGCHLD;
    }
}

/* SIGUSR1, SIGUSR2 and SIGINT are how halt, poweroff, reboot and Ctrl-Alt-Del speak to PID 1. */
static bool open_signals(void) {
    static const int wanted[] = {SIGCHLD, SIGTERM, SIGINT, SIGUSR1, SIGUSR2};
    sigset_t set;
    sigemptyset(&set);
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        sigaddset(&set, wanted[i]);
    }
    signal(SIGPIPE, SIG_IGN);
    if (sigprocmask(SIG_BLOCK, &set, NULL) != 0) {
        return false;
    }
    int fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    signals = (struct Watch){.fd = fd, .ready = signal_ready};
    loop_watch(&signals, EPOLLIN);
    return fd >= 0;
}

static void serve_until_stopped(void) {
    bool again = true;
    while (!stop_asked) {
        uint64_t deadline = jobs_deadline();
        uint64_t others[] = {connections_deadline(), settle_deadline()};
        for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
            deadline = others[i] < deadline ? others[i] : deadline;
        }
        loop_turn(again ? 0 : deadline);
        jobs_reap();
        again = connections_settle();
        jobs_flow();
        jobs_advance();
        settle_advance();
        again |= connections_settle();
        jobs_watch();
    }
    jobs_abandon_all();
}

/* --- PID 1 -------------------------------------------------------------------------------------------------- */

static void run_guest(void) {
    struct BootSettings settings;
    boot_early_mounts();
    boot_settings(&settings);
    boot_switch_root(&settings);
    boot_late_mounts();
    boot_control_groups();
    boot_network(&settings);
    configure_system_changes(true);
    if (!loop_open() || !jobs_open() || !open_signals()) {
        boot_fail("start the loop");
    }
    if (connections_listen(settings.address, SERVICE_PORT, settings.gateway) == 0) {
        boot_fail("listen");
    }
    info_ready_now();
    printf("CAPSULE-READY %.3f\n", (double)info_boot_ns() / 1e9);
    fflush(stdout);
    serve_until_stopped();
    boot_power_off();
}

/* --- --serve ------------------------------------------------------------------------------------------------ */

struct Options {
    struct in_addr host;
    uint16_t port;
    struct in_addr peer;
    const char *cgroup;
    bool root_check;
    bool serve;
};

static bool parse_endpoint(const char *text, struct Options *options) {
    char host[INET_ADDRSTRLEN];
    const char *colon = strrchr(text, ':');
    if (colon == NULL || (size_t)(colon - text) >= sizeof host) {
        return false;
    }
    memcpy(host, text, (size_t)(colon - text));
    host[colon - text] = '\0';
    char *end;
    unsigned long port = strtoul(colon + 1, &end, 10);
    options->port = (uint16_t)port;
    return inet_pton(AF_INET, host, &options->host) == 1 && *end == '\0' && end != colon + 1 && port <= UINT16_MAX;
}

static bool parse_option(const char *name, const char *value, struct Options *options) {
    if (strcmp(name, "--serve") == 0) {
        options->serve = true;
        return parse_endpoint(value, options);
    }
    if (strcmp(name, "--peer") == 0) {
        return inet_pton(AF_INET, value, &options->peer) == 1;
    }
    if (strcmp(name, "--cgroup") == 0) {
        options->cgroup = value;
        return true;
    }
    bool on = strcmp(value, "on") == 0;
    if (strcmp(name, "--root-check") == 0) {
        options->root_check = on;
    } else if (strcmp(name, "--system-changes") == 0) {
        configure_system_changes(on);
    } else {
        return false;
    }
    return on || strcmp(value, "off") == 0;
}

static int serve(const struct Options *options) {
    if (options->root_check && geteuid() != 0) {
        fputs("capsule-guest: run it as root, or with --root-check off (it can then only run programs as you)\n", stderr);
        return 1;
    }
    if (options->cgroup != NULL && !freezer_open(options->cgroup)) {
        fprintf(stderr, "capsule-guest: control group %s: %s\n", options->cgroup, strerror(errno));
        return 1;
    }
    /* Orphans come to us as they do to PID 1. */
    prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0);
    uint16_t port = 0;
    if (loop_open() && jobs_open() && open_signals()) {
        port = connections_listen(options->host, options->port, options->peer);
    }
    if (port == 0) {
        fprintf(stderr, "capsule-guest: cannot serve: %s\n", strerror(errno));
        return 1;
    }
    info_ready_now();
    printf("CAPSULE-READY port=%u\n", port);
    fflush(stdout);
    serve_until_stopped();
    return 0;
}

int main(int count, char **arguments) {
    struct Options options = {.root_check = true};
    /* The kernel hands init every word of its command line that it does not know. */
    if (getpid() == 1 && (count < 2 || strcmp(arguments[1], "--serve") != 0)) {
        run_guest();
    }
    inet_pton(AF_INET, "127.0.0.1", &options.peer);
    for (int i = 1; i < count; i += 2) {
        if (i + 1 == count || !parse_option(arguments[i], arguments[i + 1], &options)) {
            options.serve = false;
            break;
        }
    }
    if (!options.serve) {
        fputs("usage: capsule-guest --serve HOST:PORT [--peer ADDRESS] [--cgroup DIRECTORY] [--root-check on|off]"
              " [--system-changes on|off]\n",
              stderr);
        return 2;
    }
    return serve(&options);
}
