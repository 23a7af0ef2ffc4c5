"""Every byte arrives once and in order, whatever the pieces: characters cut anywhere, binary, empty, single bytes."""

from __future__ import annotations

import base64
import os
import random

import trio

SEED = int(os.environ.get("CAPSULE_STREAM_SEED", "0")) or random.randrange(1, 10**6)
STEPS = int(os.environ.get("CAPSULE_STREAM_STEPS", "3000"))
CHARACTERS = "€", "世", "\uffff", "é", "😀"
SPLITTER = """
import os, sys, time
for text in map(os.fsencode, sys.argv[1:]):
    for at in range(len(text) + 1):
        for piece in (text[:at], text[at:]):
            os.write(1, piece)
            time.sleep(0.03)
"""
ECHO = """
import os, sys, tty
tty.setraw(0)
os.write(1, b"ready")
left = int(sys.argv[1])
while left:
    data = os.read(0, 65536)
    left -= len(data)
    while data:
        data = data[os.write(1, data):]
os.read(0, 1)
"""


async def test_a_character_may_be_cut_anywhere(create, connect):
    """Written by the process in two pieces, cut at every position: the JSON framing shows whole characters only."""
    sandbox = create()
    texts = [f"a{character}b{character}" for character in CHARACTERS]
    async with connect.exec(sandbox, "python3", args=["-c", SPLITTER, *texts], framing="json") as (console, _):
        pieces = [piece.decode() async for _, piece in console.pieces()]  # none has half a character
    assert "".join(pieces) == "".join(text * (len(text.encode()) + 1) for text in texts)
    assert len(pieces) > len("".join(texts))
    assert (console.exit["exit_code"], console.closed) == (0, (1000, ""))


async def test_input_may_be_cut_anywhere(create, connect):
    """Likewise what is sent: halves of characters in base64, and empty pieces in between."""
    sandbox = create()
    text = "".join(CHARACTERS).encode()
    sent = b""
    async with connect.exec(sandbox, "cat", args=[], framing="json") as (console, _):
        for at in range(len(text) + 1):
            for piece in (text[:at], b"", text[at:]):
                await console.say("stdin", data_b64=base64.b64encode(piece).decode())
                sent += piece
        await console.say("stdin", data="")
        await console.say("close_stdin")
        assert (await console.rest())[1] == sent
    assert console.exit["exit_code"] == 0


async def test_binary_and_one_byte_at_a_time(create, connect):
    """All bytes there are in pieces of random sizes, none and one included, through `cat`, in both framings."""
    sandbox, dice = create(), random.Random(SEED)
    for framing in ("binary", "json"):
        content = dice.randbytes(150_000)
        async with connect.exec(sandbox, "cat", args=[], framing=framing) as (console, _):

            async def feed(content=content, framing=framing, console=console):
                for piece in _cut(content, dice):
                    if framing == "binary":
                        await console.type(piece)
                    else:
                        await console.say("stdin", data_b64=base64.b64encode(piece).decode())
                await console.say("close_stdin")

            echoed = await console.rest(feed=feed)
        assert echoed == {1: content, 2: b""}, f"seed {SEED}, {framing}"
        assert console.exit["exit_code"] == 0


def _cut(content, dice):
    """Into small pieces first, then large ones."""
    at = 0
    for number in range(len(content)):
        size = dice.choice([0, 1, 1, 1, 2, 3]) if number < 1500 else dice.randrange(1, 60_000)
        yield content[at : at + size]
        at += size
        if at >= len(content):
            return


async def test_sizes_between_keys_change_no_byte(create, run, connect, reach):
    """Thousands of resizes and inputs in random order: the echo is what was typed, the last size counts."""
    sandbox, dice = create(), random.Random(SEED)
    typed = [dice.randbytes(dice.choice([1, 1, 2, 30, 700])) for _ in range(STEPS)]
    total = sum(map(len, typed))
    last = []
    args = ["-c", ECHO, str(total)]
    async with connect.terminal(sandbox, cmd="python3", args=args, tag="echo") as (console, _):
        assert await console.output(5) == b"ready"

        async def feed():
            for piece in typed:
                for _ in range(dice.choice([0, 0, 1, 1, 5])):
                    last[:] = dice.randrange(1, 500), dice.randrange(1, 200)
                    await console.say("resize", cols=last[0], rows=last[1])
                await console.type(piece)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(feed)
            echoed = await console.output(total, 90)
        assert echoed == b"".join(typed), f"seed {SEED}"
        ask = "stty size < /proc/$(pgrep -f 'tty.setraw' | head -1)/fd/0"
        right = f"{last[1]} {last[0]}\n"
        await reach(lambda: run(sandbox, ask)["stdout"] == right, 20, f"the last size (seed {SEED})")
        await console.type(b"!")
        await console.rest()
    assert console.exit["exit_code"] == 0


async def test_what_holds_up_input_does_not_hold_up_control(create, connect):
    """A process that reads nothing: a signal behind more input than anybody holds arrives all the same."""
    sandbox = create()
    async with connect.exec(sandbox, "exec sleep 1000") as (console, _), trio.open_nursery() as nursery:
        nursery.start_soon(_stuff, console, 200_000)
        with trio.fail_after(20):
            await trio.sleep(1)  # the pipes of the process and the wire are full by then
            await console.say("signal", signal="SIGTERM")
            await console.rest()
        nursery.cancel_scope.cancel()
    assert console.exit["exit_code"] == 128 + 15


async def _stuff(console, size):
    for _ in range(size // 20_000):
        await console.type(b"x" * 20_000)
