"""The limits of the API's fields, once: used to check requests and to describe them in the OpenAPI document."""

from __future__ import annotations

import signal
from typing import Annotated

from msgspec import Meta

from agent.wire.calls import MIN_MEMORY_MB
from capsule.http import ids
from capsule.people.names import MAX_NAME, NAME

MAX_TIMEOUT = 31_536_000
"""Seconds a sandbox may idle: a year."""

MAX_EXEC_TIMEOUT = 86_400
"""Seconds a command may run: a day."""

MAX_COMMAND = 32_768
"""Characters of a command, an argument, or a variable's value."""

MAX_PATH_BYTES = 4096
"""A path in a sandbox: Linux's PATH_MAX."""

# `$` alone would let a newline through at the end in Python, but not in ECMAScript: `$(?!\n)` means the same in both.
END = r"$(?!\n)"
NO_NUL = r"^[^\u0000]*$"
TEMPLATE_NAME = rf"^[a-zA-Z0-9][a-zA-Z0-9._-]{{0,63}}{END}"
ENV_NAME = rf"^[A-Za-z_][A-Za-z0-9_]*{END}"
USER_NAME = rf"^[A-Za-z0-9_][A-Za-z0-9_.-]{{0,63}}{END}"
TAG = rf"^[A-Za-z_][A-Za-z0-9._-]{{0,63}}{END}"
HOST_TAG = rf"^[a-zA-Z0-9][a-zA-Z0-9._:=-]{{0,63}}{END}"
PROCESS = rf"^([1-9][0-9]{{0,9}}|[A-Za-z_][A-Za-z0-9._-]{{0,63}}){END}"
SIGNAL_NUMBERS = {member.name: member.value for member in signal.Signals if member.value < 32}
SIGNAL = rf"^([1-9]|[1-5][0-9]|6[0-4]|{'|'.join(sorted(SIGNAL_NUMBERS))}){END}"
ABSOLUTE_PATH = r"^(?![\s\S]*/\.\.(/|$))/[^\u0000]*$"

TemplateName = Annotated[str, Meta(pattern=TEMPLATE_NAME, description="Name of a template.")]
SandboxId = Annotated[str, Meta(pattern=ids.SANDBOX_FORM, description="`sb-` and a UUID, or its 32 hex digits alone.")]
Vcpus = Annotated[
    int, Meta(ge=1, le=64, description="Virtual CPUs. 1 unless given; a snapshot has its own, and no others.")
]
MemoryMb = Annotated[
    int,
    Meta(
        ge=MIN_MEMORY_MB,
        le=1_048_576,
        description="Memory in MiB. 512 unless given; a snapshot has its own, and no other.",
    ),
]
IdleTimeout = Annotated[
    int, Meta(ge=0, le=MAX_TIMEOUT, description="Seconds of idling before it is paused; 0 = never.")
]
MetadataKey = Annotated[str, Meta(min_length=1, max_length=64, pattern=NO_NUL)]
MetadataValue = Annotated[str, Meta(max_length=1024, pattern=NO_NUL)]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue],
    Meta(
        max_length=64,
        description="Your own labels, kept with the sandbox. One has a meaning: `host_tags`, such as `gpu,eu`, asks "
        "for a host that has all of these tags.",
    ),
]
EnvName = Annotated[str, Meta(min_length=1, max_length=256, pattern=ENV_NAME)]
EnvValue = Annotated[str, Meta(max_length=MAX_COMMAND, pattern=NO_NUL)]
Envs = Annotated[dict[EnvName, EnvValue], Meta(max_length=256, description="Environment variables.")]
Command = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_COMMAND,
        pattern=NO_NUL,
        description="Without `args`: a shell command line, run by `/bin/sh -c`. With `args` (even an empty list): "
        "a program, found through PATH.",
    ),
]
Argument = Annotated[str, Meta(max_length=MAX_COMMAND, pattern=NO_NUL)]
Arguments = Annotated[list[Argument], Meta(max_length=1024, description="Arguments of the program `cmd`.")]
UserName = Annotated[str, Meta(pattern=USER_NAME, description="User in the sandbox, by name or number.")]
Tag = Annotated[
    str, Meta(pattern=TAG, description="Your own name for the process; starts with a letter, unlike a pid.")
]
Text = Annotated[str, Meta(pattern=NO_NUL)]
Path = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_PATH_BYTES,
        pattern=ABSOLUTE_PATH,
        description="Absolute path in the sandbox: at most 4096 bytes, no `..` component.",
    ),
]
ExecTimeoutSec = Annotated[
    int,
    Meta(
        ge=1,
        le=MAX_EXEC_TIMEOUT,
        description="Seconds until the command's process group is killed. 30 unless given; a background command "
        "has none unless given.",
    ),
]
Signal = Annotated[
    str, Meta(pattern=SIGNAL, description="A Linux signal by number (1 to 64) or by name, as in `SIGTERM`.")
]
Name = Annotated[
    str,
    Meta(
        min_length=1,
        max_length=MAX_NAME,
        pattern=NAME,
        description="One line that is seen: no control characters, nothing that turns the direction of writing, not "
        "blanks alone.",
    ),
]
"""Of a person, or of a person's API key."""
Limit = Annotated[int, Meta(ge=1, le=200, description="Items on a page.")]
PemText = Annotated[str, Meta(min_length=1, max_length=16_384, pattern=NO_NUL)]
TokenText = Annotated[str, Meta(min_length=1, max_length=8192, pattern=NO_NUL)]
