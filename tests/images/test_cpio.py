from __future__ import annotations

import shutil
import stat
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.images.cpio import Entry, archive, character_device, directory, regular
from agent.images.initramfs import initramfs

FIELDS = 13


def read(data: bytes) -> list[Entry]:
    """An independent reader: enough of newc to get back what was written."""
    entries, at = [], 0
    while True:
        assert data[at : at + 6] == b"070701"
        values = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(FIELDS)]
        mode, size, major, minor, name_size = values[1], values[6], values[9], values[10], values[11]
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        at += -(-(110 + name_size) // 4) * 4
        content = data[at : at + size]
        at += -(-size // 4) * 4
        if name == "TRAILER!!!":
            assert at == len(data)
            return entries
        entries.append(Entry(name, mode, content, (major, minor)))


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=40).filter(
    lambda name: not name.startswith("/") and name != "TRAILER!!!"
)
entries = st.builds(
    Entry,
    name=names,
    mode=st.sampled_from([stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755, stat.S_IFCHR | 0o600]),
    data=st.binary(max_size=50),
    device=st.tuples(st.integers(0, 4095), st.integers(0, 1 << 20)),
)


@given(st.lists(entries, max_size=5))
def test_round_trip(written: list[Entry]) -> None:
    """What is written is what a reader of the format finds, whatever the lengths of names and contents."""
    assert read(archive(written)) == written


def test_deterministic() -> None:
    """Equal entries give equal bytes: the digest of an initramfs depends on its content alone."""
    parts = [directory("dev"), character_device("dev/console", 5, 1), regular("init", b"x" * 7, mode=0o755)]
    assert archive(parts) == archive(list(parts))


@pytest.mark.parametrize("name", ["", "/init", "a\0b"])
def test_refuses_names_it_cannot_carry(name: str) -> None:
    """An absolute, empty or NUL-bearing name would be unpacked as something else."""
    with pytest.raises(ValueError, match="not a name"):
        archive([regular(name, b"")])


def test_initramfs_layout() -> None:
    """The layout the guest daemon relies on: itself as /init, modules with their load order, a console."""
    found = {entry.name: entry for entry in read(initramfs(b"ELF", [("b.ko", b"1"), ("a.ko", b"22")]))}
    assert found["init"].data == b"ELF"
    assert found["init"].mode == stat.S_IFREG | 0o755
    assert found["mods/order"].data == b"b.ko\na.ko\n"
    assert found["mods/a.ko"].data == b"22"
    assert found["dev/console"].device == (5, 1)
    assert stat.S_ISCHR(found["dev/console"].mode)
    names = list(found)
    assert names.index("dev") < names.index("dev/console"), "the kernel makes no parents"


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_cpio_agrees() -> None:
    """The standard program reads the archive and sees the same files, owners and device numbers."""
    data = initramfs(b"ELF" * 1000, [("virtio.ko", b"module")])
    shown = subprocess.run(
        ["cpio", "-itv", "--quiet", "--numeric-uid-gid"], input=data, capture_output=True, check=True, timeout=20
    ).stdout.decode()
    assert [line.split()[-1] for line in shown.splitlines()] == [entry.name for entry in read(data)]
    console = next(line for line in shown.splitlines() if line.endswith("dev/console"))
    assert console.split()[2:6] == ["0", "0", "5,", "1"]
