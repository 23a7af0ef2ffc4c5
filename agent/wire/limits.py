"""Every limit of the protocol, with its reason. A peer that breaks one is a RemoteProtocolError."""

VERSION = 1
"""Protocol version: a HELLO with another major version is refused."""

MAX_FRAME_BYTES = 2 * 1024 * 1024
"""One frame after its length prefix. HTTP bodies are at most 1 MiB of JSON; msgpack is smaller. Bounds what an
unfinished frame can make us hold."""

MAX_DATA_BYTES = 64 * 1024
"""Payload of one DATA frame: larger chunks are slower here (design/stack.md §5) and delay other streams."""

MAX_CHANNEL = 255
"""Highest channel of a stream."""

MAX_DEPTH = 16
"""Nesting of a body."""

MAX_FEATURES = 32
"""Feature names in a HELLO, each at most 64 bytes."""

INITIAL_CREDIT = 256 * 1024
"""Bytes of DATA a peer may send on a fresh stream before we grant more: four chunks, enough to keep a fast link
busy, little enough that a thousand streams that nobody reads cost 256 MiB at worst."""

MAX_CREDIT = 16 * 1024 * 1024
"""Credit a stream can hold; a grant beyond it is an overflow attack or a bug."""

MAX_STREAMS = 2048
"""Streams open at once on one connection, most of them consoles that are quiet. More is refused by the opener before
it reaches the wire."""

MAX_STREAM_ID = 2**31 - 1
"""Stream ids only grow. A connection that has used them up is replaced."""

HELLO_TIMEOUT = 10.0
"""Seconds from connection to the peer's HELLO."""

PING_INTERVAL = 10.0
"""Seconds of silence after which we ask whether the peer lives."""

PING_TIMEOUT = 20.0
"""Seconds an unanswered ping may take before the link counts as dead."""
