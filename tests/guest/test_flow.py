"""Flow control: a reader that stalls costs the daemon a bounded amount, and nobody else anything."""

from __future__ import annotations

import os
import socket
import time

import pytest

from agent.wire.limits import INITIAL_CREDIT, MAX_CREDIT
from agent.wire.messages import Cancel, Credit, Data, End, Open, Ping, Pong, Reply

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")

RSS_SLACK_KIB = 2048


def received(client, stream, enough):
    """Bytes of output until `enough` have come."""
    total = 0
    while total < enough:
        frame = client.stream_frame(stream)
        assert isinstance(frame, Data)
        total += len(frame.data)
    return total


def silent(client):
    """Whether nothing comes for a while."""
    try:
        client.next_frame(timeout=0.2)
    except TimeoutError:
        return True
    return False


@pytest.mark.parametrize("credit", [1000, 65536, INITIAL_CREDIT])
def test_not_a_byte_more_than_the_credit(guest, credit):
    """The notice counts too; a grant of n brings n more."""
    client = guest.connect(initial_credit=credit)
    stream = client.open("exec", {"cmd": "yes"})
    first = client.stream_frame(stream)
    assert first.channel == 3
    assert received(client, stream, credit - len(first.data)) == credit - len(first.data)
    assert silent(client)
    client.send(Credit(stream, 10))
    assert received(client, stream, 10) == 10
    assert silent(client)


def test_no_credit_at_all(guest):
    """A stream of credit 0 brings nothing before the first grant, not even the notice, and everything after it."""
    client = guest.connect(initial_credit=0)
    stream = client.open("exec", {"cmd": "echo hello"})
    assert silent(client)
    client.send(Credit(stream, 10_000))
    outcome = client.finish(stream)
    assert outcome.stdout == b"hello\n"
    assert outcome.notices[0]["pid"] > 0


def test_memory_stays_flat_under_a_flood_nobody_reads(guest, client):
    """16 streams with 16 MiB of credit each, a socket that is not read: the daemon holds its high-water mark."""
    assert client.call("exec", {"cmd": "true"}).reply
    before = guest.status("VmRSS")
    streams = [client.open("exec", {"cmd": "cat /dev/zero"}) for _ in range(16)]
    client.send(*[Credit(stream, MAX_CREDIT - INITIAL_CREDIT) for stream in streams])
    peak = 0
    for _ in range(50):
        peak = max(peak, guest.status("VmRSS"))
        time.sleep(0.01)
    assert peak - before < RSS_SLACK_KIB
    other = guest.connect()
    assert other.call("exec", {"cmd": "echo alive"}).stdout == b"alive\n"
    for stream in streams:
        client.send(Cancel(stream))
    assert all(client.finish(stream).fault == "cancelled" for stream in streams)


def test_memory_stays_flat_under_stdin_nobody_takes(guest, client):
    """The opener can send its window and no more; granting stops with the process."""
    streams = [client.open("exec", {"cmd": "sleep 60", "stdin": True}) for _ in range(8)]
    for stream in streams:
        client.send(*[Data(stream, 0, b"x" * 65536)] * 4)
    for _ in range(2 * len(streams)):  # a notice each, and credit for what the kernel's pipe took
        frame = client.next_frame()
        assert frame == Credit(frame.stream, 65536) or frame.channel == 3
    assert silent(client)
    assert guest.status("VmRSS") < 8 * 1024
    client.send(*[Cancel(stream) for stream in streams])
    assert all(client.finish(stream).fault == "cancelled" for stream in streams)


def test_more_stdin_than_credit_ends_the_connection(client):
    """Rule 4. (One more chunk than the window is granted: it is in the pipe.)"""
    stream = client.open("exec", {"cmd": "sleep 60", "stdin": True})
    client.send(*[Data(stream, 0, b"x" * 65536)] * 5, Data(stream, 0, b"x"))
    assert client.closed_by_peer()


def test_credit_beyond_the_limit_ends_the_connection(client):
    """An overflow attack or a bug."""
    stream = client.open("exec", {"cmd": "sleep 60"})
    client.send(Credit(stream, MAX_CREDIT))
    assert client.closed_by_peer()


def test_waiting_costs_no_cpu(guest, client, until):
    """Paused pipes, among them one whose writer has gone, and a socket nobody reads: the loop sleeps."""
    streams = [client.open("exec", {"cmd": "cat /dev/zero"}) for _ in range(4)]
    client.send(*[Credit(stream, MAX_CREDIT - INITIAL_CREDIT) for stream in streams])
    other = guest.connect(initial_credit=1000)
    other.notice(other.open("exec", {"cmd": "head -c 60000 /dev/zero"}))
    other.notice(other.open("exec", {"cmd": "cat /dev/zero"}))

    def sleeps():
        before = guest.cpu_seconds()
        time.sleep(0.5)
        return guest.cpu_seconds() - before < 0.1

    until(sleeps, "all is full, and the loop sleeps")


@pytest.mark.parametrize(("count", "filler"), [(400, 20_000), (600, 0)])
def test_a_flood_of_requests_whose_answers_nobody_reads(guest, count, filler):
    """Requests are not read, and those already read not acted on, once the output is full: memory stays flat, and all
    are answered in the end."""
    client = guest.connect()
    holder = guest.connect()
    streams = [holder.open("exec", {"cmd": "sleep", "args": ["60", *["0" * 3000]]}) for _ in range(30)]
    for stream in streams:
        holder.notice(stream)
    before = guest.status("VmRSS")
    sent = 0
    client.sock.settimeout(0.3)
    client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
    for sent in range(1, count + 1):
        try:
            client.send(Open(sent, "processes.list", {"filler": b"x" * filler}, 0))
        except TimeoutError:
            break
    if filler:
        assert sent < count, "the daemon kept reading"
        sent -= 1
    assert guest.status("VmRSS") - before < RSS_SLACK_KIB
    for stream in range(1, sent + 1):
        assert isinstance(client.stream_frame(stream), Reply)
    assert guest.status("VmHWM") - before < 2 * RSS_SLACK_KIB


def test_a_flood_does_not_delay_others_on_the_connection(client):
    """While one stream floods with plenty of credit, a request on the same connection is answered."""
    stream = client.open("exec", {"cmd": "yes"})
    client.send(Credit(stream, 8 << 20))
    for _ in range(5):
        assert client.call("exec", {"cmd": "echo hi"}).stdout == b"hi\n"
    client.send(Cancel(stream))


def test_ping_is_answered_amid_a_flood(client):
    """PONG with the nonce, before the flood is over."""
    stream = client.open("exec", {"cmd": "yes"})
    client.send(Credit(stream, 8 << 20), Ping(0xFFFFFFFF))
    while not isinstance(frame := client.next_frame(), Pong):
        pass
    assert frame == Pong(0xFFFFFFFF)
    client.send(End(stream))
