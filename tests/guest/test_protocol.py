"""The protocol's rules, from the side of an opener that breaks them: its connection is closed, nothing else happens."""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import msgspec
import pytest

from agent.wire import limits
from agent.wire.codec import encode
from agent.wire.messages import Cancel, Credit, Data, End, Failure, Goaway, Hello, Open, Ping, Pong, Reply


def raw(value):
    """Any msgpack value as a frame."""
    payload = value if isinstance(value, bytes) else msgspec.msgpack.encode(value)
    return struct.pack(">I", len(payload)) + payload


def nested(depth):
    """A body `depth` maps deep."""
    body = {}
    for _ in range(depth - 1):
        body = {"a": body}
    return body


def test_hello(guest):
    """The daemon speaks first, with its window and its number of streams."""
    client = guest.connect(greet=False)
    hello = client.next_frame()
    assert hello == Hello(limits.VERSION, [], limits.INITIAL_CREDIT, 1024)


@pytest.mark.parametrize(
    "frame",
    [Open(1, "info", {}, 0), Ping(1), Hello(limits.VERSION + 1, [], 0, 0), Goaway("bye", ""), Data(1, 0, b"x")],
)
def test_the_first_frame_must_be_our_hello(guest, frame):
    """Rule 1."""
    client = guest.connect(greet=False)
    client.next_frame()
    client.send(frame)
    assert client.closed_by_peer()


def test_a_second_hello(client):
    """Rule 1: once."""
    client.send(Hello(limits.VERSION, [], 0, 0))
    assert client.closed_by_peer()


@pytest.mark.parametrize(
    "frames",
    [
        [Open(2, "info", {}, 0), Open(2, "info", {}, 0)],
        [Open(2, "info", {}, 0), Open(1, "info", {}, 0)],
        [Data(1, 0, b"x")],
        [End(1)],
        [Cancel(1)],
        [Credit(1, 1)],
        [Pong(1)],
        [Reply(1, {})],
        [Failure(1, "busy", "", False, {})],
        [Open(1, "files.write", {"path": "/tmp/capsule-never"}, 0), End(1), End(1)],
        [Open(1, "files.write", {"path": "/tmp/capsule-never"}, 0), Cancel(2)],
    ],
)
def test_broken_rules_of_streams(client, frames, tmp_path):
    """Rules 2, 5, 6, 7."""
    frames = [
        Open(f.stream, f.method, {"path": str(tmp_path / "x"), "size": 9}, 0)
        if isinstance(f, Open) and f.method == "files.write"
        else f
        for f in frames
    ]
    client.send(*frames)
    if isinstance(frames[-1], End) and len(frames) == 3:
        return  # the first END may already have retired the stream: then rule 5 holds
    assert client.closed_by_peer()


def test_data_after_end(client):
    """Rule 6, on a stream that is certainly open."""
    stream = client.open("exec", {"cmd": "sleep 60", "stdin": True})
    client.send(End(stream), Data(stream, 0, b"x"))
    assert client.closed_by_peer()


def test_a_second_end(client):
    """Rule 6."""
    stream = client.open("exec", {"cmd": "sleep 60", "stdin": True})
    client.send(End(stream), End(stream))
    assert client.closed_by_peer()


@pytest.mark.parametrize(
    "value",
    [
        b"\xc1",
        b"",
        [],
        {},
        1,
        [99],
        [-1],
        ["0"],
        [True],
        [1, 1, "info", {}],
        [1, 1, "info", {}, 0, 0],
        [1, 0, "info", {}, 0],
        [1, 2**31, "info", {}, 0],
        [1, 1.0, "info", {}, 0],
        [1, True, "info", {}, 0],
        [1, 1, "", {}, 0],
        [1, 1, "m" * 65, {}, 0],
        [1, 1, b"info", {}, 0],
        [1, 1, "info", [], 0],
        [1, 1, "info", None, 0],
        [1, 1, "info", {1: 2}, 0],
        [1, 1, "info", {"a": {b"b": 1}}, 0],
        [1, 1, "info", nested(17), 0],
        [1, 1, "info", {"a": msgspec.msgpack.Ext(5, b"x")}, 0],
        [1, 1, "info", {}, -1],
        [1, 1, "info", {}, 2**31],
        [2, 1, 0, b""],
        [2, 1, 0, "x"],
        [2, 1, 256, b"x"],
        [2, 1, 0, b"x" * 65537],
        [3],
        [3, 1, 1],
        [6, 1, 0],
        [6, 1, 2**24 + 1],
        [8, -1],
        [8, 2**32],
        [10, "", ""],
        [10, "c", "m" * 4097],
        b"\x95\x01\x01\xa4\xff\xfe\xfd\xfc\x80\x00",  # a method that is not UTF-8
        b"\x95\x01\x01\xa4info\x81\xa2\xed\xa0\x01\x00",  # a key with half a surrogate
        b"\x95\x01\x01\xa4info\xdf\xff\xff\xff\xff\x00",  # a map of 4 G pairs
        b"\x95\x01\x01\xdb\xff\xff\xff\xffx",  # a string of 4 GiB
        b"\x95\x01\x01\xa4info\x80\x00\xc0",  # a byte too many
        b"\xdc\x00",  # half an array header
    ],
)
def test_garbage_closes_the_connection(guest, client, value):
    """Whatever is not exactly a frame; other connections go on."""
    other = guest.connect()
    client.sock.sendall(raw(value))
    assert client.closed_by_peer()
    assert other.call("info").reply is not None


@pytest.mark.parametrize("length", [0, limits.MAX_FRAME_BYTES + 1, 2**32 - 1])
def test_impossible_lengths(client, length):
    """Refused by the prefix alone."""
    client.sock.sendall(struct.pack(">I", length))
    assert client.closed_by_peer()


def test_http_is_not_our_protocol(guest):
    """The classic accident."""
    client = guest.connect(greet=False)
    client.sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.closed_by_peer()


def test_every_integer_encoding_is_understood(client):
    """Wide, signed or short: the same number."""
    for stream, number in enumerate([b"\xcd\x00", b"\xce\x00\x00\x00", b"\xd1\x00", b"\xd2\x00\x00\x00"], start=1):
        frame = b"\x95\xcc\x01" + number + bytes([stream]) + b"\xd9\x04info\xde\x00\x00\xd3" + b"\0" * 8
        client.sock.sendall(raw(frame))
        assert client.finish(stream).reply is not None


def test_the_deepest_body_allowed(client):
    """16 levels pass, 17 do not (above)."""
    assert client.call("info", nested(16)).reply is not None


def test_the_largest_frame_allowed(client):
    """2 MiB exactly; a byte more does not pass (above)."""
    overhead = len(encode(Open(1, "info", {"x": b""}, 0))) - 4 + 3  # bin32 instead of bin8
    body = {"x": b"x" * (limits.MAX_FRAME_BYTES - overhead)}
    assert len(encode(Open(1, "info", body, 0))) == limits.MAX_FRAME_BYTES + 4
    assert client.call("info", body).reply is not None


def test_byte_by_byte(client, tmp_path):
    """Frames may arrive in any pieces."""
    path = str(tmp_path / "file")
    frames = [Open(1, "files.write", {"path": path}, 0), Data(1, 0, b"content"), End(1), Ping(7)]
    for byte in b"".join(encode(frame) for frame in frames):
        client.sock.sendall(bytes([byte]))
    assert client.finish(1).reply["entry"]["size"] == 7
    assert client.stream_frame(0) == Pong(7)


def test_ping(client):
    """PONG with its nonce."""
    client.send(Ping(12345))
    assert client.next_frame() == Pong(12345)
    client.send(Ping(0))
    assert client.next_frame() == Pong(0)


def test_goaway_from_the_opener_changes_nothing_for_open_streams(client):
    """Rule 8 is the server's; an opener that says it opens no more keeps what it has."""
    stream = client.open("sync")
    client.send(Goaway("restart", "the agent restarts"))
    assert client.finish(stream).reply == {}


def test_unknown_method(client):
    """A FAULT, not a broken rule."""
    assert client.call("files.chown").fault == "unknown_method"


def test_info(client):
    """Who serves, and since when."""
    reply = client.call("info").reply
    assert reply.keys() == {"version", "boot_ns", "uptime_ns", "processes", "frozen"}
    assert len(reply["version"]) == 12
    assert 0 < reply["boot_ns"] <= reply["uptime_ns"]
    assert reply["processes"] == 0


def test_strangers_are_not_served(start_guest):
    """Only the gateway's address may speak to the daemon."""
    guest = start_guest("--peer", "127.0.0.9")
    stranger = guest.connect(greet=False)
    assert stranger.closed_by_peer()
    with socket.create_connection(("127.0.0.1", guest.port), source_address=("127.0.0.9", 0), timeout=5) as gateway:
        assert gateway.recv(100)


def test_a_host_that_has_vanished_is_noticed(guest, until):
    """Every connection that is taken has the keep-alive timer, which the listener hands on."""
    client = guest.connect()
    ends = [f"0100007F:{port:04X}" for port in (guest.port, client.sock.getsockname()[1])]

    def timer():
        sockets = map(str.split, Path("/proc/net/tcp").read_text().splitlines())
        found = [words[5] for words in sockets if words[1:3] == ends]
        if len(found) != 1:  # the table changes while it is read: a line may be missing, or come twice
            return None
        kind, _, left = found[0].partition(":")
        return int(left, 16) / os.sysconf("SC_CLK_TCK") if kind == "02" else None

    assert 0 < until(timer, "all is acknowledged, and the next timer is keep-alive's") <= 15


def test_at_most_32_connections(guest):
    """The 33rd is closed, the others live; a closed one makes room."""
    clients = [guest.connect() for _ in range(32)]
    assert guest.connect(greet=False).closed_by_peer()
    assert all(client.call("info").reply for client in clients)
    clients[0].close()
    for _ in range(50):
        fresh = guest.connect(greet=False)
        if not fresh.closed_by_peer(timeout=0.1):
            break
    else:
        pytest.fail("no room was made")
