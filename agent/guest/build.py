"""Builds the guest daemon: one static binary, the same for every image."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

DAEMON = Path(__file__).parent / "daemon"
"""The sources."""

COMPILER = "musl-gcc"
COMPILER_PACKAGE = "musl-tools"
COMPILE_TIMEOUT = 120.0

WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wstrict-prototypes", "-Wmissing-prototypes", "-Wvla")
LANGUAGE = ("-std=c11", "-D_GNU_SOURCE")
_RELEASE = ("-static", "-s", "-Os", "-fstack-protector-strong")
_VERSION_DIGITS = 12


class BuildError(Exception):
    """The guest daemon could not be built; base of the causes."""


class CompilerMissingError(BuildError):
    """There is no C compiler for static guest binaries on this machine."""


class CompileError(BuildError):
    """The compiler refused; the message holds what it said."""


def sources() -> list[Path]:
    """Every C source, in a fixed order."""
    return sorted(DAEMON.glob("*.c"))


def source_digest() -> str:
    """SHA-256 (hex) over names and contents of all sources and headers: changes when the binary may change."""
    digest = hashlib.sha256()
    for path in sorted([*DAEMON.glob("*.c"), *DAEMON.glob("*.h")]):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def build_daemon(output: Path) -> None:
    """Compile the daemon to `output`, which is either whole or as it was.

    Blocks for seconds: call it in a thread.

    Raises:
        CompilerMissingError: with the package to install.
        CompileError: the compiler failed or took longer than two minutes.
    """
    compile_daemon(output, compiler=COMPILER, flags=_RELEASE)


def compile_daemon(output: Path, *, compiler: str, flags: tuple[str, ...]) -> None:
    """As `build_daemon`, with another compiler and flags: tests want sanitizers."""
    version = f'-DCAPSULE_VERSION="{source_digest()[:_VERSION_DIGITS]}"'
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".capsule-") as scratch:
        binary = Path(scratch) / output.name
        command = [compiler, *LANGUAGE, *WARNINGS, *flags, version, "-o", str(binary), *map(str, sources())]
        _run(command)
        binary.replace(output)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT, check=False)
    except FileNotFoundError as err:
        raise CompilerMissingError(
            f"{command[0]} is not installed; on Debian and Ubuntu: apt-get install {COMPILER_PACKAGE}"
        ) from err
    except subprocess.TimeoutExpired as err:
        raise CompileError(f"{command[0]} took longer than {COMPILE_TIMEOUT:.0f} s") from err
    if done.returncode != 0:
        raise CompileError(f"{command[0]} failed:\n{done.stderr}")


def main(arguments: list[str]) -> int:
    """`python -m agent.guest.build OUTPUT`. Returns the exit code."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m agent.guest.build OUTPUT\n")
        return 2
    try:
        build_daemon(Path(arguments[0]))
    except BuildError as err:
        sys.stderr.write(f"{err}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
