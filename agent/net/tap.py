"""Tap devices of the calling thread's namespace, by ioctl on /dev/net/tun (linux/if_tun.h)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from agent.net.addresses import TAP_NAME
from agent.net.errors import TapError

_TUN_DEVICE = "/dev/net/tun"
_TUNSETIFF = 0x400454CA
_TUNSETPERSIST = 0x400454CB
_IFF_TAP = 0x0002
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000
# The same flags at every opening: a snapshot's virtio-net remembers whether there was a vnet header.
_FLAGS = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR


def add_persistent_tap() -> None:
    """Make tap0 and let it outlive this descriptor, so that it is there before, between and after VMs."""
    fd = open_tap_here()
    try:
        fcntl.ioctl(fd, _TUNSETPERSIST, 1)
    finally:
        os.close(fd)


def open_tap_here() -> int:
    """A descriptor of tap0 (non-blocking, close-on-exec; the caller owns it). TapError if another process has it open.

    The device is made, not persistent, if the namespace has none: callers enter a finished slot.
    """
    fd = os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # struct ifreq: the name (16), then the flags, padded to the size of the union.
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", TAP_NAME.encode(), _FLAGS))
    except OSError as err:
        os.close(fd)
        if err.errno == errno.EBUSY:
            raise TapError(f"{TAP_NAME} is open in another process: its last VM has not been reaped") from err
        raise
    return fd
