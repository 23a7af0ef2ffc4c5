"""Transfers and watches: what is asked of a host, and what its failures become; over a guest told what to say."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial

import msgspec
import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from capsule import errors
from capsule.model import FileEvent, FileEvents
from capsule.sandboxes import flow, transfers
from capsule.sandboxes.live import LiveProcesses
from capsule.sandboxes.streams import Streams
from capsule.sandboxes.transfers import Transfers

VERSION = {"file_size": 10, "mtime_ns": 5, "inode": 7}
STARTED = {"pid": 7}
DONE = {"exit_code": 0, "duration_ms": 1, "timed_out": False}
TRAILER = bytes(1024)
RUBBISH = [None, True, -1, 1.5, "x", b"x", [], {}, [[]], [{}]]


@pytest.fixture
def streams(plane):
    links = plane.execs.links
    return Streams(rows=plane.sandboxes.rows, processes=LiveProcesses(links=links), transfers=Transfers(links=links))


@pytest.fixture
def read(world, streams, sandbox):
    """A file's size, version and bytes."""

    async def read(offset=0, length=None):
        async with streams.read_stream(world.principal, sandbox, "/f", offset=offset, length=length) as content:
            return content.size, content.version, b"".join([chunk async for chunk in content.chunks])

    return read


@pytest.fixture
def write(world, streams, sandbox):
    return lambda source, size=None: streams.write_stream(world.principal, sandbox, "/f", source, size=size)


@pytest.fixture
def pack(world, streams, sandbox):
    async def pack():
        async with streams.read_archive(world.principal, sandbox, "/d/e") as chunks:
            return b"".join([chunk async for chunk in chunks])

    return pack


@pytest.fixture
def unpack(world, streams, sandbox):
    return lambda source: streams.write_archive(world.principal, sandbox, "/d/e", source)


@pytest.fixture
def watch(world, streams, sandbox):
    async def watch():
        async with streams.watch(world.principal, sandbox, "/d", recursive=True) as seen:
            return [events async for events in seen]

    return watch


async def chunks(*parts, broken=None):
    for part in parts:
        await trio.lowlevel.checkpoint()
        yield part
    if broken is not None:
        raise broken


def packing(guest, *steps, reply=DONE):
    """The guest knows the path, then packs it as told."""

    async def stat_or_pack(method, body, stream):
        if method == "files.stat":
            return {"entry": {}}
        return await type(guest).__call__(guest, method, body, stream)

    guest.says(guest.notice(STARTED), *steps, reply=reply)
    return stat_or_pack


async def test_what_is_asked(virtual_clock, guest, sandbox, read, write, watch, unpack):
    """Live, and without a deadline: it takes as long as it takes."""
    of = {"sandbox_id": str(sandbox), "live": True}
    guest.says(guest.notice({"size": 0, **VERSION}), reply={"size": 0})
    await read()
    await read(3, 4)
    guest.says(guest.read(), reply={"entry": {}})
    await write(chunks(b"x"))
    await write(chunks(b"x"), 1)
    guest.says(guest.notice({}), reply={"reason": "removed"})
    await watch()
    assert guest.asked == [
        ("files.read", {**of, "path": "/f"}),
        ("files.read", {**of, "path": "/f", "offset": 3, "length": 4}),
        ("files.write", {**of, "path": "/f"}),
        ("files.write", {**of, "path": "/f", "size": 1}),
        ("files.watch", {**of, "path": "/d", "recursive": True}),
    ]
    guest.says(guest.notice(STARTED), guest.read(), reply=DONE)
    await unpack(chunks(TRAILER))
    method, body = guest.asked[-1]
    assert (method, body["cmd"], body["stdin"], body["live"]) == ("exec", "/bin/sh", True, True)
    assert body["args"][3] == "/d/e"
    assert "timeout_ms" not in body


async def test_each_failure(virtual_clock, guest, error_of, read, write, watch, unpack):
    """The error of its kind; what is not found is a file. An upload is not sent to its end."""
    for code, error in {**error_of, FaultCode.NOT_FOUND: errors.FileNotFound}.items():
        guest.says(reply=Fault(code, f"{code} why"))
        sent = []

        async def everything(sent=sent):
            for _ in range(10_000):
                sent.append(1)
                await trio.lowlevel.checkpoint()
                yield b"x" * 2**16

        for work in (read, partial(write, everything()), partial(unpack, everything()), watch):
            with pytest.raises(error, match=f"{code} why"):
                await work()
        assert len(sent) < 200


async def test_a_read(virtual_clock, guest, read):
    """Size and version of the file, bytes of the part."""
    guest.says(guest.notice({"size": 3, **VERSION}), guest.content(b"abc"), reply={"size": 3})
    assert await read(2, 3) == (10, "a-5-7", b"abc")
    guest.says(guest.notice({"size": 3}), guest.content(b"abc"), reply={"size": 3})  # a daemon of before
    assert await read() == (3, None, b"abc")
    assert await read(2, 3) == (None, None, b"abc")
    guest.says(guest.notice({}), guest.content(b"abc"), reply={"size": 3})
    assert await read() == (None, None, b"abc")


async def test_versions_that_make_no_sense(virtual_clock, guest, read):
    """Refused, or a version like any other."""
    for key in VERSION:
        for value in RUBBISH:
            guest.says(guest.notice({"size": 0, **VERSION, key: value}), reply={"size": 0})
            try:
                _, version, _ = await read()
            except errors.HostUnavailable:
                continue
            assert version is None or version.isascii()


@pytest.mark.parametrize("content", [b"ab", b"abcd"])
async def test_not_what_was_announced(virtual_clock, guest, read, content):
    """Neither less nor more passes for the part."""
    guest.says(guest.notice({"size": 3, **VERSION}), guest.content(content), reply={"size": len(content)})
    with pytest.raises(errors.HostUnavailable, match="makes no sense"):
        await read()


async def test_an_upload_that_breaks_off(virtual_clock, guest, write, unpack):
    """Cancelled, never told that this was all; the client's own failure is what comes out."""
    for work in (write, unpack):
        ended = trio.Event()

        async def note(stream, ended=ended):
            async for _ in stream:
                pass
            ended.set()

        guest.cancelled = trio.Event()
        guest.says(note, guest.pause(10**4), reply={})
        with pytest.raises(ValueError, match="the client went away"):
            await work(chunks(b"half", broken=ValueError("the client went away")))
        with trio.fail_after(30):
            await guest.cancelled.wait()
        assert not ended.is_set()


async def test_success_before_the_end(virtual_clock, guest, write, unpack):
    """A guest cannot have written what it has not seen."""
    for work, reply in ((write, {"entry": {}}), (unpack, DONE)):
        guest.says(reply=reply)
        with pytest.raises(errors.HostUnavailable, match="makes no sense"):
            await work(chunks(*[bytes(2**16)] * 1000))


async def test_a_stall_ends_it(virtual_clock, guest, read, write, unpack, pack, agent):
    """After a quarter of an hour without a byte, not before, in every direction."""
    silence = guest.pause(10**4)
    limit = flow.STALL_SECONDS

    async def ends(work, after):
        began = trio.current_time()
        with pytest.raises(errors.HostUnavailable, match="no byte"):
            await work()
        assert trio.current_time() - began == pytest.approx(after, abs=5)

    guest.says(silence, reply={})
    await ends(read, flow.FIRST_SECONDS)
    guest.says(
        guest.notice({"size": 9}), guest.content(b"x"), guest.pause(limit - 10), guest.content(b"y"), silence, reply={}
    )
    await ends(read, 2 * limit - 10)
    guest.says(silence, reply={})
    await ends(partial(write, chunks(*[bytes(2**16)] * 20)), limit)
    await ends(partial(write, chunks(b"x")), limit)  # no answer to the end
    await ends(partial(unpack, chunks(TRAILER)), limit)
    agent.guest = packing(guest, guest.stdout(b"x"), silence)
    await ends(pack, limit)


async def test_nothing_happens_for_long_in_a_watch(virtual_clock, guest, watch):
    """That is what it is for."""
    event = {"event": "rename", "path": "/d/a", "to": "/d/b", "directory": True}
    guest.says(
        guest.notice({}),
        guest.pause(10**4),
        guest.notice({"events": [event]}),
        guest.notice({"events": [], "overflow": True}),
        reply={"reason": "removed"},
    )
    assert await watch() == [
        FileEvents(events=(FileEvent(event="rename", path="/d/a", to="/d/b", directory=True),)),
        FileEvents(events=(), overflow=True),
    ]


async def test_a_watch_that_does_not_begin(virtual_clock, guest, watch):
    """Has a limit, if a long one: trees can be large."""
    guest.says(guest.pause(10**4), reply={})
    began = trio.current_time()
    with pytest.raises(errors.HostUnavailable):
        await watch()
    assert trio.current_time() - began == pytest.approx(transfers.WATCH_SECONDS, abs=5)


async def test_a_watch_that_breaks_off_inside_its_readers_nursery(virtual_clock, guest, streams, world, sandbox):
    """The iterator itself says what is wrong; around it nobody would find it in the group."""
    paused = Fault(FaultCode.INVALID_STATE, "it was paused", details={"status": "paused"})
    guest.says(guest.notice({}), reply=paused)
    with pytest.raises(ExceptionGroup) as caught:
        async with (
            streams.watch(world.principal, sandbox, "/d", recursive=False) as seen,
            trio.open_nursery(),
        ):
            assert [events async for events in seen] == []
    assert [type(error) for error in caught.value.exceptions] == [errors.InvalidState]


async def test_events_that_make_no_sense(virtual_clock, guest, watch):
    """A typed error, or events whose types hold."""
    good = {"event": "create", "path": "/d/a", "directory": False}
    notices = [{"events": [{**good, key: value}]} for key in ("event", "path", "to", "directory") for value in RUBBISH]
    for said in (*notices, *RUBBISH, *({"events": value} for value in RUBBISH), {"events": [good], "overflow": 5}):
        guest.says(guest.notice({}), guest.notice(msgspec.msgpack.encode(said)), reply={"reason": "ended"})
        try:
            (seen,) = await watch()
        except errors.HostUnavailable:
            continue
        for one in seen.events:
            assert isinstance(one.path, str)
            assert one.to is None or isinstance(one.to, str)
            assert isinstance(one.directory, bool)
    guest.says(guest.notice({}), guest.content(b"x"), reply={"reason": "ended"})
    with pytest.raises(errors.HostUnavailable):
        await watch()


async def test_an_archive_is_packed(virtual_clock, guest, agent, pack):
    """The output alone; a file that changed meanwhile spoils nothing."""
    for code in (0, 1):
        steps = (guest.stderr(b"tar: socket ignored\n"), guest.stdout(b"a" * 100_000), guest.stdout(b"b"))
        agent.guest = packing(guest, *steps, reply={**DONE, "exit_code": code})
        assert await pack() == b"a" * 100_000 + b"b"
        body = guest.asked[-1][1]
        assert (body["cmd"], body["args"]) == ("tar", ["-C", "/d", "-cf", "-", "--", "e"])


@pytest.mark.parametrize(
    ("code", "said", "error"),
    [
        (2, b"tar: e/x: Cannot open: Permission denied\n", errors.PermissionDenied),
        (2, b"tar: e/x: Read error: Input/output error\n", errors.Conflict),
        (127, b"", errors.Conflict),
        (137, b"", errors.Conflict),
    ],
)
async def test_an_archive_that_is_not_whole(virtual_clock, guest, agent, pack, code, said, error):
    """Raised, before the first byte and after it: it must not look whole."""
    for printed in (b"", b"x" * 100_000):
        steps = [guest.stderr(said)] if said else []
        if printed:
            steps.append(guest.stdout(printed))
        agent.guest = packing(guest, *steps, reply={**DONE, "exit_code": code})
        with pytest.raises(error) as caught:
            await pack()
        assert said.decode().strip() in caught.value.message


@pytest.mark.parametrize(
    ("code", "said", "error", "shown"),
    [
        (
            65,
            b"tar: This does not look like a tar archive\ntar: Exiting with failure status due to previous errors\n",
            errors.InvalidRequest,
            "look like a tar archive",
        ),
        (65, b"tar: a: Cannot write: No space left on device\n", errors.DiskFull, "No space"),
        (65, b"", errors.InvalidRequest, "65"),
        (72, b"/d is not a directory\n", errors.NotADirectory, "/d is not"),
        (73, b"/d/e/x is in the way\n", errors.Conflict, "/d/e/x"),
        (1, b"mkdir: cannot create directory: Read-only file system\n", errors.PermissionDenied, "Read-only"),
        (1, b"\x1b[31mred\x07\xff\n", errors.Conflict, "red"),
        (137, b"", errors.Conflict, "137"),
    ],
)
async def test_an_archive_that_does_not_arrive(virtual_clock, guest, unpack, code, said, error, shown):
    """The error of its kind, with what tar said about it, and nothing a terminal would act on. However much it says."""
    for before in (b"", b"noise\n" * 200_000):
        steps = [guest.stderr(before[start : start + 60_000]) for start in range(0, len(before), 60_000)]
        steps += [guest.stderr(said)] if said else []
        if before and not said:
            continue
        guest.says(guest.notice(STARTED), *steps, reply={**DONE, "exit_code": code})
        with pytest.raises(error) as caught:
            await unpack(chunks(*[bytes(2**16)] * 100))
        message = caught.value.message
        assert shown in message
        assert message.isprintable()
        assert "Exiting" not in message
        assert len(message) < 5000


async def test_a_client_that_stops_reading(virtual_clock, world, guest, streams, sandbox):
    """Credit bounds what is on the way; leaving cancels the guest."""
    sent = 0

    async def pour(stream):
        nonlocal sent
        while True:
            await stream.send(bytes(2**16), 0)
            sent += 2**16

    guest.says(guest.notice({}), pour, reply={})
    async with streams.read_stream(world.principal, sandbox, "/f", offset=0, length=None) as content:
        assert await anext(content.chunks)
        await trio.sleep(100)
        assert sent < 2**20
        assert not guest.cancelled.is_set()
    with trio.fail_after(30):
        await guest.cancelled.wait()


async def test_a_guest_that_stops_reading(virtual_clock, guest, write):
    """Nothing is taken from the client that the guest has no room for."""
    taken = 0

    async def source():
        nonlocal taken
        for _ in range(1000):
            await trio.lowlevel.checkpoint()
            taken += 2**16
            yield bytes(2**16)

    guest.says(guest.pause(800), guest.read(), reply={"entry": {}})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write, source())
        await trio.sleep(700)
        assert taken < 2**20
    assert taken == 1000 * 2**16
    assert guest.received == bytes(taken)


async def test_an_error_of_ours_is_not_the_guests(virtual_clock, world, guest, streams, sandbox):
    """What the caller raises inside comes out as it is."""

    @asynccontextmanager
    async def opened():
        async with streams.read_stream(world.principal, sandbox, "/f", offset=0, length=None) as content:
            yield content

    guest.says(guest.notice({"size": 9}), guest.content(b"abc"), guest.pause(10**4), reply={})
    with pytest.raises(TypeError, match="ours"):
        async with opened():
            raise TypeError("ours")


async def test_a_sandbox_that_does_not_run(virtual_clock, world, agent, guest, streams):
    """409, and the guest is not asked; nor is the source begun."""
    row = await world.insert(agent, "paused")
    who = (world.principal, row.id, "/f")
    for opened in (
        streams.read_stream(*who, offset=0, length=None),
        streams.read_archive(*who),
        streams.watch(*who, recursive=False),
    ):
        with pytest.raises(errors.InvalidState):
            async with opened:
                pass
    source = chunks(b"x")
    for work in (partial(streams.write_stream, *who, source, size=None), partial(streams.write_archive, *who, source)):
        with pytest.raises(errors.InvalidState):
            await work()
    assert await anext(source) == b"x"
    await source.aclose()
    assert not guest.asked
