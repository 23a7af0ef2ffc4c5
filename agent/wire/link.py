"""One connection, without I/O: bytes in, events out; calls in, bytes out; the clock is an argument (docs/protocol.md).

`receive_data` returns the frames the driver must act on, already checked against the connection's and the stream's
state; pings, pongs and retired streams are dealt with here. A rule the peer breaks raises RemoteProtocolError and
closes the link for good; a rule we break raises LocalProtocolError and changes nothing.
"""

from __future__ import annotations

from enum import Enum, IntEnum, auto
from typing import TYPE_CHECKING, Any

from agent.wire import limits
from agent.wire.codec import decode, encode, encode_data_header
from agent.wire.faults import FaultCode, LocalProtocolError, RemoteProtocolError
from agent.wire.framing import FrameBuffer
from agent.wire.messages import (
    Cancel,
    Credit,
    Data,
    End,
    Failure,
    Frame,
    Goaway,
    Hello,
    Open,
    Ping,
    Pong,
    Reply,
    StreamFrame,
)
from agent.wire.sending import SendQueue
from agent.wire.streams import StreamBook, StreamEvent, StreamRuleBroken

if TYPE_CHECKING:
    from collections.abc import Iterable


class Role(Enum):
    """Which end of the connection this is."""

    OPENER = auto()
    SERVER = auto()


class LinkState(IntEnum):
    """Where a connection stands."""

    HELLO = auto()
    READY = auto()
    DRAINING = auto()
    CLOSED = auto()


class LinkEvent(IntEnum):
    """What happens to a connection."""

    HELLO = auto()
    FRAME = auto()
    GOAWAY = auto()
    CLOSE = auto()


TRANSITIONS: dict[tuple[LinkState, LinkEvent], LinkState] = {
    (LinkState.HELLO, LinkEvent.HELLO): LinkState.READY,
    (LinkState.READY, LinkEvent.FRAME): LinkState.READY,
    (LinkState.READY, LinkEvent.GOAWAY): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.FRAME): LinkState.DRAINING,
    (LinkState.DRAINING, LinkEvent.GOAWAY): LinkState.DRAINING,
    **{(state, LinkEvent.CLOSE): LinkState.CLOSED for state in LinkState},
}
"""A pair that is not listed is the peer's broken rule."""

_LINK_EVENTS = {Hello: LinkEvent.HELLO, Goaway: LinkEvent.GOAWAY}
_SENT_BY_OPENER = {Data: StreamEvent.DATA_UP, End: StreamEvent.END, Cancel: StreamEvent.CANCEL}
_SENT_BY_SERVER = {Data: StreamEvent.DATA_DOWN, Reply: StreamEvent.FINAL, Failure: StreamEvent.FINAL}


class Link:
    """State of one connection. `now` is monotonic seconds of any epoch."""

    def __init__(
        self,
        role: Role,
        *,
        now: float,
        features: Iterable[str] = (),
        initial_credit: int = limits.INITIAL_CREDIT,
        max_streams: int = limits.MAX_STREAMS,
        max_frame_bytes: int = limits.MAX_FRAME_BYTES,
        max_depth: int = limits.MAX_DEPTH,
    ) -> None:
        """`initial_credit`, `max_streams` (of a server), `max_frame_bytes` and `max_depth` bound what the peer can make
        us hold and do."""
        self._max_depth = max_depth
        self.role = role
        self.state = LinkState.HELLO
        self.peer_hello: Hello | None = None
        self._initial_credit = initial_credit
        self._max_streams = max_streams if role is Role.SERVER else 0
        self._streams: dict[int, StreamBook] = {}
        self._last_id = 0
        self._buffer = FrameBuffer(max_frame_bytes)
        self._out = SendQueue()
        self._began = self._heard = now
        self._ping_sent: float | None = None
        self._ping_nonce = 0
        self._pong_unsent = False
        self._queue(Hello(limits.VERSION, list(features), initial_credit, self._max_streams))

    # --- receiving ---------------------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview, now: float) -> list[Frame]:
        """Take bytes from the peer; return what the driver must act on, in order."""
        if self.state is LinkState.CLOSED:
            raise RemoteProtocolError("the link is closed")
        self._heard = now
        self._buffer.feed(data)
        events: list[Frame] = []
        try:
            while (payload := self._buffer.next_frame()) is not None:
                event = self._receive(decode(payload, self._max_depth))
                if event is not None:
                    events.append(event)
        except StreamRuleBroken as err:
            self.close()
            raise RemoteProtocolError(str(err)) from err
        except RemoteProtocolError:
            self.close()
            raise
        return events

    def _receive(self, frame: Frame) -> Frame | None:
        after = TRANSITIONS.get((self.state, _LINK_EVENTS.get(type(frame), LinkEvent.FRAME)))
        if after is None:
            raise RemoteProtocolError(f"{type(frame).__name__} while the link is {self.state.name}")
        self.state = after
        match frame:
            case Hello():
                return self._receive_hello(frame)
            case Goaway():
                return frame
            case Ping(nonce=nonce):
                if self._pong_unsent:
                    raise RemoteProtocolError("PING before the last one was answered")
                self._pong_unsent = True
                self._queue(Pong(nonce))
                return None
            case Pong(nonce=nonce):
                if self._ping_sent is None or nonce != self._ping_nonce:
                    raise RemoteProtocolError("PONG nobody asked for")
                self._ping_sent = None
                return None
            case Open():
                return self._receive_open(frame)
            case _:
                return self._receive_on_stream(frame)

    def _receive_hello(self, hello: Hello) -> Hello:
        if hello.version != limits.VERSION:
            raise RemoteProtocolError(f"peer speaks version {hello.version}, we speak {limits.VERSION}")
        self.peer_hello = hello
        return hello

    def _receive_open(self, frame: Open) -> Open:
        if self.role is not Role.SERVER:
            raise RemoteProtocolError("OPEN from the server")
        if frame.stream <= self._last_id:
            raise RemoteProtocolError(f"stream id {frame.stream} after {self._last_id}")
        if len(self._streams) >= self._max_streams:
            raise RemoteProtocolError(f"more than {self._max_streams} streams at once")
        self._last_id = frame.stream
        self._add_stream(frame.stream)
        return frame

    def _receive_on_stream(self, frame: StreamFrame) -> Frame | None:
        book = self._streams.get(frame.stream)
        if book is None:
            if self.role is Role.SERVER and frame.stream <= self._last_id and _may_be_late(frame):
                return None
            raise RemoteProtocolError(f"{type(frame).__name__} for stream {frame.stream}, which is not open")
        book.apply(self._event_from_peer(frame))
        match frame:
            case Data(data=data):
                book.spend_receive(len(data))
            case Credit(amount=amount):
                book.earn_send(amount)
            case Reply() | Failure():
                del self._streams[frame.stream]
        return frame

    def _event_from_peer(self, frame: StreamFrame) -> StreamEvent:
        from_opener = self.role is Role.SERVER
        if isinstance(frame, Credit):
            return StreamEvent.CREDIT_UP if from_opener else StreamEvent.CREDIT_DOWN
        event = (_SENT_BY_OPENER if from_opener else _SENT_BY_SERVER).get(type(frame))
        if event is None:
            raise RemoteProtocolError(f"{type(frame).__name__} from the wrong side")
        return event

    # --- sending -----------------------------------------------------------------------------------------------

    def open_stream(self, method: str, body: dict[str, Any], *, timeout_ms: int = 0) -> int:
        """Ask the server for `method`; returns the stream's id."""
        if self.role is not Role.OPENER or self.state is not LinkState.READY or self.peer_hello is None:
            raise LocalProtocolError(f"cannot open a stream as {self.role.name} while {self.state.name}")
        if self.ids_used_up() or len(self._streams) >= self.peer_hello.max_streams:
            raise LocalProtocolError("no stream id or no room left on this connection")
        self._queue(Open(self._last_id + 1, method, body, timeout_ms))
        self._last_id += 1
        self._add_stream(self._last_id)
        return self._last_id

    def send_data(self, stream: int, channel: int, data: bytes) -> None:
        """Send 1 … MAX_DATA_BYTES bytes within `send_credit(stream)`."""
        if not 0 < len(data) <= limits.MAX_DATA_BYTES or not 0 <= channel <= limits.MAX_CHANNEL:
            raise LocalProtocolError(f"DATA of {len(data)} bytes on channel {channel}")
        up = self.role is Role.OPENER
        book = self._apply(stream, StreamEvent.DATA_UP if up else StreamEvent.DATA_DOWN)
        try:
            book.spend_send(len(data))
        except StreamRuleBroken as err:
            raise LocalProtocolError(str(err)) from err
        self._out.put(stream, encode_data_header(stream, channel, len(data)), data)

    def send_end(self, stream: int) -> None:
        """Opener: no more DATA from us."""
        self._apply(stream, StreamEvent.END, only=Role.OPENER)
        self._out.put(stream, encode(End(stream)))

    def cancel(self, stream: int) -> None:
        """Opener: no answer wanted any more; wait for the last frame nevertheless."""
        self._apply(stream, StreamEvent.CANCEL, only=Role.OPENER)
        self._out.put(stream, encode(Cancel(stream)))

    def grant(self, stream: int, amount: int) -> None:
        """We have consumed `amount` received bytes: let the peer send that many more."""
        up = self.role is Role.OPENER
        book = self._apply(stream, StreamEvent.CREDIT_UP if up else StreamEvent.CREDIT_DOWN)
        try:
            book.earn_receive(amount)
        except StreamRuleBroken as err:
            raise LocalProtocolError(str(err)) from err
        self._queue(Credit(stream, amount))

    def reply(self, stream: int, body: dict[str, Any]) -> None:
        """Server: success, last frame."""
        self._finish(Reply(stream, body))

    def fail(self, frame: Failure) -> None:
        """Server: failure, last frame."""
        self._finish(frame)

    def _finish(self, frame: Reply | Failure) -> None:
        if self.role is not Role.SERVER or frame.stream not in self._streams:
            raise LocalProtocolError(f"stream {frame.stream} is not ours to answer")
        self._out.put(frame.stream, encode(frame))
        del self._streams[frame.stream]

    def goaway(self, code: str, message: str) -> None:
        """Announce that we take (server) or open (opener) no new streams."""
        self._queue(Goaway(code, message))
        if self.state is LinkState.READY:
            self.state = LinkState.DRAINING

    @property
    def bytes_to_send(self) -> int:
        """Bytes queued."""
        return self._out.bytes

    def has_queued(self, stream: int) -> bool:
        """Whether frames of the stream wait to be sent."""
        return self._out.holds(stream)

    def data_to_send(self, limit: int | None = None) -> bytes:
        """Take what is queued, or about `limit` bytes of it, to be written in one piece; see SendQueue."""
        self._pong_unsent = False
        return self._out.take(limit)

    # --- state, timers ------------------------------------------------------------------------------------------

    def has_stream(self, stream: int) -> bool:
        """Whether the stream is not retired yet."""
        return stream in self._streams

    def open_streams(self) -> int:
        """Streams not retired yet."""
        return len(self._streams)

    def ids_used_up(self) -> bool:
        """Whether no stream can be opened any more, ever."""
        return self._last_id >= limits.MAX_STREAM_ID

    def send_credit(self, stream: int) -> int:
        """Bytes we may send on this stream now (0 when it is gone)."""
        book = self._streams.get(stream)
        return book.send_credit if book is not None else 0

    def close(self) -> None:
        """Nothing is accepted any more."""
        self.state = TRANSITIONS[self.state, LinkEvent.CLOSE]

    def next_timer(self) -> float:
        """When `handle_timer` must be called at the latest."""
        if self.state is LinkState.HELLO:
            return self._began + limits.HELLO_TIMEOUT
        if self._ping_sent is not None:
            return self._ping_sent + limits.PING_TIMEOUT
        return self._heard + limits.PING_INTERVAL

    def handle_timer(self, now: float) -> None:
        """Ask a silent peer whether it lives; RemoteProtocolError when it had its chance."""
        if now < self.next_timer():
            return
        if self.state is LinkState.HELLO or self._ping_sent is not None:
            self.close()
            raise RemoteProtocolError(f"peer silent: {FaultCode.DEADLINE_EXCEEDED}")
        self._ping_nonce = (self._ping_nonce + 1) % 2**32
        self._ping_sent = now
        self._queue(Ping(self._ping_nonce))

    def excuse(self, now: float) -> None:
        """The peer could not answer until now, through no fault of its own: its time begins anew."""
        self._heard = now
        if self._ping_sent is not None:
            self._ping_sent = now

    def _add_stream(self, stream: int) -> None:
        assert self.peer_hello is not None  # noqa: S101 - a frame before HELLO was refused above
        self._streams[stream] = StreamBook(self.peer_hello.initial_credit, self._initial_credit)

    def _apply(self, stream: int, event: StreamEvent, *, only: Role | None = None) -> StreamBook:
        if only not in {None, self.role}:
            raise LocalProtocolError(f"{event.name} by the {self.role.name}")
        book = self._streams.get(stream)
        if book is None:
            raise LocalProtocolError(f"stream {stream} is not open")
        try:
            book.apply(event)
        except StreamRuleBroken as err:
            raise LocalProtocolError(str(err)) from err
        return book

    def _queue(self, frame: Frame) -> None:
        """A frame that passes the streams' own: what is small, and an OPEN, for ids must grow."""
        self._out.put_control(encode(frame))


def _may_be_late(frame: StreamFrame) -> bool:
    """Frames the opener may have sent before it saw our last one."""
    return isinstance(frame, Data | End | Credit | Cancel)
