"""…/files/write: the form in any order and any split, whole or not at all, with bounded memory."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from capsule import errors
from capsule.http import requests, spool, spool_shares, uploads
from capsule.http.uploads import Form

BOUNDARY = b"xBOUNDARYx"
END = b"--" + BOUNDARY + b"--\r\n"
MIB = 1024 * 1024


def part(name, content, more=b""):
    return b'--%s\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % (BOUNDARY, name, more, content)


PATH = part(b"path", b"/a")
FILE = part(b"file", b"content", b'; filename="x.txt"\r\nContent-Type: text/plain')
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}


@pytest.fixture
def path(api):
    return f"/v1/sandboxes/sb-{api.sandboxes.add().id}/files/write"


def parse(body, cuts=()):
    """The path and content of a form fed in the pieces between `cuts`."""
    form = Form(BOUNDARY)
    content = b""
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, end in pairwise(edges):
        content += b"".join(form.feed(body[start:end]))
    form.finish()
    return form.path, content


NASTY = st.lists(
    st.sampled_from([b"\r", b"\n", b"\r\n", b"-", b"--", b"\r\n--", BOUNDARY, b"\r\n--" + BOUNDARY[:-1], b"\0", b"a"])
).map(b"".join)


@given(NASTY | st.binary(max_size=300), st.lists(st.integers(0, 2000), max_size=12), st.booleans())
def test_any_content_in_any_split_and_any_order(content, cuts, path_first):
    """The bytes come out as they went in, whatever they look like, wherever the network cuts (trap 12)."""
    if b"\r\n--" + BOUNDARY in b"\r\n" + content:
        return
    parts = [PATH, part(b"file", content, b'; filename="f"')]
    body = b"".join(parts if path_first else reversed(parts)) + END
    assert parse(body, cuts) == ("/a", content)


@given(st.integers(0, len(PATH + FILE + END) - 4), st.lists(st.integers(0, 400), max_size=3))
def test_no_beginning_of_a_form_is_a_form(length, cuts):
    """Trap 13: wherever it is cut, it is refused."""
    with pytest.raises(errors.InvalidRequest):
        parse((PATH + FILE + END)[:length], cuts)


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=4))
def test_any_bytes_are_a_form_or_refused(noise, cuts):
    """No input makes the parser fail in another way."""
    for body in (noise, PATH + noise, PATH + FILE + noise + END, b"--" + BOUNDARY + b"\r\n" + noise):
        try:
            parse(body, cuts)
        except errors.InvalidRequest as err:
            err.message.encode()


def written(api):
    """What the use-case was asked to write."""
    return [call for call in api.sandboxes.asked if call[0] == "write_file"]


@pytest.mark.parametrize("order", [(PATH, FILE), (FILE, PATH)])
async def test_parts_in_any_order(api, path, order):
    """Trap 12: `file` first must not store an empty file."""
    answer = await api.client.post(path, content=b"".join(order) + END, headers=FORM)
    assert answer.status_code == 204, answer.text
    assert api.sandboxes.files == {"/a": b"content"}


@pytest.mark.parametrize("size", [0, 1, spool.MEMORY_BYTES, spool.MEMORY_BYTES + 1, 3 * MIB + 7])
async def test_sizes_around_every_buffer(api, path, size):
    """In memory, on disk, and between; nothing stays on the disk."""
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    answer = await api.client.post(path, data={"path": "/a"}, files={"file": content})
    assert answer.status_code == 204
    assert api.sandboxes.files == {"/a": content}
    assert not list(api.spool_dir.iterdir())


REFUSED = {
    "no path": (FILE + END, "path"),
    "no file": (PATH + END, "file"),
    "nothing": (END, "path"),
    "empty": (b"", None),
    "path twice": (PATH + PATH + FILE + END, "path"),
    "file twice": (PATH + FILE + FILE + END, "file"),
    "another part": (PATH + FILE + part(b"mode", b"1") + END, "mode"),
    "no name": (PATH + FILE.replace(b'; name="file"', b"") + END, None),
    "no disposition": (b"--" + BOUNDARY + b"\r\n\r\nx\r\n" + END, None),
    "relative path": (part(b"path", b"a") + FILE + END, "path"),
    "dots": (part(b"path", b"/a/../b") + FILE + END, "path"),
    "NUL": (part(b"path", b"/a\0") + FILE + END, "path"),
    "not UTF-8": (part(b"path", b"/\xff") + FILE + END, "path"),
    "long path": (part(b"path", b"/" + b"a" * 4096) + FILE + END, "path"),
    "no last boundary": (PATH + FILE, None),
    "cut in the file": ((PATH + FILE)[:-4], None),
    "another boundary": (PATH.replace(b"xB", b"yB") + FILE + END, None),
    "noise": (b"\x00\xff" * 500, None),
    "endless header": (b"--" + BOUNDARY + b"\r\nContent-Disposition: " + b"x" * 50_000, None),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_wrong_form_is_400_and_nothing_is_written(api, refused, path, name):
    """Missing, repeated, unknown and malformed parts, and forms cut short (trap 13)."""
    body, field = REFUSED[name]
    answer = await api.client.post(path, content=body, headers=FORM)
    assert refused(answer, 400, "invalid_request").get("field") == field
    assert not written(api)


@pytest.mark.parametrize(
    ("content_type", "status", "code"),
    [
        ("application/json", 415, "unsupported_media_type"),
        ("", 415, "unsupported_media_type"),
        ("multipart/form-data", 400, "invalid_request"),
        ("multipart/form-data; boundary=", 400, "invalid_request"),
        ("multipart/form-data; boundary=" + "x" * 500, 400, "invalid_request"),
    ],
)
async def test_a_wrong_content_type(api, refused, path, content_type, status, code):
    """Another type is 415, a form without a usable boundary 400."""
    answer = await api.client.post(path, content=PATH + FILE + END, headers={"Content-Type": content_type})
    refused(answer, status, code)


@pytest.mark.parametrize("ending", [b"Content-Length: 500\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_a_client_that_breaks_off_writes_nothing(api, path, ending):
    """Trap 13: the connection ends inside the body; the use-case is never asked, and the disk is clean."""
    head = api.head("POST", path, f"Content-Type: {FORM['Content-Type']}").removesuffix(b"\r\n") + ending + b"\r\n"
    body = PATH + FILE
    sent = head + (b"%x\r\n%s\r\n" % (len(body), body) if b"chunked" in ending else body)
    stream = await trio.open_tcp_stream("127.0.0.1", api.port)
    async with stream:
        await stream.send_all(sent)
        await stream.send_eof()
        with trio.fail_after(20):
            answer = b"".join([chunk async for chunk in stream])
    assert not answer.startswith(b"HTTP/1.1 2"), answer
    assert not written(api)


def reset_peak():
    """Start measuring the largest resident size of this process anew; the size now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(name):
    """A figure of /proc/self/status in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{name}:")[1].split()[0]) * 1024


@pytest.mark.parametrize("chunked", [False, True])
async def test_200_mib_get_413_and_cost_no_memory(api, refused, path, chunked):
    """The client sees the answer, not a reset; neither we nor the disk keep the bytes."""
    size, piece = 200 * MIB, bytes(MIB)
    lead = PATH + part(b"file", b"").removesuffix(b"\r\n")

    async def pieces():
        yield lead
        for _ in range(size // MIB):
            yield piece
        yield b"\r\n" + END

    headers = dict(FORM)
    if not chunked:
        headers["Content-Length"] = str(len(lead) + size + len(b"\r\n" + END))
    before = reset_peak()
    answer = await api.client.post(path, content=pieces(), headers=headers)
    assert refused(answer, 413, "too_large")["limit"] == 100 * MIB
    assert memory("VmHWM") - before < 40 * MIB
    assert not written(api)
    assert not list(api.spool_dir.iterdir())


async def test_exactly_the_limit_is_taken(api, refused, path, monkeypatch):
    """The limit is the file's, not the form's."""
    monkeypatch.setattr(uploads, "MAX_FILE_BYTES", 200_000)
    good = await api.client.post(path, data={"path": "/a"}, files={"file": bytes(200_000)})
    assert good.status_code == 204
    bad = await api.client.post(path, data={"path": "/a"}, files={"file": bytes(200_001)})
    refused(bad, 413, "too_large")


async def test_a_stalled_upload_is_ended(api, path, monkeypatch):
    """408, and the connection is closed, though the client still owes most of the body."""
    monkeypatch.setattr(requests, "CHUNK_TIMEOUT", 0.1)
    monkeypatch.setattr("capsule.http.connection.DRAIN_TIMEOUT", 0.1)
    head = api.head("POST", path, f"Content-Type: {FORM['Content-Type']}", "Content-Length: 1000")
    answer = await api.raw(head + PATH)
    assert b" 408 " in answer
    assert b"request_timeout" in answer


async def test_no_place_left_is_503(api, refused, path, monkeypatch):
    """A full upload directory is our trouble, and passes; so is too many uploads at once."""

    def full(*_arguments, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    answer = await api.client.post(path, data={"path": "/a"}, files={"file": bytes(500_000)})
    refused(answer, 503, "busy")
    assert answer.headers["retry-after"]


async def test_uploads_wait_for_their_turn(api, refused, path, monkeypatch, until):
    """With all of the team's places taken an upload waits, then is told to come again; the places come back."""
    monkeypatch.setattr(spool_shares, "PLACE_TIMEOUT", 0.2)
    api.sandboxes.gates["write_file"] = trio.Event()
    big = {"data": {"path": "/a"}, "files": {"file": bytes(200_000)}}
    places, answers = spool.MAX_FILES // 2, []

    async def post():
        answers.append(await api.client.post(path, **big))

    async with trio.open_nursery() as nursery:
        for _ in range(places):
            nursery.start_soon(post)
        await until(lambda: len(written(api)) == places)
        refused(await api.client.post(path, **big), 503, "busy")
        small = {"data": {"path": "/b"}, "files": {"file": b"x"}}
        nursery.start_soon(lambda: api.client.post(path, **small))
        await until(lambda: len(written(api)) == places + 1)
        api.sandboxes.gates["write_file"].set()
    assert [answer.status_code for answer in answers] == [204] * places
    assert (await api.client.post(path, **big)).status_code == 204
