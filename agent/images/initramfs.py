"""The initramfs: the guest daemon as `/init` and the few modules it loads before it can mount the root file system.

Not compressed: it is 0.5 MB, and unpacking costs more boot time than reading it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.images.cpio import archive, character_device, directory, regular

if TYPE_CHECKING:
    from collections.abc import Sequence

RECIPE = 1  # raise it when the layout changes: cached archives are made anew
MODULES = "mods"
ORDER = f"{MODULES}/order"


def initramfs(daemon: bytes, modules: Sequence[tuple[str, bytes]]) -> bytes:
    """The archive for `daemon` (a static binary) and `modules`, (file name, uncompressed content) in load order.

    In the guest: `/init`, `/mods/<file name>`, `/mods/order` with one file name a line, and the mount points.
    """
    order = "".join(f"{name}\n" for name, _ in modules)
    return archive(
        [
            directory("dev"),
            # The kernel opens it as the standard streams of /init, before anything is mounted.
            character_device("dev/console", 5, 1),
            directory("proc"),
            directory("sys"),
            directory("new"),
            directory(MODULES),
            *(regular(f"{MODULES}/{name}", content) for name, content in modules),
            regular(ORDER, order.encode()),
            regular("init", daemon, mode=0o755),
        ]
    )
