"""The outbox: durable, acknowledged, never running backwards."""

from __future__ import annotations

import json

import msgspec
import pytest
import trio
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent.sandboxes import outbox
from agent.sandboxes.outbox import Outbox
from agent.wire import limits
from agent.wire.calls import HostListing, OutboxEntry, body_of, parse
from agent.wire.codec import encode
from agent.wire.messages import Reply
from tests.fixtures.drivers import Crash

ONE, TWO = sandbox_id(1), sandbox_id(2)


@pytest.fixture
def open_outbox(host, tmp_path):
    """A maker of outboxes on one file, as one agent after the other has them."""

    def make():
        box = Outbox(tmp_path / "outbox.json")
        box.load()
        return box

    return make


def sequences(box):
    return [entry.sequence for entry in box.entries()]


async def test_entries_stay_until_acknowledged(open_outbox):
    """Reading drains nothing (trap 8); acknowledging drops up to and including; numbers go on after a restart."""
    box = open_outbox()
    for name in (ONE, TWO, ONE):
        await box.append(name, "died", "boom")
    first, second, third = sequences(box)
    assert (second, third) == (first + 1, first + 2)
    assert sequences(box) == [first, second, third]
    await box.acknowledge(second)
    assert sequences(box) == [third]
    again = open_outbox()
    assert again.entries() == box.entries()
    await again.acknowledge(third)
    await open_outbox().append(TWO, "destroyed", "")
    assert sequences(open_outbox()) == [third + 1]


async def test_two_readers(open_outbox):
    """Both read everything; the slower one's late acknowledgement drops nothing that came after."""
    box = open_outbox()
    await box.append(ONE, "died", "a")
    seen_by_a, seen_by_b = box.entries(), box.entries()
    assert seen_by_a == seen_by_b
    await box.acknowledge(seen_by_a[-1].sequence)
    await box.append(TWO, "died", "b")
    await box.acknowledge(seen_by_b[-1].sequence)
    assert [entry.sandbox_id for entry in box.entries()] == [TWO]


async def test_many_at_once(open_outbox):
    """Concurrent appends and acknowledgements: each entry has its own number, in the file's order."""
    box = open_outbox()
    async with trio.open_nursery() as nursery:
        for number in range(20):
            nursery.start_soon(box.append, sandbox_id(number), "died", "x")
            nursery.start_soon(box.acknowledge, 0)
    assert sequences(box) == list(range(sequences(box)[0], sequences(box)[0] + 20))
    assert open_outbox().entries() == box.entries()


@pytest.mark.parametrize("step", [1, 2])
async def test_killed_between_write_and_rename(open_outbox, host, tmp_path, step):
    """Before the rename the entry is not there, after it is; the file is whole both times, and numbers go on."""
    box = open_outbox()
    await box.append(ONE, "died", "first")
    before = sequences(box)
    host.steps.clear()
    host.crash_at = step
    with pytest.raises(Crash):
        await box.append(TWO, "died", "second")
    host.crash_at, host.dead = None, False
    again = open_outbox()
    assert sequences(again) == (before if step == 1 else [*before, before[0] + 1])
    await again.append(TWO, "died", "third")
    assert sequences(again) == sorted(set(sequences(again)))


async def test_a_failed_write_changes_nothing(open_outbox, host):
    """A full disk: the caller is told, and memory says what the file says."""
    box = open_outbox()
    await box.append(ONE, "died", "first")
    before = box.entries()

    def fail(_name):
        raise OSError(28, "No space left on device")

    host.on_step = fail
    with pytest.raises(OSError, match="No space"):
        await box.append(TWO, "died", "second")
    with pytest.raises(OSError, match="No space"):
        await box.acknowledge(before[-1].sequence)
    assert box.entries() == before
    assert open_outbox().entries() == before


@pytest.mark.parametrize("damage", [b"", b'{"next_sequence": 5, "entr', b"\xff" * 40, b'{"entries": 7}'])
async def test_a_torn_file_is_put_aside(open_outbox, tmp_path, damage):
    """The agent starts; the file is kept for a look; the numbers go on above all that were ever given."""
    box = open_outbox()
    await box.append(ONE, "died", "lost")
    last = sequences(box)[-1]
    file = tmp_path / "outbox.json"
    file.write_bytes(damage)
    again = open_outbox()
    assert again.entries() == []
    assert (tmp_path / "outbox.json.broken").read_bytes() == damage
    json.loads(file.read_bytes())
    await open_outbox().append(TWO, "died", "new")
    assert sequences(open_outbox())[0] > last


async def test_a_guests_words_cannot_break_the_file(open_outbox):
    """A reason may hold anything and be of any length; half a surrogate would not encode."""
    box = open_outbox()
    await box.append(ONE, "died", "\ud800 \x00 \u202e " + "x" * 100_000)
    (entry,) = open_outbox().entries()
    assert len(entry.reason) == outbox.REASON_CHARACTERS


async def test_a_long_outbox_fits_into_a_frame(host, autojump_clock):
    """After a long absence the oldest entries are listed first, and acknowledging brings the next ones."""
    total = 3000
    reason = "\U0001f4a5" * outbox.REASON_CHARACTERS
    entries = [
        OutboxEntry(sequence=number, sandbox_id=sandbox_id(number), event="died", reason=reason, at=0.0)
        for number in range(1, total + 1)
    ]
    stored = outbox._Stored(next_sequence=total + 1, entries=entries)
    (host.state.root / "outbox.json").write_bytes(msgspec.json.encode(stored))
    async with host.agent() as agent, agent.connection() as control_plane:
        body = body_of(agent.manager.listing())
        assert len(encode(Reply(1, body))) < limits.MAX_FRAME_BYTES / 2
        seen = []
        async with control_plane.open_stream("host.watch", {}) as watch:
            while len(seen) < total:
                await anext(watch)
                listing = parse(HostListing, await control_plane.call("host.list", {}, timeout=5))
                seen += [entry.sequence for entry in listing.outbox]
                acknowledgement = {"sequence": seen[-1]}
                assert await control_plane.call("host.acknowledge", acknowledgement, timeout=5) == {}
        assert seen == list(range(1, total + 1))
        await wait_all_tasks_blocked()
        assert agent.told() == []


async def test_the_outbox_is_bounded(open_outbox, monkeypatch):
    """Of more entries than a host can have sandboxes the oldest go."""
    monkeypatch.setattr(outbox, "MAX_ENTRIES", 3)
    box = open_outbox()
    for number in range(5):
        await box.append(sandbox_id(number), "died", "x")
    assert [entry.sandbox_id for entry in box.entries()] == [sandbox_id(number) for number in (2, 3, 4)]
    assert msgspec.json.decode(msgspec.json.encode(box.entries()))
