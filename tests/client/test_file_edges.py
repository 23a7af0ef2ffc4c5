"""Files at their edges: what a sandbox packs to do harm, names and modes, answers that are short or packed."""

from __future__ import annotations

import io
import os
import stat
import tarfile

import httpx
import pytest

from capsule import errors as server
from capsule.client import CapsuleError, ConnectionLost, IntegrityError, TrioClient, archives

SANDBOX = {
    "id": "sb-1", "status": "running", "template": "minimal", "vcpus": 1, "memory_mb": 1, "disk_mb": 1,
    "timeout_sec": 0, "created_at": "2026-01-02T03:04:05Z", "last_updated": "2026-01-02T03:04:05Z",
}  # fmt: skip


def header(name, kind=tarfile.REGTYPE, **fields):
    member = tarfile.TarInfo(name)
    member.type = kind
    for field, value in fields.items():
        setattr(member, field, value)
    return member.tobuf(tarfile.PAX_FORMAT)


def unpack(data, target):
    return archives.unpack(io.BytesIO(data + bytes(10240)), "d", target)


@pytest.fixture
def umask():
    """Everything new is for its owner alone."""
    before = os.umask(0o077)
    yield
    os.umask(before)


def test_the_umask_holds_for_what_is_unpacked(tmp_path, umask):
    """Whatever modes the sandbox's files have; a private directory stays so without it, too."""
    unpack(header("d", tarfile.DIRTYPE, mode=0o777) + header("d/f", mode=0o6777), tmp_path)
    unpack(header("d/e/f", mode=0o777) + header("d/e", tarfile.DIRTYPE, mode=0o777), tmp_path)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")} == {0o700}


def test_modes_are_never_wider_than_ours(tmp_path):
    """Not writable to all; and what is private there is private here, also if its content came first."""
    data = header("d/open/f", mode=0o777) + header("d/open", tarfile.DIRTYPE, mode=0o777)
    unpack(data + header("d/own/f", mode=0o640) + header("d/own", tarfile.DIRTYPE, mode=0o700), tmp_path)
    assert not any(path.stat().st_mode & 0o022 for path in tmp_path.rglob("*"))
    assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == 0o700


@pytest.mark.parametrize("mtime", [2**62, -(2**62), float("inf"), float("nan")])
def test_a_time_that_there_is_not(tmp_path, mtime):
    """The file comes all the same."""
    assert unpack(header("d/f", mtime=0, pax_headers={"mtime": str(mtime)}), tmp_path) == []
    assert (tmp_path / "f").exists()


def test_a_hard_link_to_itself(tmp_path):
    """It is there already."""
    assert unpack(header("d/f") + header("d/f", tarfile.LNKTYPE, linkname="d/f"), tmp_path) == []
    assert (tmp_path / "f").exists()


@pytest.mark.parametrize(
    "data",
    [
        header("x", tarfile.XGLTYPE, size=512) + bytes(512),
        header("d/f", tarfile.GNUTYPE_SPARSE, size=512),
        header("d/f", size=512, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + b"9" * 512 * 1000,
        header("x", tarfile.GNUTYPE_LONGNAME, size=1) + b"x" + bytes(511),
    ],
    ids=["global headers", "a sparse file", "a sparse file in pax", "headers upon headers"],
)
def test_what_grows_without_bounds_is_refused(tmp_path, data):
    """A small archive must not fill memory or disk."""
    many = data * 2000 if b"././@LongLink" not in data and len(data) == 1024 else data
    with pytest.raises(IntegrityError):
        unpack(many, tmp_path)
    assert not any(tmp_path.iterdir())


def test_holes_of_older_pax_are_left_out(tmp_path):
    """An exabyte of nothing is not written."""
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(2**60), "GNU.sparse.numblocks": "1"}
    assert unpack(header("d/f", size=512, pax_headers=sparse) + bytes(512), tmp_path) == ["d/f"]


async def test_a_long_name_in_another_script(platform, tmp_path):
    """255 bytes are 85 letters there; the temporary name has to fit, too."""
    name = "\u4e2d" * 85
    platform.sandboxes.files["/x"] = b"x"
    platform.streams.archives["/d"] = header("d", tarfile.DIRTYPE) + bytes(10240)
    await platform.sandbox.files.download("/x", tmp_path / name)
    assert (tmp_path / name).read_bytes() == b"x"
    (tmp_path / name).unlink()
    await platform.sandbox.files.download_dir("/d", tmp_path / name)


async def test_a_private_target_is_private_at_every_moment(platform, tmp_path):
    """The temporary file never has more rights than the file that it replaces."""
    platform.sandboxes.files["/x"] = os.urandom(300_000)
    target = tmp_path / "target"
    target.write_text("old")
    target.chmod(0o600)
    modes = []
    original = os.open

    def opened(path, flags, mode=0o777, **how):
        modes.append(mode)
        return original(path, flags, mode, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "open", opened)
        await platform.sandbox.files.download("/x", target)
    assert modes[0] == 0o600
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


async def test_a_file_that_does_not_say_its_size(platform, tmp_path):
    """/proc has files of 0 bytes that are not empty."""
    await platform.sandbox.files.upload("/proc/version", "/version")
    assert platform.sandboxes.files["/version"].startswith(b"Linux")


async def test_a_download_waits_for_a_host_that_goes_away_for_a_moment(platform, tmp_path, quick):
    """It had begun: 503 is no end then."""
    content = os.urandom(3_000_000)
    platform.sandboxes.files["/x"] = content
    original, reads = platform.streams._enter, []

    async def enter(name, *arguments):
        if name == "read_stream":
            reads.append(name)
            if len(reads) == 2:
                raise server.HostUnavailable("not now")
        await original(name, *arguments)

    platform.streams._enter = enter
    await platform.relay.cut()
    platform.relay.allowance = [1_000_000]
    await platform.sandbox.files.download("/x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == content
    assert len(reads) == 3


class Played(httpx.AsyncBaseTransport):
    """Answers as they are, unread."""

    def __init__(self, answers):
        self.answers = answers

    async def handle_async_request(self, request):
        return self.answers.pop(0)


async def _played(answers, action):
    async with TrioClient("http://127.0.0.1:1", "cap_" + "0" * 40) as client:
        client._transport._client._transport = Played(answers)
        sandbox = await client.sandboxes.get("sb-1")
        return await action(sandbox.files)


async def test_a_range_that_is_cut_short_is_no_whole_file(tmp_path, quick):
    """A server may give less than the range it was asked for; the rest is asked for again."""
    whole = {"ETag": '"1"', "Content-Length": "6"}

    async def broken():
        yield b"ab"
        raise httpx.ReadError("cut")

    def ranged(start, data):
        return httpx.Response(
            206, headers={"Content-Range": f"bytes {start}-{start + len(data) - 1}/6"}, stream=httpx.ByteStream(data)
        )

    answers = [httpx.Response(200, json=SANDBOX), httpx.Response(200, headers=whole, content=broken())]
    answers += [ranged(2, b"cd"), ranged(4, b"ef")]
    await _played(answers, lambda files: files.download("/x", tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == b"abcdef"


async def test_a_proxy_that_packs_is_named(tmp_path):
    """Instead of a file that is something else."""
    answers = [
        httpx.Response(200, json=SANDBOX),
        httpx.Response(200, headers={"Content-Encoding": "gzip"}, stream=httpx.ByteStream(b"\x1f\x8b")),
    ]
    with pytest.raises(CapsuleError, match="packs") as caught:
        await _played(answers, lambda files: files.download("/x", tmp_path / "x"))
    assert not isinstance(caught.value, ConnectionLost)
    assert not any(tmp_path.iterdir())
