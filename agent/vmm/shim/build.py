"""Builds the preloaded library: one file, named after its source, for any number of agents and VMs."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("pages.c")

COMPILER = "gcc"
COMPILER_PACKAGES = "gcc libc6-dev"
COMPILE_TIMEOUT = 60.0

FLAGS = (
    *("-std=c11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-s"),
    *("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wvla"),
    *("-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-Wl,-z,relro,-z,now"),
)

NAME_DIGITS = 16

SEPARATORS = frozenset(" :;")
"""What ends a file's name in LD_PRELOAD; there is no way to escape it."""


class ShimError(Exception):
    """The library cannot be had; the message says what to do."""


def shim_name() -> str:
    """Return the file's name: it changes when the library may change."""
    digest = hashlib.sha256("\0".join((COMPILER, *FLAGS)).encode() + SOURCE.read_bytes())
    return f"pages-{digest.hexdigest()[:NAME_DIGITS]}.so"


def find_shim(directory: Path) -> Path:
    """Return the library in `directory`, built now if it is not there; readable by everybody.

    Blocks for a second when it has to build. Raises ShimError.
    """
    path = directory.absolute() / shim_name()
    if SEPARATORS & set(str(path)):
        raise ShimError(f"{path} cannot be preloaded: choose a directory without spaces and colons")
    try:
        if not path.exists():
            _build(path)
    except OSError as error:
        raise ShimError(f"{path} could not be made: {error}") from error
    return path


def _build(path: Path) -> None:
    """Compile to a name of our own first: of two agents that build at once, both end with a whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.parent.chmod(0o755)  # whatever our umask is
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        output = Path(scratch) / path.name
        _run([COMPILER, *FLAGS, "-o", str(output), str(SOURCE)])
        output.chmod(0o644)
        descriptor = os.open(output, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        output.replace(path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False)
    except FileNotFoundError as error:
        raise ShimError(
            f"{COMPILER} is not installed; on Debian and Ubuntu: apt-get install {COMPILER_PACKAGES}"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ShimError(f"{COMPILER} took longer than {COMPILE_TIMEOUT:.0f} s") from error
    if done.returncode != 0:
        raise ShimError(f"{COMPILER} failed:\n{done.stderr}")


def main(arguments: list[str]) -> int:
    """`python -m agent.vmm.shim.build DIRECTORY`: print where it is. Returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m agent.vmm.shim.build DIRECTORY\n")
        return 2
    try:
        sys.stdout.write(f"{find_shim(Path(arguments[0]))}\n")
    except ShimError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
