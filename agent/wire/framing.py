"""Length-prefixed frames out of a byte stream that arrives in any pieces."""

from __future__ import annotations

import struct

from agent.wire.faults import RemoteProtocolError
from agent.wire.limits import MAX_FRAME_BYTES

_PREFIX = struct.Struct(">I")
PREFIX_BYTES = _PREFIX.size


class FrameBuffer:
    """Takes bytes, hands out whole frames. Holds at most one unfinished frame plus what the last feed brought.

    Frames that arrive whole are handed out where they lie, only those cut by the end of a feed are copied: bulk data
    passes through here, and every copy of it shows.
    """

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._partial = bytearray()
        self._data = memoryview(b"")
        self._max = max_frame_bytes

    def __len__(self) -> int:
        return len(self._partial) + len(self._data)

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take received bytes, which must not change before `next_frame` has returned None."""
        self._data = memoryview(bytes(self._data) + bytes(data) if self._data else data)

    def next_frame(self) -> memoryview | None:
        """The next whole frame without its prefix, or None when more bytes are needed.

        Raises:
            RemoteProtocolError: the announced length is 0 or larger than the limit, before its bytes are waited for.
        """
        if self._partial:
            return self._complete()
        if len(self._data) >= PREFIX_BYTES:
            end = self._end(self._data)
            if end <= len(self._data):
                frame = self._data[PREFIX_BYTES:end]
                self._data = self._data[end:]
                return frame
        self._move(len(self._data))
        return None

    def _complete(self) -> memoryview | None:
        """Go on with the frame that the last feed left unfinished."""
        self._move(PREFIX_BYTES - len(self._partial))
        if len(self._partial) < PREFIX_BYTES:
            return None
        end = self._end(self._partial)
        self._move(end - len(self._partial))
        if len(self._partial) < end:
            return None
        frame = memoryview(self._partial)[PREFIX_BYTES:]
        self._partial = bytearray()
        return frame

    def _end(self, data: bytearray | memoryview) -> int:
        length: int = _PREFIX.unpack_from(data)[0]
        if not 0 < length <= self._max:
            raise RemoteProtocolError(f"frame of {length} bytes; 1 to {self._max} are allowed")
        return PREFIX_BYTES + length

    def _move(self, count: int) -> None:
        """Append up to `count` bytes of the feed to the unfinished frame."""
        if count > 0:
            self._partial += self._data[:count]
            self._data = self._data[count:]
