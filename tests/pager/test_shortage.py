"""A host that is short of something for a moment: nothing is said about the snapshot, and the next try succeeds."""

from __future__ import annotations

import errno
import gc
import os
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent.pager import vm as paging
from agent.pager.records import Served
from agent.pager.regions import Region
from agent.pager.service import PagedVm, SnapshotNotOpened, SnapshotUnreadable
from agent.pager.snapshot import open_snapshot
from agent.snapshots.errors import DataDamaged, StoreFailed


@pytest.fixture
def paged(snapshot, root):
    return PagedVm(vm_id="one", snapshot=snapshot.directory, builds=snapshot.builds, socket=root / "page.sock", uid=0)


def parts(snapshot):
    return [snapshot.directory / "mem.header", snapshot.data(1), snapshot.data(1).with_name("sums")]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO])
@pytest.mark.parametrize("number", range(3), ids=["header", "data", "sums"])
def test_a_shortage_is_no_damage(paged, snapshot, monkeypatch, number, code, descriptors):
    """Whichever file cannot be opened: an error of its own that names it, and nothing stays open."""
    path = parts(snapshot)[number]
    real, real_path = os.open, Path.open

    def refuse(name):
        if str(name) == str(path):
            raise OSError(code, os.strerror(code), str(path))

    gc.collect()  # what tests before this one have left
    before = descriptors()
    with monkeypatch.context() as short:
        short.setattr(os, "open", lambda name, *rest, **options: refuse(name) or real(name, *rest, **options))
        short.setattr(Path, "open", lambda name, *rest, **options: refuse(name) or real_path(name, *rest, **options))
        with pytest.raises(SnapshotNotOpened, match=str(path)):
            open_snapshot(paged)
    assert descriptors() == before
    open_snapshot(paged).memory.close()


@pytest.mark.parametrize("number", range(3), ids=["header", "data", "sums"])
@pytest.mark.parametrize("harm", ["gone", "a directory", "below a file"])
def test_a_file_that_is_not_there_is_damage(paged, snapshot, number, harm):
    """It will not come back by itself."""
    path = parts(snapshot)[number]
    if harm == "below a file":
        path.parent.rename(path.parent.with_suffix(".away"))
        path.parent.write_bytes(b"")
    else:
        path.unlink()
        if harm == "a directory":
            path.mkdir()
    with pytest.raises(SnapshotUnreadable, match=str(path.parent)):
        open_snapshot(paged)


async def test_a_pager_out_of_descriptors(world, snapshot):
    """A real one: it says so, serves those whom it has, and listens again when there are some."""
    other = await world.start(snapshot, "two", prefetch=False)
    pid = world.pager_pid()
    limits = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, limits[1]))  # what is open stays so
    with pytest.raises(SnapshotNotOpened, match=r"Too many open files.*mem\.header"):
        await world.client.listen(world.vm(snapshot))
    assert await other.ask("verify 1 1") == "same"
    resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
    vmm = await world.start(snapshot)
    assert await vmm.ask("verify 1 1") == "same"


def running_vm(paged):
    served = Served(1, 1, descriptor=3, regions=(Region(0, 8 << 20, 0),), tracked=False)
    return paging.VmPaging(paged, SimpleNamespace(), connect_timeout=1), served


async def test_a_running_vm_waits_for_the_shortage_to_end(paged, monkeypatch, autojump_clock):
    """Its pager was restarted: it is tried again for a while; only a lasting one is what its next fault meets, and that
    is no damage either."""
    codes = []

    def short(vm):
        if codes:
            codes.pop()
            raise SnapshotNotOpened("mem.header: Too many open files")
        return open_snapshot(vm)

    monkeypatch.setattr(paging, "open_snapshot", short)
    vm, served = running_vm(paged)
    codes[:] = range(5)
    opened = await vm._open(served)
    opened.memory.read_into(0, memoryview(bytearray(4096)))
    opened.memory.close()
    codes[:] = range(1000)
    opened = await vm._open(served)
    assert opened.memory_bytes == 8 << 20
    with pytest.raises(StoreFailed, match="Too many open files"):
        opened.memory.read_into(0, memoryview(bytearray(4096)))
    (paged.snapshot / "mem.header").unlink()
    codes.clear()
    opened = await vm._open(served)
    with pytest.raises(DataDamaged, match=r"mem\.header"):
        opened.memory.read_into(0, memoryview(bytearray(4096)))
