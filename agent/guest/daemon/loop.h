/* The event loop: one epoll set, one thread, callbacks that never block. */
#ifndef CAPSULE_LOOP_H
#define CAPSULE_LOOP_H

#include <stdbool.h>
#include <stdint.h>

#define NEVER UINT64_MAX

/* A descriptor the loop watches and owns. `fd` is -1 once closed. */
struct Watch {
    int fd;
    uint32_t events;
    void (*ready)(void *owner, uint32_t events);
    void *owner;
};

/* Create the epoll set; false when the kernel refuses. */
bool loop_open(void);
/* Hear of `events` (EPOLLIN, …) from now on; 0 for nothing at all, hang-ups included. */
void loop_watch(struct Watch *watch, uint32_t events);
/* Stop watching and close the descriptor. Safe to repeat. */
void loop_close(struct Watch *watch);
/* Free `memory` once no event of the current batch can refer to it any more. Its first word must be a list link that
 * nobody needs any longer: it is reused. */
void loop_discard(void *memory);
/* Wait for events until `deadline` (clock_monotonic_ns) and call back; then free what was discarded. */
void loop_turn(uint64_t deadline);

uint64_t clock_monotonic_ns(void);
uint64_t clock_boot_ns(void);
uint64_t clock_wall_ns(void);

#endif
