"""Bytes through a stream to a guest without a deadline, but never standing still for long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from agent.wire.calls import CONTENT_CHANNEL, NOTICE_CHANNEL
from capsule import errors
from capsule.sandboxes import guest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from agent.actor.peer import OpenedStream

STALL_SECONDS = 900.0
"""How long a guest may take for the next byte: a full disk queue, a command that prints nothing yet."""
FIRST_SECONDS = 60.0
"""For its first word, when there is nothing to do for it but to open a file."""


BATCH_BYTES = 256 * 1024
"""Handed on as one piece, if so much has come: each piece costs as much as copying it ten times."""


def _unheard(_channel: int, _data: bytes) -> None:
    """Nothing of interest."""


async def next_chunk(stream: OpenedStream, seconds: float) -> tuple[int, bytes] | None:
    """The next (channel, bytes), None after the last. HostUnavailable when none comes in `seconds`."""
    with trio.move_on_after(seconds):
        return await anext(stream, None)
    raise _stalled(seconds)


async def first_notice(stream: OpenedStream, seconds: float) -> bytes:
    """The notice that comes first. Raises the guest's Fault when it refuses."""
    first = await next_chunk(stream, seconds)
    if first is None:
        await stream.reply()
    if first is None or first[0] != NOTICE_CHANNEL:
        raise guest.nonsense()
    return first[1]


async def content(stream: OpenedStream, size: int | None) -> AsyncGenerator[bytes]:
    """A file's bytes to the end; raises when it could not be read to its end, so that it never looks whole."""
    count = 0
    while (chunk := await next_chunk(stream, STALL_SECONDS)) is not None:
        channel, data = chunk
        if channel != CONTENT_CHANNEL:
            continue
        data = with_more(stream, channel, data)
        count += len(data)
        if size is not None and count > size:
            raise guest.nonsense()
        yield data
    await stream.reply()
    if size is not None and count < size:
        raise guest.nonsense()


def with_more(stream: OpenedStream, channel: int, data: bytes) -> bytes:
    """`data`, which was just read, and what has come behind it on the same channel: BATCH_BYTES at most."""
    more = stream.more(channel, BATCH_BYTES - len(data))
    return b"".join((data, *more)) if more else data


async def pour(
    stream: OpenedStream,
    source: AsyncIterator[bytes],
    channel: int,
    hear: Callable[[int, bytes], None] = _unheard,
) -> dict[str, Any]:
    """Send all of `source` and END; the reply. `hear` gets what comes back meanwhile, and must not raise.

    END is what makes it count: a `source` that fails, or is not at its end, is never followed by one. A guest that has
    answered is sent no more. Raises Fault, what `source` raises, HostUnavailable when nothing moves.
    """
    failure: Exception | None = None
    ended = False

    async def listen() -> None:
        async for came_on, data in stream:
            hear(came_on, data)
        sending.cancel()
        answered.set()

    sending, answered = trio.CancelScope(), trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        try:
            with sending:
                await _send(stream, source, channel)
                await stream.end()
                ended = True
            await _wait_for(answered)
        except Exception as err:  # noqa: BLE001 - raised below, not in the nursery's group
            failure = err
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    reply = await stream.reply()
    if not ended and not reply.get("exit_code"):
        raise guest.nonsense()  # it cannot have done what it does not know all of
    return reply


async def _wait_for(answered: trio.Event) -> None:
    with trio.move_on_after(STALL_SECONDS):
        await answered.wait()
    if not answered.is_set():
        raise _stalled(STALL_SECONDS)


async def _send(stream: OpenedStream, source: AsyncIterator[bytes], channel: int) -> None:
    async for chunk in source:
        with trio.move_on_after(STALL_SECONDS) as scope:
            await stream.send(chunk, channel)
        if scope.cancelled_caught:
            raise _stalled(STALL_SECONDS)


def _stalled(seconds: float) -> errors.HostUnavailable:
    return errors.HostUnavailable(f"the sandbox moved no byte for {seconds:g} s", retry_after=2)
