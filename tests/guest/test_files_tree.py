"""files.list, files.mkdir, files.remove."""

from __future__ import annotations

import os
import subprocess

import msgspec
import pytest

from agent.wire.messages import Credit, Data


def names(outcome, root):
    return [os.path.relpath(entry["path"], root) for entry in outcome.entries]


@pytest.fixture
def tree(tmp_path):
    for path in ("b/x/deep/deeper", "a", "c"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "b/x/file").write_bytes(b"12")
    (tmp_path / "B").write_bytes(b"")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("depth", "expected"),
    [
        (None, ["B", "a", "b", "c"]),
        (1, ["B", "a", "b", "c"]),
        (2, ["B", "a", "a/loop", "b", "b/x", "c"]),
        (64, ["B", "a", "a/loop", "b", "b/x", "b/x/deep", "b/x/deep/deeper", "b/x/file", "c"]),
    ],
)
def test_depth_and_order(client, tree, depth, expected):
    """Sorted by name within a directory, each directory before what is in it, links never followed."""
    outcome = client.call("files.list", {"path": str(tree)} | ({} if depth is None else {"depth": depth}))
    assert names(outcome, tree) == expected
    assert outcome.reply == {"count": len(expected)}


def test_entries_are_those_of_stat(client, tree):
    """One shape."""
    entries = client.call("files.list", {"path": str(tree), "depth": 9}).entries
    assert len(entries) == 9
    for entry in entries:
        assert client.call("files.stat", {"path": entry["path"]}).reply["entry"] == entry


def test_large_directories_come_in_batches(guest, tmp_path):
    """No notice larger than 32 KiB, none before its credit, and nothing missing."""
    for i in range(3000):
        (tmp_path / f"{i:06}").touch()
    client = guest.connect(initial_credit=40_000)
    stream = client.open("files.list", {"path": str(tmp_path)})
    found = []
    while isinstance(frame := client.stream_frame(stream), Data):
        assert frame.channel == 3
        assert len(frame.data) <= 32 * 1024
        found += [entry["name"] for entry in msgspec.msgpack.decode(frame.data)["entries"]]
        client.send(Credit(stream, len(frame.data)))
    assert found == [f"{i:06}" for i in range(3000)]
    assert frame.body == {"count": 3000}


def test_the_root_has_plain_paths(client):
    """/etc, not //etc."""
    entries = {entry["path"]: entry for entry in client.call("files.list", {"path": "/"}).entries}
    assert entries["/etc"]["name"] == "etc"


def test_an_empty_directory(client, tmp_path):
    """No notice, count 0."""
    outcome = client.call("files.list", {"path": str(tmp_path)})
    assert (outcome.notices, outcome.reply) == ([], {"count": 0})


def test_names_that_are_not_utf8(client, tmp_path):
    """Shown with replacement characters: a strict reader must be able to read the frame."""
    (tmp_path / os.fsdecode(b"bad\xff\xc3")).mkdir()
    assert client.call("files.list", {"path": str(tmp_path)}).entries[0]["name"] == "bad\ufffd\ufffd"


def test_what_cannot_be_listed(client, tree):
    """A directory reached by a link can; files and nothing cannot; depth has its bounds."""
    (tree / "link").symlink_to("b")
    assert names(client.call("files.list", {"path": str(tree / "link")}), tree) == ["link/x"]
    assert client.call("files.list", {"path": str(tree / "B")}).fault == "not_a_directory"
    assert client.call("files.list", {"path": str(tree / "no")}).fault == "not_found"
    for depth in (0, 65, -1, "1"):
        assert client.call("files.list", {"path": "/", "depth": depth}).fault == "invalid_argument"


def test_mkdir(client, tmp_path):
    """With parents; mode as asked; conflict when anything has the name."""
    entry = client.call("files.mkdir", {"path": str(tmp_path / "a/b"), "mode": 0o777}).reply["entry"]
    assert (entry["type"], entry["mode"], entry["path"]) == ("directory", 0o777, str(tmp_path / "a/b"))
    assert client.call("files.mkdir", {"path": str(tmp_path / "c")}).reply["entry"]["mode"] == 0o755
    (tmp_path / "file").touch()
    for name in ("a/b", "c", "file"):
        assert client.call("files.mkdir", {"path": str(tmp_path / name)}).fault == "conflict"
    assert client.call("files.mkdir", {"path": "/"}).fault == "conflict"
    assert client.call("files.mkdir", {"path": str(tmp_path / "file/x")}).fault == "not_a_directory"


def test_remove_takes_the_tree_and_nothing_else(client, tree, tmp_path_factory):
    """What a link in it points to stays."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "keep").touch()
    (tree / "b/escape").symlink_to(outside)
    (tree / "b/x/readonly").touch(mode=0)
    assert client.call("files.remove", {"path": str(tree / "b")}).reply == {}
    assert not (tree / "b").exists()
    assert (outside / "keep").exists()
    assert sorted(path.name for path in tree.iterdir()) == ["B", "a", "c"]


def test_remove_of_a_link_or_a_file(client, tree):
    """The link, not its target."""
    assert client.call("files.remove", {"path": str(tree / "a/loop")}).reply == {}
    assert (tree / "B").exists()
    assert client.call("files.remove", {"path": str(tree / "B")}).reply == {}
    assert not (tree / "B").exists()


def test_remove_of_a_very_deep_tree(client, tmp_path):
    """Deeper than any path or any number of descriptors."""
    script = "import os\nfor i in range(3000): os.mkdir('d'); os.chdir('d')"
    subprocess.run(["python3", "-c", script], cwd=tmp_path, check=True, timeout=60)
    assert client.call("files.remove", {"path": str(tmp_path / "d")}).reply == {}
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed(client, tmp_path):
    """Nothing, and the root."""
    assert client.call("files.remove", {"path": str(tmp_path / "no")}).fault == "not_found"
    assert client.call("files.remove", {"path": "/etc/passwd/x"}).fault == "not_found"
    for root in ("/", "//", "/.", "/./"):
        assert client.call("files.remove", {"path": root}).fault == "invalid_argument"


@pytest.mark.skipif(os.geteuid() != 0, reason="uses /proc as root")
def test_a_refusal_of_the_kernel_is_a_fault(client):
    """Not a loop."""
    assert client.call("files.remove", {"path": "/proc/self/fd"}).fault in {"permission_denied", "conflict"}
