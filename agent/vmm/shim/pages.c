/* Preloaded into QEMU: registers the guest's memory with userfaultfd the moment QEMU maps it, before anything can have
 * touched it.
 *
 * Boot:    write protection only, asynchronous: nobody has to serve anything, and PAGEMAP_SCAN of the process tells
 *          which pages were written. Where the kernel cannot do that it is said, and the VM runs without.
 * Restore: missing pages too. The descriptor goes to who serves them, with Firecracker's handshake: one message of
 *          JSON, the descriptor as SCM_RIGHTS. Whatever goes wrong here ends QEMU: without its memory it must not run.
 *
 * Settings, from the environment, read once:
 *   CAPSULE_PAGES_DEVICE   an inherited descriptor of /dev/userfaultfd: QEMU runs as a user who may not open it
 *   CAPSULE_PAGES_MEMORY   size of the guest's memory in bytes, which is how its mapping is known
 *   CAPSULE_PAGES_SOCKET   restore: absolute path of the unix socket of who serves the pages
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

/* Newer than the headers of Debian 12. */
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif
#define FEATURE_WP_SHMEM (UINT64_C(1) << 12)
#define FEATURE_WP_UNPOPULATED (UINT64_C(1) << 13)
#define FEATURE_WP_ASYNC (UINT64_C(1) << 15)
#define TRACKING (FEATURE_WP_SHMEM | FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)

#define MEMORY_NAME "/memfd:memory-backend-memfd (deleted)"
#define EXIT_UNARMED 70
#define SEND_SECONDS 10

_Static_assert(sizeof(off_t) == 8, "mmap and mmap64 must be the same function");

static int device = -1;
static size_t memory_bytes;      /* 0: nothing to do */
static const char *page_socket;  /* NULL: boot */
static atomic_flag found = ATOMIC_FLAG_INIT;

/* Say what failed. On restore that is the end; on boot the VM goes on without the tracking of written pages. */
static void failed(const char *what) {
    dprintf(STDERR_FILENO, "capsule-pages: %s: %s\n", what, strerror(errno));
    if (page_socket) _exit(EXIT_UNARMED);
}

static bool parse(const char *text, unsigned long limit, unsigned long *value) {
    char *end;
    if (*text < '0' || *text > '9') return false;
    errno = 0;
    *value = strtoul(text, &end, 10);
    return errno == 0 && *end == '\0' && *value <= limit;
}

__attribute__((constructor)) static void read_settings(void) {
    const char *descriptor = getenv("CAPSULE_PAGES_DEVICE"), *size = getenv("CAPSULE_PAGES_MEMORY");
    unsigned long number = 0, bytes = 0;
    page_socket = getenv("CAPSULE_PAGES_SOCKET");
    if (!descriptor && !size && !page_socket) return;
    if (!descriptor || !size || !parse(descriptor, INT32_MAX, &number) || !parse(size, SIZE_MAX, &bytes)) {
        errno = EINVAL;
        failed("settings");
        return;
    }
    device = (int)number;
    memory_bytes = bytes;
    fcntl(device, F_SETFD, FD_CLOEXEC);
}

/* Open a userfaultfd and say which of `wanted` the kernel can do. */
static int open_faults(uint64_t wanted, uint64_t *features) {
    int descriptor = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    if (descriptor < 0) return -1;
    struct uffdio_api api = {.api = UFFD_API, .features = wanted};
    if (ioctl(descriptor, UFFDIO_API, &api) != 0) {
        close(descriptor);
        return -1;
    }
    *features = api.features;
    return descriptor;
}

/* The interface is asked once per descriptor: one to learn what there is, another one with what we want of it. */
static int open_with_features(bool *tracking) {
    uint64_t there = 0, used = 0;
    int descriptor = open_faults(0, &there);
    if (descriptor < 0) return -1;
    close(descriptor);
    *tracking = (there & TRACKING) == TRACKING;
    return open_faults((page_socket ? UFFD_FEATURE_MISSING_SHMEM : 0) | (*tracking ? TRACKING : 0), &used);
}

/* Connect to the page socket. Its address holds 107 bytes, its path may be longer: through /proc it is always short. */
static int connect_pages(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const char *slash = strrchr(page_socket, '/');
    char directory[4096];
    int written;
    if (page_socket[0] != '/' || !slash || (size_t)(slash - page_socket) >= sizeof directory) {
        errno = ENAMETOOLONG;
        return -1;
    }
    memcpy(directory, page_socket, (size_t)(slash - page_socket));
    directory[slash - page_socket] = '\0';
    int parent = open(directory[0] ? directory : "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (parent < 0) return -1;
    written = snprintf(address.sun_path, sizeof address.sun_path, "/proc/self/fd/%d/%s", parent, slash + 1);
    int connection = -1;
    if (written >= (int)sizeof address.sun_path) {
        errno = ENAMETOOLONG;
    } else {
        connection = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    }
    struct timeval patience = {.tv_sec = SEND_SECONDS}; /* for connect too, when nobody takes connections */
    if (connection >= 0 && (setsockopt(connection, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience) != 0 ||
                            connect(connection, (struct sockaddr *)&address, sizeof address) != 0)) {
        int error = errno;
        close(connection);
        errno = error;
        connection = -1;
    }
    int error = errno;
    close(parent);
    errno = error;
    return connection;
}

static bool hand_over(int connection, int faults, const void *address) {
    char text[256], control[CMSG_SPACE(sizeof faults)] = {0};
    long page = sysconf(_SC_PAGESIZE);
    /* page_size_kib is in bytes too: it is Firecracker's older name of the same field. */
    int length = snprintf(text, sizeof text,
                          "[{\"base_host_virt_addr\":%llu,\"size\":%zu,\"offset\":0,"
                          "\"page_size\":%ld,\"page_size_kib\":%ld}]",
                          (unsigned long long)(uintptr_t)address, memory_bytes, page, page);
    struct iovec part = {text, (size_t)length};
    struct msghdr message = {
        .msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof faults);
    memcpy(CMSG_DATA(header), &faults, sizeof faults);
    ssize_t sent = sendmsg(connection, &message, MSG_NOSIGNAL);
    if (sent >= 0 && sent != length) errno = EMSGSIZE;
    return sent == length;
}

/* The userfaultfd stays open for as long as QEMU lives, and so does the connection: its end tells of QEMU's. */
static void arm(void *address) {
    bool tracking = false;
    int faults = open_with_features(&tracking);
    if (faults < 0) return failed("userfaultfd");
    close(device);
    if (!tracking && !page_socket) {
        close(faults);
        errno = EOPNOTSUPP;
        return failed("this kernel does not track written pages of shared memory");
    }
    struct uffdio_range range = {.start = (uintptr_t)address, .len = memory_bytes};
    struct uffdio_register registration = {
        .range = range,
        .mode = (page_socket ? UFFDIO_REGISTER_MODE_MISSING : 0) | (tracking ? UFFDIO_REGISTER_MODE_WP : 0)};
    if (ioctl(faults, UFFDIO_REGISTER, &registration) != 0) {
        failed("UFFDIO_REGISTER");
        close(faults);
        return;
    }
    /* Pages that are not there yet get a marker: without it they would all count as written. */
    struct uffdio_writeprotect protection = {.range = range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    if (tracking && ioctl(faults, UFFDIO_WRITEPROTECT, &protection) != 0) {
        failed("UFFDIO_WRITEPROTECT");
        close(faults); /* which takes the registration back */
        return;
    }
    if (!page_socket) return;
    int connection = connect_pages();
    if (connection < 0) return failed("nobody serves the memory: connect to CAPSULE_PAGES_SOCKET");
    if (!hand_over(connection, faults, address)) failed("handshake with who serves the memory");
}

static bool is_guest_memory(size_t length, int protection, int flags, int descriptor, off_t offset) {
    char path[32], name[sizeof MEMORY_NAME + 1];
    struct stat status;
    if (memory_bytes == 0 || length != memory_bytes || descriptor < 0 || offset != 0) return false;
    if (!(protection & PROT_WRITE) || (flags & MAP_TYPE) == MAP_PRIVATE) return false;
    if (fstat(descriptor, &status) != 0 || !S_ISREG(status.st_mode)) return false;
    snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
    ssize_t got = readlink(path, name, sizeof name);
    return got == (ssize_t)strlen(MEMORY_NAME) && memcmp(name, MEMORY_NAME, strlen(MEMORY_NAME)) == 0;
}

#define EXPORTED __attribute__((visibility("default")))

EXPORTED void *mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset) {
    void *mapped = (void *)syscall(SYS_mmap, address, length, protection, flags, descriptor, offset);
    if (mapped != MAP_FAILED && memory_bytes != 0) {
        int error = errno;
        if (is_guest_memory(length, protection, flags, descriptor, offset) && !atomic_flag_test_and_set(&found))
            arm(mapped);
        errno = error;
    }
    return mapped;
}

EXPORTED void *mmap64(void *address, size_t length, int protection, int flags, int descriptor, off_t offset)
    __attribute__((alias("mmap")));
