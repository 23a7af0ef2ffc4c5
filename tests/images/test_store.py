from __future__ import annotations

import contextlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent.images import files as files_module
from agent.images.errors import ImageBroken, ImageNotFound
from agent.images.files import digest_file, exclusive, point, publish, remove_leftovers, temporary_directory
from agent.images.store import MANIFEST, Artifact, Image, ImageStore, Parts

if TYPE_CHECKING:
    from collections.abc import Callable


class Power(BaseException):
    """The process ends here: no handler of ours may run on it."""


@pytest.fixture
def made(tmp_path: Path) -> Parts:
    return parts(tmp_path, b"daemon 1")


def parts(folder: Path, initramfs: bytes) -> Parts:
    found = []
    for name, content in (("vmlinux", b"ELF"), ("initramfs.cpio", initramfs), ("rootfs.ext4", b"ext4" * 1000)):
        path = folder / "made" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_bytes() != content:
            path.unlink(missing_ok=True)
            path.write_bytes(content)
        found.append(Artifact(path, digest_file(path)))
    return Parts(*found)


def add(store: ImageStore, made: Parts) -> Image:
    with exclusive(store.path, on_wait=lambda: None):
        return store.publish("minimal", made, disk_mb=2048, inputs={"suite": "bookworm"})


def die_after(survived: int, patch: pytest.MonkeyPatch) -> list[str]:
    """Let the first `survived` steps that change the disk succeed and die in each later one; returns those seen."""
    steps: list[str] = []

    def dying(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def step(*args: object, **kwargs: object) -> object:
            steps.append(name)
            if len(steps) > survived:
                raise Power
            return original(*args, **kwargs)

        return step

    for name in ("rename", "replace", "symlink_to", "write_bytes", "chmod", "mkdir"):
        patch.setattr(Path, name, dying(name, getattr(Path, name)))
    for name in ("link", "fsync"):
        patch.setattr(os, name, dying(name, getattr(os, name)))
    patch.setattr(files_module, "run", dying("rm", files_module.run))
    return steps


def test_publish_then_load(tmp_path: Path, made: Parts) -> None:
    """A published image is found by its name and by its digest, is read-only, and says what it is."""
    store = ImageStore(tmp_path / "store")
    image = add(store, made)
    assert store.load("minimal") == image
    assert store.load_digest("minimal", image.digest) == image
    assert store.list() == (image,)
    assert image.kernel.read_bytes() == b"ELF"
    assert (image.disk_mb, image.platform) == (2048, "linux/amd64")
    assert [path.stat().st_mode & 0o777 for path in (image.kernel, image.initramfs, image.rootfs)] == [0o444] * 3


def test_same_parts_same_image(tmp_path: Path, made: Parts) -> None:
    """Building the same again changes nothing, not even the time it was made."""
    store = ImageStore(tmp_path / "store")
    assert add(store, made) == add(store, made)


def test_old_digests_stay_until_collected(tmp_path: Path, made: Parts) -> None:
    """A new build leaves the old image whole, because guests depend on it; collect spares what is in use."""
    store = ImageStore(tmp_path / "store")
    old = add(store, made)
    older = add(store, parts(tmp_path, b"daemon 2"))
    new = add(store, parts(tmp_path, b"daemon 3"))
    assert store.load("minimal") == new
    assert store.load_digest("minimal", old.digest) == old
    assert new.rootfs.samefile(old.rootfs), "the root file system is shared, not copied"
    assert store.collect({old.digest}) == (older.digest,)
    assert store.load_digest("minimal", old.digest) == old
    assert store.load("minimal") == new
    with pytest.raises(ImageNotFound, match="gone"):
        store.load_digest("minimal", older.digest)


@pytest.mark.parametrize("name", ["minimal", "", "../minimal", ".parts", "a/b", "x" * 65])
def test_unknown_names(tmp_path: Path, name: str) -> None:
    """A name that is not there, or that is no name, is not found; no path is built from it."""
    with pytest.raises(ImageNotFound):
        ImageStore(tmp_path).load(name)


@pytest.mark.parametrize("digest", ["", "..", "0" * 63, "g" * 64])
def test_unknown_digests(tmp_path: Path, digest: str) -> None:
    """The same for digests."""
    with pytest.raises(ImageNotFound):
        ImageStore(tmp_path).load_digest("minimal", digest)


@pytest.mark.parametrize("cut", [0, 1, 100, -3])
def test_cut_manifest(tmp_path: Path, made: Parts, cut: int) -> None:
    """A manifest that is not whole makes the image broken, and a new build mends it."""
    store = ImageStore(tmp_path / "store")
    image = add(store, made)
    manifest = image.kernel.with_name(MANIFEST)
    manifest.chmod(0o644)
    manifest.write_bytes(manifest.read_bytes()[:cut])
    with pytest.raises(ImageBroken, match="scripts/setup"):
        store.load("minimal")
    assert store.list() == ()
    assert add(store, made).digest == image.digest
    assert store.load("minimal").digest == image.digest


@pytest.mark.parametrize("part", ["kernel", "initramfs", "rootfs"])
def test_missing_or_short_file(tmp_path: Path, made: Parts, part: str) -> None:
    """An image with a file missing or of another size is broken rather than half-booted."""
    store = ImageStore(tmp_path / "store")
    image = add(store, made)
    path: Path = getattr(image, part)
    path.unlink()
    with pytest.raises(ImageBroken, match=path.name):
        store.load("minimal")
    path.write_bytes(b"")
    with pytest.raises(ImageBroken, match=path.name):
        store.load("minimal")


def test_death_at_any_step_of_publishing(tmp_path: Path, made: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever step is the last one, load finds the old image or the new one, and building again ends well.

    A death is an exception that no clean-up follows: removing, too, dies with the process.
    """
    changed = parts(tmp_path / "changed", b"daemon 2")
    for survived in range(100):
        store = ImageStore(tmp_path / f"store{survived}")
        old = add(store, made)
        with monkeypatch.context() as patch:
            steps = die_after(survived, patch)
            with contextlib.suppress(Power):
                add(store, changed)
        assert store.load("minimal") == old or store.load("minimal").initramfs.read_bytes() == b"daemon 2"
        with exclusive(store.path, on_wait=lambda: None):
            remove_leftovers(store.path)
        assert add(store, changed).initramfs.read_bytes() == b"daemon 2"
        assert not list(store.path.rglob(".tmp-*")), "nothing is left of the interrupted build"
        if len(steps) <= survived:
            assert survived > 10, "the steps were not counted"
            return
    pytest.fail("publishing never ended")


def test_leftovers_of_a_killed_build(tmp_path: Path) -> None:
    """What a killed build left is removed by the next one, and is never seen as an image."""
    left = tmp_path / ".tmp-0123"
    (left / "tree/etc").mkdir(parents=True)
    (left / "tree/etc/passwd").write_text("root")
    assert ImageStore(tmp_path).list() == ()
    remove_leftovers(tmp_path)
    assert not left.exists()


def test_temporary_directory_goes_with_an_error(tmp_path: Path) -> None:
    """A build that fails leaves nothing."""
    with pytest.raises(FileNotFoundError), temporary_directory(tmp_path) as work:
        (work / "missing/file").write_text("x")
    assert not list(tmp_path.iterdir())


def test_publish_moves_a_whole_directory(tmp_path: Path) -> None:
    """The finished directory appears under its name and nowhere else."""
    with temporary_directory(tmp_path) as work:
        (work / "into/deep").mkdir(parents=True)
        (work / "into/deep/file").write_text("x")
        publish(work / "into", tmp_path / "a/b")
    assert (tmp_path / "a/b/deep/file").read_text() == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_point_replaces(tmp_path: Path) -> None:
    """The link can be set again and again."""
    for target in ("one", "two", "two"):
        point(tmp_path, tmp_path / "current", target)
        assert (tmp_path / "current").readlink() == Path(target)


def test_second_builder_waits(tmp_path: Path) -> None:
    """Of two at once one holds the lock; the other is told that it waits and goes on when the first is done."""
    waits, done = threading.Event(), threading.Event()

    def second() -> None:
        with exclusive(tmp_path, on_wait=waits.set):
            done.set()

    with exclusive(tmp_path, on_wait=lambda: pytest.fail("nobody holds it")):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(10)
        assert not done.is_set()
    assert done.wait(10)
    thread.join(10)


def test_digest_ignores_holes_but_not_zeros(tmp_path: Path) -> None:
    """The digest is of the content: the same bytes with or without holes agree, moved or longer ones do not."""
    sparse, dense, moved, longer = (tmp_path / name for name in ("sparse", "dense", "moved", "longer"))
    content = bytes(200_000) + b"data" + bytes(300_000)
    dense.write_bytes(content)
    with sparse.open("wb") as file:
        file.truncate(len(content))
        file.seek(200_000)
        file.write(b"data")
    moved.write_bytes(bytes(200_001) + b"data" + bytes(299_999))
    longer.write_bytes(content + b"\0")
    assert digest_file(sparse) == digest_file(dense)
    assert len({digest_file(path) for path in (dense, moved, longer)}) == 3
