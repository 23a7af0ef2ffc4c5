"""A process and the client that is attached to it, whatever way they came together.

Owns: the tasks that carry input, output and control messages. Owned by: the handlers beside this. Emits: output, then
`exit`. Dies when: the process has ended and its output is sent; the client sends what it may not; the stream breaks.
"""

from __future__ import annotations

import signal
from typing import Any, TypeVar

import trio
from msgspec import UNSET

from capsule.errors import InvalidRequest, RequestTimeout
from capsule.http.sockets.ends import UnexpectedFrame
from capsule.http.sockets.framings import ProcessFraming
from capsule.http.sockets.inputs import InputQueue
from capsule.http.sockets.messages import Auth, CloseStdin, Exit, Input, Kill, Parser, Resize, Signal, Stdin, Stop
from capsule.http.sockets.websocket import WebSocket
from capsule.http.stream_ports import ProcessStream
from capsule.model import TerminalSize

START_TIMEOUT = 30.0
"""Seconds for the message that says what is wanted."""

LAST_WORD = 5.0
"""Seconds that a signal under way has when its client leaves: who says `kill` and closes means it."""

F = TypeVar("F")


async def first(socket: WebSocket, parser: Parser, kinds: type[F]) -> F:
    """The message that says what is wanted: one of `kinds` (a struct, or several as a union). InvalidRequest,
    RequestTimeout."""
    with trio.move_on_after(START_TIMEOUT):
        message = await socket.receive()
        if not message.text:
            raise UnexpectedFrame
        parsed = parser.parse(message.data)
        if isinstance(parsed, Auth):
            raise InvalidRequest("You are known by your headers; `auth` is for who is not.", field="type")
        if not isinstance(parsed, kinds):
            raise InvalidRequest("The first message is `start`.", field="type")
        return parsed
    raise RequestTimeout(f"No `start` came within {START_TIMEOUT:.0f} seconds.")


async def follow(
    socket: WebSocket, process: ProcessStream, framing: ProcessFraming, parser: Parser, *, observe: bool = False
) -> None:
    """Carry messages both ways until the process has ended."""
    inputs = InputQueue()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(inputs.feed, process)
        nursery.start_soon(_listen, socket, process, framing, parser, None if observe else inputs)
        async for channel, data in process:
            await framing.show(channel, data)
        await framing.end()
        ended = await process.exit()
        await socket.send(
            Exit(
                exit_code=ended.exit_code,
                signal=UNSET if ended.signal is None else ended.signal,
                timed_out=ended.timed_out or UNSET,
                duration_ms=ended.duration_ms,
            )
        )
        nursery.cancel_scope.cancel()


async def _listen(
    socket: WebSocket, process: ProcessStream, framing: ProcessFraming, parser: Parser, inputs: InputQueue | None
) -> None:
    while True:
        message = await socket.receive()
        if inputs is None:
            raise InvalidRequest("Who observes a process only looks on.")
        if message.text:
            await _act(parser.parse(message.data), process, inputs)
        else:
            await inputs.put(framing.typed(message.data))


async def _act(said: Any, process: ProcessStream, inputs: InputQueue) -> None:
    match said:
        case Stdin():
            await inputs.put(said.content())
        case Input():
            await inputs.put(said.data)
        case CloseStdin():
            inputs.end()
        case Signal():
            await _deliver(process, said.number())
        case Stop() | Kill():
            await _deliver(process, signal.SIGKILL)
        case Resize():
            if not process.terminal:
                raise InvalidRequest("This process has no terminal to resize.", field="type")
            await process.resize(TerminalSize(said.cols, said.rows))
        case _:
            raise InvalidRequest("This message comes first, and once.", field="type")


async def _deliver(process: ProcessStream, number: int) -> None:
    """A signal; when the client is gone before it has arrived, LAST_WORD seconds are left for that."""
    delivering = trio.CancelScope(shield=True)

    async def until_the_client_leaves() -> None:
        try:
            await trio.sleep_forever()
        finally:
            delivering.deadline = trio.current_time() + LAST_WORD

    async with trio.open_nursery() as nursery:
        nursery.start_soon(until_the_client_leaves)
        with delivering:
            await process.signal(number)
        nursery.cancel_scope.cancel()
