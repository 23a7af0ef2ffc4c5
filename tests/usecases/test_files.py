"""Files of sandboxes: whole or not at all, both ways, whatever the guest says."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from itertools import product

import msgspec
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.wire.faults import Fault, FaultCode
from capsule import errors
from capsule.sandboxes import files as module
from capsule.sandboxes import guest as guest_module

ENTRY = {
    "name": "f",
    "path": "/f",
    "type": "file",
    "size": 3,
    "mode": 0o100644,
    "owner": "root",
    "group": "",
    "uid": 0,
    "gid": 5,
    "mtime_ns": 7,
}
RUBBISH = [None, True, -1, 1.5, float("inf"), "x", b"x", [], {}, [[]], [{}]]


async def chunks(*parts):
    for part in parts:
        await trio.lowlevel.checkpoint()
        yield part


@pytest.fixture
def read(world, plane, sandbox):
    """The whole of a file, and the size that was announced."""

    async def read():
        async with plane.sandboxes.read_file(world.principal, sandbox, "/f") as (size, content):
            return size, b"".join([chunk async for chunk in content])

    return read


@pytest.fixture
def listing(world, plane, sandbox):
    return lambda: plane.sandboxes.list_files(world.principal, sandbox, "/", 1)


async def test_write(virtual_clock, world, guest, plane, sandbox):
    """All of it, beyond the credit, then the end; the answer is awaited."""
    guest.says(guest.pause(2), guest.read(), reply={"entry": ENTRY})
    parts = [b"a" * 300_000, b"", b"b" * 300_000]
    await plane.sandboxes.write_file(world.principal, sandbox, "/f", 600_000, chunks(*parts))
    assert guest.received == b"".join(parts)
    assert guest.asked == [("files.write", {"sandbox_id": str(sandbox), "path": "/f", "size": 600_000})]


async def test_each_failure(virtual_clock, world, guest, plane, sandbox, read, listing, error_of):
    """The error of its kind; what a file call does not find is a file. An upload need not be at its end."""
    for code, error in {**error_of, FaultCode.NOT_FOUND: errors.FileNotFound}.items():
        guest.says(reply=Fault(code, f"{code} why"))
        everything = chunks(*[b"x" * 2**16] * 20)
        for work in (
            partial(plane.sandboxes.write_file, world.principal, sandbox, "/f", 20 * 2**16, everything),
            read,
            listing,
            partial(plane.sandboxes.mkdir, world.principal, sandbox, "/d"),
            partial(plane.sandboxes.remove_file, world.principal, sandbox, "/d"),
        ):
            with pytest.raises(error, match=f"{code} why"):
                await work()


async def test_an_upload_that_breaks_off(virtual_clock, world, guest, plane, sandbox):
    """The guest is cancelled, never told that this was all; the client's own failure is what comes out."""

    async def broken():
        yield b"half"
        raise ValueError("the client went away")

    guest.says(guest.read(), guest.pause(10**6), reply={})
    with pytest.raises(ValueError, match="the client went away"):
        await plane.sandboxes.write_file(world.principal, sandbox, "/f", 8, broken())
    with trio.fail_after(30):
        await guest.cancelled.wait()


async def test_read(virtual_clock, guest, read):
    """Size first, then the bytes, notices in between left out; also a file that does not know its size."""
    data = bytes(range(256)) * 4000
    guest.says(guest.notice({"size": len(data)}), guest.content(data), reply={"size": len(data)})
    assert await read() == (len(data), data)
    guest.says(guest.notice({}), guest.content(b"a"), guest.notice({"x": 1}), guest.content(b"b"), reply={"size": 2})
    assert await read() == (None, b"ab")
    guest.says(guest.notice({"size": 0}), reply={"size": 0})
    assert await read() == (0, b"")


async def test_a_read_that_fails_half_way(virtual_clock, guest, read):
    """Raised from the iterator, so that it never looks like the end."""
    guest.says(guest.notice({"size": 4}), guest.content(b"ha"), reply=Fault(FaultCode.IO_ERROR, "bad sector"))
    with pytest.raises(errors.Conflict, match="bad sector"):
        await read()


@pytest.mark.parametrize("content", [b"abc", b"abcde"])
async def test_a_file_of_another_size_than_announced(virtual_clock, guest, read, content):
    """Neither less nor more passes for the whole."""
    guest.says(guest.notice({"size": 4}), guest.content(content), reply={"size": len(content)})
    with pytest.raises(errors.HostUnavailable):
        await read()


async def test_a_read_that_begins_with_rubbish(virtual_clock, guest, read):
    """A typed error before anything is sent to the client; content without a size is not shortened by its beginning."""
    deep = msgspec.msgpack.encode({"z": 0})[:-1] + b"\x91" * 60_000
    beginnings = [
        (),
        (guest.content(msgspec.msgpack.encode({"size": 3})), guest.content(b"abc")),
        (guest.notice(b"\xc1"),),
        (guest.notice(deep),),
        *[(guest.notice({"size": value}),) for value in RUBBISH if value is not None],
    ]
    for steps in beginnings:
        guest.says(*steps, reply={"size": 3})
        with pytest.raises(errors.HostUnavailable, match="makes no sense"):
            await read()
    guest.says(guest.notice({"size": None}), reply={"size": 0})
    assert await read() == (None, b"")


async def test_a_client_that_stops_reading(virtual_clock, world, guest, plane, sandbox):
    """Credit bounds what is on the way; leaving cancels the guest."""
    guest.says(guest.notice({}), *[guest.content(b"x" * 2**16)] * 100, reply={"size": 0})
    async with plane.sandboxes.read_file(world.principal, sandbox, "/f") as (_, content):
        assert await anext(content)
        await content.aclose()
        await trio.sleep(100)
        assert not guest.cancelled.is_set()
    with trio.fail_after(30):
        await guest.cancelled.wait()


async def test_an_error_of_the_reader_is_not_the_guests(virtual_clock, world, guest, plane, sandbox):
    """What the caller raises inside comes out as it is: a bug must not look like a host that is away."""
    guest.says(guest.notice({"size": 9}), guest.content(b"abc"), guest.pause(10**6), reply={})
    with pytest.raises(TypeError, match="ours"):
        async with plane.sandboxes.read_file(world.principal, sandbox, "/f"):
            raise TypeError("ours")


async def test_list(virtual_clock, guest, listing):
    """Batches in order; a type we do not know is `other`; numbers where there are no names."""
    other = {**ENTRY, "name": "s", "type": "socket", "symlink_target": "/x", "uid": 9, "owner": ""}
    guest.says(guest.notice({"entries": [ENTRY]}), guest.notice({"entries": [other]}), reply={"count": 2})
    first, second = await listing()
    assert (first.name, first.type, first.owner, first.group, first.modified_ns) == ("f", "file", "root", "5", 7)
    assert (second.type, second.owner, second.symlink_target) == ("other", "9", "/x")


async def test_a_listing_without_end(virtual_clock, guest, listing, monkeypatch):
    """413 at the limit, and the guest is stopped."""
    monkeypatch.setattr(module, "MAX_ENTRIES", 30)
    guest.says(*[guest.notice({"entries": [ENTRY] * 10})] * 3, reply={"count": 30})
    assert len(await listing()) == 30
    guest.says(*[guest.notice({"entries": [ENTRY] * 10})] * 4, guest.pause(10**6), reply={"count": 40})
    with pytest.raises(errors.TooLarge):
        await listing()
    with trio.fail_after(30):
        await guest.cancelled.wait()


async def test_entries_that_make_no_sense(virtual_clock, world, guest, plane, sandbox, listing):
    """Whatever the guest says: a typed error, or an entry whose types hold."""
    for key, value in product([*ENTRY, "symlink_target", "entries", "entry", "all"], RUBBISH):
        entry = {**ENTRY, key: value}
        guest.says(
            guest.notice(value if key == "all" else {"entries": value if key == "entries" else [entry]}), reply={}
        )
        try:
            found = list(await listing())
            guest.says(reply={"entry": value} if key == "entry" else {"entry": entry})
            found.append(await plane.sandboxes.mkdir(world.principal, sandbox, "/d"))
        except errors.HostUnavailable:
            continue
        for one in found:
            assert {type(one.size), type(one.mode), type(one.modified_ns)} == {int}
            assert {type(one.name), type(one.path), type(one.owner), type(one.group)} == {str}


NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats()
KEYS = st.sampled_from(["size", "entries", *ENTRY, "symlink_target"])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
    max_leaves=20,
)


@given(data=st.binary(max_size=200) | VALUES.map(msgspec.msgpack.encode))
@settings(deadline=None)
def test_no_bytes_of_a_guest_are_a_bug_of_ours(data):
    """Every notice is understood, or refused with the one typed error."""
    for kind in (guest_module.Batch, guest_module.Size):
        with suppress(errors.HostUnavailable):
            assert isinstance(guest_module.notice(kind, data), kind)
