"""processes.attach: what is replayed, who owns the process, who only looks on."""

from __future__ import annotations

import os
import random
import time

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from agent.wire.messages import Cancel, Credit, Data, End, Failure, Reply

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")

RING = 65536
SIZE = {"cols": 80, "rows": 24}


def attach(client, process, **body):
    """(stream, notice)."""
    stream = client.open("processes.attach", {"process": process, **body})
    return stream, client.notice(stream)


def drain(client, stream, count):
    """Exactly `count` bytes of output, granting credit for them."""
    got = b""
    while len(got) < count:
        frame = client.stream_frame(stream)
        assert isinstance(frame, Data), frame
        assert frame.channel in {1, 2}
        got += frame.data
        client.send(Credit(stream, len(frame.data)))
    assert len(got) == count
    return got


def leave(client, stream):
    client.send(Cancel(stream))
    assert client.finish(stream).fault == "cancelled"


def numbers(count):
    return b"".join(b"%d\n" % number for number in range(1, count + 1))


@pytest.fixture
def filled(client):
    """A detached process that has printed 588 895 bytes, and waits; nobody is attached."""
    stream = client.open("exec", {"cmd": "seq 100000; sleep 1000", "detach": True, "tag": "t"})
    client.notice(stream)
    whole = numbers(100_000)
    assert drain(client, stream, len(whole)) == whole
    leave(client, stream)
    return whole


def test_replay_at_every_kind_of_offset(client, filled):
    """Exact: the rest after `offset`, or what the ring has of it, and how much is lost."""
    total = len(filled)
    oldest = total - RING
    offsets = {0, 1, oldest - 1, oldest, oldest + 1, total - 1, total}
    offsets |= {random.Random(5).randrange(total) for _ in range(40)}
    for offset in sorted(offsets):
        stream, notice = attach(client, "t", offset=offset)
        begin = max(offset, oldest)
        assert (notice["offset"], notice["skipped"], notice["pty"]) == (begin, begin - offset, False)
        assert (notice["replay"], notice["ended"]) == (total - begin, False)
        assert drain(client, stream, total - begin) == filled[begin:]
        leave(client, stream)
    stream, notice = attach(client, "t")
    assert (notice["offset"], notice["skipped"]) == (oldest, 0)
    assert drain(client, stream, RING) == filled[oldest:]
    assert client.call("processes.attach", {"process": "t", "offset": total + 1}).fault == "invalid_argument"


def test_channels_are_replayed_as_they_were(client, until):
    """However short the pieces are."""
    script = "i=0; while [ $i -lt 500 ]; do echo o$i; echo e$i >&2; i=$((i+1)); done; sleep 1000"
    stream = client.open("exec", {"cmd": script, "detach": True, "tag": "t"})
    client.notice(stream)
    seen = []
    while sum(len(data) for _, data in seen) < 2 * len("".join(f"o{i}\n" for i in range(500))):
        frame = client.stream_frame(stream)
        seen.extend((frame.channel, bytes([byte])) for byte in frame.data)
    leave(client, stream)
    for offset in (0, 1, 7, 1000):
        stream, _ = attach(client, "t", offset=offset)
        again = []
        while len(again) < len(seen) - offset:
            frame = client.stream_frame(stream)
            again.extend((frame.channel, bytes([byte])) for byte in frame.data)
        assert again == seen[offset:]
        leave(client, stream)


@pytest.mark.parametrize("kind", [{"detach": True}, {"pty": SIZE}])
def test_another_takes_over(guest, client, kind):
    """Who was attached before is told so, and the new one has its input; observers stay."""
    stream = client.open("exec", {"cmd": "stty raw -echo 2>/dev/null; echo on; cat", "stdin": True, "tag": "t", **kind})
    client.notice(stream)
    drain(client, stream, 3)
    watcher = guest.connect()
    watching, _ = attach(watcher, "t", observe=True)
    other = guest.connect()
    taking, notice = attach(other, "t", offset=3)
    assert (notice["offset"], notice["skipped"]) == (3, 0)
    frame = client.stream_frame(stream)
    assert isinstance(frame, Failure)
    assert (frame.code, frame.details, frame.retryable) == ("conflict", {"taken_over": True}, False)
    client.send(Data(stream, 0, b"lost"), End(stream), Cancel(stream))  # they crossed: ignored
    other.send(Data(taking, 0, b"mine"))
    assert drain(other, taking, 4) == b"mine"
    assert drain(watcher, watching, 7) == b"on\nmine"
    assert client.call("info").reply


def test_input_that_nobody_took_stays_and_is_bounded(guest, client):
    """Who takes over sends behind it; again and again, it is never more than two windows."""
    body = {"cmd": "read x < /dev/null; sleep 0.5; head -c 10", "stdin": True, "detach": True, "tag": "t"}
    stream = client.open("exec", body)
    client.notice(stream)
    client.send(Data(stream, 0, b"0123456789"))
    before = guest.status("VmRSS")
    for _ in range(30):
        stream, _ = attach(client, "t")
        client.send(*[Data(stream, 0, b"x" * 65536)] * 4)
    assert client.call("info").reply
    assert guest.status("VmRSS") - before < 4096
    assert client.finish(stream).stdout == b"0123456789"


def test_a_slow_owner_stops_the_process_and_loses_nothing(guest, client, until):
    """The process waits, whatever observers do; who leaves and comes back goes on where he was."""
    whole = numbers(100_000)
    slow = guest.connect(initial_credit=1000)
    stream = slow.open("exec", {"cmd": "seq 100000", "detach": True, "tag": "t"})
    first = slow.notice(stream)
    got = b""
    while len(got) < 900:  # of the 1000, less the notice
        got += slow.stream_frame(stream).data

    def held():
        stream, notice = attach(client, "t", observe=True)
        leave(client, stream)
        return notice["replay"]

    until(lambda: held() == RING, "it goes on until the ring is full")
    eager, notice = attach(client, "t", observe=True)
    begin = notice["offset"]
    assert begin < 1000
    assert drain(client, eager, RING) == whole[begin : begin + RING]
    time.sleep(0.2)  # what is proved is that nothing more happens
    assert client.call("processes.list").reply["processes"][0]["pid"] == first["pid"]
    slow.close()
    until(lambda: client.call("processes.list").reply["processes"] == [], "without an owner it runs to its end")
    assert got == whole[: len(got)]


def test_an_owner_who_leaves_and_comes_back_in_time_misses_nothing(guest, client):
    """Re-attached from another connection with the count of what he had, before he left: every byte, once."""
    whole = numbers(100_000)
    slow = guest.connect(initial_credit=1000)
    stream = slow.open("exec", {"cmd": "seq 100000", "detach": True, "tag": "t"})
    slow.notice(stream)
    got = b""
    rng = random.Random(7)
    holder, held = slow, stream
    for _ in range(8):
        amount = rng.randrange(1000, 60_000)
        holder.send(Credit(held, amount))
        want = len(got) + amount
        while len(got) < want:
            got += holder.stream_frame(held).data
        holder = guest.connect(initial_credit=200)
        held, notice = attach(holder, "t", offset=len(got))
        assert (notice["offset"], notice["skipped"]) == (len(got), 0)
    holder.send(Credit(held, 1 << 20))
    outcome = holder.finish(held)
    assert got + outcome.stdout == whole
    assert outcome.reply["exit_code"] == 0


def test_a_slow_observer_skips_and_is_told(guest, client):
    """It never holds the process up; what it gets, with what it is told to be lost, is everything."""
    whole = numbers(200_000)
    stream = client.open("exec", {"cmd": "read x; seq 200000", "stdin": True, "detach": True, "tag": "t"})
    client.notice(stream)
    watcher = guest.connect(initial_credit=1000)
    watching, notice = attach(watcher, "t", observe=True)
    assert notice["offset"] == 0
    client.send(Data(stream, 0, b"\n"))
    assert client.finish(stream).stdout == whole
    at, skipped, waiting = 0, 0, True
    while waiting:
        frame = watcher.stream_frame(watching)
        match frame:
            case Reply():
                waiting = False
            case Data(channel=3):
                lost = msgspec.msgpack.decode(frame.data)["skipped"]
                at, skipped = at + lost, skipped + lost
            case Data():
                assert whole[at : at + len(frame.data)] == frame.data
                at += len(frame.data)
        if isinstance(frame, Data):
            watcher.send(Credit(watching, 100_000))
    assert at == len(whole)
    assert skipped > len(whole) // 2


def test_an_observer_has_no_input(guest, client):
    """What it sends is dropped, and counted as any stream's."""
    stream = client.open("exec", {"cmd": "cat", "stdin": True, "detach": True, "tag": "t"})
    client.notice(stream)
    watcher = guest.connect()
    watching, _ = attach(watcher, "t", observe=True)
    watcher.send(Data(watching, 0, b"noise"), End(watching))
    assert watcher.call("info").reply
    client.send(Data(stream, 0, b"sound"), End(stream))
    assert client.finish(stream).stdout == b"sound"
    assert watcher.finish(watching).stdout == b"sound"
    stream = client.open("exec", {"cmd": "cat", "stdin": True, "detach": True, "tag": "t"})
    client.notice(stream)
    watching, _ = attach(watcher, "t", observe=True)
    watcher.send(*[Data(watching, 0, b"x" * 65536)] * 30)
    assert watcher.call("info").reply


def test_a_process_that_starts_can_be_attached_to(client):
    """At once, also before its own stream's notice."""
    first = client.open("exec", {"cmd": "echo hello", "detach": True, "tag": "t"})
    second = client.open("processes.attach", {"process": "t", "observe": True})
    assert client.finish(first).stdout == client.finish(second).stdout == b"hello\n"


def test_a_background_process_can_be_attached_to(client, until):
    """It had nobody to talk to; what it printed is there all the same, and its end."""
    client.call(
        "exec", {"cmd": "echo out; echo err >&2; read x; echo $?; sleep 0.2; exit 3", "tag": "t", "background": True}
    )
    until(lambda: not client.call("processes.list").reply["processes"], "it has ended")
    found = client.finish(client.open("processes.attach", {"process": "t"}))
    assert (found.stdout, found.stderr, found.reply["exit_code"]) == (b"out\n1\n", b"err\n", 3)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({}, "invalid_argument"),
        *[({"process": process}, "invalid_argument") for process in (None, 0, -1, 2**40, 1.5, [1], {}, True)],
        *[({"process": process}, "not_found") for process in (1, 2**31 - 1, "", "no", "a\0b")],
        *[({"process": "t", "offset": offset}, "invalid_argument") for offset in (-1, "0", 2**63, 1.0, None)],
        ({"process": "t", "observe": 1}, "invalid_argument"),
        ({"process": "foreground"}, "invalid_argument"),
    ],
)
def test_wrong_bodies(client, body, fault):
    """Nobody is thrown out for them."""
    stream = client.open("exec", {"cmd": "sleep 1000", "detach": True, "tag": "t"})
    client.notice(stream)
    other = client.open("exec", {"cmd": "sleep 1000", "tag": "foreground"})
    client.notice(other)
    assert client.call("processes.attach", body).fault == fault
    client.send(Cancel(stream))
    assert client.finish(stream).fault == "cancelled"


class Attaching(RuleBasedStateMachine):
    """One process prints what it is told to, on the channel it is told to; streams come, read and go.

    The model is the whole output with its channels. Whatever a stream brings is the output from its offset on.
    """

    guest = None  # set for each run

    @initialize()
    def begin(self):
        self.client = self.guest.connect(initial_credit=300)
        self.output = []
        self.streams = {}
        self.driver = self.guest.connect()
        self.process = self.driver.open("exec", {"cmd": "cat", "stdin": True, "detach": True})
        self.pid = self.driver.notice(self.process)["pid"]
        self.given = 262144

    def read(self, stream, count):
        """What `stream` brings for `count` bytes of credit, checked against the model."""
        state = self.streams[stream]
        self.client.send(Credit(stream, count))
        state["credit"] += count
        while state["credit"] > 0 and state["at"] < len(self.output):
            frame = self.client.stream_frame(stream)
            assert isinstance(frame, Data)
            assert frame.channel == 1
            state["credit"] -= len(frame.data)
            assert bytes(self.output[state["at"] : state["at"] + len(frame.data)]) == frame.data
            state["at"] += len(frame.data)

    @rule(size=st.integers(1, 40_000), seed=st.integers(0, 255))
    def prints(self, size, seed):
        """More than the observers have read may be lost for them: they read first."""
        size = min(size, self.given)
        for stream in list(self.streams):
            self.read(stream, 70_000)
        data = bytes((seed + number * 7) % 256 for number in range(size))
        if size > 0:
            self.driver.send(Data(self.process, 0, data))
        self.output.extend(data)
        got = b""
        while len(got) < size:
            frame = self.driver.stream_frame(self.process)
            if isinstance(frame, Credit):
                self.given += frame.amount
                continue
            got += frame.data
            self.driver.send(Credit(self.process, len(frame.data)))
        self.given -= size
        assert got == data

    @rule(share=st.floats(0, 1))
    def looks_on(self, share):
        offset = int(share * len(self.output))
        stream = self.client.open("processes.attach", {"process": self.pid, "offset": offset, "observe": True})
        said = self.client.stream_frame(stream).data
        notice = msgspec.msgpack.decode(said)
        begin = max(offset, len(self.output) - RING)
        assert (notice["offset"], notice["skipped"]) == (begin, begin - offset)
        self.streams[stream] = {"at": begin, "credit": 300 - len(said)}

    @precondition(lambda self: self.streams)
    @rule(data=st.data(), count=st.integers(1, 30_000))
    def reads(self, data, count):
        self.read(data.draw(st.sampled_from(sorted(self.streams))), count)

    @precondition(lambda self: self.streams)
    @rule(data=st.data())
    def leaves(self, data):
        stream = data.draw(st.sampled_from(sorted(self.streams)))
        del self.streams[stream]
        self.client.send(Cancel(stream))
        assert self.client.finish(stream).fault == "cancelled"

    @rule()
    def owner_changes(self):
        """Another connection takes over, from where the one before was."""
        driver = self.guest.connect()
        process, notice = attach(driver, self.pid, offset=len(self.output))
        assert notice["offset"] == len(self.output)
        while not isinstance(frame := self.driver.stream_frame(self.process), Failure):
            assert isinstance(frame, Credit)
        assert frame.details == {"taken_over": True}
        self.driver.close()
        self.driver, self.process, self.given = driver, process, 262144

    def teardown(self):
        if hasattr(self, "driver"):
            self.driver.call("processes.signal", {"process": self.pid, "signal": 9})
            self.driver.close()
            self.client.close()


def test_whatever_is_written_read_and_attached(guest):
    """State machine: what any stream delivers equals the output from its offset on."""
    machine = type("Machine", (Attaching,), {"guest": guest})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )


@given(pieces=st.lists(st.tuples(st.sampled_from([1, 2]), st.integers(1, 9000)), max_size=25), share=st.floats(0, 1))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_pieces_on_both_channels(client, pieces, share):
    """Replayed from any offset: the same bytes on the same channels, and what the ring does not hold is counted."""
    script = "".join(
        f"head -c {size} /dev/zero | tr '\\0' {chr(97 + number)} >&{fd}; printf x; read x;"
        for number, (fd, size) in enumerate(pieces)
    )
    stream = client.open("exec", {"cmd": f"{script} true", "stdin": True, "detach": True})
    pid = client.notice(stream)["pid"]
    expected = []
    for number, (fd, size) in enumerate(pieces):
        order = []
        while len(order) < size + 1:
            frame = client.stream_frame(stream)
            if isinstance(frame, Data):
                order.extend((frame.channel, byte) for byte in frame.data)
                client.send(Credit(stream, len(frame.data)))
        assert sorted(order) == sorted([(fd, 97 + number)] * size + [(1, ord("x"))])
        expected.extend(order)
        client.send(Data(stream, 0, b"\n"))
    assert client.finish(stream).reply["exit_code"] == 0
    offset = int(share * len(expected))
    stream, notice = attach(client, pid, offset=offset)
    got = []
    while isinstance(frame := client.stream_frame(stream), Data):
        got.extend((frame.channel, byte) for byte in frame.data)
    begin = max(offset, len(expected) - RING)
    assert notice["offset"] == begin
    assert got == expected[begin:]
