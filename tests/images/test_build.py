from __future__ import annotations

import os
import select
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from agent.images import build as build_module
from agent.images.build import build_images
from agent.images.cache import RECORD, cached, remove_unused
from agent.images.commands import CONFINED, run, run_confined
from agent.images.errors import BuildFailed
from agent.images.kernel import resolve
from agent.images.mirrors import Source
from agent.images.rootfs import MINIMAL, Recipe, bootstrap_command, finish, rootfs_inputs

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernel and root file system made in no time; the list tells which of them were made."""
    made: list[str] = []

    def kernel(_work: Path, into: Path, *, progress: Callable[[str], None]) -> dict[str, str]:
        made.append("kernel")
        progress("kernel")
        (into / "vmlinux").write_bytes(b"ELF")
        (into / "modules").mkdir()
        (into / "modules/order").write_text("virtio.ko\n")
        (into / "modules/virtio.ko").write_bytes(b"module")
        return {"linux-image": "6.1"}

    def rootfs(*args: Any, progress: Callable[[str], None]) -> dict[str, Any]:
        made.append("rootfs")
        progress("rootfs")
        (args[3] / "rootfs.ext4").write_bytes(b"ext4")
        return {"packages": {}}

    monkeypatch.setattr(build_module, "build_kernel", kernel)
    monkeypatch.setattr(build_module, "build_rootfs", rootfs)
    monkeypatch.setattr(build_module, "host_suite", lambda: "bookworm")
    return made


def test_changed_daemon_makes_only_an_initramfs(tmp_path: Path, steps: list[str]) -> None:
    """A new guest daemon gives a new image with the old kernel and root file system, and without making those again."""
    daemon = tmp_path / "daemon"
    daemon.write_bytes(b"daemon 1")
    first = build_images(tmp_path / "store", daemon, progress=lambda _step: None)
    daemon.write_bytes(b"daemon 2")
    second = build_images(tmp_path / "store", daemon, progress=lambda _step: None)
    assert steps == ["kernel", "rootfs"]
    assert first.digest != second.digest
    assert second.rootfs.samefile(first.rootfs)
    assert b"daemon 2" in second.initramfs.read_bytes()
    assert b"module" in second.initramfs.read_bytes()


def test_nothing_to_do_says_nothing(tmp_path: Path, steps: list[str]) -> None:
    """The second build of the same finds it made: no step, no progress line, the same image."""
    daemon = tmp_path / "daemon"
    daemon.write_bytes(b"daemon")
    said: list[str] = []
    first = build_images(tmp_path / "store", daemon, progress=said.append)
    said.clear()
    assert build_images(tmp_path / "store", daemon, progress=said.append) == first
    assert said == []
    assert steps == ["kernel", "rootfs"]


def test_refresh_makes_all(tmp_path: Path, steps: list[str]) -> None:
    """With `refresh` the archive is asked again, although nothing here has changed."""
    daemon = tmp_path / "daemon"
    daemon.write_bytes(b"daemon")
    build_images(tmp_path / "store", daemon, progress=lambda _step: None)
    build_images(tmp_path / "store", daemon, progress=lambda _step: None, refresh=True)
    assert steps == ["kernel", "rootfs"] * 2


def test_part_that_lost_a_file_is_made_again(tmp_path: Path) -> None:
    """A cached part is used only while all its files are there with the sizes they had."""
    made: list[int] = []

    def make(_scratch: Path, into: Path) -> dict[str, Any]:
        made.append(1)
        (into / "file").write_bytes(b"four")
        return {"made": len(made)}

    def part() -> Any:
        return cached(tmp_path, "kind", inputs={"a": 1}, make=make)

    assert part().record == part().record
    assert len(made) == 1
    for damage in ("file", RECORD):
        (part().path / damage).unlink()
        assert (part().path / "file").read_bytes() == b"four"
    file = part().path / "file"
    file.unlink()
    file.write_bytes(b"longer")
    part()
    assert len(made) == 4
    assert not list(tmp_path.glob(".tmp-*"))


def test_failed_step_leaves_nothing(tmp_path: Path) -> None:
    """A step that fails is not taken for done."""

    def fail(_scratch: Path, into: Path) -> dict[str, Any]:
        (into / "half").write_bytes(b"")
        raise BuildFailed("the mirror is down")

    with pytest.raises(BuildFailed, match="mirror"):
        cached(tmp_path, "kind", inputs={}, make=fail)
    assert not list(tmp_path.iterdir())


def test_parts_without_image_are_removed(tmp_path: Path) -> None:
    """A part stays as long as an image shares a file with it."""

    def make(_scratch: Path, into: Path) -> dict[str, Any]:
        (into / "file").write_bytes(b"x")
        return {}

    used = cached(tmp_path, "used", inputs={}, make=make)
    unused = cached(tmp_path, "unused", inputs={}, make=make)
    os.link(used.path / "file", tmp_path / "image")
    remove_unused(tmp_path)
    assert used.path.exists()
    assert not unused.path.exists()


def test_kernel_packages() -> None:
    """The meta package leads to the packages with the files, in one piece or apart, and to nothing else."""
    known = {
        "linux-image-cloud-amd64": ("6.17-1", ["linux-image-6.17-cloud-amd64"]),
        "linux-image-6.17-cloud-amd64": ("6.17-1", ["kmod", "linux-base", "linux-modules-6.17-cloud-amd64"]),
        "linux-modules-6.17-cloud-amd64": ("6.17-2", ["linux-image-6.17-cloud-amd64"]),
    }
    assert resolve("linux-image-cloud-amd64", depends=known.__getitem__) == {
        "linux-image-6.17-cloud-amd64": "6.17-1",
        "linux-modules-6.17-cloud-amd64": "6.17-2",
    }
    with pytest.raises(BuildFailed, match="apt-get update"):
        resolve("linux-image-cloud-amd64", depends=lambda _name: ("1", ["kmod"]))


def test_guest_has_nothing_of_the_host(tmp_path: Path) -> None:
    """The finished tree has no build configuration, logs or lists, and writing it follows no link out of the tree."""
    tree, outside = tmp_path / "tree", tmp_path / "outside"
    outside.write_text("the host's")
    for name in ("etc/apt/apt.conf.d", "var/log/apt", "var/lib/apt/lists/partial", "var/cache/apt", "tmp", "run"):
        (tree / name).mkdir(parents=True)
    (tree / "etc/resolv.conf").symlink_to(outside)
    (tree / "var/log/link").symlink_to(tmp_path)
    (tree / "etc/apt/apt.conf.d/99mmdebstrap").write_text('Acquire::http::Proxy "http://user:secret@proxy.test";')
    (tree / "var/log/apt/history.log").write_text("secret")
    finish(tree, [Source("http://user:secret@mirror.test/debian/", "bookworm", ("main",))])
    assert outside.read_text() == "the host's"
    assert (tree / "etc/resolv.conf").read_text() == ""
    assert (tree / "etc/machine-id").read_text() == ""
    assert (tree / "etc/apt/sources.list").read_text() == "deb http://mirror.test/debian/ bookworm main\n"
    assert (tree / "var/log/apt").is_dir()
    texts = [path.read_text() for path in tree.rglob("*") if path.is_file()]
    assert not [text for text in texts if "secret" in text]


def test_bootstrap_command() -> None:
    """Without sources of the host the command names no mirror, so that mmdebstrap takes Debian's own."""
    command = bootstrap_command(MINIMAL, "trixie", Path("/store/tree"), [], [])
    assert command[-2:] == ["trixie", "/store/tree"]
    assert "--include=python3,iproute2,ca-certificates,procps,curl,vim-tiny" in command
    command = bootstrap_command(MINIMAL, "trixie", Path("/t"), ["deb http://m.test trixie main"], ['Acquire::x "1";'])
    assert command[-1] == "deb http://m.test trixie main"
    assert '--aptopt=Acquire::x "1";' in command


def test_key_depends_on_how_it_is_made() -> None:
    """Another suite, package or disk size makes another root file system; asking again does not."""
    other = [
        rootfs_inputs(MINIMAL, "bookworm"),
        rootfs_inputs(MINIMAL, "trixie"),
        rootfs_inputs(Recipe(MINIMAL.name, (*MINIMAL.packages, "git")), "bookworm"),
        rootfs_inputs(Recipe(MINIMAL.name, MINIMAL.packages, 4096), "bookworm"),
    ]
    assert len({msgspec.json.encode(inputs) for inputs in other}) == len(other)
    assert rootfs_inputs(MINIMAL, "bookworm") == other[0]


def test_failing_program_says_why() -> None:
    """The error carries what the program said, how it ended, or that it is not there."""
    with pytest.raises(BuildFailed, match=r"failed \(3\): no space"):
        run(["sh", "-c", "echo no space >&2; exit 3"], seconds=10)
    with pytest.raises(BuildFailed, match="scripts/setup"):
        run(["capsule-no-such-program"], seconds=10)
    with pytest.raises(BuildFailed, match="still running after 0 s"):
        run(["sleep", "30"], seconds=0.1)


@pytest.mark.host
def test_confined_program_dies_with_the_builder(tmp_path: Path) -> None:
    """kill -9 of a build takes the programs it runs with it, also those they started themselves."""
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    program = f"exec 3> {fifo}; echo up >&3; sleep 60 & sleep 60"
    script = (
        "from agent.images.commands import run_confined\n"
        f"run_confined(['sh', '-c', '{program}'], on_line=print, env={{'PATH': '/usr/bin:/bin'}})"
    )
    descriptor = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    waiting = select.poll()
    waiting.register(descriptor, select.POLLIN)
    try:
        with subprocess.Popen([sys.executable, "-c", script]) as builder:
            assert waiting.poll(60_000), "the program never started"
            assert os.read(descriptor, 10) == b"up\n"
            builder.kill()
        assert waiting.poll(60_000) == [(descriptor, select.POLLHUP)], "a process still holds the pipe"
    finally:
        os.close(descriptor)


@pytest.mark.host
def test_confined_program_reports() -> None:
    """Every line of a confined program is handed on, and its failure carries the last ones."""
    said: list[str] = []
    path = {"PATH": os.environ["PATH"]}
    run_confined(["sh", "-c", "echo one; echo two >&2"], on_line=said.append, env=path)
    assert said == ["one", "two"]
    with pytest.raises(BuildFailed, match=r"sh failed \(5\):\nthree"):
        run_confined(["sh", "-c", "echo three; exit 5"], on_line=said.append, env=path)
    assert CONFINED[0] == "setpriv"
