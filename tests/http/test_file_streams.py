"""…/files/stream/write: parts in any order and any split, whole or not at all; and nothing is held either way."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from capsule import errors
from capsule.http import requests, spool_shares, streams, uploads
from capsule.model import FileContent

KEY = "cap_0123456789abcdef0123456789abcdef01234567"
BOUNDARY = b"xBOUNDARYx"
END = b"--" + BOUNDARY + b"--\r\n"
MIB = 1024 * 1024
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}


def part(name, content, more=b""):
    return b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (BOUNDARY, name, more, content)


PATH = part(b"path", b"/a")
FILE = part(b"file", b"content", b'; filename="x.txt"\r\nContent-Type: text/plain')
TAR = part(b"format", b"tar")
RAW = part(b"format", b"raw")


def digest_of(content):
    return f"sha-256=:{b64encode(hashlib.sha256(content).digest()).decode()}:"


def reset_peak():
    """Start measuring the largest resident size of this process anew; the size now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name):
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


@pytest.fixture
def base(api):
    return f"/v1/sandboxes/sb-{api.sandboxes.add().id}/files/stream"


async def in_pieces(body, size=16):
    """`body` as a generator: each piece is a chunk of its own on the wire, which the server sees one by one."""
    for start in range(0, len(body), size):
        await trio.lowlevel.checkpoint()
        yield body[start : start + size]


@pytest.fixture
def write(api, base):
    async def write(body):
        content = in_pieces(body) if isinstance(body, bytes) and len(body) < 10_000 else body
        return await api.client.post(f"{base}/write", content=content, headers=FORM)

    return write


def asked(api, method):
    return [call for call in api.streams.asked if call[0] == method]


@pytest.mark.parametrize("order", [(PATH, FILE), (FILE, PATH), (PATH, RAW, FILE), (FILE, RAW, PATH), (PATH, FILE, RAW)])
async def test_parts_in_any_order(api, write, order):
    """With the digest of what was written. A size is known of what had to wait."""
    answer = await write(b"".join(order) + END)
    assert answer.status_code == 204, answer.text
    assert api.sandboxes.files == {"/a": b"content"}
    assert answer.headers["repr-digest"] == digest_of(b"content")
    assert [call[1][2:] for call in asked(api, "write_stream")] == [("/a", 7 if order[0] is FILE else None)]
    assert not list(api.spool_dir.iterdir())


async def test_both_names(api):
    """As all of a sandbox."""
    sandbox = api.sandboxes.add().id
    for name in ("sandboxes", "capsules"):
        base = f"/v1/{name}/sb-{sandbox}/files/stream"
        assert (await api.client.post(f"{base}/write", content=PATH + FILE + END, headers=FORM)).status_code == 204
        assert (await api.client.post(f"{base}/read", json={"path": "/a"})).content == b"content"


@pytest.mark.parametrize("order", [(PATH, TAR, FILE), (TAR, PATH, FILE), (FILE, TAR, PATH), (TAR, FILE, PATH)])
async def test_an_archive(api, write, order):
    """`format` says what the file is."""
    answer = await write(b"".join(order) + END)
    assert answer.status_code == 204, answer.text
    assert api.streams.archives == {"/a": b"content"}
    assert not api.sandboxes.files


async def test_what_is_an_archive_is_said_before_it(api, refused, write):
    """Else it has gone into a file already, which is not replaced then."""
    api.sandboxes.files["/a"] = b"old"
    answer = await write(PATH + FILE + TAR + END)
    assert refused(answer, 400, "invalid_request")["field"] == "format"
    assert api.sandboxes.files == {"/a": b"old"}
    assert not api.streams.archives


def test_any_split(served, world):
    """Wherever the network cuts, the bytes arrive as they are."""
    path = f"/v1/sandboxes/sb-{world.sandboxes.add().id}/files/stream/write"

    @settings(deadline=None, max_examples=60)
    @given(st.binary(max_size=400), st.lists(st.integers(0, 2000), max_size=10), st.booleans())
    def check(content, cuts, path_first):
        assume(b"\r\n--" + BOUNDARY not in b"\r\n" + content)
        parts = [PATH, part(b"file", content)]
        body = b"".join(parts if path_first else reversed(parts)) + END
        edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
        pieces = (body[start:end] for start, end in pairwise(edges) if start < end)
        answer = served.post(path, content=pieces, headers=FORM)
        assert answer.status_code == 204, answer.text
        assert world.sandboxes.files["/a"] == content
        assert answer.headers["repr-digest"] == digest_of(content)

    check()


@pytest.mark.parametrize("order", [(FILE, part(b"path", b"/a/bc"), TAR), (FILE, TAR, part(b"path", b"/a/bc"))])
async def test_the_network_cuts_behind_a_small_file(api, write, order):
    """Half a path, with a file before it in the same piece, is not where the file goes; nor is half of `format` one."""
    body = b"".join(order) + END
    for at in range(len(FILE), len(body)):

        async def two(at=at):
            yield body[:at]
            await trio.sleep(0.002)
            yield body[at:]

        answer = await write(two())
        assert answer.status_code == 204, (at, answer.text)
        assert api.streams.archives == {"/a/bc": b"content"}, at
        assert not api.sandboxes.files


@pytest.mark.parametrize("order", [(PATH, FILE), (FILE, PATH)])
async def test_cut_at_any_byte(api, write, order):
    """Every beginning of the form is refused, and the old file stays: the source must fail before its end."""
    body = b"".join(order) + END
    api.sandboxes.files["/a"] = b"old"
    for length in range(len(body) - 3):  # without the line break behind its last boundary a form is whole
        answer = await write(body[:length])
        assert answer.status_code == 400, (length, answer.text)
        assert api.sandboxes.files == {"/a": b"old"}


@pytest.mark.parametrize("ending", [b"Content-Length: 500\r\n", b"Transfer-Encoding: chunked\r\n"])
@pytest.mark.parametrize("body", [PATH + FILE, FILE + PATH, PATH + FILE + END])
async def test_a_client_that_breaks_off(api, base, until, ending, body):
    """The connection ends inside the body: the source never comes to its end."""
    api.sandboxes.files["/a"] = b"old"
    head = api.head("POST", f"{base}/write", f"Content-Type: {FORM['Content-Type']}")
    sent = head.removesuffix(b"\r\n") + ending + b"\r\n"
    sent += b"%x\r\n%s\r\n" % (len(body), body) if b"chunked" in ending else body
    async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
        await stream.send_all(sent)
        await stream.send_eof()
        with trio.fail_after(20):
            answer = b"".join([chunk async for chunk in stream])
    assert not answer.startswith(b"HTTP/1.1 2"), answer
    assert api.sandboxes.files == {"/a": b"old"}


MALFORMED = {
    "file twice": (PATH + FILE + FILE + END, "file"),
    "a part behind it": (PATH + FILE + part(b"mode", b"1") + END, "mode"),
    "no path at all": (FILE + END, "path"),
    "no file": (PATH + END, "file"),
    "nothing": (b"", None),
    "a bad path": (part(b"path", b"a") + FILE + END, "path"),
    "a bad path behind it": (FILE + part(b"path", b"/../a") + END, "path"),
    "another format": (PATH + part(b"format", b"zip") + FILE + END, "format"),
    "another format behind it": (FILE + PATH + part(b"format", b"zip") + END, "format"),
    "noise behind the file": (PATH + FILE + b"--" + BOUNDARY + b"\r\nnoise\0\r\n\r\n", None),
    "too much around it": (PATH + FILE + b"--" + BOUNDARY + b"\r\nX: " + b"x" * 70_000, None),
}


@pytest.mark.parametrize("name", MALFORMED)
async def test_a_wrong_form(api, refused, write, name):
    """Also one that turns out to be wrong when the file has passed through already."""
    api.sandboxes.files["/a"] = b"old"
    body, field = MALFORMED[name]
    assert refused(await write(body), 400, "invalid_request").get("field") == field
    assert api.sandboxes.files == {"/a": b"old"}


async def test_a_sandbox_that_does_not_run(api, refused, base):
    """Before a byte is taken."""
    paused = api.sandboxes.add("paused").id
    answer = await api.client.post(
        f"/v1/sandboxes/sb-{paused}/files/stream/write", content=FILE + PATH + END, headers=FORM
    )
    refused(answer, 409, "invalid_state")


async def test_who_lost_the_right_writes_nothing(api, refused, write, monkeypatch):
    """Looked up again when all has come (trap 19), and while it comes."""
    api.sandboxes.files["/a"] = b"old"
    known = api.authenticator.api_key

    async def once(key):
        monkeypatch.setattr(api.authenticator, "api_key", revoked)
        return await known(key)

    async def revoked(_key):
        raise errors.Unauthorized("This API key is unknown or revoked.")

    monkeypatch.setattr(api.authenticator, "api_key", once)
    refused(await write(PATH + FILE + END), 401, "unauthorized")
    assert api.sandboxes.files == {"/a": b"old"}


class Sink:
    """A service that takes everything and keeps nothing, and gives as much as it is told to."""

    def __init__(self):
        self.digest = hashlib.sha256()
        self.largest = self.count = 0
        self.gate = trio.Event()
        self.gate.set()

    async def write_stream(self, _principal, _sandbox, _path, source, *, size):
        async for chunk in source:
            await self.gate.wait()
            self.digest.update(chunk)
            self.count += len(chunk)
            self.largest = max(self.largest, len(chunk))

    @asynccontextmanager
    async def read_stream(self, _principal, _sandbox, _path, *, offset, length):
        async def chunks():
            for _ in range(300 * 16):
                self.count += 65536
                yield bytes(65536)

        content = chunks()
        try:
            yield FileContent(size=300 * MIB, version="v", chunks=content)
        finally:
            await content.aclose()


@pytest.fixture
def sink(api, monkeypatch):
    """Stands in for the streams."""
    sink = Sink()
    for name in ("write_stream", "read_stream"):
        monkeypatch.setattr(api.streams, name, getattr(sink, name))
    return sink


@pytest.mark.parametrize("path_first", [True, False])
async def test_a_large_upload_costs_no_memory(api, write, sink, path_first):
    """300 MiB, more than …/files/write takes: straight through, or over the disk."""
    size, piece = 300 * MIB, bytes(range(256)) * 4096
    lead, end = part(b"file", b"").removesuffix(b"\r\n"), b"\r\n"

    async def pieces():
        yield (PATH if path_first else b"") + lead
        for _ in range(size // MIB):
            yield piece
        yield end + (b"" if path_first else PATH) + END

    before = reset_peak()
    answer = await write(pieces())
    assert answer.status_code == 204, answer.text
    assert sink.count == size
    assert answer.headers["repr-digest"] == f"sha-256=:{b64encode(sink.digest.digest()).decode()}:"
    assert memory("VmHWM") - before < 30 * MIB
    assert not list(api.spool_dir.iterdir())


async def test_a_large_download_costs_no_memory(api, base, sink):
    """Nor does one whose client reads in its own time."""
    before = reset_peak()
    count = 0
    async with api.client.stream("POST", f"{base}/read", json={"path": "/a"}) as answer:
        async for chunk in answer.aiter_raw():
            count += len(chunk)
    assert count == 300 * MIB
    assert memory("VmHWM") - before < 30 * MIB


async def test_a_client_may_read_a_download_in_its_own_time(api, base, sink, monkeypatch):
    """It is not cut off as one is that does not take an ordinary answer; that holds for this answer alone."""
    monkeypatch.setattr(streams, "WRITE_TIMEOUT", 0.2)
    async with api.client.stream("POST", f"{base}/read", json={"path": "/a"}) as answer:
        await trio.sleep(1)  # five times as long, with nothing taken
        assert sum([len(chunk) async for chunk in answer.aiter_raw()]) == 300 * MIB


async def test_a_slow_sandbox_slows_the_client(api, base, sink):
    """What is not taken is not read from the socket, and is no fault of the client's."""
    sink.gate = trio.Event()
    sent = 0
    head = api.head("POST", f"{base}/write", f"Content-Type: {FORM['Content-Type']}", f"Content-Length: {500 * MIB}")
    lead = part(b"file", b"").removesuffix(b"\r\n")
    async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
        await stream.send_all(head + PATH + lead)
        with trio.move_on_after(2):
            while True:
                await stream.send_all(bytes(65536))
                sent += 65536
    assert 0 < sent < 30 * MIB


async def test_a_stalled_upload_is_ended(api, base, monkeypatch):
    """408, and the old file stays."""
    monkeypatch.setattr(requests, "CHUNK_TIMEOUT", 0.1)
    monkeypatch.setattr("capsule.http.connection.DRAIN_TIMEOUT", 0.1)
    api.sandboxes.files["/a"] = b"old"
    head = api.head("POST", f"{base}/write", f"Content-Type: {FORM['Content-Type']}", "Content-Length: 1000")
    answer = await api.raw(head + PATH + FILE)
    assert b" 408 " in answer
    assert api.sandboxes.files == {"/a": b"old"}


async def test_a_trickle_is_ended(api, base, monkeypatch):
    """A byte now and then keeps nothing open for ever, however much has come before."""
    monkeypatch.setattr(uploads, "PATIENCE", 0.3)
    monkeypatch.setattr("capsule.http.connection.DRAIN_TIMEOUT", 0.1)
    head = api.head("POST", f"{base}/write", f"Content-Type: {FORM['Content-Type']}", f"Content-Length: {500 * MIB}")
    lead = part(b"file", b"").removesuffix(b"\r\n")
    async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
        await stream.send_all(head + PATH + lead + bytes(20 * MIB))

        async def trickle():
            with trio.move_on_after(20):
                while True:
                    await stream.send_all(b"x")
                    await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(trickle)
            with trio.fail_after(30):
                assert b" 408 " in await stream.receive_some()
            nursery.cancel_scope.cancel()


async def test_no_room_for_what_comes_before_its_path(api, refused, write, monkeypatch):
    """413 when it would never fit, 503 when others are in the way; both say what helps. With its path first it fits."""
    monkeypatch.setattr(spool_shares, "LARGE_BYTES", 8 * MIB)
    large = part(b"file", bytes(6 * MIB))
    answer = await write(large + PATH + END)
    assert "before `file`" in refused(answer, 413, "too_large")["message"]

    async def pieces():  # of a length that is not known before
        yield large[: 5 * MIB]
        yield large[5 * MIB :] + PATH + END

    refused(await write(pieces()), 413, "too_large")
    monkeypatch.setattr(spool_shares, "LARGE_BYTES", 14 * MIB)
    taken = spool_shares.TeamBudget.take

    async def crowded(budget, amount, total):
        budget.held += 4 * MIB
        try:
            await taken(budget, amount, total)
        finally:
            budget.held -= 4 * MIB

    monkeypatch.setattr(spool_shares.TeamBudget, "take", crowded)
    answer = await write(large + PATH + END)
    assert "before `file`" in refused(answer, 503, "busy")["message"]
    monkeypatch.setattr(spool_shares.TeamBudget, "take", taken)
    assert (await write(PATH + large + END)).status_code == 204
    assert (await write(large + PATH + END)).status_code == 204  # what the others took was given back
    assert not list(api.spool_dir.iterdir())
