"""The store against a plain model of it: lists of pages, and what each snapshot had."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.snapshots import errors
from agent.snapshots.store import SnapshotStore
from tests.snapshots.disk import PAGES, Disk, Killed, contents, needed, page, pages_of, publish

SPAN = 24
"""Pages that a model uses, spread over the memory."""


@dataclass
class Modelled:
    """What a snapshot must come back as."""

    pages: dict[int, int]
    state: bytes
    disk: bytes


@dataclass
class World:
    """A host's store, the model of it, and one VM."""

    root: Path
    disk: Disk
    store: SnapshotStore
    snapshots: dict[UUID, Modelled] = field(default_factory=dict)
    pages: dict[int, int] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)
    base: UUID | None = None
    counter: int = 0

    def restart(self) -> None:
        self.disk.recover()
        self.store = SnapshotStore(self.root)
        self.store.prepare()
        self.store.collect(())

    def write(self, number: int, value: int) -> None:
        self.pages[number] = value
        self.written.add(number)

    def resume(self, snapshot_id: UUID | None) -> None:
        self.base, self.written = snapshot_id, set()
        self.pages = dict(self.snapshots[snapshot_id].pages) if snapshot_id else {}

    def pause(self) -> None:
        self.counter += 1
        state = f"state {self.counter}".encode()
        overlay = self.root.parent / f"overlay-{self.counter}"
        overlay.write_bytes(f"{self.counter},".encode())
        parent = self.store.load(self.base) if self.base else None
        below = self.snapshots[self.base].disk if self.base else b""
        made = Modelled(dict(self.pages), state, below + overlay.read_bytes())
        changed = {number: self.pages[number] for number in self.written}
        name = uuid4()
        self.attempt(
            lambda: publish(self.store, changed, parent=parent, disk=overlay, state=state, snapshot_id=name), name, made
        )
        overlay.unlink()
        if name in self.snapshots:
            self.resume(name)

    def copy(self, source: UUID) -> None:
        name = uuid4()
        self.attempt(lambda: self.store.copy(source, name, kind="sandbox", owner="x"), name, self.snapshots[source])

    def compact(self, source: UUID, *, flatten: bool) -> None:
        name = uuid4()
        with_layers = _flatten if flatten else None
        self.attempt(lambda: self.store.compact(source, name, with_layers), name, self.snapshots[source])

    def attempt(self, make, name: UUID, made: Modelled) -> None:
        """Make a snapshot; whatever happens on the way, it is there, whole, or not at all."""
        try:
            make()
        except Killed:
            self.restart()
            if name not in {each.id for each in self.store.list()}:
                return
        except errors.HostDiskFull:
            self.disk.recover()
            self.check(collected=True)  # nothing is left that would have to be collected
            return
        self.snapshots[name] = made

    def remove(self, snapshot_id: UUID) -> None:
        try:
            self.store.remove(snapshot_id)
        except Killed:
            self.restart()
        except errors.SnapshotError:
            self.disk.recover()
            self.store.collect(())
        if snapshot_id not in {each.id for each in self.store.list()}:
            del self.snapshots[snapshot_id]
            if snapshot_id == self.base:
                self.resume(None)

    def collect(self) -> None:
        try:
            self.store.collect(())
        except Killed:
            self.restart()
        except errors.SnapshotError:
            self.disk.recover()

    def check(self, *, collected: bool) -> None:
        """Every snapshot is what the model says; after a collection nothing else is there."""
        found = [self.store.load(name) for name in self.snapshots]
        for each in found:
            model = self.snapshots[each.id]
            expected = b"".join(page(model.pages.get(number, 0)) for number in range(PAGES))
            assert pages_of(self.store, each) == expected
            assert each.state.read_bytes() == model.state
            assert b"".join(path.read_bytes() for path in each.layers) == model.disk
        assert {each.id for each in self.store.list()} == set(self.snapshots)
        assert contents(self.root) >= needed(found)
        if collected:
            assert contents(self.root) == needed(found)


def _flatten(layers: tuple[Path, ...], target: Path) -> None:
    target.write_bytes(b"".join(layer.read_bytes() for layer in layers))


def _world(root: Path, disk: Disk) -> World:
    world = World(root / "store", disk, SnapshotStore(root / "store"))
    world.restart()
    return world


class SnapshotsAgainstModel(RuleBasedStateMachine):
    """Any sequence of writes, zeroings, pauses, copies, compactions and removals, killed or failing anywhere."""

    @initialize()
    def begin(self):
        self.directory = Path(tempfile.mkdtemp(prefix="capsule-snapshots-"))
        self.disk = Disk()
        self.disk.__enter__()
        self.world = _world(self.directory, self.disk)

    def teardown(self):
        if hasattr(self, "disk"):
            self.disk.__exit__(None, None, None)
            shutil.rmtree(self.directory)

    @rule(first=st.integers(0, SPAN - 1), count=st.integers(1, 6), value=st.integers(0, 40))
    def write(self, first, count, value):
        for number in range(first, min(first + count, SPAN)):
            self.world.write(number * (PAGES // SPAN) if first % 2 else number, value)

    @rule(kill=st.integers(0, 60), fail=st.integers(0, 60))
    def pause(self, kill, fail):
        self._harm(kill, fail)
        self.world.pause()

    @precondition(lambda self: self.world.snapshots)
    @rule(data=st.data())
    def resume(self, data):
        self.world.resume(data.draw(st.sampled_from(list(self.world.snapshots))))

    @precondition(lambda self: self.world.snapshots)
    @rule(data=st.data(), kill=st.integers(0, 40), fail=st.integers(0, 40))
    def copy(self, data, kill, fail):
        source = data.draw(st.sampled_from(list(self.world.snapshots)))
        self._harm(kill, fail)
        self.world.copy(source)

    @precondition(lambda self: self.world.snapshots)
    @rule(data=st.data(), kill=st.integers(0, 60), fail=st.integers(0, 60), flatten=st.booleans())
    def compact(self, data, kill, fail, flatten):
        source = data.draw(st.sampled_from(list(self.world.snapshots)))
        self._harm(kill, fail)
        self.world.compact(source, flatten=flatten)

    @precondition(lambda self: self.world.snapshots)
    @rule(data=st.data(), kill=st.integers(0, 25), fail=st.integers(0, 25))
    def remove(self, data, kill, fail):
        victim = data.draw(st.sampled_from(list(self.world.snapshots)))
        self._harm(kill, fail)
        self.world.remove(victim)

    @rule(kill=st.integers(0, 10))
    def collect(self, kill):
        self._harm(kill, 0)
        self.world.collect()

    @rule(kill=st.integers(0, 10))
    def restart(self, kill):
        """A start that is itself killed."""
        again = SnapshotStore(self.world.root)
        self._harm(kill, 0)
        with suppress(Killed):
            again.prepare()
            again.collect(())
        self.world.restart()

    @invariant()
    def all_is_there_and_nothing_else(self):
        if hasattr(self, "world"):
            self.disk.recover()
            self.world.check(collected=False)
            self.world.store.collect(())
            self.world.check(collected=True)

    def _harm(self, kill: int, fail: int) -> None:
        if kill:
            self.disk.kill_at(kill)
        elif fail:
            self.disk.fail_at(fail)


SnapshotsAgainstModel.TestCase.settings = settings(
    max_examples=60, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSnapshotsAgainstModel = SnapshotsAgainstModel.TestCase


@pytest.mark.parametrize("harm", ["kill", "fail"])
@pytest.mark.parametrize("action", ["pause", "copy", "compact", "flatten", "remove", "collect"])
def test_killed_or_failing_at_every_operation(tmp_path, action, harm):
    """Each operation of each action in turn: afterwards it is as before or as it should be, and nothing is over."""
    number, finished = 0, False
    with Disk() as disk:
        world = _world(tmp_path, disk)
        for generation in range(3):
            world.write(generation, generation + 7)
            world.write(9, generation)
            world.pause()
        while not finished:
            number += 1
            newest = world.base
            world.write(4, number)
            world.write(5, 0)
            if action == "remove":
                world.copy(newest)
                newest = list(world.snapshots)[-1]
            elif action == "collect":
                shutil.copytree(world.store.build_directory(world.store.load(newest).header.build), _orphan(world))
            if harm == "kill":
                disk.kill_at(number)
            else:
                disk.fail_at(number)
            _act(world, action, newest)
            finished = not disk.harmed
            disk.recover()
            world.store.collect(())
            world.check(collected=True)
    assert number > {"collect": 3, "remove": 5}.get(action, 12)


def _orphan(world: World) -> Path:
    return world.store.build_directory(uuid4())


def _act(world: World, action: str, newest: UUID) -> None:
    match action:
        case "pause":
            world.pause()
        case "copy":
            world.copy(newest)
        case "compact":
            world.compact(newest, flatten=False)
        case "flatten":
            world.compact(newest, flatten=True)
        case "remove":
            world.remove(newest)
        case "collect":
            world.collect()
