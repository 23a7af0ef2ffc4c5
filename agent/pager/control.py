"""How a call to the pager crosses to its process: names, and errors there and back."""

from __future__ import annotations

from agent.pager.service import (
    ConnectTimeout,
    NotPaged,
    PagerError,
    PagerUnavailable,
    PagingDamaged,
    PagingFailed,
    SnapshotNotOpened,
    SnapshotUnreadable,
    SocketRefused,
)
from agent.wire.faults import Fault, FaultCode

SOCKET = "pager.sock"
"""In the pager's directory; only root may connect."""

_CODES: dict[type[PagerError], FaultCode] = {
    SnapshotUnreadable: FaultCode.SNAPSHOT_DAMAGED,
    SnapshotNotOpened: FaultCode.BUSY,
    SocketRefused: FaultCode.IO_ERROR,
    NotPaged: FaultCode.NOT_FOUND,
    ConnectTimeout: FaultCode.DEADLINE_EXCEEDED,
    PagingFailed: FaultCode.INVALID_STATE,
    PagingDamaged: FaultCode.SNAPSHOT_DAMAGED,
}
_ERRORS = {error.__name__: error for error in _CODES}


def as_fault(error: PagerError) -> Fault:
    """What the process answers with."""
    return Fault(_CODES[type(error)], str(error), details={"error": type(error).__name__})


def as_error(method: str, fault: Fault) -> PagerError:
    """What the agent's caller gets: the same error; what is none of ours says that the pager cannot be talked to."""
    error = _ERRORS.get(str(fault.details.get("error")))
    return (
        PagerUnavailable(f"the pager does not answer {method}: {fault.message}")
        if error is None
        else error(fault.message)
    )
