"""What a sandbox did by itself, on its way to the outbox."""

from __future__ import annotations

from typing import TYPE_CHECKING

import structlog

from agent.sandboxes.made import save

if TYPE_CHECKING:
    from agent.sandboxes.outbox import Event
    from agent.sandboxes.parts import HostParts
    from agent.sandboxes.sandbox import Sandbox

log = structlog.get_logger()


async def tell(parts: HostParts, sandbox: Sandbox, event: Event, reason: str) -> bool:
    """Whether it is in the outbox now: a full disk is no reason for more than a line in the log."""
    try:
        await parts.outbox.append(sandbox.id, event, reason)
    except OSError as err:
        log.warning("outbox_not_written", event_kind=event, error=str(err))
        return False
    sandbox.tell_changed()
    return True


async def tell_pause(parts: HostParts, sandbox: Sandbox) -> None:
    """Put a pause that nobody asked for into the outbox; what fails is done by the next agent, or at the next rest."""
    reason = sandbox.made.record.untold
    if reason and await tell(parts, sandbox, "auto_paused", reason):
        try:
            await save(parts, sandbox.made, untold="")
        except OSError as err:  # then it is told twice
            log.warning("telling_not_noted", error=str(err))
