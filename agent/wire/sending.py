"""What a link has to send, stream by stream, so that a quiet one does not wait behind another's flood.

Control frames leave first and in order. Streams take turns by deficit round robin; one that had nothing queued comes
before those that had, for the length of one turn (the scheduler of RFC 8290, without its dropping). A stream's own
frames stay in order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

QUANTUM_BYTES = 64 * 1024
"""What a stream may send in one turn: about one full DATA frame."""


@dataclass(slots=True)
class _Flow:
    """One stream's frames. It stays listed, empty, until its turn among the old ones has come: whoever sends much in
    many small pieces is not new each time."""

    parts: deque[tuple[bytes | bytearray, bytes]] = field(default_factory=deque)
    deficit: int = QUANTUM_BYTES


class SendQueue:
    """Frames to be sent. `bytes`: of all of them."""

    __slots__ = ("_control", "_flows", "_new", "_old", "bytes")

    def __init__(self) -> None:
        self.bytes = 0
        self._control: list[bytes | bytearray] = []
        self._flows: dict[int, _Flow] = {}
        self._new: deque[int] = deque()
        self._old: deque[int] = deque()

    def put_control(self, frame: bytes | bytearray) -> None:
        """A frame that passes all streams."""
        self._control.append(frame)
        self.bytes += len(frame)

    def put(self, stream: int, frame: bytes | bytearray, payload: bytes = b"") -> None:
        """A frame behind its stream's earlier ones; `payload` is the rest of it, not copied."""
        flow = self._flows.get(stream)
        if flow is None:
            flow = self._flows[stream] = _Flow()
            self._new.append(stream)
        flow.parts.append((frame, payload))
        self.bytes += len(frame) + len(payload)

    def holds(self, stream: int) -> bool:
        """Whether the stream has frames here."""
        flow = self._flows.get(stream)
        return flow is not None and bool(flow.parts)

    def take(self, limit: int | None = None) -> bytes:
        """The next frames as one piece: all control frames, then streams' until there are `limit` bytes."""
        out = self._control
        size = sum(map(len, out))
        most = self.bytes if limit is None else limit
        while self._flows and size < most:
            turns = self._new or self._old
            number = turns[0]
            flow = self._flows[number]
            if flow.parts and flow.deficit > 0:
                frame, payload = flow.parts.popleft()
                length = len(frame) + len(payload)
                flow.deficit -= length
                size += length
                out += (frame, payload)
            else:
                self._end_turn(turns, number, flow)
        self._control = []
        self.bytes -= size
        return b"".join(out)

    def _end_turn(self, turns: deque[int], number: int, flow: _Flow) -> None:
        turns.popleft()
        if flow.parts:
            flow.deficit += QUANTUM_BYTES
        elif turns is self._old or not self._old:
            del self._flows[number]
            return
        self._old.append(number)
