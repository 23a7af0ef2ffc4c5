"""What clients send: request bodies and query strings. Unknown fields are refused; limits are in fields.py."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule.http import fields
from capsule.http.cursors import CURSOR_FORM, PID_CURSOR_FORM
from capsule.model import SandboxStatus, TemplateType

Cursor = Annotated[str, Meta(pattern=CURSOR_FORM, description="Where the last page ended, as the last answer gave it.")]


PidCursor = Annotated[str, Meta(pattern=PID_CURSOR_FORM, description="`next_cursor` of the last page.")]


class CreateSandboxBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A sandbox to be made. All fields have a default; an empty body is an empty object."""

    template: fields.TemplateName = "minimal"
    vcpus: fields.Vcpus | UnsetType = UNSET
    memory_mb: fields.MemoryMb | UnsetType = UNSET
    timeout_sec: fields.IdleTimeout = 0
    metadata: fields.Metadata = {}
    envs: fields.Envs = {}


class ListSandboxesQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which sandboxes, and which page of them."""

    status: (
        Annotated[
            list[SandboxStatus],
            Meta(
                min_length=1,
                max_length=32,
                description="Only these; repeat it or separate by commas. Without it: all but stopped and error.",
            ),
        ]
        | UnsetType
    ) = UNSET
    limit: fields.Limit = 50
    cursor: Cursor | UnsetType = UNSET


class ExecBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A command to run in a sandbox."""

    cmd: fields.Command
    args: fields.Arguments | UnsetType = UNSET
    envs: fields.Envs = {}
    cwd: fields.Path | UnsetType = UNSET
    user: fields.UserName | UnsetType = UNSET
    stdin: Annotated[fields.Text, Meta(description="What the command reads; without it, nothing.")] | UnsetType = UNSET
    timeout_sec: fields.ExecTimeoutSec | UnsetType = UNSET
    background: Annotated[bool, Meta(description="Answer 202 at once and let the command run on.")] = False
    tag: fields.Tag | UnsetType = UNSET


class ListProcessesQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which page of the processes."""

    limit: fields.Limit = 50
    cursor: PidCursor | UnsetType = UNSET


class SignalQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to end the process."""

    signal: fields.Signal = "SIGKILL"


class PathBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A file or directory in the sandbox."""

    path: fields.Path


class ListFilesBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A directory in the sandbox, and how deep to look."""

    path: fields.Path
    depth: Annotated[int, Meta(ge=1, le=32, description="Levels below it.")] = 1


class ForkBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """How many children; an empty body is an empty object."""

    count: Annotated[int, Meta(ge=1, le=100, description="Children to make.")] = 1


class CreateSnapshotBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A running or paused sandbox, and what its frozen state is called."""

    sandbox_id: fields.SandboxId
    name: fields.TemplateName | UnsetType = UNSET
    pause: Annotated[bool, Meta(description="Pause a running sandbox as well; else it runs on.")] = False


class ListSnapshotsQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which templates, and which page of them."""

    type: Annotated[TemplateType, Meta(description="Only these. Without it: all.")] | UnsetType = UNSET
    limit: fields.Limit = 50
    cursor: Cursor | UnsetType = UNSET
