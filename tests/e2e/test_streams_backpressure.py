"""A client that stops reading stops the process or the transfer, and costs nobody memory; what is broken off leaves
nothing behind."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest
import trio

MIB = 1024 * 1024
STREAM = int(os.environ.get("CAPSULE_STREAM_MIB", "96")) * MIB
UPLOAD = int(os.environ.get("CAPSULE_UPLOAD_MIB", "96")) * MIB
STALL = 36
"""Seconds; ordinary answers are cut after 30."""
GROWTH = 12
"""MiB that a process may grow by while nobody reads."""
PIECE = 256 * 1024
SEED = os.urandom(PIECE)


class Memory:
    """Resident MiB of each process between the client and the process in the guest."""

    def __init__(self, platform, sandbox, run):
        ready = platform.ready
        pager = [pid for pid in platform.pids() if b"pager" in _command(pid)]
        self._pids = {
            "control": ready["control_pids"],
            "agent": ready["agent_pids"],
            "pager": [pid for pid in pager if pid not in ready["agent_pids"]],
            "qemu": platform.vmm_pids(sandbox),
        }
        assert all(self._pids.values()), self._pids
        self._guest = lambda: int(run(sandbox, "awk '/VmRSS/ {print $2}' /proc/1/status")["stdout"]) // 1024

    def now(self):
        """{name: MiB}."""
        page = os.sysconf("SC_PAGESIZE")
        found = {
            name: sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * page // MIB
            for name, pids in self._pids.items()
        }
        return {**found, "guest daemon": self._guest()}


def _command(pid):
    """Its command line, empty for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def _flat(memory, before=None):
    """Watch it through a stall; what it grew by."""
    before = before or memory.now()
    highest = dict(before)
    for _ in range(STALL // 4):
        await trio.sleep(4)
        highest = {name: max(highest[name], size) for name, size in memory.now().items()}
    print(f"resident MiB before {before}, highest {highest}")  # noqa: T201 - a figure
    assert {name: highest[name] - before[name] for name in before if highest[name] - before[name] > GROWTH} == {}


@pytest.fixture
def big(create, run):
    """A sandbox with a random file /root/big of STREAM bytes."""
    sandbox = create(memory_mb=512)
    run(sandbox, f"head -c {STREAM} /dev/urandom > /root/big; sha256sum /root/big > /root/big.sum", timeout_sec=120)
    return sandbox


async def test_stalled_clients_hold_up_processes_and_not_memory(platform, big, connect, run):
    """An exec's output, a terminal's and a download to clients that read nothing for 36 s: all processes stay as large
    as they are; then all is read, and every hash is right."""
    url = f"{platform.ready['url']}/v1/sandboxes/{big['id']}/files/stream/read"
    headers = {"X-API-Key": platform.ready["api_key"]}
    async with (
        connect.exec(big, "cat", args=["/root/big"]) as (console, _),
        connect.terminal(big, cmd=f"stty raw; head -c {STREAM // 4} /root/big", tag="big") as (terminal, _),
        httpx.AsyncClient(timeout=120, trust_env=False) as client,
        client.stream("POST", url, json={"path": "/root/big"}, headers=headers) as download,
    ):
        assert download.status_code == 200
        come = {"exec": hashlib.sha256(), "terminal": hashlib.sha256(), "download": hashlib.sha256()}
        come["exec"].update(await console.output(MIB))
        come["terminal"].update(await terminal.output(MIB))
        await trio.sleep(2)  # what is in between fills up
        await _flat(Memory(platform, big, run))

        async def finish(name, pieces):
            async for piece in pieces:
                come[name].update(piece[1] if isinstance(piece, tuple) else piece)

        with trio.fail_after(120 + STREAM // MIB):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(finish, "exec", console.pieces())
                nursery.start_soon(finish, "terminal", terminal.pieces())
                nursery.start_soon(finish, "download", download.aiter_raw(64 * 1024))
    part = run(big, f"head -c {STREAM // 4} /root/big | sha256sum > /root/part.sum", timeout_sec=120)
    assert part["exit_code"] == 0
    sums = [run(big, f"cat /root/{name}.sum")["stdout"].split()[0] for name in ("big", "part", "big")]
    assert [digest.hexdigest() for digest in come.values()] == sums
    assert console.exit["exit_code"] == terminal.exit["exit_code"] == 0
    assert (console.received, terminal.received) == (STREAM, STREAM // 4)


def _content(size):
    for at in range(0, size, PIECE):
        yield SEED[: min(PIECE, size - at)]


def _form(path, size):
    """Head and tail of the multipart body around the content, and its type."""
    head = (
        f'--cut\r\nContent-Disposition: form-data; name="path"\r\n\r\n{path}\r\n--cut\r\n'
        'Content-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
    ).encode()
    tail = b"\r\n--cut--\r\n"
    return (
        head,
        tail,
        {"Content-Type": "multipart/form-data; boundary=cut", "Content-Length": str(len(head) + size + len(tail))},
    )


def _upload(api, sandbox, path, size):
    head, tail, headers = _form(path, size)

    def body():
        yield head
        yield from _content(size)
        yield tail

    return api.post(f"/sandboxes/{sandbox['id']}/files/stream/write", content=body(), headers=headers)


def test_an_upload_is_there_whole_or_not_at_all(platform, api, create, run, poll):
    """Of any size, in bounded memory, with the digest of what was written. One that is cut off half-way leaves the old
    file, and nothing beside it."""
    sandbox = create(memory_mb=512)
    memory = Memory(platform, sandbox, run)
    before = memory.now()
    answer = _upload(api, sandbox, "/data/file", UPLOAD)
    assert answer.status_code == 204, answer.text
    digest = hashlib.sha256()
    for piece in _content(UPLOAD):
        digest.update(piece)
    assert answer.headers["Repr-Digest"] == f"sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    inside = "sha256sum /data/file | cut -d' ' -f1; ls -A /data"
    whole = f"{digest.hexdigest()}\nfile\n"
    assert run(sandbox, inside, timeout_sec=120)["stdout"] == whole
    after = memory.now()
    grown = {name: after[name] - before[name] for name in ("control", "agent", "pager", "guest daemon")}
    assert max(grown.values()) < 32, grown

    head, _, headers = _form("/data/file", UPLOAD)
    url = urlsplit(platform.ready["url"])
    with socket.create_connection((url.hostname, url.port)) as raw:
        lines = {"Host": url.netloc, "X-API-Key": platform.ready["api_key"], **headers}
        text = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        raw.sendall(f"POST /v1/sandboxes/{sandbox['id']}/files/stream/write HTTP/1.1\r\n{text}\r\n".encode() + head)
        for piece in _content(UPLOAD // 2):
            raw.sendall(piece)
        entries = poll(
            lambda: (found := run(sandbox, "ls -A /data")["stdout"].split()) != ["file"] and found, 20, "a draft"
        )
        assert len(entries) == 2
    poll(lambda: run(sandbox, "ls -A /data")["stdout"] == "file\n", 20, "no draft")
    assert run(sandbox, inside, timeout_sec=120)["stdout"] == whole


def test_a_download_goes_on_where_it_broke_off(platform, api, big, run):
    """By Range and If-Range; after the file was changed, from its beginning."""
    url = f"/sandboxes/{big['id']}/files/stream/read"
    ask = {"json": {"path": "/root/big"}}
    digest, size = hashlib.sha256(), 0
    with api.stream("POST", url, **ask) as first:
        assert (first.status_code, first.headers["Content-Length"]) == (200, str(STREAM))
        version = first.headers["ETag"]
        for piece in first.iter_raw(64 * 1024):
            digest.update(piece)
            size += len(piece)
            if size > STREAM // 3:
                break
    going_on = {"Range": f"bytes={size}-", "If-Range": version}
    with api.stream("POST", url, **ask, headers=going_on) as rest:
        assert rest.status_code == 206
        assert rest.headers["Content-Range"] == f"bytes {size}-{STREAM - 1}/{STREAM}"
        for piece in rest.iter_raw(64 * 1024):
            digest.update(piece)
    assert run(big, "cat /root/big.sum")["stdout"].split()[0] == digest.hexdigest()
    last = api.post(url, **ask, headers={"Range": "bytes=-10"})
    assert (last.status_code, len(last.content)) == (206, 10)
    beyond = api.post(url, **ask, headers={"Range": f"bytes={STREAM}-"})
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{STREAM}")
    run(big, "echo changed > /root/big")
    changed = api.post(url, **ask, headers=going_on)
    assert (changed.status_code, changed.content) == (200, b"changed\n")
