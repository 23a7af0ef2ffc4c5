"""What a link has to send, stream by stream, so that a quiet one does not wait behind another's flood.

Control frames leave first and in order. Streams take turns, a quantum each (deficit round robin); whoever has nothing
queued and not used up its quantum since its last turn passes those that wait for theirs (after RFC 8290's new flows).
A stream's own frames stay in order.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

QUANTUM_BYTES = 64 * 1024
"""What a stream may send in one turn: about one full DATA frame."""


@dataclass(slots=True)
class _Flow:
    """One stream's frames. It stays listed, empty, until its turn comes: whoever sends much in many small pieces is not
    new each time. `passes`: it is among those that go first."""

    parts: deque[tuple[bytes | bytearray, bytes]] = field(default_factory=deque)
    deficit: int = QUANTUM_BYTES
    passes: bool = False


class SendQueue:
    """Frames to be sent. `bytes`: of all of them."""

    __slots__ = ("_control", "_first", "_flows", "_turns", "bytes")

    def __init__(self) -> None:
        self.bytes = 0
        self._control: list[bytes | bytearray] = []
        self._flows: dict[int, _Flow] = {}
        self._first: deque[_Flow] = deque()
        self._turns: deque[int] = deque()

    def put_control(self, frame: bytes | bytearray) -> None:
        """A frame that passes all streams."""
        self._control.append(frame)
        self.bytes += len(frame)

    def put(self, stream: int, frame: bytes | bytearray, payload: bytes = b"") -> None:
        """A frame behind its stream's earlier ones; `payload` is the rest of it, not copied."""
        flow = self._flows.get(stream)
        if flow is None:
            flow = self._flows[stream] = _Flow()
            self._turns.append(stream)
        if not flow.parts and flow.deficit > 0 and not flow.passes:
            flow.passes = True
            self._first.appendleft(flow)
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
        most = math.inf if limit is None else limit
        while size < most and (flow := self._next()) is not None:
            frame, payload = flow.parts.popleft()
            length = len(frame) + len(payload)
            flow.deficit -= length
            size += length
            out += (frame, payload)
        self._control = []
        self.bytes -= size
        return b"".join(out)

    def _next(self) -> _Flow | None:
        """Whose frame is the next."""
        while self._first:
            flow = self._first[0]
            if flow.parts and flow.deficit > 0:
                return flow
            flow.passes = False
            self._first.popleft()
        while self._turns:
            flow = self._flows[self._turns[0]]
            if not flow.parts:
                del self._flows[self._turns.popleft()]
            elif flow.deficit > 0:
                return flow
            else:
                flow.deficit += QUANTUM_BYTES
                self._turns.rotate(-1)
        return None
