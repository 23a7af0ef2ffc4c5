"""What clients get: response bodies, and how they are made from the model. Absent optional fields are left out."""

from __future__ import annotations

import stat
from base64 import b64encode
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule.http import ids
from capsule.model import (
    ExecResult,
    FileEntry,
    FileType,
    Forked,
    ProcessView,
    SandboxStatus,
    SandboxView,
    TemplateType,
    TemplateView,
)

T = TypeVar("T")

Timestamp = Annotated[str, Meta(description="RFC 3339, UTC, microseconds.", extra_json_schema={"format": "date-time"})]
Output = Annotated[str, Meta(description="What it printed, in `encoding`.")]
Encoding = Annotated[
    Literal["utf-8", "base64"],
    Meta(description="`base64` for both streams when either is not UTF-8."),
]

FORKED_ITEM = {
    "anyOf": [{"$ref": "#/components/schemas/Sandbox"}, {"$ref": "#/components/schemas/FailedChild"}],
}
"""Written out: the library's unions of structs need a tag."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TYPE_BITS = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK, "other": 0}


def timestamp(moment: datetime) -> str:
    """RFC 3339 in UTC with microseconds and `Z`."""
    return moment.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def timestamp_ns(nanoseconds: int) -> str:
    """The same from nanoseconds since 1970, as a guest reports them: one beyond year 9999 becomes the epoch."""
    try:
        return timestamp(_EPOCH + timedelta(microseconds=nanoseconds // 1000))
    except OverflowError:
        return timestamp(_EPOCH)


def printed(stdout: bytes, stderr: bytes) -> dict[str, Any]:
    """`stdout`, `stderr` and `encoding`: text when both are UTF-8, else base64 for both."""
    try:
        return {"stdout": stdout.decode(), "stderr": stderr.decode(), "encoding": "utf-8"}
    except UnicodeDecodeError:
        both = {"stdout": b64encode(stdout).decode(), "stderr": b64encode(stderr).decode()}
        return {**both, "encoding": "base64"}


def given(value: T | None) -> T | UnsetType:
    """None as msgspec's "leave it out"."""
    return UNSET if value is None else value


def optional_time(moment: datetime | None) -> str | UnsetType:
    """A time that may be absent."""
    return UNSET if moment is None else timestamp(moment)


class Sandbox(Struct, kw_only=True):
    """A sandbox."""

    id: str
    status: SandboxStatus
    template: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    timeout_sec: int
    host_id: str | UnsetType = UNSET
    host_ip: str | UnsetType = UNSET
    metadata: dict[str, str] | UnsetType = UNSET
    created_at: Timestamp
    started_at: Timestamp | UnsetType = UNSET
    last_active_at: Timestamp | UnsetType = UNSET
    last_updated: Timestamp
    reason: Annotated[str, Meta(description="Why it is in this status, for people.")] | UnsetType = UNSET

    @classmethod
    def of(cls, view: SandboxView) -> Sandbox:
        return cls(
            id=ids.sandbox_id(view.id),
            status=view.status,
            template=view.template,
            vcpus=view.vcpus,
            memory_mb=view.memory_mb,
            disk_mb=view.disk_mb,
            timeout_sec=view.timeout_sec,
            host_id=UNSET if view.host_id is None else ids.host_id(view.host_id),
            host_ip=given(view.host_ip),
            metadata=dict(view.metadata) if view.metadata else UNSET,
            created_at=timestamp(view.created_at),
            started_at=optional_time(view.started_at),
            last_active_at=optional_time(view.last_active_at),
            last_updated=timestamp(view.last_updated),
            reason=given(view.reason),
        )


class ForkFailure(Struct, kw_only=True):
    """Why a child was not made."""

    code: Annotated[str, Meta(description="As in the errors of creating a sandbox.")]
    message: str


class FailedChild(Struct, kw_only=True):
    """In the place of a child that was not made."""

    error: ForkFailure


class ForkedSandboxes(Struct, kw_only=True):
    """The children of a fork, one item for each."""

    items: Annotated[list[Any], Meta(extra_json_schema={"items": FORKED_ITEM})]

    @classmethod
    def of(cls, items: Sequence[Forked]) -> ForkedSandboxes:
        return cls(
            items=[
                Sandbox.of(item)
                if isinstance(item, SandboxView)
                else FailedChild(error=ForkFailure(code=item.code, message=item.message))
                for item in items
            ]
        )


class Execution(Struct, kw_only=True):
    """A command that has ended."""

    sandbox_id: str
    cmd: str
    stdout: Output
    stderr: Output
    exit_code: Annotated[int, Meta(description="128 + the signal's number for a killed command.")]
    duration_ms: int
    encoding: Encoding

    @classmethod
    def of(cls, sandbox_id: str, cmd: str, result: ExecResult) -> Execution:
        return cls(
            sandbox_id=sandbox_id,
            cmd=cmd,
            exit_code=result.exit_code,
            duration_ms=result.duration_ms,
            **printed(result.stdout, result.stderr),
        )


class BackgroundExecution(Struct, kw_only=True):
    """A command that runs on."""

    sandbox_id: str
    cmd: str
    pid: int
    tag: str


class Process(Struct, kw_only=True):
    """A running process that exec started."""

    pid: int
    tag: str | UnsetType = UNSET
    cmd: str
    args: list[str] | UnsetType = UNSET
    user: str
    cwd: str
    background: bool
    started_at: Timestamp

    @classmethod
    def of(cls, view: ProcessView) -> Process:
        return cls(
            pid=view.pid,
            tag=view.tag or UNSET,
            cmd=view.cmd,
            args=UNSET if view.args is None else list(view.args),
            user=view.user,
            cwd=view.cwd,
            background=view.background,
            started_at=timestamp_ns(view.started_ns),
        )


class Processes(Struct, kw_only=True):
    """A page of processes, by pid."""

    items: list[Process]
    next_cursor: str | UnsetType = UNSET


class File(Struct, kw_only=True):
    """A file, a directory, or something else with a name."""

    name: str
    path: str
    type: FileType
    size: int
    mode: Annotated[int, Meta(description="Permission bits: 420 is 0644.")]
    permissions: Annotated[str, Meta(description="As `ls -l` writes them: `-rw-r--r--`.")]
    owner: str
    group: str
    modified_at: Timestamp
    symlink_target: str | UnsetType = UNSET

    @classmethod
    def of(cls, entry: FileEntry) -> File:
        mode = entry.mode & 0o7777
        return cls(
            name=entry.name,
            path=entry.path,
            type=entry.type,
            size=entry.size,
            mode=mode,
            permissions=stat.filemode(_TYPE_BITS[entry.type] | mode),
            owner=entry.owner,
            group=entry.group,
            modified_at=timestamp_ns(entry.modified_ns),
            symlink_target=given(entry.symlink_target),
        )


class Files(Struct, kw_only=True):
    """What a directory holds."""

    entries: list[File]


class MadeDirectory(Struct, kw_only=True):
    """The directory that was made."""

    entry: File


class Template(Struct, kw_only=True):
    """What sandboxes start from."""

    name: str
    type: TemplateType
    vcpus: int | UnsetType = UNSET
    memory_mb: int | UnsetType = UNSET
    size_bytes: int
    platform: Annotated[bool, Meta(description="Ours, for everybody; else your team's.")]
    created_at: Timestamp

    @classmethod
    def of(cls, view: TemplateView) -> Template:
        return cls(
            name=view.name,
            type=view.type,
            vcpus=given(view.vcpus),
            memory_mb=given(view.memory_mb),
            size_bytes=view.size_bytes,
            platform=view.platform,
            created_at=timestamp(view.created_at),
        )


class Health(Struct, kw_only=True):
    """The process answers."""

    status: Literal["ok"]
    version: str


class Ready(Struct, kw_only=True):
    """Requests can be served."""

    status: Literal["ready"]
