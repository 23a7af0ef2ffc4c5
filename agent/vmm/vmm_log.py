"""What a VMM writes to its standard output and error: a small file in the VM's directory."""

from __future__ import annotations

import os
import stat
import weakref
from typing import TYPE_CHECKING

from agent.vmm.text import printable

if TYPE_CHECKING:
    from pathlib import Path

NAME = "vmm.log"

MAX_BYTES = 1024 * 1024
"""Beyond this the file starts again. A guest can make a VMM complain as often as it likes."""

TAIL_BYTES = 4096


class VmmLog:
    """The open file. Held open because the VM's directory may belong to the VM's user, who could replace it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    @classmethod
    def create(cls, directory: Path) -> VmmLog:
        """Create or empty the file. Raises OSError."""
        return cls(_open(directory / NAME, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND))

    @classmethod
    def open(cls, directory: Path) -> VmmLog | None:
        """Open the file that an earlier agent created; None if it cannot be had."""
        try:
            return cls(_open(directory / NAME, os.O_RDWR | os.O_APPEND))
        except OSError:
            return None

    def fileno(self) -> int:
        """The descriptor, for the process that writes. It appends, so that `limit` works."""
        return self._descriptor

    def limit(self) -> None:
        """Empty the file if it has grown beyond MAX_BYTES."""
        if os.fstat(self._descriptor).st_size > MAX_BYTES:
            os.truncate(self._descriptor, 0)

    def tail(self) -> str:
        """Return the last TAIL_BYTES, control characters removed."""
        size = os.fstat(self._descriptor).st_size
        return printable(os.pread(self._descriptor, TAIL_BYTES, max(0, size - TAIL_BYTES))).strip()


def _open(path: Path, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise FileExistsError(f"{path} is not a plain file")
    return descriptor
