"""The file a VM's state is kept in."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from agent.vmm.driver import VmDiskFull, VmStateFailed

if TYPE_CHECKING:
    from pathlib import Path


def write_state(target: Path, state: bytes, *, sync: bool) -> None:
    """Write a new file, whole or not at all; blocks. Raises VmStateFailed, VmDiskFull."""
    try:
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb") as file:  # noqa: PTH123 - a descriptor
                file.write(state)
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        except BaseException:
            target.unlink(missing_ok=True)
            raise
    except OSError as error:
        kind = VmDiskFull if error.errno in {errno.ENOSPC, errno.EDQUOT} else VmStateFailed
        raise kind(f"the state could not be written to {target}: {error}") from error
