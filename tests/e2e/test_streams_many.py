"""Many streams in one sandbox, and a quiet terminal beside one that floods."""

from __future__ import annotations

import os
import random
import time

import trio

STREAMS = int(os.environ.get("CAPSULE_STREAMS", "60"))
ECHOES = 200


async def test_many_streams_at_once(create, connect, run):
    """Consoles and terminals in one sandbox, all echoing at once: each has its own bytes, and all of them."""
    sandbox = create(memory_mb=512)
    held = []

    async def one(number):
        dice = random.Random(number)
        pieces = [dice.randbytes(dice.randrange(1, 3000)) for _ in range(8)]
        if number % 3:
            opening = connect.exec(sandbox, "cat", args=[])
        else:
            opening = connect.terminal(sandbox, cmd="stty raw -echo; printf ready; exec cat", tag=f"many-{number}")
        async with opening as (console, _):
            if not number % 3:
                assert await console.output(5) == b"ready"
            held.append(number)
            for piece in pieces:
                await console.type(piece)
                assert await console.output(len(piece)) == piece
            while len(held) < STREAMS:
                await trio.sleep(0.05)
            await console.say("close_stdin" if number % 3 else "kill")
            await console.rest()
        assert console.exit["exit_code"] == (0 if number % 3 else 137)

    with trio.fail_after(30 + STREAMS):
        async with trio.open_nursery() as nursery:
            for number in range(STREAMS):
                nursery.start_soon(one, number)
    assert run(sandbox, "pgrep -c cat || true")["stdout"] == "0\n"


async def test_a_quiet_terminal_beside_a_flooding_one(create, connect):
    """Keys are echoed while another terminal of the sandbox prints as fast as it is read."""
    sandbox = create(memory_mb=512)
    async with connect.terminal(sandbox, cmd="stty raw -echo; printf ready; exec cat", tag="quiet") as (quiet, _):
        assert await quiet.output(5) == b"ready"
        alone = await _echoes(quiet)
        async with connect.terminal(sandbox, cmd="yes flood", tag="flood") as (flood, _):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_read, flood)
                with trio.fail_after(60):
                    while flood.received < 1024 * 1024:
                        await trio.sleep(0.05)
                began, read = time.perf_counter(), flood.received
                beside = await _echoes(quiet)
                rate = (flood.received - read) / (time.perf_counter() - began) / 1024 / 1024
                nursery.cancel_scope.cancel()
            await flood.say("kill")
    for name, times in (("alone", alone), ("beside a flood", beside)):
        p50, p99 = times[len(times) // 2] * 1000, times[len(times) * 99 // 100] * 1000
        print(f"echo {name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")  # noqa: T201 - figures
    print(f"flood: {rate:.1f} MiB/s")  # noqa: T201


async def _echoes(console):
    """Seconds from key to echo, sorted."""
    times = []
    for _ in range(ECHOES):
        began = time.perf_counter()
        await console.type(b"k")
        assert await console.output(1, 10) == b"k"
        times.append(time.perf_counter() - began)
    return sorted(times)


async def _read(console):
    async for _ in console.pieces():
        pass
