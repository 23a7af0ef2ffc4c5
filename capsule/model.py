"""What the use-cases and the HTTP layer say to each other: plain frozen values, no behaviour, no I/O.

They live below both so that neither needs the other's module. Ids are bare UUIDs here (`sb-…` is the API's spelling),
times are aware datetimes in UTC, sizes are bytes unless the name says otherwise.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, Literal, TypeVar
from uuid import UUID

T = TypeVar("T")

SandboxStatus = Literal[
    "pending",
    "starting",
    "running",
    "pausing",
    "paused",
    "resuming",
    "stopping",
    "stopped",
    "missing",
    "error",
]
FileType = Literal["file", "directory", "symlink", "other"]
TemplateType = Literal["base", "snapshot"]
HostType = Literal["regular", "byoc"]


@dataclass(frozen=True, slots=True)
class Position:
    """Where a page of a newest-first list ended: rows strictly older than (created_at, id) come next."""

    created_at: datetime
    id: UUID


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a list. `after` is the position of its last row when more rows follow, else None."""

    items: tuple[T, ...]
    after: Position | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSandbox:
    """A sandbox to be made; every limit of the API was checked already, the team's quotas were not.

    `vcpus` and `memory_mb` None: the template's, or the smallest usual ones.
    """

    template: str
    vcpus: int | None = None
    memory_mb: int | None = None
    timeout_sec: int
    metadata: Mapping[str, str]
    envs: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class SandboxView:
    """A sandbox as its team sees it. Empty metadata is left out of answers. `reason`: why it is in its status."""

    id: UUID
    status: SandboxStatus
    template: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    timeout_sec: int
    created_at: datetime
    last_updated: datetime
    host_id: UUID | None = None
    host_ip: str | None = None
    metadata: Mapping[str, str] | None = None
    started_at: datetime | None = None
    last_active_at: datetime | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ForkFailure:
    """Why there is no child, in the words of the error that a create would have met."""

    code: str
    message: str


Forked = SandboxView | ForkFailure
"""A child of a fork, or why there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateSnapshot:
    """A sandbox to be frozen under a name (None: one is made up). `pause`: and paused, if it runs."""

    sandbox: UUID
    name: str | None = None
    pause: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecCall:
    """A command to run. `args` None: `cmd` is a line for /bin/sh -c; else (even empty) a program and its arguments.

    `stdin` None: /dev/null. `timeout_sec` None: no time-out (background commands only).
    """

    cmd: str
    args: tuple[str, ...] | None = None
    envs: Mapping[str, str]
    cwd: str | None = None
    user: str | None = None
    stdin: bytes | None = None
    timeout_sec: int | None = 30
    background: bool = False
    tag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecResult:
    """A command that ended by itself. `exit_code` is 128 + signal for one that was killed."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    duration_ms: int


@dataclass(frozen=True, slots=True)
class ExecStarted:
    """A background command that runs now."""

    pid: int
    tag: str


@dataclass(frozen=True, slots=True)
class TerminalSize:
    """Of a terminal, in characters: 1 to 4096 each."""

    cols: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamCall:
    """A process to be started with somebody attached. `args` None: `cmd` is a line for /bin/sh -c; else (even empty) a
    program and its arguments. `cmd` None, with a `terminal` only: the user's login shell.

    `timeout_sec` None: no time-out. `detach`: it outlives the stream; one with a `terminal` always does. `tag` None:
    one is made up.
    """

    cmd: str | None
    args: tuple[str, ...] | None = None
    envs: Mapping[str, str]
    cwd: str | None = None
    user: str | None = None
    timeout_sec: int | None = None
    detach: bool = False
    terminal: TerminalSize | None = None
    tag: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessExit:
    """How a process ended. `exit_code` is 128 + `signal` for one that was killed."""

    exit_code: int
    signal: int | None = None
    duration_ms: int
    timed_out: bool = False


FileEventKind = Literal["create", "write", "remove", "rename", "chmod"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEvent:
    """Something happened to a file. `path`: absolute; `to`: its new path, of a rename."""

    event: FileEventKind
    path: str
    to: str | None = None
    directory: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEvents:
    """What a watch has seen since the last ones. `overflow`: more happened than is told; look for yourself."""

    events: tuple[FileEvent, ...]
    overflow: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class FileContent:
    """A file that is open for reading. `size`: of the whole file, None for one that does not know (a pipe, /proc).

    `version` changes when the file does; None for one without. `chunks`: from the offset that was asked for on."""

    size: int | None
    version: str | None
    chunks: AsyncIterator[bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessView:
    """A process started by exec that still runs. `args` None: `cmd` is a shell command line."""

    pid: int
    tag: str
    cmd: str
    args: tuple[str, ...] | None
    user: str
    cwd: str
    background: bool
    started_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """One file as the guest reports it: all of it is the guest's word. `modified_ns` counts from the epoch."""

    name: str
    path: str
    type: FileType
    size: int
    mode: int
    owner: str
    group: str
    modified_ns: int
    symlink_target: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateView:
    """What sandboxes start from. A base template leaves vcpus and memory open. `id` is only for the cursor."""

    id: UUID
    name: str
    type: TemplateType
    size_bytes: int
    platform: bool
    created_at: datetime
    vcpus: int | None = None
    memory_mb: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HostRegistration:
    """What an agent says when it registers with its one-time token. `csr_pem`: its certificate request."""

    token: str
    address: str
    arch: str
    cpu_cores: int
    memory_mb: int
    disk_gb: int
    csr_pem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class HostView:
    """A host as its owners see it."""

    id: UUID
    type: HostType
    status: str
    created_at: datetime
    address: str | None = None
    arch: str | None = None
    cpu_cores: int | None = None
    memory_mb: int | None = None
    disk_gb: int | None = None
    team_id: UUID | None = None
    provider: str | None = None
    availability_zone: str | None = None
    tags: tuple[str, ...] = ()
    last_heartbeat_at: datetime | None = None
    cordoned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCredentials:
    """What a registered host goes on with; shown once. `token`: host JWT, `refresh_token`: opaque, single use."""

    host: HostView
    token: str
    refresh_token: str
    cert_pem: str
    ca_cert_pem: str
