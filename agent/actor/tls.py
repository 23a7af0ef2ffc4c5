"""Mutual TLS on a non-blocking `SSLSocket` with Trio waits: half the cost of `trio.SSLStream` (design/stack.md §5).

Our framing tells a cut connection from a finished one, so there is no closing handshake.
"""

from __future__ import annotations

import errno
import operator
import socket
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

HANDSHAKE_TIMEOUT = 10.0
READ_BYTES = 256 * 1024
_LOST = (OSError, ValueError)


class TlsStream(trio.abc.Stream):
    """A connected TLS socket. One sending and one receiving task at a time."""

    def __init__(self, sock: ssl.SSLSocket) -> None:
        self._sock = sock
        self._read_buffer = bytearray(READ_BYTES)
        self._read_view = memoryview(self._read_buffer)
        self._writable = trio.Lock()
        self._sending = False

    async def handshake(self) -> None:
        """Complete the TLS handshake. Raises BrokenResourceError with the reason when the peer is refused."""
        with trio.move_on_after(HANDSHAKE_TIMEOUT) as scope:
            while True:
                try:
                    self._sock.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    await trio.lowlevel.wait_readable(self._sock)
                except ssl.SSLWantWriteError:
                    await self._wait_writable()
                except _LOST as err:
                    raise trio.BrokenResourceError(f"TLS handshake failed: {err}") from err
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("TLS handshake timed out")

    def peer_certificate(self) -> bytes:
        """The peer's certificate, DER."""
        return self._sock.getpeercert(binary_form=True) or b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write everything. After a cancellation the stream is unusable: cancel only to close it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        try:
            with self._only_sender(), memoryview(data) as view:
                sent = 0
                while sent < len(view):
                    try:
                        sent += self._sock.send(view[sent : sent + READ_BYTES])
                    except ssl.SSLWantWriteError:
                        waited = True
                        await self._wait_writable()
                    except ssl.SSLWantReadError:
                        await trio.lowlevel.checkpoint()
                    except _LOST as err:
                        raise _broken(err) from err
        finally:
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()

    async def wait_send_all_might_not_block(self) -> None:
        """Part of the Stream interface."""
        await trio.lowlevel.checkpoint()
        with self._only_sender():
            await self._wait_writable()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, at least one byte; empty at the end. Drains whole TLS records per wake-up."""
        want = min(READ_BYTES if max_bytes is None else operator.index(max_bytes), READ_BYTES)
        if want < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        try:
            while True:
                try:
                    return self._read(want)
                except ssl.SSLWantReadError:
                    waited = True
                    await trio.lowlevel.wait_readable(self._sock)
                except ssl.SSLWantWriteError:
                    waited = True
                    await self._wait_writable()
        finally:
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()

    def _read(self, want: int) -> bytes:
        """Up to `want` bytes that are there; SSLWantReadError or SSLWantWriteError only when there are none."""
        got = 0
        try:
            while got < want and (read := self._sock.recv_into(self._read_view[got:want])):
                got += read
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            if not got:
                raise
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            pass
        except _LOST as err:
            raise _broken(err) from err
        return bytes(self._read_view[:got])

    async def aclose(self) -> None:
        """Close the socket."""
        if self._sock.fileno() >= 0:
            trio.lowlevel.notify_closing(self._sock)
            self._sock.close()
        await trio.lowlevel.checkpoint()

    @contextmanager
    def _only_sender(self) -> Iterator[None]:
        """A second writer would put its bytes into the middle of the first one's."""
        if self._sock.fileno() < 0:
            raise trio.ClosedResourceError("closed")
        if self._sending:
            raise trio.BusyResourceError("another task is sending")
        self._sending = True
        try:
            yield
        finally:
            self._sending = False

    async def _wait_writable(self) -> None:
        async with self._writable:
            await trio.lowlevel.wait_writable(self._sock)


def _broken(err: BaseException) -> Exception:
    if isinstance(err, OSError) and err.errno == errno.EBADF:
        return trio.ClosedResourceError("closed")
    return trio.BrokenResourceError(str(err))


async def connect_tls(host: str, port: int, context: ssl.SSLContext, *, timeout: float = 10.0) -> TlsStream:  # noqa: ASYNC109
    """Dial and complete the handshake. Raises BrokenResourceError with a reason in words."""
    try:
        with trio.fail_after(timeout):
            plain = await trio.open_tcp_stream(host, port)
    except (OSError, trio.TooSlowError) as err:
        raise trio.BrokenResourceError(f"cannot connect to {host}:{port}: {err}") from err
    return await _secure(plain, context, server_side=False)


async def serve_tls(
    handler: Callable[[TlsStream], Awaitable[object]],
    *,
    host: str,
    port: int,
    context: ssl.SSLContext,
    task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Accept connections for ever; `started()` gets the bound port. A failed handshake only ends that connection."""

    async def accept(plain: trio.SocketStream) -> None:
        try:
            stream = await _secure(plain, context, server_side=True)
        except trio.BrokenResourceError:
            return
        try:
            await handler(stream)
        finally:
            await trio.aclose_forcefully(stream)

    listeners = await trio.open_tcp_listeners(port, host=host, backlog=1024)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, accept, listeners)
        task_status.started(listeners[0].socket.getsockname()[1])


async def _secure(plain: trio.SocketStream, context: ssl.SSLContext, *, server_side: bool) -> TlsStream:
    raw = socket.socket(fileno=plain.socket.detach())
    try:
        raw.getpeername()  # SSLSocket leaks the socket when it finds out by itself
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setblocking(False)
        stream = TlsStream(context.wrap_socket(raw, server_side=server_side, do_handshake_on_connect=False))
    except _LOST as err:  # the peer may be gone already, or have sent something before its hello
        raw.close()
        raise trio.BrokenResourceError(f"TLS cannot start: {err}") from err
    try:
        await stream.handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream
