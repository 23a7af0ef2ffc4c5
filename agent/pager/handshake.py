"""Waits for a VMM on its socket and takes its userfaultfd; everything that comes is checked.

Firecracker's handshake: the VMM connects and sends one message, a JSON array of regions, with the descriptor.
"""

from __future__ import annotations

import array
import os
import socket
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import structlog
import trio

from agent.pager.abi import Userfault, find_descriptor, is_userfaultfd, peer_pidfd, take_descriptor
from agent.pager.process import ProcessIdentity, has_ended, open_process, start_time_of
from agent.pager.records import Served
from agent.pager.regions import MAX_HANDSHAKE_BYTES, HandshakeRefused, Region, parse_handshake
from agent.pager.sockets import peer_credentials

if TYPE_CHECKING:
    from agent.pager.service import PagedVm

log = structlog.get_logger()

MESSAGE_TIMEOUT = 10.0
"""Seconds a VMM that has connected may take to say something."""

_MAX_DESCRIPTORS = 16
"""Room for more than the one that may come: what does not fit would be closed unseen."""


@dataclass(eq=False)
class Client:
    """A VMM that has shaken hands. Owns both descriptors until `close`."""

    identity: ProcessIdentity
    pidfd: int
    userfault: Userfault
    descriptor: int
    regions: tuple[Region, ...]
    _closed: bool = field(default=False, init=False)

    def close(self) -> None:
        """Let go of the VMM; harmless when done already."""
        if not self._closed:
            self._closed = True
            for fd in (self.userfault.fd, self.pidfd):
                trio.lowlevel.notify_closing(fd)
            self.userfault.close()
            os.close(self.pidfd)

    def served(self, *, tracked: bool) -> Served:
        """For the record."""
        return Served(self.identity.pid, self.identity.start_time, self.descriptor, self.regions, tracked)


async def accept_client(listener: trio.socket.SocketType, vm: PagedVm, *, memory_bytes: int) -> Client:
    """Wait for the VMM. Raises HandshakeRefused when what it sends is wrong.

    Strangers are sent away, and one that sends nothing: the right one may still come.
    """
    while True:
        sock, _ = await listener.accept()
        with sock:
            credentials = peer_credentials(sock)
            if credentials.uid != vm.uid:
                log.warning("stranger_refused", vm_id=vm.vm_id, uid=credentials.uid, pid=credentials.pid)
                continue
            with trio.move_on_after(MESSAGE_TIMEOUT):
                message, descriptors = await _receive(sock)
                try:
                    return _check(sock, credentials.pid, message, descriptors, memory_bytes)
                finally:
                    for fd in descriptors:  # those that nobody has taken
                        os.close(fd)
            log.warning("silent_vmm_refused", vm_id=vm.vm_id, pid=credentials.pid)


def adopt_client(served: Served) -> Client | None:
    """Take the userfaultfd of a VMM back from it; None if its process has gone. Raises HandshakeRefused."""
    identity = ProcessIdentity(served.pid, served.start_time)
    pidfd = open_process(identity)
    if pidfd is None:
        return None
    try:
        fd = _take(pidfd, served.descriptor)
    except HandshakeRefused:
        gone = has_ended(pidfd)
        os.close(pidfd)
        if gone:
            return None
        raise
    return Client(identity, pidfd, Userfault(fd), served.descriptor, served.regions)


def _take(pidfd: int, number: int) -> int:
    try:
        fd = take_descriptor(pidfd, number)
    except OSError as err:
        raise HandshakeRefused(f"the VMM's userfaultfd cannot be taken back: {err.strerror}") from err
    if is_userfaultfd(fd):
        return fd
    os.close(fd)
    raise HandshakeRefused("the VMM has closed its userfaultfd")


async def _receive(sock: trio.socket.SocketType) -> tuple[bytes, list[int]]:
    """One message and its descriptors, all of them the caller's. Raises HandshakeRefused."""
    room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * 4)
    try:
        message, ancillary, flags, _ = await sock.recvmsg(MAX_HANDSHAKE_BYTES + 1, room, socket.MSG_CMSG_CLOEXEC)
    except OSError as err:
        raise HandshakeRefused(f"the VMM's handshake cannot be read: {err.strerror}") from err
    descriptors = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            descriptors.frombytes(data[: len(data) // 4 * 4])
    if flags & socket.MSG_CTRUNC or len(message) > MAX_HANDSHAKE_BYTES or not message:
        for fd in descriptors:
            os.close(fd)
        raise HandshakeRefused("the VMM's handshake is empty or too long")
    return message, list(descriptors)


def _check(sock: trio.socket.SocketType, pid: int, message: bytes, descriptors: list[int], memory_bytes: int) -> Client:
    """Make a client; takes the descriptor out of `descriptors`. Raises HandshakeRefused."""
    regions = parse_handshake(message, memory_bytes=memory_bytes)
    if len(descriptors) != 1 or not is_userfaultfd(descriptors[0]):
        raise HandshakeRefused(f"the VMM's handshake has {len(descriptors)} descriptors, not one userfaultfd")
    try:
        pidfd = peer_pidfd(sock, pid)
    except OSError as err:
        raise HandshakeRefused("the VMM has ended") from err
    try:
        identity, number = _identify(pid, pidfd, descriptors[0])
    except BaseException:
        os.close(pidfd)
        raise
    with suppress(OSError):
        os.set_blocking(descriptors[0], False)
    return Client(identity, pidfd, Userfault(descriptors.pop()), number, regions)


def _identify(pid: int, pidfd: int, fd: int) -> tuple[ProcessIdentity, int]:
    """Which process it is and the number of `fd` there. Raises HandshakeRefused."""
    try:
        start_time = start_time_of(pid)
        number = find_descriptor(pid, fd)
    except OSError as err:
        raise HandshakeRefused(f"the VMM cannot be looked at: {err}") from err
    if start_time is None or has_ended(pidfd):
        raise HandshakeRefused("the VMM has ended")
    if number is None:
        # Its memory would be let loose, full of zeros, at the moment we end.
        raise HandshakeRefused("the VMM has not kept its userfaultfd open")
    return ProcessIdentity(pid, start_time), number
