"""Length-prefixed frames out of a byte stream that arrives in any pieces."""

from __future__ import annotations

import struct

from agent.wire.faults import RemoteProtocolError
from agent.wire.limits import MAX_FRAME_BYTES

_PREFIX = struct.Struct(">I")
PREFIX_BYTES = _PREFIX.size
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
        begin = self._start + PREFIX_BYTES
        if begin > len(self._bytes):
            return None
        (length,) = _PREFIX.unpack_from(self._bytes, self._start)
        if not 0 < length <= self._max:
            raise RemoteProtocolError(f"frame of {length} bytes; 1 to {self._max} are allowed")
        end = begin + length
        if end > len(self._bytes):
            return None
        with memoryview(self._bytes) as view:
            frame = bytes(view[begin:end])
        self._start = end
        if end == len(self._bytes):
            self._bytes.clear()
            self._start = 0
        elif end > _COMPACT_AT:
            del self._bytes[:end]
            self._start = 0
        return frame
