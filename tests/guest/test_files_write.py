"""files.write: whole or not at all."""

from __future__ import annotations

import os

import pytest

from agent.wire.messages import Cancel, Data, End


def leftovers(directory):
    return list(directory.rglob(".capsule-*"))


def begin(client, until, path, **more):
    """An upload in the middle: its stream, with the temporary file already there."""
    stream = client.open("files.write", {"path": str(path), **more})
    client.send(Data(stream, 0, b"half"))
    until(lambda: leftovers(path.parent), "the temporary file is there")
    return stream


@pytest.mark.parametrize("size", [0, 1, 65536, (5 << 20) + 7])
def test_content_arrives_whole(client, tmp_path, size):
    """Also empty, also larger than the credit window; the reply is the entry."""
    content = os.urandom(size)
    outcome = client.upload({"path": str(tmp_path / "file"), "size": size}, content)
    assert outcome.reply["entry"]["size"] == size
    assert outcome.reply["entry"]["path"] == str(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == content
    assert (tmp_path / "file").stat().st_mode & 0o7777 == 0o644
    assert leftovers(tmp_path) == []


def test_parents_are_made(client, tmp_path):
    """As 0755."""
    assert client.upload({"path": str(tmp_path / "a/b/c")}, b"x").reply
    assert (tmp_path / "a/b/c").read_bytes() == b"x"
    assert (tmp_path / "a/b").stat().st_mode & 0o7777 == 0o755


def test_mode_of_a_new_file(client, tmp_path):
    """As asked; the umask has no say."""
    client.upload({"path": str(tmp_path / "run"), "mode": 0o777}, b"#!/bin/sh\n")
    assert (tmp_path / "run").stat().st_mode & 0o7777 == 0o777


def test_an_existing_file_keeps_mode_and_owner(client, tmp_path):
    """Whatever mode the request names."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    path.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    before = path.stat()
    assert client.upload({"path": str(path), "mode": 0o777}, b"new").reply
    after = path.stat()
    assert path.read_bytes() == b"new"
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_link_is_written_through(client, tmp_path):
    """The target changes, the link stays; also when the target is not there yet."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real/file").write_bytes(b"old")
    (tmp_path / "direct").symlink_to("real/file")
    (tmp_path / "via").symlink_to(tmp_path / "direct")
    (tmp_path / "dangling").symlink_to("real/new")
    assert client.upload({"path": str(tmp_path / "via")}, b"new").reply["entry"]["path"] == str(tmp_path / "real/file")
    assert client.upload({"path": str(tmp_path / "dangling")}, b"born").reply
    assert (tmp_path / "real/file").read_bytes() == b"new"
    assert (tmp_path / "real/new").read_bytes() == b"born"
    assert (tmp_path / "via").is_symlink()
    assert (tmp_path / "dangling").is_symlink()
    assert leftovers(tmp_path) == []


def test_a_reader_never_sees_half(client, until, tmp_path):
    """Until END has come the old file is what there is."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    stream = begin(client, until, path)
    assert path.read_bytes() == b"old"
    client.send(End(stream))
    assert client.finish(stream).reply
    assert path.read_bytes() == b"half"


@pytest.mark.parametrize("size", [0, 3, 5, 100])
def test_a_size_that_does_not_match(client, tmp_path, size):
    """Too much or too little: the old file stays."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    assert client.upload({"path": str(path), "size": size}, b"four").fault == "size_mismatch"
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []


def test_cancel_leaves_the_old_file(client, until, tmp_path):
    """And no temporary file."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    stream = begin(client, until, path)
    client.send(Cancel(stream))
    assert client.finish(stream).fault == "cancelled"
    until(lambda: not leftovers(tmp_path), "the temporary file is gone")
    assert path.read_bytes() == b"old"


def test_a_deadline_leaves_the_old_file(client, until, tmp_path):
    """The upload that hangs."""
    path = tmp_path / "file"
    stream = client.open("files.write", {"path": str(path)}, timeout_ms=200)
    client.send(Data(stream, 0, b"half"))
    assert client.finish(stream).fault == "deadline_exceeded"
    until(lambda: not leftovers(tmp_path), "the temporary file is gone")
    assert not path.exists()


def test_a_lost_connection_leaves_the_old_file(guest, until, tmp_path):
    """Every point of the upload at which it may be lost, many times over."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    for chunks in range(30):
        client = guest.connect()
        stream = client.open("files.write", {"path": str(path)})
        client.send(*[Data(stream, 0, b"x" * 1000)] * chunks)
        client.close()
    until(lambda: guest.children() == {} and not leftovers(tmp_path), "workers and temporary files are gone")
    assert path.read_bytes() == b"old"


def test_a_killed_worker_leaves_the_old_file(guest, client, until, tmp_path):
    """By the OOM killer, say: a FAULT, and the loop cleans up."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    stream = begin(client, until, path)
    (worker,) = guest.children()
    os.kill(worker, 9)
    assert client.finish(stream).fault == "internal"
    until(lambda: not leftovers(tmp_path), "the temporary file is gone")
    assert path.read_bytes() == b"old"


def test_the_daemons_death_is_no_end_of_the_content(start_guest, until, running, tmp_path):
    """The worker's pipe ends too, but nobody said that the content was whole."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    guest = start_guest()
    begin(guest.connect(), until, path)
    (worker,) = guest.children()
    guest.process.kill()
    guest.process.wait(timeout=10)
    until(lambda: not running(worker), "the worker has ended")
    assert path.read_bytes() == b"old"
    assert leftovers(tmp_path) == []
    guest.process.returncode = 0
    guest.ended = True


def test_what_cannot_be_written(client, tmp_path):
    """Each with its own fault, nothing left behind."""
    (tmp_path / "dir").mkdir()
    (tmp_path / "file").write_bytes(b"")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    cases = {
        "/": "is_a_directory",
        str(tmp_path / "dir"): "is_a_directory",
        str(tmp_path / "dir") + "/": "is_a_directory",
        str(tmp_path / "fifo"): "not_a_file",
        "/dev/null": "not_a_file",
        str(tmp_path / "file/below"): "not_a_directory",
        str(tmp_path / "loop"): "invalid_argument",
        str(tmp_path / ("n" * 256)): "invalid_argument",
        "/proc/capsule": "not_found",
    }
    for path, fault in cases.items():
        assert client.upload({"path": path}, b"x").fault == fault, path
    assert leftovers(tmp_path) == []


@pytest.mark.host
@pytest.mark.skipif(os.geteuid() != 0, reason="needs mount")
def test_a_full_disk(start_guest, tmp_path):
    """disk_full, early, and the disk is as it was."""
    mount = f'mount -t tmpfs -o size=1m tmpfs {tmp_path} && exec "$@"'
    guest = start_guest(prefix=("unshare", "-m", "sh", "-c", mount, "sh"))
    client = guest.connect()
    path = str(tmp_path / "file")
    assert client.upload({"path": path}, b"old").reply
    assert client.upload({"path": path}, b"x" * (8 << 20)).fault == "disk_full"
    assert client.call("files.read", {"path": path}).content == b"old"
    assert client.call("files.list", {"path": str(tmp_path)}).reply == {"count": 1}


def test_operations_have_a_limit(client, tmp_path):
    """320 at once; then busy."""
    streams = [client.open("files.write", {"path": str(tmp_path / str(i))}) for i in range(320)]
    assert client.call("files.stat", {"path": "/"}).fault == "busy"
    client.send(*[End(stream) for stream in streams])
    assert all(client.finish(stream).reply for stream in streams)
    assert len(list(tmp_path.iterdir())) == 320
