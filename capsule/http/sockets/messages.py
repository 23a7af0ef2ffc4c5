"""The text messages of the streams, both ways: JSON objects told apart by `type`. Unknown types and fields are refused;
the limits are those of fields.py."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from capsule.errors import InvalidRequest
from capsule.http import fields
from capsule.model import FileEventKind

Columns = Annotated[int, Meta(ge=1, le=4096, description="Of a terminal, in characters.")]
SignalNumber = Annotated[int, Meta(ge=1, le=64)]
Offset = Annotated[int, Meta(ge=0, le=2**63 - 1, description="Bytes of output that you have; more follow from there.")]
ProcessName = Annotated[str, Meta(pattern=fields.PROCESS, description="A pid, or the tag given to exec.")]
Token = Annotated[str, Meta(min_length=1, max_length=8192)]
Framing = Literal["json", "binary"]

SHOWN = 200
"""Characters of a refusal; a part of it may be the client's own text."""

_FIELD = re.compile(r"`\$\.([A-Za-z_]+)|(?:field|`) ?`([^`]*)`")


class In(Struct, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """What a client sends."""


class Auth(In, kw_only=True, tag="auth"):
    """First, from a client that cannot set headers: a session's token or an API key."""

    token: Token


class ExecStart(In, kw_only=True, tag="start"):
    """A process to be started, with the fields of POST …/exec."""

    cmd: fields.Command
    args: fields.Arguments | UnsetType = UNSET
    envs: fields.Envs = {}
    cwd: fields.Path | UnsetType = UNSET
    user: fields.UserName | UnsetType = UNSET
    timeout_sec: fields.ExecTimeoutSec | UnsetType = UNSET
    detach: bool = False
    tag: fields.Tag | UnsetType = UNSET
    framing: Framing = "json"


class TerminalStart(In, kw_only=True, tag="start"):
    """A terminal to be opened. Without `cmd`: the user's login shell."""

    cmd: fields.Command | UnsetType = UNSET
    args: fields.Arguments | UnsetType = UNSET
    cols: Columns = 80
    rows: Columns = 24
    envs: fields.Envs = {}
    cwd: fields.Path | UnsetType = UNSET
    user: fields.UserName | UnsetType = UNSET
    tag: fields.Tag | UnsetType = UNSET
    framing: Framing = "binary"


class TerminalConnect(In, kw_only=True, tag="connect"):
    """A terminal that was opened before."""

    tag: ProcessName
    offset: Offset | UnsetType = UNSET
    cols: Columns | UnsetType = UNSET
    rows: Columns | UnsetType = UNSET
    framing: Framing = "binary"


class WatchStart(In, kw_only=True, tag="start"):
    """A file or directory to be watched."""

    path: fields.Path
    recursive: bool = False


class Stdin(In, kw_only=True, tag="stdin"):
    """For the process's input: `data` as UTF-8, or any bytes in base64."""

    data: str | UnsetType = UNSET
    data_b64: bytes | UnsetType = UNSET

    def content(self) -> bytes:
        """The bytes; InvalidRequest unless given exactly once."""
        if isinstance(self.data, str) and self.data_b64 is UNSET:
            return self.data.encode()
        if isinstance(self.data_b64, bytes) and self.data is UNSET:
            return self.data_b64
        raise InvalidRequest("stdin takes either `data` or `data_b64`.", field="data")


class CloseStdin(In, kw_only=True, tag="close_stdin"):
    """The input ends here."""


class Input(In, kw_only=True, tag="input"):
    """Typed into a terminal, in base64."""

    data: bytes


class Signal(In, kw_only=True, tag="signal"):
    """To the process group."""

    signal: fields.Signal | SignalNumber

    def number(self) -> int:
        """Of the signal."""
        if isinstance(self.signal, int):
            return self.signal
        return fields.SIGNAL_NUMBERS.get(self.signal) or int(self.signal)


class Stop(In, kw_only=True, tag="stop"):
    """SIGKILL to the process group."""


class Kill(In, kw_only=True, tag="kill"):
    """The same, of a terminal."""


class Resize(In, kw_only=True, tag="resize"):
    """The terminal has another size."""

    cols: Columns
    rows: Columns


Control = Auth | Signal | Stop | Kill | Resize
ExecMessage = ExecStart | Stdin | CloseStdin | Control
TerminalMessage = TerminalStart | TerminalConnect | Input | Control
AttachedMessage = Stdin | CloseStdin | Input | Control
WatchMessage = WatchStart | Stop


class Out(Struct, kw_only=True, tag_field="type", omit_defaults=True):
    """What we send. Fields that have their default are left out."""


class Started(Out, kw_only=True, tag="start"):
    """A process runs. All behind `tag` when it was attached to."""

    pid: int
    tag: str
    pty: bool | UnsetType = UNSET
    offset: int | UnsetType = UNSET
    skipped: int | UnsetType = UNSET
    replay: int | UnsetType = UNSET
    ended: bool | UnsetType = UNSET


class TerminalStarted(Out, kw_only=True, tag="started"):
    """A terminal is attached."""

    tag: str
    pid: int
    offset: int | UnsetType = UNSET
    skipped: int | UnsetType = UNSET


class Printed(Out, kw_only=True):
    """Base of what a process printed: `data`, or `data_b64` where it is no UTF-8."""

    data: str | UnsetType = UNSET
    data_b64: bytes | UnsetType = UNSET


class Stdout(Printed, kw_only=True, tag="stdout"):
    """To its standard output."""


class Stderr(Printed, kw_only=True, tag="stderr"):
    """To its standard error."""


class Output(Out, kw_only=True, tag="output"):
    """Of a terminal, in base64."""

    data: bytes


class Exit(Out, kw_only=True, tag="exit"):
    """How the process ended; nothing follows."""

    exit_code: int
    signal: int | UnsetType = UNSET
    timed_out: bool | UnsetType = UNSET
    duration_ms: int


class WatchStarted(Out, kw_only=True, tag="started"):
    """What happens from now on is told."""


class Happened(Out, kw_only=True, tag="event"):
    """Something happened to a file."""

    event: FileEventKind
    path: str
    to: str | UnsetType = UNSET
    directory: bool = False


class Overflow(Out, kw_only=True, tag="overflow"):
    """More happened than is told: look for yourself."""


class WatchEnd(Out, kw_only=True, tag="end"):
    """What was watched is gone."""

    reason: Literal["removed"]


class ErrorMessage(Out, kw_only=True, tag="error"):
    """Why the close frame follows: as in an HTTP answer's `error`."""

    code: str
    data: str


M = TypeVar("M")


class Parser:
    """Of one set of messages."""

    def __init__(self, kinds: Any) -> None:
        self._decoder = msgspec.json.Decoder(kinds)

    def parse(self, data: bytes) -> Any:
        """One of the structs; InvalidRequest says what is wrong with a message that is none of them."""
        try:
            return self._decoder.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as err:
            said = str(err)[:SHOWN].encode(errors="replace").decode()
            refusal = InvalidRequest(f"The message is refused: {said}.")
            if found := _FIELD.search(said):
                refusal.extra["field"] = found[1] or found[2]
            raise refusal from None


AUTH = Parser(Auth | Stop)
"""Of one struct alone msgspec would not ask for the `type`."""
EXEC = Parser(ExecMessage)
TERMINAL = Parser(TerminalMessage)
ATTACHED = Parser(AttachedMessage)
WATCH = Parser(WatchMessage)


def encode(message: Out) -> bytes:
    """As a text frame's payload."""
    return msgspec.json.encode(message)
