"""What comes back: typed, with unknown fields ignored, as the server may be newer. Times are aware and in UTC."""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from msgspec import Struct

Output = Literal["stdout", "stderr"]


class SandboxInfo(Struct, frozen=True, kw_only=True):
    """A sandbox as the server last described it. `status`: pending, starting, running, pausing, paused, resuming,
    stopping, stopped, missing or error; `reason` says why, where it needs saying."""

    id: str
    status: str
    template: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    timeout_sec: int
    created_at: datetime
    last_updated: datetime
    host_id: str | None = None
    host_ip: str | None = None
    metadata: dict[str, str] = {}
    started_at: datetime | None = None
    last_active_at: datetime | None = None
    reason: str | None = None


class ForkFailure(Struct, frozen=True, kw_only=True):
    """In the place of a child that was not made: the error that a create would have met."""

    code: str
    message: str


class ExecResult(Struct, frozen=True, kw_only=True):
    """A command that has ended. `exit_code` is 128 + the signal's number for one that was killed."""

    stdout: bytes
    stderr: bytes
    exit_code: int
    duration_ms: int

    @property
    def text(self) -> str:
        """`stdout` as text; what is not UTF-8 is replaced."""
        return self.stdout.decode("utf-8", "replace")


class StartedProcess(Struct, frozen=True, kw_only=True):
    """A process that was started in the background."""

    pid: int
    tag: str


class ProcessInfo(Struct, frozen=True, kw_only=True):
    """A running process. `args` None: `cmd` is a shell command line."""

    pid: int
    cmd: str
    user: str
    cwd: str
    background: bool
    started_at: datetime
    tag: str | None = None
    args: list[str] | None = None


class ExitStatus(Struct, frozen=True, kw_only=True):
    """How a process ended. `exit_code` is 128 + the number of `signal` for one that was killed."""

    exit_code: int
    duration_ms: int = 0
    signal: int | str | None = None
    timed_out: bool = False


class Chunk(Struct, frozen=True):
    """A piece of output, as it came: `stream` is "stdout" or "stderr"."""

    stream: Output
    data: bytes


class FileEntry(Struct, frozen=True, kw_only=True):
    """A file or directory in a sandbox. `type`: file, directory, symlink or other; `mode`: permission bits."""

    name: str
    path: str
    type: str
    size: int
    mode: int
    permissions: str
    owner: str
    group: str
    modified_at: datetime
    symlink_target: str | None = None


class FileEvent(Struct, frozen=True, kw_only=True):
    """Something happened to a file. `event`: create, write, remove, rename (then `to` is the new path) or chmod;
    `overflow` when more happened than is told (`path` is then the watched one): look for yourself."""

    event: str
    path: str
    to: str | None = None
    directory: bool = False


class Transfer(Struct, frozen=True, kw_only=True):
    """A file or directory that was copied. `bytes`: of the file, or of the tar stream; `sha256`: of a file, in hex;
    `skipped`: names in a downloaded directory that were left out because they are unsafe here (a link to outside of it,
    a device)."""

    bytes: int
    sha256: str | None = None
    skipped: tuple[str, ...] = ()


class Template(Struct, frozen=True, kw_only=True):
    """What sandboxes start from. `type`: base or snapshot; `platform`: not one of your team's, but everybody's."""

    name: str
    type: str
    size_bytes: int
    platform: bool
    created_at: datetime
    vcpus: int | None = None
    memory_mb: int | None = None


class ApiKey(Struct, frozen=True, kw_only=True):
    """An API key without its secret: `prefix` is its first 12 characters."""

    id: str
    name: str
    prefix: str
    created_at: datetime
    last_used: datetime | None = None


class NewApiKey(Struct, frozen=True, kw_only=True):
    """A key at the only moment when all of it is known. Its repr does not have it."""

    id: str
    name: str
    prefix: str
    key: str
    created_at: datetime

    def __repr__(self) -> str:
        return f"NewApiKey(id={self.id!r}, name={self.name!r}, prefix={self.prefix!r})"


class Login(Struct, frozen=True, kw_only=True):
    """A session of a user. `token` is its credential for some hours; its repr does not have it. `team_id`: empty for a
    user without a team."""

    token: str
    user_id: str
    team_id: str
    email: str
    name: str

    def __repr__(self) -> str:
        return f"Login(user_id={self.user_id!r}, team_id={self.team_id!r}, email={self.email!r})"


class Reconnection(Struct, frozen=True, kw_only=True):
    """A terminal's connection was lost and is there again. `attempts`: how many it took; `skipped`: bytes of output
    that were lost because the sandbox keeps no more than its last 64 KiB for somebody who is away."""

    attempts: int
    skipped: int
