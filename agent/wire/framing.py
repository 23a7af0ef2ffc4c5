"""Length-prefixed frames out of a byte stream that arrives in any pieces."""

from __future__ import annotations

from agent.wire.faults import RemoteProtocolError
from agent.wire.limits import MAX_FRAME_BYTES

PREFIX_BYTES = 4
_COMPACT_AT = 256 * 1024


class FrameBuffer:
    """Collects bytes, hands out whole frames. Holds at most one unfinished frame plus what the last feed brought."""

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._bytes = bytearray()
        self._start = 0
        self._max = max_frame_bytes

    def __len__(self) -> int:
        return len(self._bytes) - self._start

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Append received bytes."""
        self._bytes += data

    def next_frame(self) -> bytes | None:
        """The next whole frame without its prefix, or None when more bytes are needed.

        Raises:
            RemoteProtocolError: the announced length is 0 or larger than the limit, before its bytes are waited for.
        """
        if len(self) < PREFIX_BYTES:
            return None
        begin = self._start + PREFIX_BYTES
        length = int.from_bytes(self._bytes[self._start : begin], "big")
        if not 0 < length <= self._max:
            raise RemoteProtocolError(f"frame of {length} bytes; 1 to {self._max} are allowed")
        if len(self) < PREFIX_BYTES + length:
            return None
        with memoryview(self._bytes) as view:
            frame = bytes(view[begin : begin + length])
        self._start = begin + length
        if self._start == len(self._bytes):
            self._bytes.clear()
            self._start = 0
        elif self._start > _COMPACT_AT:
            del self._bytes[: self._start]
            self._start = 0
        return frame
