"""One store, many threads: what one makes, another's collection does not take."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from uuid import UUID, uuid4

from agent.snapshots import errors
from agent.snapshots.store import SnapshotStore
from tests.snapshots.disk import Disk, contents, needed, pages_of, publish


class Crowd:
    """Threads that act on one store, and what the snapshots that they share must hold."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.store = SnapshotStore(directory / "store")
        self.store.prepare()
        self.store.collect(())
        self.shared: dict[UUID, bytes] = {}
        self.failures: list[BaseException] = []
        self.done: set[str] = set()
        self.lock = threading.Lock()

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        for number in range(25):
            action = chance.choice(["pause", "pause", "copy", "compact", "remove", "remove", "collect"])
            with self.lock:
                source = chance.choice(list(self.shared)) if self.shared else None
            try:
                getattr(self, action)(source, number)
                self.done.add(action)
            except errors.SnapshotMissing:
                continue  # another one removed it
            except BaseException as err:
                self.failures.append(err)
                raise

    def pause(self, source, number):
        disk = self.directory / f"disk-{uuid4()}"
        disk.write_bytes(b"disk")
        parent = self.store.load(source) if source else None
        try:
            made = publish(self.store, {number: number + 1, 7: number}, parent=parent, disk=disk)
        except (errors.DataDamaged, errors.LayerMissing):
            # A sandbox owns its parent; here another thread may have removed it, but only so.
            assert source not in self.shared
            raise errors.SnapshotMissing from None
        self.shared[made.id] = pages_of(self.store, made)

    def copy(self, source, number):
        if source and (content := self.shared.get(source)):
            self.shared[self.store.copy(source, uuid4(), kind="named", owner="").id] = content

    def compact(self, source, number):
        if source and (content := self.shared.get(source)):
            self.shared[self.store.compact(source, uuid4(), _flatten).id] = content

    def remove(self, source, number):
        if source and self.shared.pop(source, None):
            self.store.remove(source)

    def collect(self, source, number):
        self.store.collect(())
        self.store.list()


def _flatten(layers, target):
    target.write_bytes(b"".join(layer.read_bytes() for layer in layers))


def test_everything_at_once(tmp_path):
    """Pauses, copies, compactions, removals and collections; every snapshot that is left is whole, nothing else is."""
    crowd = Crowd(tmp_path)
    with Disk():
        threads = [threading.Thread(target=crowd.work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert not crowd.failures
    assert crowd.done == {"pause", "copy", "compact", "remove", "collect"}
    crowd.store.collect(())
    found = [crowd.store.load(name) for name in crowd.shared]
    for each in found:
        assert pages_of(crowd.store, each) == crowd.shared[each.id]
    assert contents(tmp_path / "store") == needed(found)
