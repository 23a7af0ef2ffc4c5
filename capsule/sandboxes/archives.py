"""Directories as tar, by the guest's own tar: what is asked of it, and what its end means.

An upload is unpacked beside its directory, checked against what is there, and only then moved in, so that nothing of a
broken one arrives. Files are replaced one by one, each in one step.
"""

from __future__ import annotations

import posixpath
import secrets
from typing import TYPE_CHECKING, Any

from agent.wire.calls import STDERR_CHANNEL, STDOUT_CHANNEL
from capsule import errors
from capsule.sandboxes import guest
from capsule.sandboxes.flow import STALL_SECONDS, next_chunk

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from agent.actor.peer import OpenedStream

ENVS = {"LC_ALL": "C.UTF-8", "TAR_OPTIONS": ""}
"""Messages that we know, names as they are, and no options of somebody else's."""

SHOWN_BYTES = 4096
SHOWN_LINES = 3
"""Of what tar complained about, the end."""

TRAILER_BYTES = 1024
"""Every archive ends in at least two blocks of zeros (POSIX pax, "ustar Interchange Format"): one without was cut."""

MISSING = 127
DIFFERS = 1
"""tar: a file changed while it was read. The archive is sound."""
BROKEN, NOT_A_DIRECTORY, IN_THE_WAY = 65, 72, 73
"""Of UNPACK."""

# Whatever ends the work, be it a SIGKILL to its process group, closes the pipe to a process in a session of its own,
# which then removes what is left of the staging directory.
UNPACK = r"""
target=$1
base=$target
while [ ! -d "$base" ]; do
    if [ -e "$base" ] || [ -L "$base" ]; then echo "$base is not a directory" >&2; exit 72; fi
    base=${base%/*}
    base=${base:-/}
done
if [ "$base" = "$target" ] && [ "$target" != / ]; then
    parent=${target%/*}
    parent=${parent:-/}
    # Beside it, if that is the same file system: whoever watches the directory sees only what arrives.
    if [ "$(stat -L -c %d -- "$target")" = "$(stat -L -c %d -- "$parent")" ]; then base=$parent; fi
fi
staging=${base%/}/$2

in_the_way() { echo "$1 is in the way" >&2; exit 73; }

is_directory() { [ -d "$1" ] && [ ! -L "$1" ]; }

# Directories only meet directories, other things only other things.
check() {
    for entry in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        there=$2/${entry##*/}
        if is_directory "$entry"; then
            if is_directory "$there"; then
                check "$entry" "$there"
            elif [ -e "$there" ] || [ -L "$there" ]; then
                in_the_way "$there"
            fi
        elif [ -e "$entry" ] || [ -L "$entry" ]; then
            if is_directory "$there"; then in_the_way "$there"; fi
        fi
    done
}

move_in() {
    for entry in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        if [ ! -e "$entry" ] && [ ! -L "$entry" ]; then continue; fi
        if is_directory "$entry" && is_directory "$2/${entry##*/}"; then continue; fi
        printf '%s\0' "$entry"
    done | xargs -0 -r mv -f -t "$2" --
    for entry in "$1"/* "$1"/.[!.]* "$1"/..?*; do
        if is_directory "$entry"; then move_in "$entry" "$2/${entry##*/}"; fi
    done
}

{
    (
        set -e
        mkdir -m 700 -- "$staging" "$staging/tree"
        tar -x -p --no-same-owner -f - -C "$staging/tree" || exit 65
        if [ -d "$target" ]; then check "$staging/tree" "$target"; fi
        sync -f "$staging/tree"
        mkdir -p -- "$target"
        move_in "$staging/tree" "${target%/}"
    ) 9>&1 >&2
    echo $?
} | setsid sh -c 'status=$(cat); rm -rf -- "$1"; exit "${status:-1}"' sh "$staging" 2>/dev/null
"""


def packing(path: str) -> dict[str, Any]:
    """The exec whose output is `path` with all below it. Of the root only its own file system."""
    parent, name = posixpath.split(_plain(path))
    what = ["--", name] if name else ["--one-file-system", "--", "."]
    return {"cmd": "tar", "args": ["-C", parent, "-cf", "-", *what], "envs": ENVS, "stdin": False}


async def packed(stream: OpenedStream, path: str) -> AsyncGenerator[bytes]:
    """The archive. Raises when tar could not read everything."""
    complaints = Complaints()
    while (chunk := await next_chunk(stream, STALL_SECONDS)) is not None:
        channel, data = chunk
        if channel == STDOUT_CHANNEL:
            yield data
        elif channel == STDERR_CHANNEL:
            complaints.add(data)
    code = guest.answer(guest.Ended, await stream.reply()).exit_code
    if code not in {0, DIFFERS}:
        raise _explain(code, complaints.text(), f"{path} cannot be packed")


class Unpacking:
    """One upload of an archive into the directory `path`."""

    def __init__(self, path: str) -> None:
        self._path = _plain(path)
        self._staging = f".capsule-{secrets.token_hex(16)}"
        self._complaints = Complaints()

    def question(self) -> dict[str, Any]:
        """The exec whose input is the archive."""
        script = ["-c", UNPACK, "capsule-unpack", self._path, self._staging]
        return {"cmd": "/bin/sh", "args": script, "envs": ENVS, "stdin": True}

    def hear(self, channel: int, data: bytes) -> None:
        """What it says meanwhile."""
        if channel == STDERR_CHANNEL:
            self._complaints.add(data)

    async def checked(self, source: AsyncIterator[bytes]) -> AsyncGenerator[bytes]:
        """`source`, if it ends as an archive does: tar itself takes one that was cut between two files for whole.
        InvalidRequest."""
        end = b""
        async for chunk in source:
            end = chunk[-TRAILER_BYTES:] if len(chunk) >= TRAILER_BYTES else (end + chunk)[-TRAILER_BYTES:]
            yield chunk
        if end != bytes(TRAILER_BYTES):
            raise errors.InvalidRequest("file: not a whole tar archive: its end is missing. Nothing was written.")

    def finish(self, reply: dict[str, Any]) -> None:
        """What came of it; raises unless everything is there."""
        code = guest.answer(guest.Ended, reply).exit_code
        text = self._complaints.text()
        if code == NOT_A_DIRECTORY:
            raise errors.NotADirectory(text)
        if code == IN_THE_WAY:
            raise errors.Conflict(f"{text}: a directory and something else have the same name. Nothing was written.")
        if code != 0:
            raise _explain(code, text, "the archive was not unpacked")


class Complaints:
    """The end of what a command printed on stderr."""

    def __init__(self) -> None:
        self._kept = b""

    def add(self, data: bytes) -> None:
        """More of it."""
        self._kept = (self._kept + data)[-SHOWN_BYTES:]

    def text(self) -> str:
        """Its last lines as one, without what no terminal should be sent."""
        lines = [line.strip() for line in self._kept.decode(errors="replace").splitlines()]
        said = [line for line in lines if line and "Exiting with failure status" not in line]
        return "".join(c for c in "; ".join(said[-SHOWN_LINES:]) if c.isprintable())


def _explain(code: int, text: str, what: str) -> errors.CapsuleError:
    message = f"{what}: {text}" if text else f"{what} (exit code {code})"
    if "No space left on device" in text or "Disk quota exceeded" in text:
        return errors.DiskFull(message)
    if any(reason in text for reason in ("Permission denied", "Read-only file system", "Operation not permitted")):
        return errors.PermissionDenied(message)
    if code == MISSING:
        return errors.Conflict(f"{what}: the sandbox has no tar; install it")
    return errors.InvalidRequest(message) if code == BROKEN else errors.Conflict(message)


def _plain(path: str) -> str:
    """Without what makes no difference; it has no `..`."""
    return posixpath.normpath("/" + path.lstrip("/"))
