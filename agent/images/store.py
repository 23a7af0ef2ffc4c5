"""The images of a host: `<store>/<name>/<digest>/` holds one, `<store>/<name>/current` points to the newest.

An image never changes once it is there: overlays and restored guests depend on every byte of it. A new build is a new
digest beside the old one, which stays until `collect` finds that nobody uses it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from agent.images.cache import remove_unused
from agent.images.errors import ImageBroken, ImageNotFound
from agent.images.files import (
    discard,
    exclusive,
    link_or_copy,
    point,
    publish,
    remove_leftovers,
    temporary_directory,
)

DEFAULT_STORE = Path("/var/lib/capsule/images")
PLATFORM = "linux/amd64"
MANIFEST = "manifest.json"
CURRENT = "current"
NAME = re.compile(r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}$")
DIGEST = re.compile(r"^[0-9a-f]{64}$")


class File(msgspec.Struct, frozen=True):
    """A file of an image: its path below the image's directory, its size and digest (`files.digest_file`)."""

    path: str
    size: int
    digest: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`manifest.json`: what the image is and what it was made from."""

    name: str
    digest: str
    platform: str
    disk_mb: int
    created_at: datetime
    kernel: File
    initramfs: File
    rootfs: File
    inputs: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Artifact:
    """A built file and its digest (`files.digest_file`)."""

    path: Path
    digest: str


@dataclass(frozen=True, slots=True)
class Parts:
    """What an image consists of."""

    kernel: Artifact
    initramfs: Artifact
    rootfs: Artifact


@dataclass(frozen=True, slots=True)
class Image:
    """An image that can be booted. The files are read-only and stay as they are as long as they exist."""

    name: str
    digest: str
    kernel: Path
    initramfs: Path
    rootfs: Path
    disk_mb: int
    platform: str
    created_at: datetime


class ImageStore:
    """Reads and publishes images below `path`. Every method blocks on the file system: call from a thread in Trio."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self, name: str) -> Image:
        """The newest image called `name`. ImageNotFound, or ImageBroken when a part of it is missing."""
        if NAME.match(name) is None:
            raise ImageNotFound(f"not an image name: {name!r}")
        try:
            digest = (self.path / name / CURRENT).readlink().name
        except FileNotFoundError as err:
            raise ImageNotFound(f"there is no image {name} in {self.path}: run scripts/setup") from err
        except OSError as err:
            raise ImageBroken(f"{self.path / name / CURRENT} is no link: {err}") from err
        return self.load_digest(name, digest)

    def load_digest(self, name: str, digest: str) -> Image:
        """The image `name` with this digest, also an old one. ImageNotFound or ImageBroken."""
        if NAME.match(name) is None or DIGEST.match(digest) is None:
            raise ImageNotFound(f"not an image: {name!r} {digest!r}")
        folder = self.path / name / digest
        if not folder.is_dir():
            raise ImageNotFound(f"the image {name} {digest[:12]} is gone from {self.path}: run scripts/setup")
        manifest = _read(folder)
        if (manifest.name, manifest.digest) != (name, digest):
            raise ImageBroken(f"{folder} holds the manifest of another image: remove it and run scripts/setup")
        return Image(
            name=name,
            digest=digest,
            kernel=_checked(folder, manifest.kernel),
            initramfs=_checked(folder, manifest.initramfs),
            rootfs=_checked(folder, manifest.rootfs),
            disk_mb=manifest.disk_mb,
            platform=manifest.platform,
            created_at=manifest.created_at,
        )

    def list(self) -> tuple[Image, ...]:
        """The newest image of every name, by name; broken ones are left out (`load` says what is wrong with one)."""
        found = []
        for name in sorted(folder.name for folder in self._folders()):
            try:
                found.append(self.load(name))
            except (ImageNotFound, ImageBroken):
                continue
        return tuple(found)

    def publish(
        self, name: str, parts: Parts, *, disk_mb: int, inputs: dict[str, Any], platform: str = PLATFORM
    ) -> Image:
        """Add the image made of `parts`, unless it is there already, and make it the newest of its name.

        Only while holding `files.exclusive(store)`. The files are linked, not copied, where that is possible.
        """
        digest = identify(parts, disk_mb=disk_mb, platform=platform)
        folder = self.path / name / digest
        try:
            self.load_digest(name, digest)
        except (ImageBroken, ImageNotFound):
            if folder.exists():
                discard(self.path, folder)
            self._add(
                parts,
                Manifest(
                    name=name,
                    digest=digest,
                    platform=platform,
                    disk_mb=disk_mb,
                    created_at=datetime.now(UTC),
                    kernel=_described(parts.kernel),
                    initramfs=_described(parts.initramfs),
                    rootfs=_described(parts.rootfs),
                    inputs=inputs,
                ),
            )
        link = self.path / name / CURRENT
        if not (link.is_symlink() and link.readlink() == Path(digest)):
            point(self.path, link, digest)
        return self.load_digest(name, digest)

    def collect(self, in_use: set[str]) -> tuple[str, ...]:
        """Remove old images whose digest is not in `in_use`, and leftovers of builds; returns the digests removed.

        The newest of each name always stays. Whoever holds an image must have its digest in `in_use` already.
        """
        removed = []
        with exclusive(self.path, on_wait=lambda: None):
            remove_leftovers(self.path)
            for name in self._folders():
                link = name / CURRENT
                keep = in_use | ({link.readlink().name} if link.is_symlink() else set())
                for folder in name.iterdir():
                    if DIGEST.match(folder.name) and folder.name not in keep:
                        discard(self.path, folder)
                        removed.append(folder.name)
            remove_unused(self.path)
        return tuple(removed)

    def _folders(self) -> tuple[Path, ...]:
        if not self.path.is_dir():
            return ()
        return tuple(folder for folder in self.path.iterdir() if NAME.match(folder.name) and folder.is_dir())

    def _add(self, parts: Parts, manifest: Manifest) -> None:
        with temporary_directory(self.path) as work:
            for artifact in (parts.kernel, parts.initramfs, parts.rootfs):
                link_or_copy(artifact.path, work / artifact.path.name)
                (work / artifact.path.name).chmod(0o444)
            text = msgspec.json.format(msgspec.json.encode(manifest), indent=2)
            (work / MANIFEST).write_bytes(text + b"\n")
            (work / MANIFEST).chmod(0o444)
            publish(work, self.path / manifest.name / manifest.digest)


def identify(parts: Parts, *, disk_mb: int, platform: str) -> str:
    """An image's digest, from its files' digests and how it is to be used."""
    canonical = msgspec.json.encode(
        {
            "kernel": parts.kernel.digest,
            "initramfs": parts.initramfs.digest,
            "rootfs": parts.rootfs.digest,
            "disk_mb": disk_mb,
            "platform": platform,
        },
        order="deterministic",
    )
    return hashlib.sha256(canonical).hexdigest()


def _described(artifact: Artifact) -> File:
    return File(artifact.path.name, artifact.path.stat().st_size, artifact.digest)


def _read(folder: Path) -> Manifest:
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError) as err:
        raise ImageBroken(f"{folder / MANIFEST} cannot be read ({err}): run scripts/setup") from err


def _checked(folder: Path, file: File) -> Path:
    path = folder / file.path
    if "/" in file.path or not path.is_file() or path.stat().st_size != file.size:
        raise ImageBroken(f"{path} is missing or not {file.size} bytes long: run scripts/setup")
    return path
