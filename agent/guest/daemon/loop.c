#include "loop.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <time.h>
#include <unistd.h>

/* Larger than most numbers of jobs: who is quiet should be heard in the turn in which others flood. */
#define BATCH 256

/* Discarded blocks are chained through their own first bytes. */
struct Discarded {
    struct Discarded *next;
};

static int poll_fd = -1;
static struct Discarded *discarded;

bool loop_open(void) {
    poll_fd = epoll_create1(EPOLL_CLOEXEC);
    return poll_fd >= 0;
}

void loop_watch(struct Watch *watch, uint32_t events) {
    if (watch->fd < 0 || watch->events == events) {
        return;
    }
    struct epoll_event event = {.events = events, .data.ptr = watch};
    /* Removed, not masked: epoll reports hang-ups even of an empty mask, and a paused pipe would spin the loop. */
    int action = events == 0 ? EPOLL_CTL_DEL : watch->events == 0 ? EPOLL_CTL_ADD : EPOLL_CTL_MOD;
    if (epoll_ctl(poll_fd, action, watch->fd, &event) != 0) {
        fprintf(stderr, "capsule-guest: cannot watch a descriptor: %s\n", strerror(errno));
        return;
    }
    watch->events = events;
}

void loop_close(struct Watch *watch) {
    if (watch->fd < 0) {
        return;
    }
    /* A child between fork and close_range still holds the file: only an explicit removal ends its events. */
    loop_watch(watch, 0);
    close(watch->fd);
    watch->fd = -1;
}

void loop_discard(void *memory) {
    struct Discarded *block = memory;
    block->next = discarded;
    discarded = block;
}

static int milliseconds_until(uint64_t deadline) {
    if (deadline == NEVER) {
        return -1;
    }
    uint64_t now = clock_monotonic_ns();
    if (deadline <= now) {
        return 0;
    }
    uint64_t left = (deadline - now + 999999) / 1000000;
    return left > 60000 ? 60000 : (int)left;
}

void loop_turn(uint64_t deadline) {
    struct epoll_event events[BATCH];
    int count = epoll_wait(poll_fd, events, BATCH, milliseconds_until(deadline));
    for (int i = 0; i < count; i++) {
        struct Watch *watch = events[i].data.ptr;
        /* An earlier callback of this batch may have closed or paused it. */
        uint32_t wanted = events[i].events & (watch->events | EPOLLERR | EPOLLHUP);
        if (watch->fd >= 0 && watch->events != 0 && wanted != 0) {
            watch->ready(watch->owner, wanted);
        }
    }
    while (discarded != NULL) {
        struct Discarded *next = discarded->next;
        free(discarded);
        discarded = next;
    }
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000ULL + (uint64_t)now.tv_nsec;
}

uint64_t clock_monotonic_ns(void) { return clock_ns(CLOCK_MONOTONIC); }
uint64_t clock_boot_ns(void) { return clock_ns(CLOCK_BOOTTIME); }
uint64_t clock_wall_ns(void) { return clock_ns(CLOCK_REALTIME); }
