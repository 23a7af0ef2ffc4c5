"""The frames of the protocol, one class each. On the wire a frame is a msgpack array whose first element is the tag.

Roles: the *opener* dialled the connection and opens streams; the *server* answers them. Every stream gets exactly one
REPLY or FAULT from the server, also after CANCEL; only then is its id retired. docs/protocol.md has the whole story.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from agent.wire import limits

StreamId = Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_STREAM_ID)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Nonce = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
Body = dict[str, Any]


class _Frame(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """Positional on the wire; an element too many or too few is refused."""


class Hello(_Frame, frozen=True, tag=0):
    """First frame of both sides. `initial_credit`: DATA bytes the receiver may send on each new stream.
    `max_streams`: streams the sender serves at once (0 from an opener)."""

    version: Annotated[int, msgspec.Meta(ge=0, le=2**16)]
    features: Annotated[list[Name], msgspec.Meta(max_length=limits.MAX_FEATURES)]
    initial_credit: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_CREDIT)]
    max_streams: Annotated[int, msgspec.Meta(ge=0, le=2**20)]


class Open(_Frame, frozen=True, tag=1):
    """Opener asks for `method`. `timeout_ms`: what is left until the asker's deadline, 0 for none; the server gives
    up by itself then. Ids grow strictly."""

    stream: StreamId
    method: Name
    body: Body
    timeout_ms: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class Data(_Frame, frozen=True, tag=2):
    """Bytes of a stream, both ways, within the credit the receiver granted. What a `channel` means is the method's."""

    stream: StreamId
    channel: Annotated[int, msgspec.Meta(ge=0, le=limits.MAX_CHANNEL)]
    data: Annotated[bytes, msgspec.Meta(min_length=1, max_length=limits.MAX_DATA_BYTES)]


class End(_Frame, frozen=True, tag=3):
    """Opener has no more DATA for this stream. (The server's end is its REPLY or FAULT.)"""

    stream: StreamId


class Reply(_Frame, frozen=True, tag=4):
    """The server's success: last frame of the stream."""

    stream: StreamId
    body: Body


class Failure(_Frame, frozen=True, tag=5):
    """The server's failure: last frame of the stream. `message` is fit for the end user."""

    stream: StreamId
    code: Name
    message: Text
    retryable: bool
    details: Body


class Credit(_Frame, frozen=True, tag=6):
    """The receiver of DATA read `amount` bytes: the sender may send that many more."""

    stream: StreamId
    amount: Annotated[int, msgspec.Meta(ge=1, le=limits.MAX_CREDIT)]


class Cancel(_Frame, frozen=True, tag=7):
    """Opener wants no answer any more. The server stops the work and still answers (usually FAULT `cancelled`)."""

    stream: StreamId


class Ping(_Frame, frozen=True, tag=8):
    """Is the peer alive? At most one may be unanswered."""

    nonce: Nonce


class Pong(_Frame, frozen=True, tag=9):
    """Answer to the PING with this nonce."""

    nonce: Nonce


class Goaway(_Frame, frozen=True, tag=10):
    """The sender takes (server) or opens (opener) no new streams; open ones go on to their end."""

    code: Name
    message: Text


Frame = Hello | Open | Data | End | Reply | Failure | Credit | Cancel | Ping | Pong | Goaway
StreamFrame = Open | Data | End | Reply | Failure | Credit | Cancel
