"""What the agent serves: methods, and the shapes of their bodies (msgpack maps; absent optional fields are left out).

| method | body | reply |
| --- | --- | --- |
| `host.describe` | - | HostDescription |
| `host.list` | - | HostListing |
| `host.watch` | - | never; a DATA notice on channel 3 whenever the listing changed |
| `host.acknowledge` | Acknowledge | - |
| `sandbox.create` | CreateSandbox | SandboxState; the same id again gives the same sandbox |
| `sandbox.destroy` | SandboxRef | - ; also when it is gone already |
| `sandbox.ping` | SandboxRef | - |
| `sandbox.pause` | SandboxRef | SandboxState, `paused`; also when it is paused already |
| `sandbox.resume` | SandboxRef | SandboxState, `running`; also when it runs already |
| `snapshot.create` | CreateSnapshot | SnapshotState; the same id again gives the same snapshot |
| `snapshot.remove` | SnapshotRef | - ; also when it is gone already |
| guest methods of docs/protocol.md | their body plus `sandbox_id`, and `live?` bool | theirs |

`live`: a call that lasts as long as somebody looks on (a console, a download); it takes none of the places that short
calls share. `processes.attach` and `files.watch` always are.

Units: memory and disk in MiB, times in seconds since the epoch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec

from agent.wire.faults import Fault, FaultCode

SandboxId = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")]
"""The UUID alone, lower case: it names directories on the host."""

SnapshotId = SandboxId
"""A UUID of the same form, of a snapshot."""

TemplateName = Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,63}\Z")]

GUEST_METHODS = frozenset(
    {
        "exec",
        "processes.attach",
        "processes.list",
        "processes.resize",
        "processes.signal",
        "files.read",
        "files.watch",
        "files.write",
        "files.list",
        "files.stat",
        "files.mkdir",
        "files.remove",
    }
)
"""Guest methods that the control plane may ask for; the others are the agent's own business."""

LIVE_METHODS = frozenset({"processes.attach", "files.watch"})
"""Those that always last as long as somebody looks on."""

CONTROL_METHODS = frozenset({"processes.list", "processes.resize", "processes.signal"})
"""Those that end or steer what others have started, and must get through when everything is full."""

MIN_MEMORY_MB = 128
"""Debian's kernel runs out of memory while it unpacks its initramfs in 64."""

VMM_MEMORY_MB = 128
"""What a VM costs its host beside the guest's memory: QEMU and, emulated, its translated code (60 to 220 MiB measured).
Agent and scheduler count it alike."""

STDIN_CHANNEL, STDOUT_CHANNEL, STDERR_CHANNEL, NOTICE_CHANNEL = 0, 1, 2, 3
CONTENT_CHANNEL = 0


class _Body(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """Unknown fields are ignored, so that either side may be newer."""


class SandboxRef(_Body, frozen=True, kw_only=True):
    """Names a sandbox."""

    sandbox_id: SandboxId


class GuestCall(SandboxRef, frozen=True, kw_only=True):
    """What the agent reads of a call into a guest; it keeps that to itself."""

    live: bool = False


class CreateSandbox(_Body, frozen=True, kw_only=True):
    """Make a sandbox from a template. `envs` are defaults for every exec; they never touch the host's disk.

    `snapshot_id`: start from that snapshot of this host instead of the base image `template`; `vcpus` and `memory_mb`
    must be the snapshot's. `keep_envs`: a fork, which has the defaults of its source; `envs` is ignored.
    `timeout_sec`: seconds of idleness after which the host pauses it by itself; 0 = never.
    """

    sandbox_id: SandboxId
    template: TemplateName
    vcpus: Annotated[int, msgspec.Meta(ge=1, le=256)]
    memory_mb: Annotated[int, msgspec.Meta(ge=MIN_MEMORY_MB, le=2**22)]
    hostname: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\Z")]
    envs: dict[str, str] = {}
    snapshot_id: SnapshotId | None = None
    keep_envs: bool = False
    timeout_sec: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0


class SandboxState(_Body, frozen=True, kw_only=True):
    """A sandbox as its host knows it. `status`: starting, running, pausing, paused, resuming or stopping.
    `timings_ms`: what each step of the last start, pause or resume took; empty for an adopted sandbox.
    `disk_bytes`: allocated bytes on the host of its disk and snapshot, as of its last pause."""

    sandbox_id: SandboxId
    status: str
    vcpus: int
    memory_mb: int
    disk_mb: int
    host_ip: str = ""
    started_at: float = 0.0
    last_active_at: float = 0.0
    timings_ms: dict[str, float] = {}
    disk_bytes: int = 0


class CreateSnapshot(_Body, frozen=True, kw_only=True):
    """Freeze a running sandbox, which runs on, or a paused one, which stays paused, under a new id."""

    snapshot_id: SnapshotId
    sandbox_id: SandboxId


class SnapshotRef(_Body, frozen=True, kw_only=True):
    """Names a snapshot that `snapshot.create` made."""

    snapshot_id: SnapshotId


class SnapshotState(_Body, frozen=True, kw_only=True):
    """A snapshot that sandboxes can start from. `size_bytes`: allocated bytes, shared ones included.
    `template`: the base image at its bottom. `stopped_ms`: how long the source's vCPUs stood still."""

    snapshot_id: SnapshotId
    template: TemplateName
    vcpus: int
    memory_mb: int
    disk_mb: int
    size_bytes: int
    stopped_ms: float = 0.0


class OutboxEntry(_Body, frozen=True, kw_only=True):
    """Something the host did or saw by itself, kept until acknowledged. `sequence` grows for the host's whole life.

    died: its VM ended. auto_paused: it was idle for its time-out. pause_failed: that did not succeed, it runs on.
    """

    sequence: int
    sandbox_id: SandboxId
    event: Literal["died", "destroyed", "auto_paused", "pause_failed"]
    reason: str
    at: float


class HostListing(_Body, frozen=True, kw_only=True):
    """Everything that lives or rests on the host, and everything it has to tell.

    `sandboxes`: live ones. `paused`: ids of those that rest as a snapshot; they are not among the live ones.
    `snapshots`: what `snapshot.create` made and `snapshot.remove` has not removed.
    """

    sandboxes: list[SandboxState] = []
    outbox: list[OutboxEntry] = []
    paused: list[SandboxId] = []
    snapshots: list[SnapshotId] = []


class Acknowledge(_Body, frozen=True, kw_only=True):
    """Entries up to and including `sequence` are safe in the control plane's database."""

    sequence: int


class TemplateDescription(_Body, frozen=True, kw_only=True):
    """A base image that the host can start from."""

    name: str
    digest: str
    disk_mb: int
    size_bytes: int
    platform: str
    created_at: float


class HostDescription(_Body, frozen=True, kw_only=True):
    """What the host is and has."""

    version: str
    driver: str
    cpu_cores: int
    memory_mb: int
    disk_mb: int
    disk_free_mb: int
    templates: list[TemplateDescription] = []


B = TypeVar("B", bound=msgspec.Struct)


def parse(kind: type[B], body: dict[str, Any]) -> B:
    """A body as `kind`. Raises Fault `invalid_argument` naming the field."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as err:
        raise Fault(FaultCode.INVALID_ARGUMENT, str(err)) from err


def body_of(struct: msgspec.Struct) -> dict[str, Any]:
    """`struct` as a body."""
    body: dict[str, Any] = msgspec.to_builtins(struct)
    return body
