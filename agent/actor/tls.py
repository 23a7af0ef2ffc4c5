"""Mutual TLS between memory buffers, over a socket with Trio's waits: a fraction of `trio.SSLStream`'s cost, and, where
much is received, half of an `SSLSocket`'s, which asks the kernel twice for each record of 16 KiB.

Our framing tells a cut connection from a finished one, so there is no closing handshake.
"""

from __future__ import annotations

import errno
import operator
import socket
import ssl
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, cast

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

HANDSHAKE_TIMEOUT = 10.0
READ_BYTES = 256 * 1024
"""Taken off the socket at a time, and decrypted."""
WRITE_BYTES = 256 * 1024
"""Encrypted at a time."""
RECORDS = 1024
"""Decrypted at a time at most: a peer may put each of its bytes into one of its own."""
_LOST = (OSError, ValueError)


class TlsStream(trio.abc.Stream):
    """A connected socket, which must not block, inside TLS. One sending and one receiving task at a time.

    What TLS itself has to say after the handshake leaves with the next bytes of ours.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        self._sock = sock
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server_side)
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._sending = False

    async def handshake(self) -> None:
        """Complete the TLS handshake. Raises BrokenResourceError with the reason when the peer is refused."""
        with trio.move_on_after(HANDSHAKE_TIMEOUT) as scope:
            try:
                await self._shake_hands()
            except _LOST as err:
                raise trio.BrokenResourceError(f"TLS handshake failed: {err}") from err
        if scope.cancelled_caught:
            raise trio.BrokenResourceError("TLS handshake timed out")

    async def _shake_hands(self) -> None:
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                while not self._fill():
                    await trio.lowlevel.wait_readable(self._sock)
            except ssl.SSLError:
                with suppress(OSError):
                    self._sock.send(self._outgoing.read())  # why, for the peer
                raise
            else:
                await self._flush()
                return

    def peer_certificate(self) -> bytes:
        """The peer's certificate, DER."""
        return self._tls.getpeercert(binary_form=True) or b""

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Write everything. After a cancellation the stream is unusable: cancel only to close it."""
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        try:
            with self._only_sender(), memoryview(data) as view:
                for start in range(0, len(view), WRITE_BYTES):
                    self._tls.write(view[start : start + WRITE_BYTES])
                    waited |= await self._flush()
        except _LOST as err:
            raise _broken(err) from err
        finally:
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()

    async def _flush(self) -> bool:
        """Send what is encrypted; whether that had to wait. OSError."""
        waited, left = False, memoryview(self._outgoing.read())
        while left:
            try:
                left = left[self._sock.send(left) :]
            except BlockingIOError:
                waited = True
                await trio.lowlevel.wait_writable(self._sock)
        return waited

    async def wait_send_all_might_not_block(self) -> None:
        """Part of the Stream interface."""
        await trio.lowlevel.checkpoint()
        with self._only_sender():
            await trio.lowlevel.wait_writable(self._sock)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """What has arrived, at least one byte; empty at the end. Decrypts all records that are there."""
        want = min(READ_BYTES if max_bytes is None else operator.index(max_bytes), READ_BYTES)
        if want < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint_if_cancelled()
        waited = False
        try:
            while (data := self._decrypt(want)) is None:
                while not self._fill():
                    waited = True
                    await trio.lowlevel.wait_readable(self._sock)
        except _LOST as err:
            raise _broken(err) from err
        else:
            return data
        finally:
            if not waited:
                await trio.lowlevel.cancel_shielded_checkpoint()

    def _fill(self) -> bool:
        """Take from the socket; False when nothing has come. A reset is an end, too: who closes without having read all
        we sent, be it TLS's own tickets, resets. OSError."""
        try:
            got = self._sock.recv_into(self._buffer)
        except BlockingIOError:
            return False
        except ConnectionResetError:
            got = 0
        if got:
            self._incoming.write(self._buffer[:got])
        else:
            self._incoming.write_eof()
        return True

    def _decrypt(self, want: int) -> bytes | None:
        """Up to `want` bytes of what was taken, empty at the end; None when more must be taken first. OSError."""
        got = 0
        try:
            for _ in range(RECORDS):
                if got == want or not (read := cast("int", self._tls.read(want - got, self._buffer[got:want]))):
                    break
                got += read
        except ssl.SSLWantReadError:
            if not got:
                return None
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            pass
        return bytes(self._buffer[:got])

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
        raw.getpeername()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        raw.setblocking(False)
        stream = TlsStream(raw, context, server_side=server_side)
    except _LOST as err:  # the peer may be gone already, or have sent something before its hello
        raw.close()
        raise trio.BrokenResourceError(f"TLS cannot start: {err}") from err
    try:
        await stream.handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return stream
