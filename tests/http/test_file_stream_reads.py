"""…/files/stream/read: any range, versions, archives, and failures half-way."""

from __future__ import annotations

from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capsule import errors
from capsule.http import file_streams, ranges
from capsule.http.ranges import Range
from capsule.model import FileContent


@pytest.fixture
def base(api):
    return f"/v1/sandboxes/sb-{api.sandboxes.add().id}/files/stream"


@pytest.fixture
def stored(world, served):
    """Where generated tests read, synchronously."""
    return f"/v1/sandboxes/sb-{world.sandboxes.add().id}/files/stream"


@pytest.fixture
def read(api, base):
    async def read(path="/a", **headers):
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await api.client.post(f"{base}/read", json={"path": path}, headers=named)

    return read


CONTENT = bytes(range(256)) * 10


@pytest.mark.parametrize("content", [b"", CONTENT])
async def test_read_all(api, read, content):
    """With its length and version; also when a range cannot be served as one."""
    api.sandboxes.files["/a"] = content
    for header in ({}, {"Range": "bytes=0-1,5-9"}, {"Range": "lines=1-2"}, {"Range": "bytes=9-3"}, {"Range": "x"}):
        answer = await read(**header)
        assert (answer.status_code, answer.content) == (200, content)
        assert answer.headers["content-length"] == str(len(content))
        assert answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["etag"].startswith('"')
        assert answer.headers["content-type"] == "application/octet-stream"


def test_any_range(served, world, stored):
    """The very bytes, or 416 with the size."""
    world.sandboxes.files["/a"] = CONTENT
    size = len(CONTENT)

    @settings(deadline=None, max_examples=150)
    @given(st.integers(0, 3000) | st.none(), st.integers(0, 3000) | st.integers(0, 10**30) | st.none())
    def check(first, last):
        header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
        answer = served.post(f"{stored}/read", json={"path": "/a"}, headers={"Range": header})
        if (first is None and last is None) or (first is not None and last is not None and last < first):
            assert (answer.status_code, answer.content) == (200, CONTENT)
            return
        begin, end = (max(0, size - last), size) if first is None else (first, size if last is None else last + 1)
        if begin >= size:
            assert answer.status_code == 416
            assert answer.json()["error"]["code"] == "range_not_satisfiable"
            assert answer.json()["error"]["size"] == size
            assert answer.headers["content-range"] == f"bytes */{size}"
            return
        assert (answer.status_code, answer.content) == (206, CONTENT[begin:end])
        assert answer.headers["content-range"] == f"bytes {begin}-{min(end, size) - 1}/{size}"
        assert answer.headers["content-length"] == str(len(answer.content))

    check()


@given(
    st.text(max_size=40) | st.from_regex(r"bytes=[0-9]{0,30}-[0-9]{0,30}", fullmatch=True), st.integers(0, 2**63 - 1)
)
def test_no_header_is_a_bug(header, size):
    """Any Range header is understood or left out, and what it means lies within the file."""
    wanted = ranges.parse(header)
    span = wanted.within(size) if wanted is not None else None
    if span is not None:
        assert 0 <= span.first <= span.last < size
        assert span.size == size
    if wanted is not None:
        assert 0 <= wanted.first <= ranges.MAX_POSITION
        assert 0 <= (wanted.wanted or 0) <= ranges.MAX_POSITION


async def test_a_resumed_download_equals_the_file(api, read):
    """Part by part, by the version of the first."""
    api.sandboxes.files["/a"] = CONTENT
    first = await read(Range="bytes=0-99")
    content, tag = first.content, first.headers["etag"]
    while len(content) < len(CONTENT):
        answer = await read(Range=f"bytes={len(content)}-{len(content) + 500}", If_Range=tag)
        assert answer.status_code == 206
        content += answer.content
    assert content == CONTENT


async def test_a_file_that_changed_is_sent_whole(api, read):
    """If-Range with the version of before, or with what is no version of ours: 200."""
    api.sandboxes.files["/a"] = CONTENT
    tag = (await read(Range="bytes=0-99")).headers["etag"]
    for old in (tag.strip('"'), f"W/{tag}", "Sun, 06 Nov 1994 08:49:37 GMT", '"other"'):
        answer = await read(Range="bytes=100-", If_Range=old)
        assert (answer.status_code, answer.content) == (200, CONTENT)
    changed = bytes(reversed(CONTENT))
    api.sandboxes.files["/a"] = changed
    for wanted in ("bytes=100-", "bytes=-5", "bytes=999999-"):
        answer = await read(Range=wanted, If_Range=tag)
        assert (answer.status_code, answer.content) == (200, changed)
        assert answer.headers["etag"] != tag


class Changing:
    """A file that is another one, of another size, each time it is opened."""

    def __init__(self, *contents):
        self._contents = list(contents)

    @asynccontextmanager
    async def read_stream(self, _principal, _sandbox, _path, *, offset, length):
        content = self._contents.pop(0) if len(self._contents) > 1 else self._contents[0]

        async def chunks():
            yield content[offset:] if length is None else content[offset : offset + length]

        generator = chunks()
        try:
            yield FileContent(size=len(content), version=str(len(content)), chunks=generator)
        finally:
            await generator.aclose()


async def test_the_end_of_a_file_that_changes(api, read, monkeypatch):
    """The last bytes are those of one version; one that never stands still is sent whole."""
    growing = [b"x" * size + b"end" + str(size).encode() for size in (10, 20, 30)]
    monkeypatch.setattr(api.streams, "read_stream", Changing(growing[0], growing[1]).read_stream)
    answer = await read(Range="bytes=-5")
    assert (answer.status_code, answer.content) == (206, b"end20")
    monkeypatch.setattr(api.streams, "read_stream", Changing(*growing, b"whole").read_stream)
    answer = await read(Range="bytes=-5")
    assert (answer.status_code, answer.content) == (200, b"whole")


async def test_a_file_without_a_size(api, read, monkeypatch):
    """Chunked, without ranges and version."""

    @asynccontextmanager
    async def read_stream(_principal, _sandbox, _path, *, offset, length):
        async def chunks():
            yield b"proc"[offset:]

        generator = chunks()
        try:
            yield FileContent(size=None, version=None, chunks=generator)
        finally:
            await generator.aclose()

    monkeypatch.setattr(api.streams, "read_stream", read_stream)
    for header in ({}, {"Range": "bytes=1-"}, {"Range": "bytes=-1"}):
        answer = await read(**header)
        assert (answer.status_code, answer.content) == (200, b"proc")
        assert not {"content-length", "etag", "accept-ranges"} & answer.headers.keys()


@pytest.mark.parametrize(("path", "status", "code"), [("/none", 404, "file_not_found"), ("/", 400, "is_a_directory")])
async def test_refusals_come_before_the_first_byte(read, refused, path, status, code):
    """Also when a part is asked for."""
    refused(await read(path), status, code)
    refused(await read(path, Range="bytes=-5"), status, code)


async def test_an_archive_is_read(api, base, refused):
    """Of a type of its own, without ranges."""
    api.streams.archives["/d"] = b"archive"
    body = {"path": "/d", "format": "tar"}
    answer = await api.client.post(f"{base}/read", json=body, headers={"Range": "bytes=1-2"})
    assert (answer.status_code, answer.content) == (200, b"archive")
    assert answer.headers["content-type"] == "application/x-tar"
    assert "accept-ranges" not in answer.headers
    refused(await api.client.post(f"{base}/read", json={**body, "path": "/none"}), 404, "file_not_found")
    refused(await api.client.post(f"{base}/read", json={**body, "format": "zip"}), 400, "invalid_request")


async def test_a_failure_half_way_breaks_the_connection(api, read, monkeypatch):
    """A file never looks whole that is not, and neither does an archive, which has no length."""

    @asynccontextmanager
    async def broken(*_arguments, **_more):
        async def chunks():
            yield b"x" * 200_000
            raise errors.HostUnavailable("Its host went away.")

        generator = chunks()
        try:
            yield FileContent(size=None, version=None, chunks=generator)
        finally:
            await generator.aclose()

    monkeypatch.setattr(api.streams, "read_stream", broken)
    with pytest.raises(httpx.RemoteProtocolError):
        await read()


async def test_who_lost_the_right_reads_no_more(api, read, monkeypatch):
    """A download that has begun breaks off soon; one whose database is away for a moment does not."""
    monkeypatch.setattr(file_streams, "RECHECK_SECONDS", 0)
    api.sandboxes.files["/a"] = bytes(10 * 65536)
    known = api.authenticator.api_key
    answers = []

    async def answer(key):
        if answers and (error := answers.pop(0)) is not None:
            raise error
        return await known(key)

    monkeypatch.setattr(api.authenticator, "api_key", answer)
    answers += [None, None, errors.DatabaseUnavailable("away"), None]
    assert len((await read()).content) == 10 * 65536
    answers += [None, None, None, errors.Unauthorized("revoked")]
    with pytest.raises(httpx.RemoteProtocolError):
        await read()


def test_ranges_read_as_the_rfc_says():
    """RFC 9110 §14.1.2, its own examples."""
    assert ranges.parse("bytes=0-499") == Range(0, 499)
    assert ranges.parse("bytes=500-999") == Range(500, 999)
    assert ranges.parse("bytes=-500") == Range(suffix=500)
    assert ranges.parse("bytes=9500-") == Range(9500)
    assert ranges.parse("bytes= 0-999, 4500-5499, -1000") is None
    assert ranges.parse("BYTES=1-1") == Range(1, 1)
    assert ranges.parse("bytes=-0").within(5) is None
