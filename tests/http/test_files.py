"""…/files over HTTP, but for uploads."""

from __future__ import annotations

import httpx
import pytest
import trio

from capsule import errors


@pytest.fixture
def base(api):
    return f"/v1/sandboxes/sb-{api.sandboxes.add().id}/files"


async def test_read_gives_raw_bytes_with_their_length(api, base):
    """Any bytes, also none."""
    for content in (b"", bytes(range(256)) * 1000):
        api.sandboxes.files["/a"] = content
        answer = await api.client.post(f"{base}/read", json={"path": "/a"})
        assert answer.content == content
        assert answer.headers["content-length"] == str(len(content))
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["x-request-id"]


async def test_read_without_a_known_size_is_chunked(api, base):
    """A file that grows (/proc) has no length; its end is a clean one."""

    async def chunks():
        for _ in range(50):
            yield b"x" * 10_000
            yield b""

    api.sandboxes.chunks, api.sandboxes.announced = chunks, None
    answer = await api.client.post(f"{base}/read", json={"path": "/proc/x"})
    assert answer.content == b"x" * 500_000
    assert "content-length" not in answer.headers


@pytest.mark.parametrize(("path", "status", "code"), [("/none", 404, "file_not_found"), ("/", 400, "is_a_directory")])
async def test_read_refusals_come_before_the_first_byte(api, refused, base, path, status, code):
    """An ordinary refusal, though the answer would be a stream."""
    refused(await api.client.post(f"{base}/read", json={"path": path}), status, code)


@pytest.mark.parametrize(
    ("announced", "trouble"),
    [(None, "fault"), (None, "bug"), (300_000, "fault"), (300_000, "bug"), (300_000, "short"), (300_000, "long")],
)
async def test_a_failure_half_way_breaks_the_connection(api, base, events, announced, trouble):
    """The client must not take half a file for the whole: no clean end, and the source is closed."""

    async def chunks():
        yield b"x" * 200_000
        if trouble == "fault":
            raise errors.HostUnavailable("Its host went away.")
        if trouble == "bug":
            raise ZeroDivisionError
        if trouble == "long":
            yield b"x" * 200_000

    api.sandboxes.chunks, api.sandboxes.announced = chunks, announced
    with pytest.raises(httpx.RemoteProtocolError):
        await api.client.post(f"{base}/read", json={"path": "/a"})
    with trio.fail_after(20):
        await api.sandboxes.received.wait()
    logged = [event["event"] for event in events]
    assert ("answer_failed" if trouble == "bug" else "answer_broken_off") in logged


async def test_a_slow_reader_slows_the_source(api, base):
    """Back-pressure: what is not read is not produced."""
    produced = 0

    async def chunks():
        nonlocal produced
        while produced < 200_000_000:
            produced += 65_536
            yield bytes(65_536)

    api.sandboxes.chunks, api.sandboxes.announced = chunks, None
    body = b'{"path": "/a"}'
    head = api.head("POST", f"{base}/read", "Content-Type: application/json", f"Content-Length: {len(body)}")
    async with await trio.open_tcp_stream("127.0.0.1", api.port) as stream:
        await stream.send_all(head + body)
        assert await stream.receive_some(1)
        before = -1
        with trio.fail_after(20):
            while before != produced:  # until the buffers between us are full
                before = produced
                await trio.sleep(0.3)
        assert produced < 50_000_000
    with trio.fail_after(20):
        await api.sandboxes.received.wait()


async def test_list_describes_every_kind(api, base):
    """Type and mode as `ls -l` writes them; times a guest made up do no harm."""
    answer = await api.client.post(f"{base}/list", json={"path": "/", "depth": 3})
    file, link, other = answer.json()["entries"]
    assert file == {
        "name": "a",
        "path": "/a",
        "type": "file",
        "size": 4096,
        "mode": 0o644,
        "permissions": "-rw-r--r--",
        "owner": "root",
        "group": "root",
        "modified_at": "2023-11-14T22:13:20.123456Z",
    }
    assert (link["permissions"], link["symlink_target"]) == ("lrwxrwxrwx", "/a")
    assert (other["permissions"], other["modified_at"]) == ("?rws--x--x", "1969-12-31T23:59:59.999999Z")
    assert api.sandboxes.asked[-1][1][2:] == ("/", 3)


async def test_mkdir_and_remove(api, refused, base):
    """mkdir gives the entry, and 409 for what is there; remove gives nothing."""
    answer = await api.client.post(f"{base}/mkdir", json={"path": "/d"})
    assert answer.json()["entry"]["permissions"] == "drwxr-xr-x"
    refused(await api.client.post(f"{base}/mkdir", json={"path": "/"}), 409, "conflict")
    answer = await api.client.post(f"{base}/remove", json={"path": "/d"})
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize(
    "path", ["", "a", "./a", "/..", "/a/../b", "/a/..", "/a\0", "/" + "a" * 4096, "/" + "ä" * 4000, 5]
)
@pytest.mark.parametrize("verb", ["read", "list", "mkdir", "remove"])
async def test_a_bad_path_is_400(api, refused, base, verb, path):
    """Absolute, at most 4096 bytes, no NUL, no `..`."""
    answer = await api.client.post(f"{base}/{verb}", json={"path": path})
    assert refused(answer, 400, "invalid_request")["field"] == "path"
    assert not api.sandboxes.asked


@pytest.mark.parametrize("path", ["/", "/..a", "/a../b", "/...", "/a b\n", "/ä", "//a/./b"])
async def test_an_odd_path_is_fine(api, base, path):
    """Two dots are forbidden only as a whole component."""
    assert (await api.client.post(f"{base}/list", json={"path": path})).status_code == 200


@pytest.mark.parametrize("depth", [0, 33, "1"])
async def test_a_bad_depth_is_400(api, refused, base, depth):
    """1 to 32."""
    answer = await api.client.post(f"{base}/list", json={"path": "/", "depth": depth})
    assert refused(answer, 400, "invalid_request")["field"] == "depth"
