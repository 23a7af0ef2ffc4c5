"""The sanitized daemon against frames made to hurt it. It may close connections; it may not crash or grow."""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress

import msgspec
import pytest

from agent.wire.codec import encode
from agent.wire.messages import Cancel, Credit, Data, End, Goaway, Hello, Open, Ping

SECONDS = 12.0
"""Of the whole run, longer only on a machine that takes longer for the fewest rounds; a seed reproduces it up to the
machine's speed."""
FEWEST, MOST = 100, 3000
"""Rounds."""
SEED = 20250607

METHODS = [
    "configure",
    "info",
    "sync",
    "settle",
    "thaw",
    "exec",
    "processes.attach",
    "processes.list",
    "processes.resize",
    "processes.signal",
    "files.read",
    "files.write",
    "files.list",
    "files.stat",
    "files.mkdir",
    "files.remove",
    "no.such",
]


class Fuzz:
    """Valid conversations, then damage."""

    def __init__(self, rng, root):
        self.rng = rng
        self.root = root

    def value(self, depth=0):
        rng = self.rng
        kind = rng.randrange(8 if depth < 4 else 6)
        if kind == 0:
            return rng.choice([0, 1, -1, 2**31, 2**63, -(2**63), rng.randrange(2**32)])
        if kind == 1:
            return rng.choice([True, False, None, 1.5])
        if kind in {2, 3}:
            return rng.choice(["", "/", self.root, f"{self.root}/x", "..", "é" * rng.randrange(99), "a\0b", "nobody"])
        if kind in {4, 5}:
            return rng.randbytes(rng.randrange(100))
        if kind == 6:
            return [self.value(depth + 1) for _ in range(rng.randrange(4))]
        return {rng.choice(["a", "path", "PATH", "", "x=y"]): self.value(depth + 1) for _ in range(rng.randrange(4))}

    def body(self):
        """Often sensible, so that deep code is reached too. Never a path outside `root` that could be removed."""
        rng = self.rng
        body = {}
        for key in (
            "args",
            "envs",
            "cwd",
            "user",
            "stdin",
            "timeout_ms",
            "background",
            "tag",
            "offset",
            "length",
            "thaw_after_ms",
        ):
            if rng.random() < 0.15:
                body[key] = self.value()
        for key in (
            "size",
            "mode",
            "depth",
            "signal",
            "hostname",
            "dns",
            "entropy",
            "time_ns",
            "process",
            "machine_id",
            "cols",
            "rows",
            "observe",
        ):
            if rng.random() < 0.1:
                body[key] = self.value()
        if rng.random() < 0.9:
            body["path"] = f"{self.root}/{rng.choice('abc')}" + rng.choice(["", "/d", "/d/e", "/.", "//f"])
        if rng.random() < 0.9:
            body["cmd"] = rng.choice(["true", "echo hello", "cat", "head -c 100000 /dev/zero", "exec 1>&-; cat"])
        body |= self.lasting()
        if rng.random() < 0.5:
            body["stdin"] = rng.random() < 0.7
        return body

    def lasting(self):
        """What makes a process outlive its stream, and names one."""
        rng = self.rng
        body = {}
        if rng.random() < 0.2:
            body["pty"] = rng.choice([{"cols": 80, "rows": 24}, {"cols": 80, "rows": 24}, {"cols": 0}, self.value()])
            body["user"] = "nobody"  # noise is typed into it: not as root, and nobody's login shell is none
        if rng.random() < 0.2:
            body["detach"] = rng.random() < 0.8
        if rng.random() < 0.3:
            body["tag"] = rng.choice("abc")
        if rng.random() < 0.3:
            body["process"] = rng.choice("abc")
            body["offset"] = rng.choice([0, 0, 1, 5, 100, 2**40])
        return body

    def conversation(self):
        rng = self.rng
        frames = [Hello(1, [], rng.choice([0, 100, 262144]), 0)]
        stream = 0
        for _ in range(rng.randrange(1, 12)):
            kind = rng.randrange(8)
            if kind < 4 or stream == 0:
                stream += rng.choice([1, 1, 1, 5])
                frames.append(Open(stream, rng.choice(METHODS), self.body(), rng.choice([0, 0, 1, 200])))
                continue
            target = rng.randint(max(1, stream - 2), stream)
            frames.append(
                rng.choice(
                    [
                        Data(target, rng.choice([0, 0, 0, 1, 255]), rng.randbytes(rng.choice([1, 50, 65536]))),
                        End(target),
                        Credit(target, rng.choice([1, 1000, 1 << 20])),
                        Cancel(target),
                        Ping(rng.randrange(2**32)),
                        Goaway("why", "because"),
                    ]
                )
            )
        return frames

    def damaged(self, data):
        rng = self.rng
        out = bytearray(data)
        for _ in range(rng.choice([0, 0, 1, 1, 2, 8])):
            if not out:
                break
            at = rng.randrange(len(out))
            match rng.randrange(4):
                case 0:
                    out[at] ^= 1 << rng.randrange(8)
                case 1:
                    out[at] = rng.choice([0, 0x7F, 0x80, 0xC1, 0xC7, 0xDB, 0xDD, 0xDF, 0xFF])
                case 2:
                    del out[at : at + rng.randrange(1, 9)]
                case 3:
                    out[at:at] = rng.randbytes(rng.randrange(1, 9))
        return bytes(out)

    def reframed(self, data):
        """Damage inside a frame whose length is right: what reaches the decoder's depths."""
        payload = self.damaged(data[4:]) or b"\xc0"
        return len(payload).to_bytes(4, "big") + payload


def greeted(guest):
    """A connection, once the daemon has seen that the earlier ones are closed."""
    with suppress(EOFError, ConnectionError):
        return guest.connect()
    return None


@pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")
def test_nothing_an_opener_sends_crashes_the_daemon(sanitized_binary, start_settling, until, tmp_path):
    """Random and mutated conversations under ASAN and UBSAN; afterwards the daemon serves, with nothing left over.

    Meanwhile a connection that never said HELLO was closed: its 10 seconds are not worth a test of their own.
    """
    guest, _ = start_settling(binary=sanitized_binary)
    baseline = guest.descriptors()
    silent = guest.connect(greet=False)
    fuzz = Fuzz(random.Random(SEED), str(tmp_path))
    end = time.monotonic() + SECONDS
    rounds = 0
    while rounds < FEWEST or (time.monotonic() < end and rounds < MOST):
        rounds += 1
        client = guest.connect(greet=False)
        frames = [bytes(encode(frame)) for frame in fuzz.conversation()]
        mode = rounds % 4
        if mode == 1:
            frames = [frames[0], *[fuzz.reframed(frame) for frame in frames[1:]]]
        elif mode == 2:
            frames = [fuzz.damaged(b"".join(frames))]
        elif mode == 3:
            at = fuzz.rng.randrange(len(frames))
            frames[at] = msgspec.msgpack.encode(fuzz.value())
            frames[at] = len(frames[at]).to_bytes(4, "big") + frames[at]
        with suppress(ConnectionError, TimeoutError, EOFError):
            client.sock.settimeout(0.5)
            client.sock.sendall(b"".join(frames))
            if rounds % 7 == 0:
                client.next_frame(timeout=0.05)
        client.close()
        guest._clients.remove(client)
        assert guest.process.poll() is None
    assert silent.closed_by_peer(timeout=11)
    client = until(lambda: greeted(guest), "a connection")
    assert client.call("thaw").reply == {}
    for entry in client.call("processes.list").reply["processes"]:
        client.call("processes.signal", {"process": entry["pid"], "signal": 9})
    assert client.call("info").reply
    client.close()
    until(lambda: guest.children() == {}, "no children")
    until(lambda: guest.descriptors() == baseline, "no descriptors")
    until(lambda: not list(tmp_path.rglob(".capsule-*")), "no temporary files")
