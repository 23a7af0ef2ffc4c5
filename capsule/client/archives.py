"""Tar streams (POSIX.1-2001 ustar and pax), packed and unpacked piece by piece. Blocking: it runs in a thread.

What comes out of a sandbox is hostile. `tarfile.data_filter` has had holes where links lead through links
(CVE-2025-4138, -4330, -4517), which installed Pythons still have; so its rules are kept here in another way: no
symbolic link is made before everything else is there, so that nothing is ever written through one; and then only such
that cannot lead out of the directory, however the others lead.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

from capsule.client.errors import IntegrityError

BLOCK = 256 * 1024
MAX_HEADER = 256 * 1024
"""Bytes of a member's extended header (a long name, pax records), which tarfile reads into memory, and holds while it
follows one to the next as deep as Python lets it."""

MAX_SKIPPED = 10_000
"""Names of what was left out that are kept to be told."""

_EXTENDED = frozenset(
    {
        tarfile.XHDTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    }
)

_REFUSED = frozenset({tarfile.XGLTYPE, tarfile.GNUTYPE_SPARSE})
"""What grows without bounds: headers that hold for all the rest, maps of holes as large as a disk."""


class Member(tarfile.TarInfo):
    """A header whose extensions are bounded."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Member:
        """Refuses headers that would fill the memory."""
        member = super().frombuf(buf, encoding, errors)
        if member.type in _EXTENDED and member.size > MAX_HEADER:
            raise IntegrityError(f"the archive has a header of {member.size} bytes")
        if member.type in _REFUSED:
            raise IntegrityError("the archive has global headers or sparse files, which a sandbox's tar does not write")
        return member

    def _proc_gnusparse_10(self, *_: Any) -> None:
        """tarfile's: it would read a map of any length into memory."""
        raise IntegrityError("the archive has sparse files, which a sandbox's tar does not write")


def pack(source: Path, sink: IO[bytes]) -> None:
    """What the directory `source` holds, as names relative to it; files, directories and links, owned by root."""
    archive: Any
    with tarfile.open(fileobj=sink, mode="w|", format=tarfile.PAX_FORMAT, bufsize=BLOCK) as archive:
        for path in _below(source):
            archive.add(path, path.relative_to(source).as_posix(), recursive=False, filter=_plain)
            archive.members = []  # it would keep one for each file


def unpack(source: IO[bytes], name: str, target: Path) -> list[str]:
    """The directory `name` of the archive, as the directory `target`, which is empty; what was left out.

    IntegrityError for an archive that is broken or cut off."""
    skipped: list[str] = []
    links: dict[Path, str] = {}
    archive: Any
    try:
        with tarfile.open(fileobj=source, mode="r|", bufsize=BLOCK, tarinfo=Member) as archive:
            for member in archive:
                archive.members = []
                if not _place(archive, member, name, target, links) and len(skipped) < MAX_SKIPPED:
                    skipped.append(member.name)
    except (tarfile.TarError, EOFError, RecursionError) as exc:
        raise IntegrityError(f"the archive is broken: {exc}") from exc
    return skipped + [path.relative_to(target).as_posix() for path in _link(links, target)]


def _place(
    archive: tarfile.TarFile,
    member: tarfile.TarInfo,
    name: str,
    target: Path,
    links: dict[Path, str],
) -> bool:
    """Bring one member to its place, or keep it for later; False for one that has none here."""
    parts = _inside(member.name, name)
    if parts is None:
        return False
    path = target.joinpath(*parts)
    if member.isdir():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(_mode(member) | 0o700, exist_ok=True)
        path.chmod(path.stat().st_mode & (_mode(member) | 0o700))  # one that was there for what is in it
    elif not parts:
        return False
    elif member.issym():
        links[path] = member.linkname
    elif member.isreg() and not member.issparse():
        _write(archive, member, path)
    elif member.islnk():
        return _hard_link(member, name, target, path)
    else:
        return False
    return True


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = archive.extractfile(member)
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    with os.fdopen(os.open(path, flags, _mode(member) | 0o600), "wb") as file:
        if content is not None:
            shutil.copyfileobj(content, file, BLOCK)
    with contextlib.suppress(OSError, OverflowError, ValueError):  # a time that there is not here
        os.utime(path, (member.mtime, member.mtime))


def _mode(member: tarfile.TarInfo) -> int:
    """As tarfile's own filter: no set-uid, not writable to all. The umask holds, too: it is for open() and mkdir()."""
    return member.mode & 0o755


def _hard_link(member: tarfile.TarInfo, name: str, target: Path, path: Path) -> bool:
    """To a file that came before, which is a file of ours: there are no symbolic links yet."""
    parts = _inside(member.linkname, name)
    if not parts or not target.joinpath(*parts).is_file():
        return False
    if target.joinpath(*parts) == path:
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.hardlink_to(target.joinpath(*parts))
    return True


def _link(links: dict[Path, str], target: Path) -> Iterator[Path]:
    """Make the symbolic links; those that are not made."""
    for path, destination in links.items():
        link = path.relative_to(target)
        through = any(target.joinpath(parent).is_symlink() for parent in link.parents)
        if through or os.path.lexists(path) or not _stays(link, destination):
            yield path
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(destination)


def _stays(link: Path, destination: str) -> bool:
    """Whether a link cannot lead out: relative, up first and then only down, and up no further than the root. What is
    on the way down is a directory or a link of the same kind, so it stays inside, too."""
    parts = destination.split("/")
    ups = 0
    while ups < len(parts) and parts[ups] == "..":
        ups += 1
    depth = len(link.parts) - 1
    return bool(destination) and not destination.startswith("/") and ups <= depth and ".." not in parts[ups:]


def _inside(member: str, name: str) -> tuple[str, ...] | None:
    """The path below `name`; None for one that is not below it."""
    parts = tuple(part for part in member.split("/") if part not in {"", "."})
    if member.startswith("/") or ".." in parts or "\0" in member or parts[:1] != (name,):
        return None
    if any(PurePath(part).name != part for part in parts[1:]):
        return None  # where a backslash or a colon means something
    return parts[1:]


def _below(source: Path) -> Iterator[Path]:
    for directory, names, files in os.walk(source, onerror=_raise):
        names.sort()
        yield from (Path(directory, name) for name in sorted([*names, *files]))


def _raise(error: OSError) -> None:
    raise error


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk()):
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
