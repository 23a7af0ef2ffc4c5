"""A host's or guest's fault as an error of the API."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import Status
from capsule import errors

if TYPE_CHECKING:
    from collections.abc import Callable

_ALWAYS: dict[str, Callable[[str], errors.CapsuleError]] = {
    FaultCode.CONFLICT: errors.Conflict,
    FaultCode.DISK_FULL: errors.DiskFull,
    FaultCode.INVALID_ARGUMENT: errors.InvalidRequest,
    FaultCode.IO_ERROR: errors.Conflict,
    FaultCode.IS_A_DIRECTORY: errors.IsADirectory,
    FaultCode.NOT_A_DIRECTORY: errors.NotADirectory,
    FaultCode.NOT_A_FILE: errors.NotAFile,
    FaultCode.NOT_FOUND: errors.NotFound,
    FaultCode.PERMISSION_DENIED: errors.PermissionDenied,
    FaultCode.SIZE_MISMATCH: errors.InvalidRequest,
    FaultCode.SNAPSHOT_DAMAGED: errors.SnapshotDamaged,
    FaultCode.TOO_LARGE: errors.TooLarge,
}


def as_error(fault: Fault, *, not_found: Callable[[str], errors.CapsuleError] = errors.NotFound) -> errors.CapsuleError:
    """The error for `fault`; `not_found` says what it is that a call of this kind can fail to find."""
    match fault.code:
        case FaultCode.NOT_FOUND if fault.details.get("object") == "sandbox":
            return errors.InvalidState("the sandbox no longer runs on its host; its status will say so in a moment")
        case FaultCode.NOT_FOUND if fault.details.get("object") == "snapshot":
            return errors.SnapshotDamaged(fault.message)
        case FaultCode.NOT_FOUND:
            return not_found(fault.message)
        case FaultCode.INVALID_STATE:
            return _invalid_state(fault)
        case FaultCode.TOO_MANY_PROCESSES:
            return errors.TooManyExecs(fault.message, retry_after=1)
        case FaultCode.BUSY | FaultCode.DRAINING:
            return errors.Busy(fault.message, retry_after=2)
        case FaultCode.NO_CAPACITY:
            return errors.NoHostsAvailable(fault.message, retry_after=10)
        case code if code in _ALWAYS:
            return _ALWAYS[code](fault.message)
        case _:
            return errors.HostUnavailable(fault.message, retry_after=2)


def _invalid_state(fault: Fault) -> errors.InvalidState:
    """With the status that the host tells, if it is one."""
    status = fault.details.get("status")
    known = isinstance(status, str) and status in frozenset(Status)
    return errors.InvalidState(fault.message, **({"status": status} if known else {}))
