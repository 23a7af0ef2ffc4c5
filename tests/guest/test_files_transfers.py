"""The control plane's transfers into a real guest daemon: archives by its tar, resumed downloads, watches."""

from __future__ import annotations

import hashlib
import io
import math
import os
import random
import shutil
import signal
import stat
import tarfile
from contextlib import asynccontextmanager
from types import SimpleNamespace
from uuid import UUID

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.guest.client import GuestLink
from capsule import errors
from capsule.model import FileEvent
from capsule.sandboxes import flow
from capsule.sandboxes.archives import Unpacking
from capsule.sandboxes.transfers import Transfers

PLACED = SimpleNamespace(host=UUID(int=1), id=UUID(int=2))


class Links:
    """Leads straight into one guest; what the agent keeps to itself is left out."""

    def __init__(self, link):
        self._link = link

    @asynccontextmanager
    async def open_stream(self, host, method, body, *, timeout=math.inf):  # noqa: ASYNC109
        assert (host, timeout, body["sandbox_id"], body["live"]) == (PLACED.host, math.inf, str(PLACED.id), True)
        question = {key: value for key, value in body.items() if key not in {"sandbox_id", "live"}}
        async with self._link.open_stream(method, question, timeout=timeout) as stream:
            yield stream


@pytest.fixture
async def transfers(guest, nursery):
    """Over a connection to a daemon on this machine."""
    link = GuestLink("127.0.0.1", guest.port)
    nursery.start_soon(link.run)
    return Transfers(links=Links(link))


async def pieces(content, size=65536, *, broken=None):
    """`content`, to its end or to where it breaks."""
    for start in range(0, len(content), size):
        await trio.lowlevel.checkpoint()
        yield content[start : start + size]
    if broken is not None:
        raise broken


async def packed(transfers, path):
    async with transfers.read_archive(PLACED, str(path)) as chunks:
        return b"".join([chunk async for chunk in chunks])


async def unpack(transfers, path, archive, **more):
    await transfers.write_archive(PLACED, str(path), pieces(archive, **more))


def snapshot(root):
    """Everything below a directory: what it is, its mode and its content."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), content)
    return found


def archive_of(entries, **options):
    """A tar archive of name → content (None: a directory)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.uid, info.gid, info.uname = 12345, 12345, "nobody-of-here"
            if content is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def tree(tmp_path):
    """A directory with everything that a file system has."""
    root = tmp_path / "tree"
    (root / "empty").mkdir(parents=True)
    (root / "a" / "b").mkdir(parents=True)
    (root / "a" / "b" / "file").write_bytes(os.urandom(300_000))
    (root / "a" / "link").symlink_to("b/file")
    (root / "dangling").symlink_to("/nowhere/at/all")
    (root / "run").write_bytes(b"#!/bin/sh\n")
    (root / "run").chmod(0o4755)
    (root / "secret").write_bytes(b"x")
    (root / "secret").chmod(0o600)
    (root / ("ä€𝄞 " * 10)).write_bytes(b"unicode")
    (root / "new\nline").write_bytes(b"newline")
    (root / "-n").write_bytes(b"a dash")
    (root / ".hidden").write_bytes(b"hidden")
    (root / "..odd").mkdir()
    (root / "..odd" / "x").write_bytes(b"odd")
    long = root.joinpath(*("n" * 200, "m" * 200))
    long.mkdir(parents=True)
    (long / "deep").write_bytes(b"long")
    (root / "sticky").mkdir()
    (root / "sticky").chmod(0o1777)
    return root


def leftovers(directory):
    return list(directory.rglob(".capsule-*"))


def holds(condition):
    """Whether it does, of a tree that somebody is just removing: one that vanishes under our eyes is not yet gone."""
    try:
        return condition()
    except FileNotFoundError:
        return False


async def test_a_tree_goes_round(transfers, tree, tmp_path, until):
    """Out of one directory and into another: links, modes, empty directories, long and odd names."""
    archive = await packed(transfers, tree)
    target = tmp_path / "new" / "place"
    await unpack(transfers, target, archive)
    assert snapshot(target / "tree") == snapshot(tree)
    status = (target / "tree" / "run").stat()
    assert (status.st_uid, status.st_gid) == (os.getuid(), os.getgid())
    assert not leftovers(tmp_path)
    await unpack(transfers, target, archive)  # the same again, over itself
    assert snapshot(target / "tree") == snapshot(tree)
    assert not leftovers(tmp_path)


async def test_one_file_and_the_root_of_names(transfers, tree, tmp_path):
    """A file is an archive with one entry; the same path in other words is the same."""
    for path in (f"{tree}/run", f"/{tree}//./run/"):
        with tarfile.open(fileobj=io.BytesIO(await packed(transfers, path))) as archive:
            assert archive.getnames() == ["run"]


async def test_a_merge(transfers, tmp_path):
    """What the archive has replaces what is there, file by file; the rest stays, as do modes of directories."""
    target = tmp_path / "target"
    (target / "both" / "mine").mkdir(parents=True)
    (target / "both" / "file").write_bytes(b"old")
    (target / "both" / "link").symlink_to("file")
    (target / "both").chmod(0o1777)
    (target / "only").write_bytes(b"mine")
    inode = (target / "both" / "file").stat().st_ino
    held = (target / "both" / "file").open("rb")
    entries = {
        "./": None,
        "both": None,
        "both/file": b"new",
        "both/link": b"a file now",
        "both/sub": None,
        "both/sub/x": b"x",
    }
    await unpack(transfers, target, archive_of(entries))
    assert held.read() == b"old"  # replaced, not written over
    held.close()
    assert (target / "both" / "file").stat().st_ino != inode
    assert stat.S_IMODE((target / "both").stat().st_mode) == 0o1777
    assert {name: entry[2] for name, entry in snapshot(target).items()} == {
        "both": None,
        "both/file": b"new",
        "both/link": b"a file now",
        "both/mine": None,
        "both/sub": None,
        "both/sub/x": b"x",
        "only": b"mine",
    }
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("existing", [True, False])
async def test_a_broken_archive_changes_nothing(transfers, tmp_path, existing, until):
    """Cut anywhere, even between two files, followed by an error of the client's, or no tar at all."""
    target = tmp_path / "target"
    if existing:
        target.mkdir()
        (target / "a").write_bytes(b"old")
    before = snapshot(tmp_path)

    def as_before():
        return snapshot(tmp_path) == before

    whole = archive_of({"a": b"new" * 1000, "b": None, "b/c": os.urandom(5000)})
    rubbish = [whole[:length] for length in (0, 1, 511, 512, 1000, 512 + 3072, 4096, 9000, 9728, 9728 + 512)]
    rubbish += [b"rubbish" * 1000, whole[:600] + b"\xff" * 5000 + bytes(1024), bytes(100)]
    for archive in rubbish:
        with pytest.raises((errors.InvalidRequest, errors.Conflict)) as caught:
            await unpack(transfers, target, archive)
        assert caught.value.message
        await trio.to_thread.run_sync(until, lambda: holds(as_before), "the staging directory is gone")
    gone = ValueError("the client went away")
    with pytest.raises(ValueError, match="went away"):
        await unpack(transfers, target, whole, broken=gone)
    await trio.to_thread.run_sync(until, lambda: holds(as_before), "the staging directory is gone")


async def test_an_archive_that_breaks_off_while_it_is_unpacked(transfers, tmp_path, guest, until):
    """tar is killed, and what it has written goes, though nobody is left who waits for that."""
    target = tmp_path / "target"
    target.mkdir()
    large = archive_of({"a": os.urandom(3_000_000), "b": os.urandom(3_000_000)})

    async def source():
        yield large[:5_000_000]
        await trio.to_thread.run_sync(until, lambda: list(tmp_path.rglob(".capsule-*/tree/b")), "tar is at work")
        raise ValueError("the client went away")

    def no_leftovers():
        return not leftovers(tmp_path)

    with pytest.raises(ValueError, match="went away"):
        await transfers.write_archive(PLACED, str(target), source())
    await trio.to_thread.run_sync(until, lambda: holds(no_leftovers), "the staging directory is gone")
    assert not list(target.iterdir())
    await trio.to_thread.run_sync(until, lambda: not guest.children(), "the shell is gone")


async def test_what_tar_says_is_told(transfers, tmp_path):
    """In its words, for the end user, without our own paths."""
    with pytest.raises(errors.InvalidRequest, match="archive") as caught:
        await unpack(transfers, tmp_path / "target", b"rubbish" * 1000 + bytes(1024))
    assert "tar" in caught.value.message
    assert "\n" not in caught.value.message
    compressed = io.BytesIO()
    with tarfile.open(fileobj=compressed, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    with pytest.raises(errors.InvalidRequest):
        await unpack(transfers, tmp_path / "target", compressed.getvalue() + bytes(1024))


async def test_names_that_lead_out(transfers, tmp_path):
    """An absolute name loses its slash, one with `..` fails; a link does not lead out of the directory either."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"old")
    before = snapshot(outside)
    target = tmp_path / "target"
    await unpack(transfers, target, archive_of({f"{outside}/file": b"new"}))
    assert (target / str(outside).lstrip("/") / "file").read_bytes() == b"new"
    with pytest.raises(errors.InvalidRequest):
        await unpack(transfers, target, archive_of({"../outside/file": b"new"}))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(outside)
        archive.addfile(link)
        info = tarfile.TarInfo("link/file")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"new"))
    with pytest.raises((errors.InvalidRequest, errors.Conflict)):
        await unpack(transfers, target, buffer.getvalue())
    assert snapshot(outside) == before


async def test_things_in_the_way(transfers, tmp_path):
    """A directory where the archive has a file, a file or a link where it has a directory: nothing is written."""
    target = tmp_path / "target"
    (target / "directory" / "x").mkdir(parents=True)
    (target / "file").write_bytes(b"mine")
    (target / "link").symlink_to("directory")
    before = snapshot(tmp_path)
    for entries in (
        {"a": b"a", "directory": b"file"},
        {"a": b"a", "file": None, "file/x": b"x"},
        {"a": b"a", "link": None, "link/x": b"x"},
        {"a": b"a", "directory": None, "directory/x": b"x"},
    ):
        with pytest.raises(errors.Conflict, match="in the way"):
            await unpack(transfers, target, archive_of(entries))
        assert snapshot(tmp_path) == before
    for path in (target / "file", target / "file" / "below"):
        with pytest.raises(errors.NotADirectory):
            await unpack(transfers, path, archive_of({"a": b"a"}))
    assert snapshot(tmp_path) == before


async def test_what_cannot_be_packed(transfers, tmp_path):
    """An ordinary error before the first byte."""
    with pytest.raises(errors.FileNotFound):
        await packed(transfers, tmp_path / "none")


async def test_no_tar(transfers, tmp_path, monkeypatch):
    """Said so, and what to do."""
    monkeypatch.setattr("capsule.sandboxes.archives.ENVS", {"PATH": "/nowhere"})
    (tmp_path / "x").touch()
    with pytest.raises(errors.Conflict, match="has no tar"):
        await packed(transfers, tmp_path)


async def test_many_files(transfers, tmp_path):
    """Into a directory that has half of them already: more than fit into one command line."""
    names = {f"d/{'n' * 100}{number}": b"new" for number in range(3000)}
    target = tmp_path / "target"
    (target / "d").mkdir(parents=True)
    for name in list(names)[:1500]:
        (target / name).write_bytes(b"old")
    with trio.fail_after(60):
        await unpack(transfers, target, archive_of({"d": None, **names}))
    assert {entry[2] for entry in snapshot(target / "d").values()} == {b"new"}
    assert len(list((target / "d").iterdir())) == 3000


async def test_a_reader_that_leaves(transfers, guest, tmp_path, until):
    """tar is not left behind."""
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 30)
        file.seek((1 << 30) - 1)
        file.write(b"x")
    async with transfers.read_archive(PLACED, str(tmp_path)) as chunks:
        assert await anext(chunks)
    await trio.to_thread.run_sync(until, lambda: not guest.children(), "tar is gone")


async def read(transfers, path, offset=0, length=None):
    async with transfers.read(PLACED, str(path), offset=offset, length=length) as content:
        return content, b"".join([chunk async for chunk in content.chunks])


async def test_any_part_of_a_file(transfers, tmp_path):
    """With the size and version of all of it."""
    data = random.Random(1).randbytes(200_000)
    path = tmp_path / "file"
    path.write_bytes(data)
    version = (await read(transfers, path))[0].version
    assert version
    for offset, length in (
        (0, None),
        (1, None),
        (0, 0),
        (70_000, 70_000),
        (199_999, 5),
        (200_000, None),
        (10**15, 10**15),
    ):
        content, got = await read(transfers, path, offset, length)
        assert got == (data[offset:] if length is None else data[offset : offset + length])
        assert (content.size, content.version) == (200_000, version)
    path.write_bytes(data)
    os.utime(path, ns=(1, 1))
    assert (await read(transfers, path))[0].version not in {None, version}
    content, got = await read(transfers, "/proc/version")
    assert (content.size, content.version) == (len(got), None)
    content, _ = await read(transfers, "/proc/version", 3, None)
    assert (content.size, content.version) == (None, None)


async def test_an_upload(transfers, tmp_path):
    """Whole and atomic; what breaks off leaves the old file."""
    path = tmp_path / "file"
    data = os.urandom(3_000_000)
    await transfers.write(PLACED, str(path), pieces(data), size=None)
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(data).digest()
    with pytest.raises(errors.InvalidRequest):
        await transfers.write(PLACED, str(path), pieces(b"short"), size=6)
    with pytest.raises(ValueError, match="cut"):
        await transfers.write(PLACED, str(path), pieces(b"x" * 500_000, broken=ValueError("cut")), size=None)
    assert path.read_bytes() == data
    with pytest.raises(errors.IsADirectory):  # at once: what follows is not waited for
        await transfers.write(PLACED, str(tmp_path), pieces(bytes(10**9), 4096), size=None)


async def test_a_watch(transfers, tmp_path, monkeypatch):
    """Events as the API has them, until what is watched is gone."""
    root = tmp_path / "root"
    root.mkdir()
    with trio.fail_after(60):
        async with transfers.watch(PLACED, str(root), recursive=True) as seen:
            (root / "a").touch()
            (root / "a").rename(root / "b")
            events = []
            while len([one for one in events if one.event in {"create", "rename"}]) < 2:
                events += (await anext(seen)).events
            assert events[0] == FileEvent(event="create", path=f"{root}/a")
            assert FileEvent(event="rename", path=f"{root}/a", to=f"{root}/b") in events
            shutil.rmtree(root)
            events = [event async for some in seen for event in some.events]
            assert events[-1] == FileEvent(event="remove", path=f"{root}/b")
        with pytest.raises(errors.FileNotFound):
            async with transfers.watch(PLACED, str(root), recursive=False):
                pass


async def test_a_guest_that_stalls(transfers, tmp_path, monkeypatch, guest):
    """Ended, and said so, however long a transfer may take otherwise."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    async with transfers.read(PLACED, str(path), offset=0, length=None) as content:
        await anext(content.chunks)
        monkeypatch.setattr(flow, "STALL_SECONDS", 0.2)  # not before: a machine that is only slow has not stalled
        os.kill(guest.pid, signal.SIGSTOP)
        try:
            with pytest.raises(errors.HostUnavailable, match="no byte"):
                async for _ in content.chunks:
                    pass
        finally:
            os.kill(guest.pid, signal.SIGCONT)


@given(st.binary(max_size=2000), st.integers(1, 700))
@settings(deadline=None)
def test_the_end_of_an_archive(content, size):
    """Seen in any pieces: the last 1024 bytes are zeros, or it is none."""

    async def check(data):
        return b"".join([chunk async for chunk in Unpacking("/x").checked(pieces(data, size))])

    for data in (content, content + bytes(1024)):
        sound = len(data) >= 1024 and not any(data[-1024:])
        if sound:
            assert trio.run(check, data) == data
        else:
            with pytest.raises(errors.InvalidRequest):
                trio.run(check, data)
