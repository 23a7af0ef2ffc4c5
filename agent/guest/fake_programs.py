"""Programs of a fake guest: a few command lines, word for word, that do there what they do in a real one."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from agent.wire.calls import STDERR_CHANNEL
from agent.wire.messages import Body


class Process(Protocol):
    """What a program has."""

    size: tuple[int, int] | None

    async def read(self) -> bytes:
        """Input; empty at its end."""
        ...

    async def write(self, data: bytes, channel: int = 1) -> None:
        """Output."""
        ...

    async def wait_resized(self) -> tuple[int, int]:
        """Its terminal's next size."""
        ...


LiveProgram = Callable[[Process], Awaitable[int]]

RAW_CAT = "stty raw -echo; echo ready; cat"
"""A terminal that gives back what it gets, byte for byte."""
TELL_SIZE = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
BOTH = "cat; echo oops >&2; exit 3"


async def cat(process: Process) -> int:
    """`cat`."""
    while data := await process.read():
        await process.write(data)
    return 0


async def raw_cat(process: Process) -> int:
    """`RAW_CAT`."""
    await process.write(b"ready\n")
    return await cat(process)


async def both(process: Process) -> int:
    """`BOTH`."""
    await cat(process)
    await process.write(b"oops\n", STDERR_CHANNEL)
    return 3


async def sleep(_process: Process) -> int:
    """`sleep` for ever."""
    await trio.sleep_forever()
    return 0


async def tell_size(process: Process) -> int:
    """`TELL_SIZE`."""
    await process.write(b"ready\r\n")
    while True:
        cols, rows = await process.wait_resized()
        await process.write(b"%d %d\r\n" % (rows, cols))


async def size(process: Process) -> int:
    """`stty size`."""
    cols, rows = process.size or (0, 0)
    await process.write(b"%d %d\r\n" % (rows, cols))
    return 0


async def shell(process: Process) -> int:
    """A login shell on a terminal: it echoes, and knows `echo` and `exit`."""
    line = bytearray()
    await process.write(b"$ ")
    while data := await process.read():
        for byte in data:
            if byte not in b"\r\n":
                line.append(byte)
                await process.write(bytes([byte]))
                continue
            words = line.decode(errors="replace").split()
            line.clear()
            await process.write(b"\r\n")
            match words:
                case ["exit", *code]:
                    return int(code[0]) if code else 0
                case ["echo", *said]:
                    await process.write(" ".join(said).encode() + b"\r\n")
            await process.write(b"$ ")
    return 0


def seq(last: int) -> LiveProgram:
    """`seq LAST`."""

    async def run(process: Process) -> int:
        for begin in range(1, last + 1, 1000):
            lines = (f"{number}\n" for number in range(begin, min(begin + 1000, last + 1)))
            await process.write("".join(lines).encode())
        return 0

    return run


def zeros(count: int) -> LiveProgram:
    """`head -c COUNT /dev/zero`."""

    async def run(process: Process) -> int:
        for begin in range(0, count, 65536):
            await process.write(bytes(min(65536, count - begin)))
        return 0

    return run


EXACT: dict[str, LiveProgram] = {
    "cat": cat,
    RAW_CAT: raw_cat,
    BOTH: both,
    TELL_SIZE: tell_size,
    "sleep 1000": sleep,
    "stty size": size,
    "yes": zeros(2**62),
}
WITH_NUMBER: dict[str, Callable[[int], LiveProgram]] = {
    r"seq (\d+)": seq,
    r"head -c (\d+) /dev/zero": zeros,
}


def find_program(body: Body) -> LiveProgram | None:
    """What `body` of an exec runs here; None when nothing is written for it."""
    cmd = body.get("cmd")
    if cmd is None:
        return shell if "pty" in body else None
    line = " ".join([cmd, *body.get("args", [])])
    if line in EXACT:
        return EXACT[line]
    for pattern, make in WITH_NUMBER.items():
        if found := re.fullmatch(pattern, line):
            return make(int(found[1]))
    return None
