"""What can go wrong, as the caller sees it. No error holds a credential.

`ApiError` is the server's word, with subclasses for what callers handle; the rest is the client's own.
"""

# ruff: noqa: N818 - each is named for what happened, as the server names them

from __future__ import annotations

import binascii
from base64 import b64decode
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from capsule.client.answers import ExecResult


class CapsuleError(Exception):
    """Base of everything that this library raises by itself."""


class ConfigurationError(CapsuleError):
    """There is no URL, no credential, or a credentials file that cannot be read."""


class ConnectionLost(CapsuleError):
    """The server was not reached, or the connection to it broke, or it was silent for too long.

    Whether the request was carried out is unknown, unless the message says that the server was not reached."""


class IntegrityError(CapsuleError):
    """What arrived is not what was sent: the digests differ, or the file changed while it was read."""


class StreamClosed(CapsuleError):
    """The server ended a stream that had begun, before its process ended.

    `code`: the WebSocket's close code, 4000 + an HTTP status for a typed error. `error_code`: that error's code, such
    as `invalid_state` when the sandbox was paused, `conflict` when somebody else attached or the tag is in use; else
    None.
    """

    def __init__(self, code: int, reason: str, error_code: str | None = None) -> None:
        super().__init__(f"the stream was closed ({code}): {reason or 'no reason given'}")
        self.code = code
        self.reason = reason
        self.error_code = error_code


class CommandFailed(CapsuleError):
    """With `check=True`: the command's exit code is not 0. `result` has all of it."""

    def __init__(self, cmd: str, result: ExecResult) -> None:
        last = result.stderr.decode("utf-8", "replace").strip()[-500:]
        super().__init__(f"{cmd!r} exited with {result.exit_code}" + (f": {last}" if last else ""))
        self.result = result


class ApiError(CapsuleError):
    """The server refused or failed. `status`: HTTP's; `code`: one per cause; `message`: for people; `request_id`: names
    the request in the server's log; `details`: what else stood in the error; `retry_after`: seconds, where it said
    so."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        request_id: str | None = None,
        details: Mapping[str, Any] | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(f"{message} ({code})")
        self.status = status
        self.code = code
        self.message = message
        self.request_id = request_id
        self.details: dict[str, Any] = dict(details or {})
        self.retry_after = retry_after


class InvalidRequest(ApiError):
    """400: an argument is malformed or outside its limits; `details["field"]` names it where there is one."""


class Unauthorized(ApiError):
    """401: the credential is missing, unknown, expired or revoked."""


class Forbidden(ApiError):
    """403: the credential is good, but not for this; also a quota that would be passed."""


class NotFound(ApiError):
    """404: no such sandbox, process, template or file (`code` says which)."""


class Conflict(ApiError):
    """409: something stands in the way."""


class InvalidState(Conflict):
    """409: the sandbox's status does not allow this."""


class TooLarge(ApiError):
    """413: more than the server takes or gives in one piece."""


class RateLimited(ApiError):
    """429: too much at once; `retry_after` says how long to wait, where known."""


class Unavailable(ApiError):
    """503: no host has room, or a part of the platform does not answer; try again."""


class PartialOutput(ApiError):
    """Base of errors that come with what the command printed: `stdout`, `stderr` (bytes), `duration_ms`."""

    @property
    def stdout(self) -> bytes:
        """What it printed until then."""
        return self._output("stdout")

    @property
    def stderr(self) -> bytes:
        """Likewise."""
        return self._output("stderr")

    @property
    def duration_ms(self) -> int:
        """How long it ran."""
        known = self.details.get("duration_ms")
        return known if isinstance(known, int) else 0

    def _output(self, name: str) -> bytes:
        text = self.details.get(name)
        if not isinstance(text, str):
            return b""
        return output_bytes(text, str(self.details.get("encoding", "utf-8")))


class ExecTimeout(PartialOutput):
    """408: the command ran longer than `timeout_sec` and was killed."""


class OutputTooLarge(PartialOutput, TooLarge):
    """413: the command printed more than an answer holds and was killed; use `stream` for such commands."""


_BY_CODE: dict[str, type[ApiError]] = {
    "exec_timeout": ExecTimeout,
    "output_too_large": OutputTooLarge,
    "invalid_state": InvalidState,
}
_BY_STATUS: dict[int, type[ApiError]] = {
    400: InvalidRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    429: RateLimited,
    503: Unavailable,
}
_STANDARD = frozenset({"code", "message", "request_id"})


def output_bytes(text: str, encoding: str) -> bytes:
    """What a command printed, from an answer's text in its `encoding`."""
    if encoding != "base64":
        return text.encode("utf-8", "surrogatepass")
    try:
        return b64decode(text, validate=True)
    except binascii.Error:
        return b""


def api_error(status: int, headers: Mapping[str, str], body: bytes) -> ApiError:
    """The error for an answer that is not a success; also for one that a proxy on the way has written."""
    try:
        said = msgspec.json.decode(body, type=dict[str, Any])["error"]
        details = {name: value for name, value in said.items() if name not in _STANDARD}
        code, message, request_id = str(said["code"]), str(said["message"]), said.get("request_id")
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        code, message, request_id, details = "unknown", f"the server answered {status} without saying why", None, {}
        if 300 <= status < 400:
            message = f"the server sends us on to {headers.get('location', 'nowhere')}: give the URL that it has there"
    return typed_error(status, code, message, request_id=request_id, details=details, retry_after=_retry_after(headers))


def typed_error(status: int, code: str, message: str, **more: Any) -> ApiError:
    """Of the class for its code or status."""
    return (_BY_CODE.get(code) or _BY_STATUS.get(status, ApiError))(status, code, message, **more)


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds; None for none, and for a date, which we are never sent."""
    text = headers.get("retry-after", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 8 else None
