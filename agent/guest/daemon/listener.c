/* Accepting connections, from one peer only. */
#include <errno.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include "connection.h"
#include "guest_limits.h"

static struct Watch listener = {.fd = -1};
static struct in_addr allowed_peer;

static void accept_ready(void *owner, uint32_t events) {
    (void)owner;
    (void)events;
    struct sockaddr_in peer;
    socklen_t size = sizeof peer;
    int fd = accept4(listener.fd, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC | SOCK_NONBLOCK);
    if (fd < 0) {
        return;
    }
    if (size != sizeof peer || peer.sin_addr.s_addr != allowed_peer.s_addr) {
        close(fd);
        return;
    }
    connection_add(fd);
}

/* Of the listener, for every connection: Linux hands them on, and a resumed guest has six calls less to make. The host of
 * before a restore is gone without a word: keep-alive finds out. */
static void set_options(int fd) {
    const struct {
        int level, name, value;
    } options[] = {
        {IPPROTO_TCP, TCP_NODELAY, 1},    {SOL_SOCKET, SO_KEEPALIVE, 1}, {IPPROTO_TCP, TCP_KEEPIDLE, 15},
        {IPPROTO_TCP, TCP_KEEPINTVL, 5}, {IPPROTO_TCP, TCP_KEEPCNT, 3}, {IPPROTO_TCP, TCP_USER_TIMEOUT, 30000},
        {IPPROTO_TCP, TCP_NOTSENT_LOWAT, UNSENT_BYTES},
    };
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        setsockopt(fd, options[i].level, options[i].name, &options[i].value, sizeof options[i].value);
    }
}

uint16_t connections_listen(struct in_addr address, uint16_t port, struct in_addr peer) {
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = address, .sin_port = htons(port)};
    socklen_t size = sizeof name;
    int on = 1;
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0) {
        return 0;
    }
    if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof on) != 0 ||
        bind(fd, (struct sockaddr *)&name, size) != 0 || listen(fd, MAX_CONNECTIONS) != 0 ||
        getsockname(fd, (struct sockaddr *)&name, &size) != 0) {
        int reason = errno;
        close(fd);
        errno = reason;
        return 0;
    }
    set_options(fd);
    allowed_peer = peer;
    listener = (struct Watch){.fd = fd, .ready = accept_ready};
    loop_watch(&listener, EPOLLIN);
    return ntohs(name.sin_port);
}
