"""files.read and files.stat."""

from __future__ import annotations

import os
import socket

import pytest

from agent.wire.messages import Cancel, Credit, Data


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 3 << 20])
def test_whole_files(client, tmp_path, size):
    """The notice tells the size, the content follows, the reply tells it again."""
    path = tmp_path / "file"
    path.write_bytes(os.urandom(size))
    outcome = client.call("files.read", {"path": str(path)})
    status = path.stat()
    version = {"file_size": size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}
    assert outcome.notices == [{"size": size, **version}]
    assert outcome.content == path.read_bytes()
    assert outcome.reply == {"size": size}


@pytest.mark.parametrize(
    ("offset", "length", "expected"),
    [(0, 3, b"012"), (4, None, b"456789"), (4, 2, b"45"), (8, 100, b"89"), (10, 5, b""), (99, None, b""), (3, 0, b"")],
)
def test_ranges(client, tmp_path, offset, length, expected):
    """offset and length; beyond the end there is nothing. The notice is the size of what comes."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    body = {"path": str(path), "offset": offset} | ({} if length is None else {"length": length})
    outcome = client.call("files.read", body)
    (notice,) = outcome.notices
    assert (outcome.content, notice["size"], notice["file_size"]) == (expected, len(expected), 10)


def test_ranges_of_more_than_4_gib(client, tmp_path):
    """Offsets and sizes have 64 bits."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(6 << 30)
        file.seek(5 << 30)
        file.write(b"here")
    outcome = client.call("files.read", {"path": str(path), "offset": (5 << 30) - 2, "length": 8})
    assert outcome.content == b"\0\0here\0\0"
    assert outcome.notices[0]["file_size"] == 6 << 30
    outcome = client.call("files.read", {"path": str(path), "offset": (6 << 30) - 1})
    assert (outcome.content, outcome.reply) == (b"\0", {"size": 1})
    outcome = client.call("files.read", {"path": str(path), "offset": 2**63 - 1, "length": 2**63 - 1})
    assert (outcome.content, outcome.fault) == (b"", None)


def test_nothing_of_a_file(client, tmp_path):
    """A length of 0 asks what there is; of an empty file only a look at it tells that it is empty."""
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    outcome = client.call("files.read", {"path": str(path), "length": 0})
    assert (outcome.content, outcome.notices[0]["file_size"]) == (b"", 10)
    path.write_bytes(b"")
    assert client.call("files.read", {"path": str(path)}).notices[0]["file_size"] == 0
    for body in ({"length": 0}, {"offset": 3}):
        assert client.call("files.read", {"path": str(path), **body}).notices == [{"size": 0}]
    assert client.call("files.read", {"path": "/proc/version", "offset": 10**6}).notices == [{"size": 0}]


def test_a_version_is_another_when_the_file_is(client, tmp_path):
    """Written in place, or replaced by one of the same size."""
    path = tmp_path / "file"
    versions = set()
    for content in (b"one", b"two"):
        path.write_bytes(content)
        os.utime(path, ns=(1, 1_600_000_000_000_000_000 + content[0]))
        versions.add(tuple(sorted(client.call("files.read", {"path": str(path)}).notices[0].items())))
    client.upload({"path": str(path)}, b"six")
    os.utime(path, ns=(1, 1_600_000_000_000_000_000 + b"two"[0]))
    versions.add(tuple(sorted(client.call("files.read", {"path": str(path)}).notices[0].items())))
    assert len(versions) == 3


def test_procfs_files_have_their_true_size(client):
    """They say 0, and are read ahead."""
    outcome = client.call("files.read", {"path": "/proc/version"})
    assert outcome.content.startswith(b"Linux version")
    assert outcome.notices == [{"size": len(outcome.content)}]
    assert client.call("files.read", {"path": "/proc/version", "length": 5}).content == b"Linux"
    assert client.call("files.read", {"path": "/proc/version", "offset": 6, "length": 7}).content == b"version"


def test_a_long_procfs_file_comes_without_a_size(client):
    """More than 64 KiB of a file that says 0: the end is known at the end."""
    outcome = client.call("files.read", {"path": "/proc/kallsyms"})
    if len(outcome.content) <= 65536:
        pytest.skip("this kernel hides its symbols")
    assert outcome.notices == [{}]
    assert outcome.reply == {"size": len(outcome.content)}


def test_links_are_followed(client, tmp_path):
    """A link's content is its target's."""
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to("file")
    assert client.call("files.read", {"path": str(tmp_path / "link")}).content == b"x"


def test_what_is_no_regular_file(client, tmp_path):
    """A FIFO without a writer and a socket answer at once; devices are not opened."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        cases = {
            tmp_path: "is_a_directory",
            tmp_path / "fifo": "not_a_file",
            tmp_path / "socket": "not_a_file",
            "/dev/zero": "not_a_file",
            tmp_path / "nothing": "not_found",
            "/etc/passwd/x": "not_found",
            tmp_path / "loop": "invalid_argument",
        }
        for path, fault in cases.items():
            outcome = client.call("files.read", {"path": str(path)})
            assert (outcome.fault, outcome.notices) == (fault, []), path


@pytest.mark.parametrize(
    "path",
    ["", "relative", "../etc/passwd", "/tmp/../etc", "/..", "/a/..", "/a\0b", "/" + "x" * 4096, 5, None, b"/tmp"],
)
@pytest.mark.parametrize("method", ["read", "write", "list", "stat", "mkdir", "remove", "watch"])
def test_paths_must_be_plain(client, method, path):
    """Absolute, at most 4096 bytes, no NUL, no '..' component: for every method."""
    assert client.call(f"files.{method}", {"path": path}).fault == "invalid_argument"


def test_dots_that_are_no_traversal(client, tmp_path):
    """Names that begin with dots, double slashes and '.' are fine; the entry shows the plain path."""
    (tmp_path / "..hidden").write_bytes(b"x")
    path = f"/{tmp_path}//.//..hidden/"
    assert client.call("files.stat", {"path": path}).reply["entry"]["path"] == f"{tmp_path}/..hidden"


@pytest.mark.parametrize(
    "more", [{"offset": -1}, {"length": -1}, {"offset": "0"}, {"offset": 2**63}, {"length": 1.0}, {"mode": 0o10000}]
)
def test_wrong_numbers(client, more):
    """Refused, whatever the method would do with them."""
    assert client.call("files.read", {"path": "/etc/passwd", **more}).fault == "invalid_argument"


def test_a_file_that_shrinks_is_a_fault_not_a_short_success(guest, tmp_path):
    """The size was promised; half a file must never look whole."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * (4 << 20))
    client = guest.connect(initial_credit=1024)
    stream = client.open("files.read", {"path": str(path)})
    assert client.notice(stream)["size"] == 4 << 20
    first = client.stream_frame(stream)
    assert isinstance(first, Data)
    os.truncate(path, 100)
    client.send(Credit(stream, len(first.data)))
    outcome = client.finish(stream)
    assert outcome.fault == "io_error"


def test_cancel_of_a_read(client, tmp_path):
    """The worker goes with it."""
    path = tmp_path / "file"
    os.truncate(os.open(path, os.O_CREAT | os.O_RDWR), 1 << 30)
    stream = client.open("files.read", {"path": str(path)})
    client.notice(stream)
    client.send(Cancel(stream))
    assert client.finish(stream).fault == "cancelled"


def test_stat(client, tmp_path):
    """Every field, of the link itself."""
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    path.chmod(0o4751)
    os.utime(path, ns=(1, 1_600_000_000_123_456_789))
    (tmp_path / "link").symlink_to("fi\udcffle")
    status = path.stat()
    entry = client.call("files.stat", {"path": str(path)}).reply["entry"]
    assert entry.pop("owner").isalnum()
    assert entry.pop("group").isalnum()
    assert entry == {
        "name": "file",
        "path": str(path),
        "type": "file",
        "size": 5,
        "mode": 0o4751,
        "uid": status.st_uid,
        "gid": status.st_gid,
        "mtime_ns": 1_600_000_000_123_456_789,
    }
    link = client.call("files.stat", {"path": str(tmp_path / "link")}).reply["entry"]
    assert (link["type"], link["symlink_target"]) == ("symlink", "fi\ufffdle")
    assert client.call("files.stat", {"path": "/"}).reply["entry"]["name"] == "/"
    assert client.call("files.stat", {"path": "/dev/null"}).reply["entry"]["type"] == "other"
    assert client.call("files.stat", {"path": str(tmp_path / "no")}).fault == "not_found"
    assert client.call("files.stat", {"path": str(path / "no")}).fault == "not_found"
