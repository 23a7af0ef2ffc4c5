"""files.watch: every kind of event, trees that grow while they are looked at, and ends."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from agent.wire.messages import Cancel, Credit, Data, End, Failure, Reply

PATIENCE = 20.0


class Watch:
    """A watch that a client has open, and what it has told."""

    def __init__(self, client, path, *, recursive=False):
        self.client = client
        self.root = Path(path)
        self.stream = client.open("files.watch", {"path": str(path), "recursive": recursive})
        self.events = []
        self.overflow = False
        self.reply = self.fault = None
        assert self.take() == {}, (self.reply, self.fault)

    def take(self, timeout=PATIENCE):
        """The next notice; None for the last frame."""
        frame = self.client.stream_frame(self.stream, timeout)
        match frame:
            case Data(data=data):
                self.client.send(Credit(self.stream, len(data)))
                notice = msgspec.msgpack.decode(data)
                self.events += notice.get("events", [])
                self.overflow |= notice.get("overflow", False)
                return notice
            case Reply(body=body):
                self.reply = body
            case Failure(code=code):
                self.fault = code
        return None

    def told(self):
        """(kind, path below the root, where to) of everything so far."""
        short = lambda path: None if path is None else os.path.relpath(path, self.root)  # noqa: E731
        return [(one["event"], short(one["path"]), short(one.get("to"))) for one in self.events]

    def until(self, *expected):
        """Take notices until all of these were told."""
        deadline = time.monotonic() + PATIENCE
        wanted = [one if len(one) == 3 else (*one, None) for one in expected]
        while not set(wanted) <= set(self.told()):
            assert time.monotonic() < deadline, (wanted, self.told())
            assert self.take() is not None, (self.reply, self.fault, self.told())
        return self.told()

    def settle(self):
        """Everything that was done before has been told after this."""
        marker = self.root / f"marker-{len(self.events)}"
        marker.touch()
        self.until(("create", marker.name))
        marker.unlink()
        return [one for one in self.told() if not one[1].startswith("marker")]


def test_every_kind(client, tmp_path):
    """Create, write, chmod, rename, remove; of files and directories, with whole paths."""
    watch = Watch(client, tmp_path)
    file, other = tmp_path / "file", tmp_path / "other"
    file.touch()
    watch.until(("create", "file"))
    file.write_bytes(b"x")
    watch.until(("write", "file"))
    file.chmod(0o600)
    watch.until(("chmod", "file"))
    file.rename(other)
    watch.until(("rename", "file", "other"))
    other.unlink()
    watch.until(("remove", "other"))
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory").rmdir()
    watch.until(("create", "directory"), ("remove", "directory"))
    assert watch.events[0] == {"event": "create", "path": str(file), "directory": False}
    assert [one["directory"] for one in watch.events[-2:]] == [True, True]


def test_not_recursive(client, tmp_path):
    """What is inside a directory is nobody's business then."""
    (tmp_path / "directory").mkdir()
    watch = Watch(client, tmp_path)
    (tmp_path / "directory" / "file").touch()
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    assert watch.settle()[:1] == [("create", "new", None)]
    assert not [one for one in watch.told() if "/" in one[1]]


def test_one_file(client, tmp_path):
    """Its own path; replaced or removed, it is gone."""
    file = tmp_path / "file"
    file.touch()
    for end in (file.unlink, lambda: (tmp_path / "new").rename(file), lambda: file.rename(tmp_path / "away")):
        file.touch()
        (tmp_path / "new").touch()
        watch = Watch(client, file)
        file.write_bytes(b"x")
        file.chmod(0o600)
        watch.until(("write", "."), ("chmod", "."))
        end()
        while watch.take() is not None:
            pass
        assert watch.reply == {"reason": "removed"}


def test_moves_across_the_border(client, tmp_path):
    """Moved out is removed, moved in is created, with all that is in it."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "a" / "b").mkdir(parents=True)
    (inside / "a" / "b" / "file").touch()
    outside.mkdir()
    watch = Watch(client, inside, recursive=True)
    (inside / "a").rename(outside / "a")
    watch.until(("remove", "a"))
    (outside / "a" / "b" / "other").touch()
    assert watch.settle() == [("remove", "a", None)]
    (outside / "a").rename(inside / "c")
    told = watch.until(("create", "c/b/other"))
    assert {("create", "c", None), ("create", "c/b", None), ("create", "c/b/file", None)} <= set(told)
    (inside / "c" / "b" / "file").write_bytes(b"x")
    watch.until(("write", "c/b/file"))


def test_renames_within_a_tree(client, tmp_path):
    """One event, of a directory, too; then everything below it has its new path."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "d").mkdir()
    watch = Watch(client, tmp_path, recursive=True)
    (tmp_path / "a").rename(tmp_path / "d" / "c")
    watch.until(("rename", "a", "d/c"))
    (tmp_path / "d" / "c" / "b" / "file").touch()
    watch.until(("create", "d/c/b/file"))
    (tmp_path / "d" / "c" / "b" / "file").rename(tmp_path / "file")
    watch.until(("rename", "d/c/b/file", "file"))
    assert len(watch.told()) == 3


def test_directories_that_change_places(client, tmp_path):
    """RENAME_EXCHANGE, and a directory that takes an empty one's place: later events have the right paths."""
    for name in ("a", "b", "empty"):
        (tmp_path / name).mkdir()
    watch = Watch(client, tmp_path, recursive=True)
    code = "import ctypes,sys; sys.exit(ctypes.CDLL(None).renameat2(-100, b'a', -100, b'b', 2))"
    for turn in ("1", "2"):
        if subprocess.run(["python3", "-c", code], cwd=tmp_path, check=False).returncode != 0:
            break  # a file system that cannot
        for name in ("a", "b"):
            (tmp_path / name / turn).touch()
        watch.until(("rename", "a", "b"), ("rename", "b", "a"), ("create", f"a/{turn}"), ("create", f"b/{turn}"))
    (tmp_path / "a").rename(tmp_path / "empty")
    watch.until(("rename", "a", "empty"))
    (tmp_path / "empty" / "x").touch()
    (tmp_path / "b" / "y").touch()
    watch.until(("create", "empty/x"), ("create", "b/y"))


def test_nothing_is_missed_in_a_tree_that_grows(client, tmp_path):
    """Files appear in directories before anybody can watch those: each is told, once."""
    watch = Watch(client, tmp_path, recursive=True)
    made = set()
    for number in range(60):
        deep = tmp_path / f"d{number}" / "x" / "y"
        deep.mkdir(parents=True)
        for name in ("1", "2"):
            (deep / name).touch()
            made.add(("create", f"d{number}/x/y/{name}", None))
        (deep.parent / "3").touch()
        made.add(("create", f"d{number}/x/3", None))
    told = [one for one in watch.until(*made) if one[0] == "create"]
    assert len(told) == len(set(told))


def test_a_tree_that_is_there_is_not_told(client, tmp_path):
    """Only what changes is; it is watched to its bottom before the watch has begun."""
    deep = tmp_path.joinpath(*("d" * 50))
    deep.mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path)
    watch = Watch(client, tmp_path, recursive=True)
    assert watch.events == []
    (deep / "file").touch()
    assert watch.settle() == [("create", "/".join("d" * 50) + "/file", None)]


def test_a_tree_that_goes(client, tmp_path):
    """Every removal is told, and what comes back is watched anew."""
    for _ in range(2):
        (tmp_path / "a" / "b").mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / "b" / "file").touch()
    watch = Watch(client, tmp_path, recursive=True)
    shutil.rmtree(tmp_path / "a")
    watch.until(("remove", "a"), ("remove", "a/b"), ("remove", "a/b/file"))
    (tmp_path / "a" / "b").mkdir(parents=True)
    watch.until(("create", "a"), ("create", "a/b"))
    (tmp_path / "a" / "b" / "again").touch()
    watch.until(("create", "a/b/again"))


def test_odd_names(client, tmp_path):
    """Whatever Linux takes for a name; what is not UTF-8 is replaced, as everywhere."""
    watch = Watch(client, tmp_path, recursive=True)
    for name in ("ä€𝄞", "new\nline", "-n", "x" * 255):
        (tmp_path / name).touch()
        watch.until(("create", name))
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).touch()
    watch.until(("create", "\ufffd"))


def test_many_writes_are_few_events(client, tmp_path):
    """What happens again and again between two batches is told once."""
    watch = Watch(client, tmp_path)
    with (tmp_path / "file").open("wb", buffering=0) as file:
        for _ in range(5000):
            file.write(b"x")
    assert len(watch.settle()) < 500


def test_end(client, tmp_path):
    """Replied to; what was sent as content does no harm."""
    watch = Watch(client, tmp_path)
    client.send(Data(watch.stream, 0, b"x" * 10_000), End(watch.stream))
    while watch.take() is not None:
        pass
    assert watch.reply == {"reason": "ended"}


def test_cancel(client, guest, tmp_path, until):
    """The worker goes."""
    watch = Watch(client, tmp_path)
    assert len(guest.children()) == 1
    client.send(Cancel(watch.stream))
    while watch.take() is not None:
        pass
    assert watch.fault == "cancelled"
    until(lambda: not guest.children(), "the worker is gone")


def test_a_connection_that_is_lost(guest, tmp_path, until):
    """Likewise."""
    client = guest.connect()
    Watch(client, tmp_path)
    client.close()
    until(lambda: not guest.children(), "the worker is gone")


@pytest.mark.parametrize("recursive", [False, True])
def test_what_is_watched_goes(client, tmp_path, recursive):
    """Removed or moved: the last events, then the end."""
    for end in (shutil.rmtree, lambda path: path.rename(path.with_name("away"))):
        root = tmp_path / "root"
        (root / "sub").mkdir(parents=True)
        watch = Watch(client, root, recursive=recursive)
        end(root)
        while watch.take() is not None:
            pass
        assert watch.reply == {"reason": "removed"}
        if end is shutil.rmtree:
            assert ("remove", "sub", None) in watch.told()


def test_what_cannot_be_watched(client, tmp_path):
    """Typed, before it begins."""
    (tmp_path / "file").touch()
    for path, fault in {
        tmp_path / "none": "not_found",
        tmp_path / "file" / "x": "not_found",
        "x": "invalid_argument",
    }.items():
        assert client.call("files.watch", {"path": str(path)}).fault == fault
    assert client.call("files.watch", {"path": str(tmp_path), "recursive": 1}).fault == "invalid_argument"


def queue_length():
    return int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


def test_a_reader_that_stalls(guest, tmp_path):
    """The kernel's queue overflows, no memory grows, and it is told; afterwards nothing of the tree is missed."""
    (tmp_path / "old").mkdir()
    client = guest.connect()
    watch = Watch(client, tmp_path, recursive=True)
    worker = next(iter(guest.children()))
    os.kill(worker, signal.SIGSTOP)  # no faster reader is slow enough for the kernel's 16 384
    for number in range(queue_length() // 2 + 1000):
        (tmp_path / f"f{number}").touch()
        (tmp_path / f"f{number}").unlink()
    (tmp_path / "old" / "unseen" / "deep").mkdir(parents=True)
    (tmp_path / "gone").mkdir()
    (tmp_path / "gone").rmdir()
    os.kill(worker, signal.SIGCONT)
    deadline = time.monotonic() + PATIENCE
    while not watch.overflow:
        assert time.monotonic() < deadline
        assert watch.take() is not None
    (tmp_path / "old" / "unseen" / "deep" / "file").touch()
    watch.until(("create", "old/unseen/deep/file"))
    assert guest.status("VmRSS") < 8000


def test_a_reader_without_credit_holds_nothing_up(guest, tmp_path, until):
    """Its events stay in the kernel; the daemon serves others meanwhile, and END still ends it when it reads on."""
    client = guest.connect(initial_credit=40_000)
    stream = client.open("files.watch", {"path": str(tmp_path)})
    assert client.notice(stream) == {}
    for number in range(queue_length() // 2 + 1000):
        (tmp_path / f"{'x' * 100}{number}").touch()
        (tmp_path / f"{'x' * 100}{number}").unlink()
    assert client.call("files.stat", {"path": "/"}).reply
    before = guest.status("VmRSS")
    client.send(End(stream))
    outcome = client.finish(stream)
    assert outcome.reply == {"reason": "ended"}
    assert before < 8000


def test_limits(client, tmp_path, until):
    """32 at once; they take no places from other work."""
    watches = [Watch(client, tmp_path) for _ in range(32)]
    assert client.call("files.watch", {"path": str(tmp_path)}).fault == "too_many_processes"
    assert client.call("files.stat", {"path": "/"}).reply
    client.send(Cancel(watches[0].stream))
    while watches[0].take() is not None:
        pass
    until(lambda: client.call("files.watch", {"path": "/none"}).fault == "not_found", "there is a place again")


def test_too_many_directories(client, tmp_path):
    """Typed, at the beginning and later."""
    for number in range(8192):
        (tmp_path / f"d{number}").mkdir()
    assert client.call("files.watch", {"path": str(tmp_path), "recursive": True}).fault == "too_large"
    (tmp_path / "d0").rmdir()
    watch = Watch(client, tmp_path, recursive=True)
    (tmp_path / "d0").mkdir()
    while watch.take() is not None:
        pass
    assert watch.fault == "too_large"
