"""Files and directories: streamed, checked, resumed, and safe from what a sandbox packs."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import tarfile
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from capsule import errors as server
from capsule.client import ApiError, Conflict, ConnectionLost, IntegrityError, NotFound, archives

BIG = os.urandom(1024 * 1024) * 6


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


async def test_small_files(platform):
    """Written and read whole, listed, made and removed."""
    files = platform.sandbox.files
    await files.write("/tmp/a", "text")
    await files.write("/tmp/b", BIG[:300_000])
    assert await files.read("/tmp/a") == b"text"
    assert await files.read("/tmp/b") == BIG[:300_000]
    await files.mkdir("/tmp/dir")
    with pytest.raises(Conflict):
        await files.mkdir("/")
    assert [entry.type for entry in await files.list("/tmp")] == ["file", "symlink", "other"]
    await files.remove("/tmp/a")
    with pytest.raises(NotFound, match="file_not_found"):
        await files.read("/none")


async def test_an_upload_and_a_download(platform, tmp_path):
    """A file there and back: bytes, digests and progress are right; an existing target keeps its mode."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(BIG)
    target.write_bytes(b"old")
    target.chmod(0o640)
    steps = []
    sent = await platform.sandbox.files.upload(source, "/up", on_progress=lambda *step: steps.append(step))
    assert platform.sandboxes.files["/up"] == BIG
    assert sent.sha256 == hashlib.sha256(BIG).hexdigest()
    assert steps[-1] == (len(BIG), len(BIG))
    assert steps == sorted(steps)
    steps.clear()
    got = await platform.sandbox.files.download("/up", target, on_progress=lambda *step: steps.append(step))
    assert target.read_bytes() == BIG
    assert (got.bytes, got.sha256) == (sent.bytes, sent.sha256)
    assert steps[-1] == (len(BIG), len(BIG))
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert names_in(tmp_path) == ["source", "target"]


async def test_open_files_and_pipes(platform):
    """From where an open file stands; from one without a size, in chunks; into one that is open."""
    source = io.BytesIO(b"skip" + BIG[:100_000])
    source.seek(4)
    await platform.sandbox.files.upload(source, "/part")
    assert platform.sandboxes.files["/part"] == BIG[:100_000]
    read, write = os.pipe()
    with os.fdopen(read, "rb") as pipe:
        os.write(write, b"through a pipe")
        os.close(write)
        assert (await platform.sandbox.files.upload(pipe, "/pipe")).bytes == 14
    sink = io.BytesIO()
    await platform.sandbox.files.download("/pipe", sink)
    assert sink.getvalue() == b"through a pipe"
    await platform.sandbox.files.upload(io.BytesIO(), "/empty")
    assert (await platform.sandbox.files.download("/empty", io.BytesIO())).bytes == 0


async def test_a_file_that_grows_or_shrinks_meanwhile(platform, tmp_path):
    """What is appended is left out; what is missing fails the upload, and the target stays as it was."""
    source = tmp_path / "log"
    source.write_bytes(BIG)
    with source.open("ab") as log:

        def append(_done, _total):
            log.write(b"more")
            log.flush()

        await platform.sandbox.files.upload(source, "/log", on_progress=append)
    assert platform.sandboxes.files["/log"] == BIG
    with pytest.raises(IntegrityError, match="changed"):
        await platform.sandbox.files.upload(source, "/log", on_progress=lambda *_: os.truncate(source, 1000))
    assert platform.sandboxes.files["/log"] == BIG


async def test_an_upload_holds_a_piece_at_a_time(platform):
    """A source of 256 MiB that nobody takes: a few pieces are read, not all of it."""
    gate = platform.streams.gates["write_stream"] = trio.Event()

    class Endless(io.RawIOBase):
        read_bytes = 0

        def read(self, size=-1):
            self.read_bytes += size
            return bytes(size) if self.read_bytes < 256 * 1024 * 1024 else b""

        def tell(self):
            raise OSError

    source = Endless()
    with trio.move_on_after(2):
        await platform.sandbox.files.upload(source, "/big")
    gate.set()
    assert 0 < source.read_bytes < 32 * 1024 * 1024


async def test_a_wrong_digest_is_noticed(platform, monkeypatch, tmp_path):
    """The server has got something else than was sent."""
    monkeypatch.setattr("capsule.http.file_streams.b64encode", lambda _: b"AAAA")
    with pytest.raises(IntegrityError):
        await platform.sandbox.files.upload(io.BytesIO(b"x"), "/x")


async def test_a_refused_upload_says_why(platform):
    """The server answers while the body is still coming."""
    platform.streams.failures["write_stream"] = server.DiskFull("no room")
    with pytest.raises(Conflict, match="disk_full"):
        await platform.sandbox.files.upload(io.BytesIO(BIG), "/x")


async def test_a_download_goes_on_where_it_broke_off(platform, tmp_path, quick):
    """Three losses: each time the rest is asked for, nothing comes twice, and the file is the file."""
    platform.sandboxes.files["/big"] = BIG
    await platform.relay.cut()
    platform.relay.allowance = [1_000_000, 2_000_000, 0]
    got = await platform.sandbox.files.download("/big", tmp_path / "big")
    assert (tmp_path / "big").read_bytes() == BIG
    assert got.sha256 == hashlib.sha256(BIG).hexdigest()
    offsets = [args[3] for name, args in platform.streams.asked if name == "read_stream" and args[3]]
    assert offsets
    assert offsets == sorted(offsets)


async def test_a_file_that_changed_comes_anew(platform, tmp_path, quick):
    """If-Range: parts of two files are never put together; into an open file that cannot be, so it fails."""
    platform.sandboxes.files["/big"] = BIG
    for target in (tmp_path / "big", io.BytesIO()):
        await platform.relay.cut()
        platform.relay.allowance = [1_000_000]
        platform.sandboxes.files["/big"] = BIG

        def change(_done, _total):
            platform.sandboxes.files["/big"] = BIG[::-1]

        if isinstance(target, io.BytesIO):
            with pytest.raises(IntegrityError):
                await platform.sandbox.files.download("/big", target, on_progress=change)
        else:
            await platform.sandbox.files.download("/big", target, on_progress=change)
            assert target.read_bytes() == BIG[::-1]


async def test_a_download_that_fails_leaves_the_old_file(platform, tmp_path, quick):
    """Without `resume`, or cancelled: the target as it was, and no temporary file."""
    platform.sandboxes.files["/big"] = BIG
    target = tmp_path / "target"
    target.write_bytes(b"old")
    await platform.relay.cut()
    platform.relay.allowance = [1_000_000]
    with pytest.raises(ConnectionLost):
        await platform.sandbox.files.download("/big", target, resume=False)
    with trio.CancelScope() as scope:
        await platform.sandbox.files.download("/big", target, on_progress=lambda *_: scope.cancel())
    assert scope.cancelled_caught
    with pytest.raises(NotFound):
        await platform.sandbox.files.download("/none", target)
    assert target.read_bytes() == b"old"
    assert names_in(tmp_path) == ["target"]


async def test_a_directory_there_and_back(platform, tmp_path):
    """Files, empty directories, links, modes and names of any kind."""
    source = tmp_path / "source"
    (source / "sub" / "empty").mkdir(parents=True)
    (source / "sub" / "big").write_bytes(BIG)
    (source / ("n" * 200 + " \u20ac\n")).write_text("odd")
    (source / "run").write_text("#!/bin/sh\n")
    (source / "run").chmod(0o755)
    (source / "sub" / "link").symlink_to("../run")
    steps = []
    await platform.sandbox.files.upload_dir(source, "/srv/in", on_progress=lambda *step: steps.append(step))
    assert steps[-1][0] >= len(BIG)
    packed = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(platform.streams.archives["/srv/in"])) as sent:
        assert all((one.uid, one.uname) == (0, "") for one in sent)
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for member in sent:
                content = sent.extractfile(member) if member.isreg() else None
                member.name, member.pax_headers = f"in/{member.name}", {}
                archive.addfile(member, content)
    platform.streams.archives["/srv/in"] = packed.getvalue()
    target = tmp_path / "target"
    got = await platform.sandbox.files.download_dir("/srv/in", target)
    assert got.skipped == ()
    assert _tree(target) == _tree(source)
    with pytest.raises(FileExistsError):
        await platform.sandbox.files.download_dir("/srv/in", target)


def _tree(root):
    found = {}
    for path in sorted(root.rglob("*")):
        kind = path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else "directory"
        found[path.relative_to(root).as_posix()] = (kind, path.lstat().st_mode & 0o700)
    return found


async def test_a_directory_that_cannot_be_read_or_sent(platform, tmp_path):
    """What is wrong on either side is raised as it is, and no thread is left waiting."""
    with pytest.raises(FileNotFoundError):
        await platform.sandbox.files.upload_dir(tmp_path / "none", "/x")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "big").write_bytes(BIG)
    platform.streams.failures["write_archive"] = server.DiskFull("no room")
    with pytest.raises(ApiError, match="disk_full"):
        await platform.sandbox.files.upload_dir(tmp_path / "source", "/x")


async def test_a_directory_that_breaks_off_does_not_appear(platform, tmp_path, quick):
    """A lost connection and a cut archive: no target, no temporary directory."""
    archive = _archive([("d/big", BIG)])
    platform.streams.archives["/d"] = archive
    await platform.relay.cut()
    platform.relay.allowance = [1_000_000]
    with pytest.raises(ConnectionLost):
        await platform.sandbox.files.download_dir("/d", tmp_path / "d")
    platform.streams.archives["/d"] = archive[:1_000_000]
    with pytest.raises(IntegrityError):
        await platform.sandbox.files.download_dir("/d", tmp_path / "d")
    assert names_in(tmp_path) == []


def _archive(members):
    """(name, bytes | ("symlink" | "hardlink", to) | "directory" | "fifo")."""
    packed = io.BytesIO()
    kinds = {"symlink": tarfile.SYMTYPE, "hardlink": tarfile.LNKTYPE}
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, what in members:
            member = tarfile.TarInfo(name)
            if isinstance(what, bytes):
                member.size = len(what)
            elif isinstance(what, tuple):
                member.type, member.linkname = kinds[what[0]], what[1]
            else:
                member.type = tarfile.DIRTYPE if what == "directory" else tarfile.FIFOTYPE
            archive.addfile(member, io.BytesIO(what) if isinstance(what, bytes) else None)
    return packed.getvalue()


def _unpack(members, target):
    target.mkdir(parents=True)
    return archives.unpack(io.BytesIO(_archive(members)), "d", target)


HOSTILE = [
    [("../evil", b"x")],
    [("/tmp/evil", b"x")],
    [("d/../../evil", b"x")],
    [("other/evil", b"x")],
    [("d/out", ("symlink", "..")), ("d/out/evil", b"x")],
    [("d/out", ("symlink", "/")), ("d/out/evil", b"x")],
    [("d/p/q/r/s", ("symlink", "../../..")), ("d/t", ("symlink", "p/q/r/s/../.."))],
    [("d/a/b", ("symlink", "..")), ("d/a/b/c", ("symlink", "../.."))],
    [("d/a/c", ("symlink", "../..")), ("d/a", ("symlink", "."))],
    [("d/secret", ("hardlink", "d/../../secret"))],
    [("d/secret", ("hardlink", "/etc/passwd"))],
    [("d/pipe", "fifo")],
]


@pytest.mark.parametrize("members", HOSTILE)
def test_nothing_gets_out_of_the_directory(tmp_path, members):
    """Hostile names and links are left out and named, or lead nowhere but inside."""
    (tmp_path / "secret").write_text("secret")
    target = tmp_path / "in" / "side"
    skipped = _unpack(members, target)
    _check_inside(tmp_path, target)
    assert skipped or list(target.rglob("evil"))
    assert not (target / "secret").exists()


def _check_inside(outside, target):
    assert set(names_in(outside)) <= {"in", "secret"}
    assert names_in(outside / "in") == ["side"]
    for path in target.rglob("*"):
        assert Path(os.path.realpath(path)).is_relative_to(target.resolve()), path


names = st.lists(st.sampled_from(["a", "b", "c", "..", "."]), min_size=1, max_size=5).map("/".join)
kinds = st.one_of(
    st.just(b"x"), st.just("directory"), st.tuples(st.sampled_from(["symlink", "hardlink"]), names.map(str))
)


@settings(max_examples=300, deadline=None)
@given(members=st.lists(st.tuples(names, kinds), max_size=8))
def test_no_combination_gets_out(tmp_path_factory, members):
    """Any archive of these: what is unpacked, and what its links lead to, is inside, or it fails as a broken one."""
    outside = tmp_path_factory.mktemp("x")
    target = outside / "in" / "side"
    linked = [(f"d/{name}", (k[0], f"d/{k[1]}") if k[0] == "hardlink" else k) for name, k in members]
    with contextlib.suppress(OSError):
        _unpack(linked, target)
    _check_inside(outside, target)


def test_a_header_does_not_fill_the_memory(tmp_path):
    """An extended header that says it has a gigabyte is refused before it is read."""
    member = tarfile.TarInfo("x")
    member.type, member.size = tarfile.XHDTYPE, 2**30
    with pytest.raises(IntegrityError, match="header"):
        archives.unpack(io.BytesIO(member.tobuf() + bytes(4096)), "d", tmp_path)
