"""A host that is short of something for a moment finds no damage, and removes nothing."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pytest

from agent.snapshots import errors
from agent.snapshots.store import SnapshotStore
from tests.snapshots.disk import contents, pages_of, publish


@pytest.fixture
def store(tmp_path):
    made = SnapshotStore(tmp_path / "store")
    made.prepare()
    made.collect(())
    return made


@contextmanager
def failing(code, name):
    """Files of that name cannot be opened or looked at."""
    with pytest.MonkeyPatch.context() as patch:
        for place, function in ((os, "open"), (Path, "open"), (Path, "stat")):
            patch.setattr(place, function, refusing(getattr(place, function), code, name))
        yield


def refusing(real, code, name):
    def attempt(path, *rest, **options):
        if Path(path).name == name:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *rest, **options)

    return attempt


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])
@pytest.mark.parametrize("name", ["manifest.json", "mem.header", "vm.state", "data", "sums"])
def test_a_shortage_is_no_damage(store, tmp_path, code, name):
    """Loading fails as the file system does; nobody is told that the snapshot is gone; collecting waits."""
    one = publish(store, {1: 1, 2: 2})
    other = publish(store, {7: 7})
    before = contents(tmp_path / "store")
    with failing(code, name), pytest.raises(errors.StoreFailed, match=rf"{name}|cannot be read"):
        pages_of(store, store.load(one.id))
    if name == "manifest.json":
        fresh = SnapshotStore(tmp_path / "store")
        with failing(code, name):
            fresh.collect(())
            assert {each.manifest for each in fresh.list()} == {None}
            with pytest.raises(errors.StoreFailed):
                fresh.allocated_bytes(one.id)
            with pytest.raises(errors.StoreFailed):
                fresh.copy(one.id, uuid4(), kind="named", owner="x")
    assert contents(tmp_path / "store") == before
    assert pages_of(store, store.load(one.id))
    assert pages_of(store, store.load(other.id))
