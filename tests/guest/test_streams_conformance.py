"""Live, detached and terminal processes through the host's own link: the daemon and its fake answer alike."""

from __future__ import annotations

import itertools
import os
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio

from agent.guest.client import GuestLink
from agent.guest.fake import FakeGuest
from agent.guest.fake_programs import BOTH, RAW_CAT, TELL_SIZE
from agent.wire.faults import Fault, FaultCode

PATIENCE = 30.0
RING = 64 * 1024
SIZE = {"cols": 80, "rows": 24}
numbers = itertools.count(1)


@pytest.fixture(params=["fake", "daemon"])
def connect(request):
    """`connect()`: a link to a guest, running; each call another link to the same guest, if it is the daemon."""
    if request.param == "fake":
        guests = itertools.repeat(None)
    elif os.geteuid() != 0:
        pytest.skip("exec as root is the default, which needs root")
    else:
        guests = itertools.repeat(request.getfixturevalue("guest").port)

    @asynccontextmanager
    async def connected():
        port = next(guests)
        guest = FakeGuest("fake") if port is None else GuestLink("127.0.0.1", port)
        with trio.fail_after(3 * PATIENCE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.run)
                yield guest
                nursery.cancel_scope.cancel()

    return connected


async def call(guest, method, **body):
    return await guest.call(method, body, timeout=PATIENCE)


async def refused(guest, method, **body):
    """The code of the fault, and its details."""
    with pytest.raises(Fault) as caught:
        await call(guest, method, **body)
    return caught.value


@asynccontextmanager
async def running(guest, method="exec", **body):
    """A stream whose first notice has come: (stream, notice)."""
    async with guest.open_stream(method, body) as stream:
        channel, data = await anext(stream)
        assert channel == 3
        yield stream, msgspec.msgpack.decode(data)


async def read(stream, count):
    """Exactly so many bytes of output, or fewer at the end."""
    got = bytearray()
    while len(got) < count:
        try:
            channel, data = await anext(stream)
        except StopAsyncIteration:
            break
        assert channel in {1, 2}
        got += data
    return bytes(got)


async def read_until(stream, word):
    """Output up to where it ends with `word`."""
    got = bytearray()
    while not got.endswith(word):
        got += (await anext(stream))[1]
    return bytes(got)


async def gone(guest, process):
    """Wait until it is not listed any more."""
    while any(process in {one["pid"], one.get("tag")} for one in (await call(guest, "processes.list"))["processes"]):
        await trio.sleep(0.01)


async def stuck(guest, process):
    """Wait until it has printed more than the ring holds, and then no more."""
    before, oldest = 0, 0
    while oldest == 0 or oldest != before:
        before = oldest
        await trio.sleep(0.05)
        async with running(guest, "processes.attach", process=process, observe=True) as (_, notice):
            oldest = notice["offset"]


def tag():
    return f"t{next(numbers)}"


async def test_input_and_output_as_they_come(connect):
    """A conversation, END, and the end with the exit code; both channels."""
    async with connect() as guest, running(guest, cmd=BOTH, stdin=True) as (stream, said):
        assert said == {"pid": said["pid"]}
        for word in (b"one", b"\xff\x00", b"three"):
            await stream.send(word)
            assert await read(stream, len(word)) == word
        await stream.end()
        rest = [chunk async for chunk in stream]
        assert rest == [(2, b"oops\n")]
        reply = await stream.reply()
        assert reply.pop("duration_ms") >= 0
        assert reply == {"exit_code": 3, "timed_out": False}


async def test_who_leaves_a_foreground_process_kills_it(connect):
    """CANCEL: it is gone."""
    async with connect() as guest:
        async with running(guest, cmd="sleep 1000") as (_, said):
            assert [one["pid"] for one in (await call(guest, "processes.list"))["processes"]] == [said["pid"]]
        await gone(guest, said["pid"])


@pytest.mark.parametrize("kind", [{"detach": True, "stdin": True, "cmd": "cat"}, {"pty": SIZE, "cmd": RAW_CAT}])
async def test_who_leaves_a_detached_process_only_leaves(connect, kind):
    """It lives on, is listed as a background process, and takes the next one's input where the last one stopped."""
    async with connect() as guest:
        name = tag()
        async with running(guest, tag=name, **kind) as (stream, said):
            assert said == {"pid": said["pid"], "tag": name}
            if "pty" in kind:
                await read_until(stream, b"ready\n")
            await stream.send(b"one")
            assert await read(stream, 3) == b"one"
        (listed,) = (await call(guest, "processes.list"))["processes"]
        assert (listed["pid"], listed["tag"], listed["background"]) == (said["pid"], name, True)
        had = 3 + ("pty" in kind) * 6
        for process in (name, said["pid"]):
            async with running(guest, "processes.attach", process=process, offset=had) as (stream, notice):
                assert (notice["pid"], notice["tag"], notice["pty"]) == (said["pid"], name, "pty" in kind)
                assert [notice[key] for key in ("offset", "skipped", "replay", "ended")] == [had, 0, 0, False]
                await stream.send(b"two")
                assert await read(stream, 3) == b"two"
                had += 3
        await call(guest, "processes.signal", process=name, signal=9)
        async with running(guest, "processes.attach", process=name) as (stream, notice):
            assert (notice["offset"], await read_until(stream, b"onetwotwo")) == (
                0,
                b"ready\n" * (had > 9) + b"onetwotwo",
            )
            assert (await anext(stream, None)) is None
            reply = await stream.reply()
            assert (reply["exit_code"], reply["signal"], reply["timed_out"]) == (137, 9, False)


@pytest.mark.parametrize("asked", [None, 0, 100_000, 300_000, 588_895])
async def test_replay(connect, asked):
    """The ring has the last 64 KiB of what nobody read; `offset` leaves out what one has, `skipped` is lost."""
    whole = "".join(f"{number}\n" for number in range(1, 100_001)).encode()
    async with connect() as guest:
        name = tag()
        async with running(guest, cmd="seq 100000", detach=True, tag=name):
            pass
        await gone(guest, name)
        offset = {} if asked is None else {"offset": asked}
        async with running(guest, "processes.attach", process=name, **offset) as (stream, notice):
            begin = notice["offset"]
            assert len(whole) - RING <= begin <= len(whole)
            assert begin <= len(whole) - RING + 4096 or begin == asked
            assert notice["skipped"] == (0 if asked is None else begin - asked)
            assert (notice["replay"], notice["ended"]) == (len(whole) - begin, True)
            assert await read(stream, len(whole)) == whole[begin:]
            assert (await stream.reply())["exit_code"] == 0


async def test_whoever_is_attached_misses_nothing(connect):
    """A slow reader of far more than the ring: the process waits for him, and he may leave and come back."""
    count = 600_000
    whole = "".join(f"{number}\n" for number in range(1, 100_001)).encode()
    async with connect() as guest:
        name = tag()
        async with running(guest, cmd="seq 100000", detach=True, tag=name) as (stream, _):
            await trio.sleep(0.3)  # all that fits anywhere is under way by now
            assert await read(stream, count) == whole
            assert (await stream.reply())["exit_code"] == 0


async def test_nobody_holds_a_detached_process_up(connect):
    """Left in the middle, it goes on to its end, whatever it prints."""
    async with connect() as guest:
        name = tag()
        async with running(guest, cmd="head -c 5000000 /dev/zero", detach=True, tag=name) as (stream, _):
            await read(stream, 100_000)
        await gone(guest, name)
        async with running(guest, "processes.attach", process=name) as (stream, notice):
            assert notice["offset"] + len(await read(stream, 10**7)) == 5_000_000


async def test_taking_over(connect):
    """The one of before is told so, the new one has the input; an observer is not in the way."""
    async with connect() as guest:
        name = tag()
        async with (
            running(guest, cmd="cat", stdin=True, detach=True, tag=name) as (first, _),
            running(guest, "processes.attach", process=name, observe=True) as (observer, _),
        ):
            await first.send(b"one")
            assert await read(first, 3) == await read(observer, 3) == b"one"
            async with running(guest, "processes.attach", process=name, offset=3) as (second, _):
                with pytest.raises(Fault) as caught:
                    await first.reply()
                assert (caught.value.code, caught.value.details) == (FaultCode.CONFLICT, {"taken_over": True})
                await second.send(b"two")
                assert await read(second, 3) == await read(observer, 3) == b"two"
                await second.end()
                assert (await second.reply())["exit_code"] == (await observer.reply())["exit_code"] == 0


async def test_a_slow_owner_is_taken_over_as_well(connect):
    """One who does not read at all, with the process waiting for him."""
    async with connect() as guest:
        name = tag()
        async with running(guest, cmd="yes", detach=True, tag=name) as (first, _):
            await stuck(guest, name)
            async with running(guest, "processes.attach", process=name) as (second, notice):
                assert notice["offset"] > 0
                await read(second, 500_000)
                await call(guest, "processes.signal", process=name, signal=9)
                with pytest.raises(Fault) as caught:
                    await first.reply()
                assert caught.value.details == {"taken_over": True}


async def test_an_observer_holds_nothing_up(connect):
    """He misses what he is too slow for, and is told how much: together it is all."""
    count = 20_000_000
    async with connect() as guest:
        name = tag()
        async with (
            running(guest, cmd=f"head -c {count} /dev/zero", detach=True, tag=name) as (owner, _),
            running(guest, "processes.attach", process=name, observe=True) as (observer, begun),
        ):
            await read(owner, count + 1)
            assert (await owner.reply())["exit_code"] == 0
            seen, skipped = begun["offset"], 0
            async for channel, data in observer:
                if channel == 3:
                    skipped += msgspec.msgpack.decode(data)["skipped"]
                else:
                    seen += len(data)
            assert seen + skipped == count
            assert skipped > 0


async def test_a_terminal_and_its_size(connect):
    """As it was asked for, and as it is changed while the process runs; from wherever it comes."""
    async with connect() as guest:
        async with running(guest, cmd="stty size", pty={"cols": 132, "rows": 43}) as (stream, _):
            assert await read(stream, 100) == b"43 132\r\n"
        name = tag()
        async with running(guest, cmd=TELL_SIZE, pty=SIZE, tag=name) as (stream, said):
            await read_until(stream, b"ready\r\n")
            for process, (cols, rows) in ((name, (1, 4096)), (said["pid"], (4096, 1)), (name, (100, 50))):
                assert await call(guest, "processes.resize", process=process, cols=cols, rows=rows) == {}
                assert await read_until(stream, b"\n") == b"%d %d\r\n" % (rows, cols)
        await call(guest, "processes.signal", process=name, signal=9)


async def test_the_shell_of_a_terminal(connect):
    """Without a command: it takes lines until `exit`. END is nothing to it."""
    async with connect() as guest, running(guest, pty=SIZE, envs={"PS1": "$ "}, tag=tag()) as (stream, _):
        await stream.send(b"echo he''llo\n")
        got = b""
        while got.count(b"llo\r\n") < 2:  # as it was typed, and as it was said; perhaps with the prompt behind it
            got += (await anext(stream))[1]
        await stream.send(b"exit 7\n")
        await stream.end()
        async for channel, _ in stream:
            assert channel == 1
        assert (await stream.reply())["exit_code"] == 7


async def test_a_signal_passes_input_that_waits(connect):
    """The process reads nothing, its stream is full: the signal does not queue behind that."""
    async with connect() as guest, running(guest, cmd="sleep 1000", stdin=True) as (stream, said):
        with trio.move_on_after(0.3):
            await stream.send(b"x" * 2**20)
        await call(guest, "processes.signal", process=said["pid"], signal=15)
        reply = await stream.reply()
        assert (reply["exit_code"], reply["signal"]) == (143, 15)


async def test_a_time_out_ends_a_detached_one(connect):
    """Whoever is attached or not."""
    async with connect() as guest:
        name = tag()
        async with running(guest, cmd="sleep 1000", detach=True, tag=name, timeout_ms=200):
            pass
        async with running(guest, "processes.attach", process=name) as (stream, _):
            assert [chunk async for chunk in stream] == []
            reply = await stream.reply()
            assert (reply["exit_code"], reply["timed_out"]) == (137, True)


async def test_a_background_process_is_attached_to_later(connect):
    """Nobody was there when it began; its output and its end are."""
    async with connect() as guest:
        name = tag()
        started = await call(guest, "exec", cmd=BOTH, background=True, tag=name)
        async with running(guest, "processes.attach", process=name) as (stream, said):
            assert (said["pid"], said["offset"], said["skipped"], said["pty"]) == (started["pid"], 0, 0, False)
            assert [chunk async for chunk in stream] == [(2, b"oops\n")]
            assert (await stream.reply())["exit_code"] == 3


async def test_what_is_refused(connect):
    """Unknown processes, sizes that are none, a tag in use."""
    async with connect() as guest:
        name = tag()
        background = await call(guest, "exec", cmd="sleep 1000", background=True, tag=name)
        pid = background["pid"]
        async with running(guest, cmd="sleep 1000", pty=SIZE, tag=tag()) as (_, terminal):
            for method, extra in (("attach", {}), ("resize", SIZE), ("signal", {"signal": 15})):
                for process in ("nobody", 2**30):
                    fault = await refused(guest, f"processes.{method}", process=process, **extra)
                    assert fault.code == FaultCode.NOT_FOUND, method
                for process in (None, -1, 0, 2**40, 1.5, [1]):
                    fault = await refused(guest, f"processes.{method}", process=process, **extra)
                    assert fault.code == FaultCode.INVALID_ARGUMENT, (method, process)
            assert (await refused(guest, "processes.resize", process=pid, **SIZE)).code == FaultCode.INVALID_ARGUMENT
            for cols, rows in ((0, 1), (1, 0), (4097, 1), (1, 4097), (-1, 5), ("a", 5)):
                fault = await refused(guest, "processes.resize", process=terminal["pid"], cols=cols, rows=rows)
                assert fault.code == FaultCode.INVALID_ARGUMENT
            assert (await refused(guest, "exec", cmd="cat", tag=name, detach=True)).code == FaultCode.CONFLICT
        for process in (pid, terminal["pid"]):
            await call(guest, "processes.signal", process=process, signal=9)
            await gone(guest, process)
