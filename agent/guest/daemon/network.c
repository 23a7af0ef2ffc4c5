#include <errno.h>
#include <net/if.h>
#include <net/route.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "boot.h"
#include "guest_limits.h"

static struct ifreq request_for(const char *link) {
    struct ifreq request;
    memset(&request, 0, sizeof request);
    snprintf(request.ifr_name, sizeof request.ifr_name, "%s", link);
    return request;
}

static struct sockaddr address_of(struct in_addr address) {
    struct sockaddr_in name = {.sin_family = AF_INET, .sin_addr = address};
    struct sockaddr generic;
    memcpy(&generic, &name, sizeof generic);
    return generic;
}

static void bring_up(int fd, const char *link) {
    struct ifreq request = request_for(link);
    if (ioctl(fd, SIOCGIFFLAGS, &request) != 0) {
        boot_fail(link);
    }
    request.ifr_flags |= IFF_UP;
    if (ioctl(fd, SIOCSIFFLAGS, &request) != 0) {
        boot_fail(link);
    }
}

static void wait_for_link(int fd, const char *link) {
    struct ifreq request = request_for(link);
    for (int waited = 0; ioctl(fd, SIOCGIFINDEX, &request) != 0; waited++) {
        if (waited == LINK_WAIT_MS) {
            boot_fail(link);
        }
        nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
    }
}

static void set_address(int fd, const char *link, unsigned long what, struct in_addr address) {
    struct ifreq request = request_for(link);
    request.ifr_addr = address_of(address);
    if (ioctl(fd, what, &request) != 0) {
        boot_fail(link);
    }
}

static void add_default_route(int fd, struct in_addr gateway) {
    struct rtentry route = {
        .rt_dst = address_of((struct in_addr){INADDR_ANY}),
        .rt_genmask = address_of((struct in_addr){INADDR_ANY}),
        .rt_gateway = address_of(gateway),
        .rt_flags = RTF_UP | RTF_GATEWAY,
    };
    if (ioctl(fd, SIOCADDRT, &route) != 0) {
        boot_fail("default route");
    }
}

void boot_network(const struct BootSettings *settings) {
    int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    if (fd < 0) {
        boot_fail("socket");
    }
    bring_up(fd, "lo");
    wait_for_link(fd, "eth0");
    set_address(fd, "eth0", SIOCSIFADDR, settings->address);
    set_address(fd, "eth0", SIOCSIFNETMASK, settings->netmask);
    bring_up(fd, "eth0");
    add_default_route(fd, settings->gateway);
    close(fd);
}
