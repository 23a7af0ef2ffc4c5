"""Running the programs of a build: none may outlive its time or us, and what one says ends up in the error."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

from agent.images.errors import BuildFailed

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

SAID_BYTES = 2000  # of a failed program's output, in the error
# A build that is killed takes its programs with it (pdeathsig, and --kill-child for all that they started), and what
# they mounted was only ever mounted in their own namespace: a later clean-up cannot reach the host's /sys through it.
CONFINED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"),
)


def run(
    argv: Sequence[str],
    *,
    seconds: float,
    stdin: bytes = b"",
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
) -> bytes:
    """Run `argv` and return its standard output; BuildFailed when it is missing, fails, or needs longer."""
    _require(argv[0])
    try:
        done = subprocess.run(argv, input=stdin, capture_output=True, check=False, timeout=seconds, cwd=cwd, env=env)
    except subprocess.TimeoutExpired as err:
        raise BuildFailed(f"{argv[0]} was still running after {seconds:.0f} s") from err
    if done.returncode != 0:
        said = (done.stderr or done.stdout)[-SAID_BYTES:].decode(errors="replace").strip()
        raise BuildFailed(f"{' '.join(argv[:3])} failed ({done.returncode}): {said}")
    return done.stdout


def run_confined(argv: Sequence[str], *, on_line: Callable[[str], None], env: dict[str, str]) -> None:
    """Run a long program that mounts things, handing each line it says to `on_line`; BuildFailed when it fails."""
    _require(argv[0])
    last: list[str] = []
    with subprocess.Popen(
        [*CONFINED, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env
    ) as program:
        assert program.stdout is not None  # noqa: S101 - PIPE was asked for
        try:
            for raw in program.stdout:
                line = raw.decode(errors="replace").rstrip()
                last = [*last[-19:], line]
                on_line(line)
        except BaseException:
            program.kill()
            raise
    if program.returncode != 0:
        raise BuildFailed(f"{argv[0]} failed ({program.returncode}):\n" + "\n".join(last))


def _require(program: str) -> None:
    if shutil.which(program) is None:
        raise BuildFailed(f"{program} is not installed: run scripts/setup, which installs what a build needs")
