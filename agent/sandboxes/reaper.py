"""Pauses sandboxes that nobody has used for their time-out.

Owned by: the daemon's nursery. It keeps nothing: each look begins anew, and all that it can do is to ask. The sandbox's
own life decides, in its turn, and tells how it went.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from agent.wire.faults import Fault

if TYPE_CHECKING:
    from agent.sandboxes.manager import Manager

EVERY = 2.0
"""Seconds from one look to the next."""


async def reap(manager: Manager) -> None:
    """Look and ask, until cancelled."""
    while True:
        await trio.sleep(EVERY)
        for sandbox in manager.all():
            if sandbox.is_idle() and sandbox.commands.idle():
                try:
                    sandbox.pause_idle()
                except Fault:
                    continue  # it ends, or has its hands full
