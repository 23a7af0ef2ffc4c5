"""The life of a sandbox: one table for everybody. The agent and the control plane move along it, the database refuses
every other step (a test compares the two), the docs' diagram is made from it."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """Every status the API shows."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    STOPPING = "stopping"
    STOPPED = "stopped"
    MISSING = "missing"
    ERROR = "error"


FINAL = frozenset({Status.STOPPED, Status.ERROR})
"""No step leads out of these."""

TRANSITIONAL = frozenset({Status.PENDING, Status.STARTING, Status.PAUSING, Status.RESUMING, Status.STOPPING})
"""Somebody is at work; a row that stays here past its deadline is reconciled."""

_STEPS: dict[Status, tuple[Status, ...]] = {
    Status.PENDING: (Status.STARTING, Status.STOPPING, Status.ERROR),
    Status.STARTING: (Status.RUNNING, Status.STOPPING, Status.MISSING, Status.ERROR),
    Status.RUNNING: (Status.PAUSING, Status.STOPPING, Status.MISSING, Status.ERROR),
    Status.PAUSING: (Status.PAUSED, Status.RUNNING, Status.STOPPING, Status.MISSING, Status.ERROR),
    Status.PAUSED: (Status.RESUMING, Status.STOPPING, Status.MISSING, Status.ERROR),
    Status.RESUMING: (Status.RUNNING, Status.PAUSED, Status.STOPPING, Status.MISSING, Status.ERROR),
    Status.STOPPING: (Status.STOPPED, Status.MISSING, Status.ERROR),
    Status.MISSING: (Status.RUNNING, Status.PAUSED, Status.STOPPING, Status.STOPPED, Status.ERROR),
}

TRANSITIONS = frozenset((before, after) for before, afters in _STEPS.items() for after in afters)
"""Every allowed step as (before, after)."""


def may_become(before: Status, after: Status) -> bool:
    """Whether the table has this step."""
    return (before, after) in TRANSITIONS
