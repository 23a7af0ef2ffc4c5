"""Failures as data: what crosses a process is a code, a message for the end user, and whether to try again."""

from __future__ import annotations

from enum import StrEnum
from typing import Any


class FaultCode(StrEnum):
    """Every code a server of ours answers with; the control plane maps each to one HTTP error."""

    BUSY = "busy"
    CANCELLED = "cancelled"
    CONFLICT = "conflict"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    DISK_FULL = "disk_full"
    DRAINING = "draining"
    INTERNAL = "internal"
    INVALID_ARGUMENT = "invalid_argument"
    INVALID_STATE = "invalid_state"
    IO_ERROR = "io_error"
    IS_A_DIRECTORY = "is_a_directory"
    NOT_A_DIRECTORY = "not_a_directory"
    NOT_A_FILE = "not_a_file"
    NOT_FOUND = "not_found"
    NO_CAPACITY = "no_capacity"
    PERMISSION_DENIED = "permission_denied"
    SIZE_MISMATCH = "size_mismatch"
    SNAPSHOT_DAMAGED = "snapshot_damaged"
    TOO_LARGE = "too_large"
    TOO_MANY_PROCESSES = "too_many_processes"
    UNAVAILABLE = "unavailable"
    UNKNOWN_METHOD = "unknown_method"


class Fault(Exception):  # noqa: N818 - the field's word for a failure that crosses a process
    """A typed failure that may cross the wire.

    `message` is written for the end user and never holds internals; `retryable` says that the same call may succeed
    later unchanged; `details` holds msgpack values for programs.
    """

    def __init__(
        self, code: str, message: str, *, retryable: bool = False, details: dict[str, Any] | None = None
    ) -> None:
        super().__init__(code, message)
        self.code = str(code)
        self.message = message
        self.retryable = retryable
        self.details = details or {}

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


class ProtocolError(Exception):
    """Base of the two ways to break the protocol; never raised itself."""


class LocalProtocolError(ProtocolError):
    """Our own code misused the protocol: a bug. The link's state is unchanged."""


class FrameTooLargeError(LocalProtocolError):
    """What was to be sent does not fit into one frame."""


class RemoteProtocolError(ProtocolError):
    """The peer broke the protocol: the link is unusable and must be closed. Not our bug, never a crash."""
