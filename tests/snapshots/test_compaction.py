"""Compaction: many generations become one, with the same content, and without touching what it reads."""

from __future__ import annotations

import os
import tracemalloc
from uuid import uuid4

import pytest

from agent.snapshots import compaction, errors, working_set
from agent.snapshots.blocks import BuildWriter
from agent.snapshots.header import COMPACT_AT, PAGE, Run
from agent.snapshots.memory import MemoryReader
from agent.snapshots.merge import overlay
from agent.snapshots.store import SnapshotStore
from tests.snapshots.disk import Disk, Killed, contents, description, flip, needed, pages_of, publish


@pytest.fixture
def store(tmp_path):
    made = SnapshotStore(tmp_path / "store")
    made.prepare()
    made.collect(())
    return made


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def generations(store, tmp_path):
    """Eight generations, each with a layer; only the newest is kept."""
    newest = None
    for number in range(COMPACT_AT):
        disk = tmp_path / f"disk-{number}"
        disk.write_bytes(b"%d" % number)
        assert newest is None or not newest.wants_compaction()
        made = publish(
            store, {number: number + 1, 40 + number * 3: number + 9, 50: number % 2}, parent=newest, disk=disk
        )
        if newest is not None:
            store.remove(newest.id)
        newest = made
        disk.unlink()
    return newest


def flatten(layers, target):
    target.write_bytes(b"".join(layer.read_bytes() for layer in layers))


def test_eight_generations_become_one(store, root, generations):
    """One build, one layer, generation 1; kind, state, working set and content are the old ones."""
    assert generations.wants_compaction()
    assert not generations.wants_compaction(COMPACT_AT + 1)
    assert len(generations.manifest.builds) == COMPACT_AT
    working_set.write(generations.working_set, working_set.combine(None, [(0, PAGE)]))
    before = pages_of(store, generations)

    made = store.compact(generations.id, uuid4(), flatten)

    assert pages_of(store, store.load(made.id)) == before
    assert (len(made.manifest.builds), made.manifest.generation, made.wants_compaction()) == (1, 1, False)
    assert [path.read_bytes() for path in made.layers] == [b"01234567"]
    assert made.manifest.description == generations.manifest.description
    assert made.state.read_bytes() == generations.state.read_bytes()
    assert working_set.read(made.working_set).ranges() == ((0, PAGE),)
    assert contents(root) == needed([generations, made])
    store.remove(generations.id)
    assert contents(root) == needed([made])
    assert pages_of(store, store.load(made.id)) == before


def test_layers_stay_without_somebody_to_flatten_them(store, generations):
    """Memory alone is compacted; a single layer is never flattened."""
    made = store.compact(generations.id, uuid4())
    assert made.layers == generations.layers
    once = store.compact(store.compact(generations.id, uuid4(), flatten).id, uuid4(), lambda *_: pytest.fail("called"))
    assert len(once.layers) == 1


def test_a_stopped_compaction_leaves_nothing(store, root, generations):
    """It is asked between chunks; the snapshot is as it was."""
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked > 3

    before = contents(root)
    with pytest.raises(errors.CompactionStopped):
        store.compact(generations.id, uuid4(), should_stop=stop)
    assert (asked, contents(root)) == (4, before)


def test_a_failing_flatten_leaves_nothing(store, root, generations):
    """Whatever it raises comes through."""

    def fail(_layers, target):
        target.write_bytes(b"half")
        raise ZeroDivisionError

    before = contents(root)
    with pytest.raises(ZeroDivisionError):
        store.compact(generations.id, uuid4(), fail)
    assert contents(root) == before


def test_a_source_that_is_removed_meanwhile_is_still_read(store, root, generations):
    """Its parts are held until the compaction is done, then they go."""
    expected = pages_of(store, generations)

    def remove():
        store.remove(generations.id)
        return False

    made = store.compact(generations.id, uuid4(), flatten, should_stop=remove)
    assert pages_of(store, store.load(made.id)) == expected
    store.collect(())
    assert contents(root) == needed([made])


def test_damaged_data_is_not_copied(store, root, generations):
    """A flipped bit ends it, typed and by name; neither the snapshot nor anything of it is removed."""
    data = store.build_directory(generations.manifest.builds[2]) / "data"
    flip(data, 77)
    before = contents(root)
    with pytest.raises(errors.DataDamaged, match=str(data)):
        store.compact(generations.id, uuid4())
    assert contents(root) == before


def test_killed_anywhere_the_snapshot_is_whole(store, root, generations):
    """Every single operation of a compaction."""
    expected = pages_of(store, generations)
    with Disk() as disk:
        for number in range(1, 200):
            disk.kill_at(number)
            try:
                store.compact(generations.id, uuid4(), flatten)
            except Killed:
                disk.recover()
                store = SnapshotStore(root)
                store.prepare()
                store.collect(())
                found = [store.load(each.id) for each in store.list()]
                assert generations.id in {each.id for each in found}
                assert {pages_of(store, each) for each in found} == {expected}
                assert contents(root) == needed(found)
            else:
                break
    assert 20 < number < 199


def test_large_memories_take_little_memory(tmp_path):
    """64 MiB are compacted through a few MiB, in chunks that join into one run."""
    size = 64 << 20
    with Disk():
        writer = BuildWriter(tmp_path / str(uuid4()))
        for _ in range(64):
            writer.append(os.urandom(1 << 20))
        writer.finish()
        runs = [Run(offset, PAGE, writer.build, size - PAGE - offset) for offset in range(0, size, PAGE)]
        header = overlay(None, runs, memory_bytes=size, build=writer.build)
        del runs
        tracemalloc.start()
        try:
            with MemoryReader(header, tmp_path) as memory:
                target = BuildWriter(tmp_path / str(uuid4()))
                found = compaction.rewrite(memory, target, should_stop=lambda: False)
                target.finish()
            assert tracemalloc.get_traced_memory()[1] < 5 << 20
        finally:
            tracemalloc.stop()
    assert len(header.runs) == size // PAGE
    assert len(found.runs) == 1
    with MemoryReader(header, tmp_path) as before, MemoryReader(found, tmp_path) as after:
        for offset in range(0, size, 1 << 20):
            assert before.read(offset, 1 << 20) == after.read(offset, 1 << 20)


def test_a_memory_of_zeros_has_no_build(store, root):
    """Nothing to copy, nothing to keep."""
    first = publish(store, {1: 1})
    second = publish(store, {1: 0}, parent=first)
    made = store.compact(second.id, uuid4())
    assert (made.manifest.builds, made.manifest.description) == ((), description())
    store.remove(first.id)
    assert contents(root) == needed([second, made])
