"""Live processes and terminals through the real WebSocket layer."""

from __future__ import annotations

import pytest
import trio

from capsule.client import ConnectionLost, NotFound, StreamClosed
from capsule.errors import InvalidState
from capsule.model import FileEvent, FileEvents


async def playing(platform, until, count=1):
    await until(lambda: len(platform.streams.processes) >= count)
    return platform.streams.processes[count - 1]


async def test_a_process_is_talked_to(platform, until):
    """Input, both outputs (any bytes), signals and the exit get through, in order."""
    async with platform.sandbox.stream("cat", ["-v"], envs={"A": "b"}, tag="mine") as process:
        fake = await playing(platform, until)
        assert (process.pid, process.tag) == (42, "mine")
        assert fake.call.args == ("-v",)
        await process.send(b"x" * 200_000)
        await process.end()
        await process.signal("SIGINT")
        await until(lambda: fake.input_ended and fake.signals == [2])
        assert len(fake.received) == 200_000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_play, fake)
            got = [(chunk.stream, chunk.data) async for chunk in process]
        assert got == [("stdout", b"\xff\x00"), ("stderr", b"oops"), ("stdout", "\u20ac".encode()[:2])]
        assert process.received == 8
        assert (await process.wait()).exit_code == 3


async def _play(fake):
    await fake.say(b"\xff\x00")
    await fake.say(b"oops", 2)
    await fake.say("\u20ac".encode()[:2])
    fake.finish(exit_code=3)


async def test_leaving_lets_the_process_go(platform, until):
    """The context's end is the stream's end on the server, also when the body raises; its error comes as it was."""
    with pytest.raises(KeyError):
        await _fail_inside(platform, until)
    await until(platform.streams.processes[0].left.is_set)


async def _fail_inside(platform, until):
    async with platform.sandbox.stream("sleep 100"):
        await playing(platform, until)
        raise KeyError("mine")


async def test_a_reader_that_stands_still_stops_the_process(platform, until, level):
    """What is not read stays in the process: no more than the buffers of the way are taken from it."""
    async with platform.sandbox.stream("flood") as process, trio.open_nursery() as nursery:
        fake = await playing(platform, until)
        taken = 0

        async def flood():
            nonlocal taken
            for _ in range(1000):
                await fake.say(bytes(65536))
                taken += 1
            fake.finish()

        nursery.start_soon(flood)
        await until(lambda: taken)
        assert 0 < await level(lambda: taken) < 300
        assert (await process.wait()).exit_code == 0
        assert process.received == 1000 * 65536


async def test_a_signal_overtakes_input_that_waits(platform, until, level):
    """A process that reads nothing, and a socket full of input: the signal goes another way."""
    async with platform.sandbox.stream("sleep") as process, trio.open_nursery() as nursery:
        fake = await playing(platform, until)
        fake.reads = trio.Event()
        nursery.start_soon(process.send, bytes(32 * 1024 * 1024))
        await level(lambda: len(fake.received), still=0.2)
        platform.sandboxes.run(42)
        with trio.fail_after(30):
            await process.signal("SIGTERM")
        await until(lambda: ("signal_process", 15) in [(name, args[-1]) for name, args in platform.sandboxes.asked])
        nursery.cancel_scope.cancel()


async def test_two_readers_are_one_too_many(platform, until):
    """The second hears so, instead of stealing output from the first."""
    async with platform.sandbox.stream("x") as process, trio.open_nursery() as nursery:
        await playing(platform, until)
        nursery.start_soon(process.wait)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with pytest.raises(trio.BusyResourceError):
            await process.wait()
        nursery.cancel_scope.cancel()


async def test_endings_have_their_names(platform, until):
    """Before the upgrade an ApiError, inside a StreamClosed with the typed code, without a goodbye ConnectionLost."""
    with pytest.raises(NotFound):
        async with platform.sandbox.attach("nobody") as process:
            await process.wait()
    gone = await platform.client.sandboxes.get(platform.sandbox.id)
    gone._path = gone._path.replace(gone.id, "sb-00000000-0000-0000-0000-000000000001")
    with pytest.raises(NotFound):
        async with gone.stream("x"):
            pass
    async with platform.sandbox.stream("x") as process:
        fake = await playing(platform, until)
        await until(lambda fake=fake: fake._said.statistics().tasks_waiting_receive)
        fake.fail(InvalidState("it was paused"))
        with pytest.raises(StreamClosed) as caught:
            await process.wait()
        assert (caught.value.code, caught.value.error_code) == (4409, "invalid_state")
    async with platform.sandbox.stream("x") as process:
        await playing(platform, until, 2)
        await platform.relay.cut()
        with pytest.raises(ConnectionLost):
            await process.wait()


async def test_attaching_goes_on_at_the_offset(platform, until):
    """`received` counts from the process's first byte; an observer says that it is one."""
    fake = platform.streams.add(pid=7, tag="job", offset=100, skipped=3, replay=50)
    async with platform.sandbox.attach("job", offset=97, observe=True) as process:
        assert (process.pid, process.received, process.skipped) == (7, 100, 3)
        assert (process.replay, process.ended) == (50, False)
        await playing(platform, until)
        await fake.say(b"more")
        assert (await anext(process)).data == b"more"
        assert process.received == 104
    assert platform.streams.asked[-1][1][-3:] == ("job", 97, True)


async def test_a_terminal_is_used(platform, until):
    """Keys, sizes, output and the end."""
    async with platform.sandbox.terminal("vim", cols=100, rows=30) as terminal, trio.open_nursery() as nursery:
        fake = await playing(platform, until)
        assert (fake.call.terminal.cols, fake.call.terminal.rows) == (100, 30)
        await terminal.send(b":q\r")
        await terminal.resize(90, 20)
        await until(lambda: bytes(fake.received) == b":q\r" and (90, 20) in fake.sizes)
        nursery.start_soon(fake.say, b"\x1b[2J")
        assert await anext(terminal) == b"\x1b[2J"
        await terminal.kill()
        assert (await terminal.wait()).exit_code == 137
        with pytest.raises(StreamClosed):
            await terminal.send(b"x")


async def test_a_terminal_comes_back(platform, until, quick):
    """A lost connection, twice refused: it attaches again where the output stood, and says so once; nothing is lost."""
    heard = []
    opening = platform.sandbox.terminal("bash", reconnect=True, on_reconnect=heard.append)
    async with opening as terminal, trio.open_nursery() as nursery:
        fake = await playing(platform, until)
        nursery.start_soon(fake.say, b"before")
        assert await anext(terminal) == b"before"
        again = platform.streams.add(pid=42, tag=fake.tag, terminal=True, offset=6)
        platform.relay.refusing = True
        seen = platform.relay.count
        await platform.relay.cut()
        await until(lambda: platform.relay.count > seen + 1)
        platform.relay.refusing = False
        nursery.start_soon(again.say, b"after")
        assert await anext(terminal) == b"after"
        assert terminal.received == 11
        assert platform.streams.asked[-1][1][-2:] == (6, False)
        assert [one.skipped for one in heard] == [0]
        await terminal.send(b"x")
        await until(lambda: bytes(again.received) == b"x")
        again.finish()
        assert (await terminal.wait()).exit_code == 0


async def test_a_terminal_without_reconnect_ends(platform, until):
    """It says that the connection is lost, to readers and writers; so does one that cannot come back."""
    async with platform.sandbox.terminal() as terminal:
        await playing(platform, until)
        await platform.relay.cut()
        with pytest.raises(ConnectionLost):
            await anext(terminal)
        with pytest.raises(ConnectionLost):
            await terminal.send(b"x")


async def test_a_paused_terminal_is_not_tried_again(platform, until, quick):
    """Only what passes is waited for."""
    async with platform.sandbox.terminal(reconnect=True) as terminal:
        fake = await playing(platform, until)
        await until(lambda fake=fake: fake._said.statistics().tasks_waiting_receive)
        fake.fail(InvalidState("it was paused"))
        with pytest.raises(StreamClosed) as caught:
            await terminal.wait()
        assert caught.value.error_code == "invalid_state"


async def test_files_are_watched(platform, until):
    """Events come from when the context is entered; the end of what is watched is the iterator's."""
    platform.sandboxes.directories.add("/src")
    async with platform.sandbox.files.watch("/src", recursive=True) as watch, trio.open_nursery() as nursery:
        told = platform.streams.watched["/src"]

        async def happen():
            await told.send(FileEvents(events=(FileEvent(event="rename", path="/src/a", to="/src/b"),), overflow=True))
            told.close()

        nursery.start_soon(happen)
        seen = [(event.event, event.path, event.to) async for event in watch]
    assert seen == [("rename", "/src/a", "/src/b"), ("overflow", "/src", None)]
