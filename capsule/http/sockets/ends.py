"""How a WebSocket ends: the close frame's code and reason, and the message before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from wsproto.frame_protocol import CloseReason

from capsule.errors import CapsuleError
from capsule.http.errors import internal
from capsule.http.sockets.messages import ErrorMessage, encode

PRIVATE = 4000
"""Added to an HTTP status: 4000 to 4999 are for applications (RFC 6455 §7.4.2)."""

LOST_CODE = int(CloseReason.ABNORMAL_CLOSURE)
"""Never sent: the connection was gone without a close frame."""


@dataclass(frozen=True, slots=True)
class End:
    """`message`: what is sent before the close frame; empty for nothing."""

    code: int
    reason: str = ""
    message: bytes = b""


DONE = End(CloseReason.NORMAL_CLOSURE)
GOING_AWAY = End(CloseReason.GOING_AWAY, "the server shuts down; connect again")


def lost(reason: str) -> End:
    """The client is not there any more, or as good as that."""
    return End(LOST_CODE, reason)


class UnexpectedFrame(Exception):  # noqa: N818 - named for what happened
    """A binary message where none is taken."""


def of_error(error: CapsuleError) -> End:
    """What an HTTP request would have been answered, as an end."""
    message = ErrorMessage(code=error.code, data=error.message)
    return End(PRIVATE + error.status, f"{error.code}: {error.message}", encode(message))


def of_exception(error: Exception) -> End | None:
    """The end for what a handler raised; None for a bug. What passes through nurseries comes in groups: the first of
    ours counts, if there is nothing else."""
    leaves = list(_leaves(error))
    if not all(isinstance(leaf, CapsuleError | UnexpectedFrame) for leaf in leaves):
        return None
    for leaf in leaves:
        if isinstance(leaf, CapsuleError):
            return of_error(leaf)
    return End(CloseReason.UNSUPPORTED_DATA, "this stream takes no binary messages")


def of_bug() -> End:
    """What a client hears of one: nothing about it."""
    error = internal()
    message = ErrorMessage(code=error.code, data=error.message)
    return End(CloseReason.INTERNAL_ERROR, f"{error.code}: {error.message}", encode(message))


def _leaves(error: Exception) -> Iterator[Exception]:
    if isinstance(error, ExceptionGroup):
        for inner in error.exceptions:
            yield from _leaves(inner)
    else:
        yield error
