// What a VMM is to the pager: memory in a memfd, registered with userfaultfd, handed over with Firecracker's handshake.
// usage: vmm SOCKET MEGABYTES REGIONS OPTIONS [MODEL]; then commands on standard input, one answer line each.
//   MODEL: a file with what the memory must hold. OPTIONS: r = tell of removed ranges, w = no write protection.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <linux/userfaultfd.h>
#ifndef UFFD_FEATURE_WP_UNPOPULATED
#define UFFD_FEATURE_WP_UNPOPULATED (1 << 13)
#endif
#define FEATURE_WP_ASYNC (1 << 15)
#define PAGE 4096ul

static uint8_t *memory;
static const uint8_t *model;
static uint64_t size, pages;
static int memory_fd;

static void check(int ok, const char *what) {
    if (!ok) {
        fprintf(stderr, "vmm: %s: %s\n", what, strerror(errno));
        _exit(9);
    }
}

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int arm(const char *options) {
    int wp = !strchr(options, 'w');
    int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    check(fd >= 0, "userfaultfd");
    struct uffdio_api api = {.api = UFFD_API, .features = UFFD_FEATURE_MISSING_SHMEM};
    if (wp) api.features |= FEATURE_WP_ASYNC | UFFD_FEATURE_WP_UNPOPULATED | UFFD_FEATURE_WP_HUGETLBFS_SHMEM;
    if (strchr(options, 'r')) api.features |= UFFD_FEATURE_EVENT_REMOVE;
    check(!ioctl(fd, UFFDIO_API, &api), "api");
    struct uffdio_register r = {.range = {(uintptr_t)memory, size}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if (wp) r.mode |= UFFDIO_REGISTER_MODE_WP;
    check(!ioctl(fd, UFFDIO_REGISTER, &r), "register");
    struct uffdio_writeprotect w = {.range = r.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    if (wp) check(!ioctl(fd, UFFDIO_WRITEPROTECT, &w), "write-protect");
    return fd;
}

static void handshake(const char *path, int uffd, int regions) {
    int s = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    strncpy(a.sun_path, path, sizeof a.sun_path - 1);
    check(!connect(s, (void *)&a, sizeof a), "connect");
    char text[4096];
    int n = 0;
    uint64_t each = size / regions / PAGE * PAGE;
    for (int i = 0; i < regions; i++) {
        uint64_t length = i == regions - 1 ? size - i * each : each;
        n += snprintf(text + n, sizeof text - n,
            "%c{\"base_host_virt_addr\":%lu,\"size\":%lu,\"offset\":%lu,\"page_size\":4096,\"page_size_kib\":4096}",
            i ? ',' : '[', (uintptr_t)memory + i * each, length, i * each);
    }
    n += snprintf(text + n, sizeof text - n, "]");
    struct iovec iov = {text, n};
    char control[CMSG_SPACE(sizeof uffd)];
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *h = CMSG_FIRSTHDR(&m);
    h->cmsg_level = SOL_SOCKET;
    h->cmsg_type = SCM_RIGHTS;
    h->cmsg_len = CMSG_LEN(sizeof uffd);
    memcpy(CMSG_DATA(h), &uffd, sizeof uffd);
    check(sendmsg(s, &m, 0) == n, "sendmsg");
}

static uint64_t random_next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

// Each of several threads reads every page in an order of its own and compares it with the model.
struct job { uint64_t seed; uint64_t bad, first; };

static void *verify(void *argument) {
    struct job *job = argument;
    uint32_t *order = malloc(pages * sizeof *order);
    uint64_t state = job->seed | 1;
    for (uint64_t i = 0; i < pages; i++) order[i] = i;
    for (uint64_t i = pages - 1; job->seed && i > 0; i--) {
        uint64_t j = random_next(&state) % (i + 1);
        uint32_t t = order[i]; order[i] = order[j]; order[j] = t;
    }
    for (uint64_t i = 0; i < pages; i++) {
        if (memcmp(memory + order[i] * PAGE, model + order[i] * PAGE, PAGE)) {
            if (!job->bad++) job->first = order[i];
        }
    }
    free(order);
    return NULL;
}

static void verify_all(int threads, uint64_t seed) {
    pthread_t ids[64];
    struct job jobs[64];
    uint64_t bad = 0, first = 0;
    for (int i = 0; i < threads; i++) {
        jobs[i] = (struct job){.seed = seed ? seed * 64 + i + 1 : 0};
        check(!pthread_create(&ids[i], NULL, verify, &jobs[i]), "thread");
    }
    for (int i = 0; i < threads; i++) {
        pthread_join(ids[i], NULL);
        if (jobs[i].bad) { bad += jobs[i].bad; first = jobs[i].first; }
    }
    if (bad) printf("differs %lu first %lu\n", bad, first); else printf("same\n");
}

static int compare(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static volatile uint8_t sink;

int main(int argc, char **argv) {
    check(argc >= 5, "usage");
    size = strtoull(argv[2], NULL, 10) << 20;
    pages = size / PAGE;
    memory_fd = memfd_create("guest", MFD_CLOEXEC);
    check(memory_fd >= 0 && !ftruncate(memory_fd, size), "memfd");
    memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, memory_fd, 0);
    check(memory != MAP_FAILED, "mmap");
    if (argc > 5) {
        int fd = open(argv[5], O_RDONLY);
        model = mmap(NULL, size, PROT_READ, MAP_PRIVATE | MAP_POPULATE, fd, 0);
        check(model != MAP_FAILED, "model");
    }
    int uffd = arm(argv[4]);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("armed %lu %d\n", (uintptr_t)memory, memory_fd);
    handshake(argv[1], uffd, atoi(argv[3]));
    char line[256], word[32];
    while (fgets(line, sizeof line, stdin)) {
        uint64_t a = 0, b = 0, c = 0;
        sscanf(line, "%31s %lu %lu %lu", word, &a, &b, &c);
        if (!strcmp(word, "verify")) {            // THREADS SEED
            verify_all(a, b);
        } else if (!strcmp(word, "read")) {       // OFFSET LENGTH STEP: nanoseconds
            uint64_t began = now();
            for (uint64_t o = a; o < a + b; o += c) sink = *(volatile uint8_t *)(memory + o);
            printf("%lu\n", now() - began);
        } else if (!strcmp(word, "scatter")) {    // COUNT STEP: nanoseconds for reads out of order
            uint64_t began = now();
            for (uint64_t i = 0; i < a; i++) sink = *(volatile uint8_t *)(memory + i * 37 % a * b);
            printf("%lu\n", now() - began);
        } else if (!strcmp(word, "peek")) {       // OFFSET: the byte
            printf("%u\n", *(volatile uint8_t *)(memory + a));
        } else if (!strcmp(word, "write")) {      // OFFSET LENGTH BYTE
            memset(memory + a, c, b);
            printf("done\n");
        } else if (!strcmp(word, "remove")) {     // OFFSET LENGTH
            check(!madvise(memory + a, b, MADV_REMOVE), "remove");
            printf("done\n");
        } else if (!strcmp(word, "punch")) {      // OFFSET LENGTH: without a word to the pager
            check(!fallocate(memory_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, a, b), "punch");
            printf("done\n");
        } else if (!strcmp(word, "latency")) {    // COUNT STEP PAUSE_US: median, highest nanoseconds of reads out of order
            uint64_t *each = calloc(a, sizeof *each);
            for (uint64_t i = 0; i < a; i++) {
                uint64_t began = now();
                sink = *(volatile uint8_t *)(memory + i * 37 % a * b);
                each[i] = now() - began;
                usleep(c);
            }
            qsort(each, a, sizeof *each, compare);
            printf("%lu %lu\n", each[a / 2], each[a - 1]);
            free(each);
        } else if (!strcmp(word, "fallback")) {   // make the shared description a blocking one
            check(!fcntl(uffd, F_SETFL, 0), "fcntl");
            printf("done\n");
        } else if (!strcmp(word, "close")) {
            close(uffd);
            printf("done\n");
        } else if (!strcmp(word, "unmap")) {      // OFFSET LENGTH
            check(!munmap(memory + a, b), "munmap");
            printf("done\n");
        } else {
            printf("unknown\n");
        }
    }
    return 0;
}
