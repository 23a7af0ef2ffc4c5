"""Which images an agent's sandboxes and snapshots need, found in its state directory from outside."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from agent.images.errors import InUseUnknown

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
SANDBOXES = "sandboxes/*/record.json"
SNAPSHOTS = "snapshots/snapshots/*/manifest.json"
ORDER = (SANDBOXES, SNAPSHOTS, SANDBOXES)
"""A snapshot may outlive its sandbox and a sandbox its snapshot: whichever goes while we look, one of them is seen."""


def digests_in_use(state: Path) -> set[str]:
    """The digests of all images that sandboxes and snapshots below `state` name, among others that are no image's.

    Files are searched, not decoded: one that was damaged, and is kept for inspection, still needs its image. The agent
    may run meanwhile. Raises InUseUnknown, naming the file that tells nothing.
    """
    found: set[str] = set()
    for pattern in ORDER:
        for path in state.glob(pattern):
            try:
                digests = DIGEST.findall(path.read_bytes())
            except FileNotFoundError:  # removed since
                continue
            except OSError as err:
                raise InUseUnknown(f"{path} cannot be read ({err}): which image it needs is not known") from err
            if not digests:
                raise InUseUnknown(f"{path} names no image: repair it, or remove what it belongs to")
            found.update(digest.decode() for digest in digests)
    return found
