"""Every way the control plane can refuse or fail, one class per cause.

A use-case raises one of these; the HTTP layer answers with its `status` and
`{"error": {code, message, request_id, …extra}}`. The base classes are never raised. `message` is written for the end
user: what happened and what to do; it never holds internals. The first line of each docstring is the description in
the OpenAPI document.
"""

# ruff: noqa: N818 - each is named for what happened; `NotFoundError` would say no more than `NotFound`

from __future__ import annotations

from typing import Any, ClassVar


class CapsuleError(Exception):
    """Base of the taxonomy; never raised itself.

    `extra`: JSON values that stand beside `code` and `message`. `retry_after`: seconds after which the same request
    may succeed unchanged (the `Retry-After` header), None when we cannot tell.
    """

    code: ClassVar[str]
    status: ClassVar[int]

    def __init__(self, message: str, *, retry_after: float | None = None, **extra: Any) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after = retry_after
        self.extra: dict[str, Any] = extra


class InvalidRequest(CapsuleError):
    """Something in the request is malformed or outside its limits; `field` names it where there is one."""

    code = "invalid_request"
    status = 400


class IsADirectory(CapsuleError):
    """The path is a directory where a file is needed."""

    code = "is_a_directory"
    status = 400


class NotADirectory(CapsuleError):
    """The path is not a directory where one is needed."""

    code = "not_a_directory"
    status = 400


class NotAFile(CapsuleError):
    """The path is neither a regular file nor a directory: a socket, a device, a pipe."""

    code = "not_a_file"
    status = 400


class Unauthorized(CapsuleError):
    """The credential is missing, malformed, unknown, expired or revoked."""

    code = "unauthorized"
    status = 401


class Forbidden(CapsuleError):
    """The credential is good, but its holder may not do this."""

    code = "forbidden"
    status = 403


class NoTeam(CapsuleError):
    """The credential belongs to no live team."""

    code = "no_team"
    status = 403


class QuotaExceeded(CapsuleError):
    """The team's limit would be passed; `limit` names it."""

    code = "quota_exceeded"
    status = 403


class PermissionDenied(CapsuleError):
    """The sandbox's file system refused the operation."""

    code = "permission_denied"
    status = 403


class NotFound(CapsuleError):
    """No such resource, or not one of this team."""

    code = "not_found"
    status = 404


class ProviderNotFound(CapsuleError):
    """No such identity provider is configured."""

    code = "provider_not_found"
    status = 404


class FileNotFound(CapsuleError):
    """No such file or directory in the sandbox."""

    code = "file_not_found"
    status = 404


class MethodNotAllowed(CapsuleError):
    """The path exists, but not with this method; `Allow` lists those it has."""

    code = "method_not_allowed"
    status = 405


class RequestTimeout(CapsuleError):
    """The request's body did not arrive in time."""

    code = "request_timeout"
    status = 408


class Conflict(CapsuleError):
    """It exists already, or something else stands in the way."""

    code = "conflict"
    status = 409


class DiskFull(CapsuleError):
    """The sandbox's disk is full."""

    code = "disk_full"
    status = 409


class EmailTaken(CapsuleError):
    """There is an account with this e-mail address."""

    code = "email_taken"
    status = 409


class HostHasSandboxes(CapsuleError):
    """Sandboxes live or rest on the host; `sandbox_ids` names them."""

    code = "host_has_sandboxes"
    status = 409


class IdempotencyKeyReused(CapsuleError):
    """The Idempotency-Key was used within 24 hours for a different request."""

    code = "idempotency_key_reused"
    status = 409


class InUse(CapsuleError):
    """Sandboxes depend on it; `sandbox_ids` names them."""

    code = "in_use"
    status = 409


class InvalidState(CapsuleError):
    """The sandbox's status does not allow this."""

    code = "invalid_state"
    status = 409


class SnapshotDamaged(CapsuleError):
    """A file of the sandbox's or template's snapshot is damaged or missing; the message names it. Nothing was lost."""

    code = "snapshot_damaged"
    status = 409


class TooLarge(CapsuleError):
    """The request, or the file in it, is larger than the limit."""

    code = "too_large"
    status = 413


class UnsupportedMediaType(CapsuleError):
    """The body's Content-Type or Content-Encoding is not one this operation takes."""

    code = "unsupported_media_type"
    status = 415


class RangeNotSatisfiable(CapsuleError):
    """The file has none of the bytes in the header `Range`; `size` is how many it has."""

    code = "range_not_satisfiable"
    status = 416


class UpgradeRequired(CapsuleError):
    """The path is a WebSocket: send the headers that ask for one."""

    code = "upgrade_required"
    status = 426


class RateLimited(CapsuleError):
    """Too many attempts; try again after `Retry-After` seconds."""

    code = "rate_limited"
    status = 429


class TooManyExecs(CapsuleError):
    """The sandbox runs as many commands as it can; try again when one has ended."""

    code = "too_many_execs"
    status = 429


class HeaderTooLarge(CapsuleError):
    """The request's head (request line and headers) is larger than the limit."""

    code = "header_too_large"
    status = 431


class Internal(CapsuleError):
    """Something failed on our side; the message says no more than that, our log says all, under the request's id."""

    code = "internal"
    status = 500


class Busy(CapsuleError):
    """More work is waiting than can be taken; try again after `Retry-After` seconds."""

    code = "busy"
    status = 503


class DatabaseUnavailable(CapsuleError):
    """The database does not answer; try again."""

    code = "database_unavailable"
    status = 503


class TokensUnavailable(CapsuleError):
    """The store of registration tokens (Redis) does not answer; try again."""

    code = "tokens_unavailable"
    status = 503


class HostUnavailable(CapsuleError):
    """The sandbox's host cannot be reached; try again."""

    code = "host_unavailable"
    status = 503


class NoHostsAvailable(CapsuleError):
    """No online host has room for this sandbox."""

    code = "no_hosts_available"
    status = 503


class PartialOutput(CapsuleError):
    """Base of failures that carry what a command printed; never raised itself.

    The answer has `stdout`, `stderr`, `encoding` and `duration_ms` inside `error`, encoded like an exec's success.
    """

    def __init__(self, message: str, *, stdout: bytes, stderr: bytes, duration_ms: int) -> None:
        super().__init__(message)
        self.stdout = stdout
        self.stderr = stderr
        self.duration_ms = duration_ms


class ExecTimeout(PartialOutput):
    """The command ran longer than `timeout_sec` and was killed; what it printed so far comes with the error."""

    code = "exec_timeout"
    status = 408


class OutputTooLarge(PartialOutput):
    """The command printed more than an answer can hold and was killed; the first 64 KiB of each stream come along."""

    code = "output_too_large"
    status = 413
