"""Asking a host for something until it answers: agents restart in a second or two, and every call may be repeated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.wire import calls
from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule.hosts.answers import parse_answer

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from uuid import UUID

    from capsule.hosts.links import HostLinks

log = structlog.get_logger()

RETRY_PAUSE = 0.5
"""Between tries to reach a host whose agent is away."""
RETRIED = frozenset({FaultCode.UNAVAILABLE, FaultCode.BUSY, FaultCode.DRAINING})
UNCERTAIN = frozenset({FaultCode.UNAVAILABLE, FaultCode.DEADLINE_EXCEEDED, FaultCode.CANCELLED, FaultCode.INTERNAL})
"""After these nobody knows whether it was done: the host has to be asked, or the monitor finds out."""
LOOK_TIMEOUT = 5.0


async def persist(
    links: HostLinks,
    host: UUID,
    method: str,
    body: dict[str, Any],
    *,
    timeout: float,  # noqa: ASYNC109 - travels to the agent
    patience: float,
    check: Callable[[], Awaitable[None]] | None = None,
) -> dict[str, Any]:
    """The answer to a call that may be repeated, within `timeout` seconds; a host that is away or too busy is asked
    again for `patience` seconds. `check` raises a Fault between two tries when nobody wants it any more. Raises Fault.
    """
    now = trio.current_time()
    deadline, give_up_at = now + timeout, now + timeout
    while True:
        left = deadline - trio.current_time()
        try:
            return await links.call(host, method, body, timeout=left)
        except Fault as fault:
            now = trio.current_time()
            give_up_at = min(give_up_at, now + patience)
            if fault.code not in RETRIED or not fault.retryable or now + RETRY_PAUSE * 2 > give_up_at:
                raise
            log.info("call_retried", method=method, code=fault.code, message=fault.message)
        await trio.sleep(RETRY_PAUSE)
        if check is not None:
            await check()


async def look(links: HostLinks, host: UUID, sandbox: UUID) -> calls.SandboxState | Status | None:
    """What the host has of a sandbox: it as it runs, PAUSED, or None when it is neither yet or cannot be asked."""
    try:
        answer = await links.call(host, "host.list", {}, timeout=LOOK_TIMEOUT)
        listing = parse_answer(calls.HostListing, answer)
    except Fault as fault:
        log.info("host_not_looked_at", code=fault.code, message=fault.message)
        return None
    for state in listing.sandboxes:
        if state.sandbox_id == str(sandbox):
            return state if state.status == Status.RUNNING else None
    return Status.PAUSED if str(sandbox) in listing.paused else None
