"""What a guest says, as values whose types hold: everything in a sandbox may be under its tenant's control."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar, cast

import msgspec

from capsule import errors
from capsule.model import FileEntry, FileType, ProcessView

S = TypeVar("S", bound=msgspec.Struct)

Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Pid = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]
Signal = Annotated[int, msgspec.Meta(ge=1, le=64)]
Tag = Annotated[str, msgspec.Meta(max_length=128)]

FILE_TYPES = frozenset({"file", "directory", "symlink"})


class Ended(msgspec.Struct, frozen=True):
    """A foreground process is over."""

    exit_code: Annotated[int, msgspec.Meta(ge=0, le=255)]
    signal: Signal | None = None
    duration_ms: Count = 0
    timed_out: bool = False


class Started(msgspec.Struct, frozen=True):
    """A background process runs."""

    pid: Pid
    tag: str


class Attached(msgspec.Struct, frozen=True):
    """The first notice of a live process: of an `exec` only `pid` and `tag`."""

    pid: Pid
    tag: Tag = ""
    pty: bool = False
    offset: Count = 0
    skipped: Count = 0
    replay: Count = 0
    ended: bool = False


class Skipped(msgspec.Struct, frozen=True):
    """A later notice, to an observer who was too slow for so many bytes."""

    skipped: Count


class Process(msgspec.Struct, frozen=True):
    """One running process."""

    pid: Pid
    cmd: str = ""
    tag: str = ""
    args: tuple[str, ...] | None = None
    user: str = ""
    cwd: str = ""
    background: bool = False
    started_ns: Count = 0

    def view(self) -> ProcessView:
        """As its team sees it."""
        return ProcessView(**msgspec.structs.asdict(self))


class Processes(msgspec.Struct, frozen=True):
    """All of them."""

    processes: list[Process] = []


class Entry(msgspec.Struct, frozen=True):
    """One file. `owner` and `group` are empty when the guest has no name for them."""

    name: str
    path: str
    type: str
    size: Count
    mode: Count
    mtime_ns: int
    owner: str = ""
    group: str = ""
    uid: Count = 0
    gid: Count = 0
    symlink_target: str | None = None

    def view(self) -> FileEntry:
        """As its team sees it; a type that we do not know is `other`."""
        return FileEntry(
            name=self.name,
            path=self.path,
            type=cast("FileType", self.type) if self.type in FILE_TYPES else "other",
            size=self.size,
            mode=self.mode,
            owner=self.owner or str(self.uid),
            group=self.group or str(self.gid),
            modified_ns=self.mtime_ns,
            symlink_target=self.symlink_target,
        )


class Made(msgspec.Struct, frozen=True):
    """The answer of mkdir."""

    entry: Entry


class Batch(msgspec.Struct, frozen=True):
    """A notice of files.list."""

    entries: list[Entry] = []


class Size(msgspec.Struct, frozen=True):
    """The first notice of files.read; None for a file that does not know (a pipe, /proc)."""

    size: Count | None = None


def answer(kind: type[S], body: dict[str, Any]) -> S:
    """A reply's body as `kind`. HostUnavailable when it does not fit."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as err:
        raise nonsense() from err


def notice(kind: type[S], data: bytes) -> S:
    """A notice as `kind`. HostUnavailable when it does not fit, or is not msgpack at all."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, ValueError) as err:
        raise nonsense() from err


def nonsense() -> errors.HostUnavailable:
    """For whatever a sound guest would not say."""
    return errors.HostUnavailable("the sandbox's guest daemon gave an answer that makes no sense")
