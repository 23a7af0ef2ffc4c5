"""Hostile guests and clients: clear errors, bounded memory, the neighbours unharmed."""

from __future__ import annotations

import json
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import pytest

MIB = 1024 * 1024


def resident(pids):
    """MiB that these processes hold."""
    return (
        sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * os.sysconf("SC_PAGESIZE") // MIB
    )


def daemons(platform):
    ready = platform.ready
    return ready["agent_pids"] + ready["control_pids"]


@pytest.mark.parametrize("name", ["sb-x", "x", "sb-00000000-0000-0000-0000-00000000000g", "..%2f..", "usr-" + "0" * 32])
def test_malformed_ids(api, name):
    """An id that is none is 400 or 404, never more."""
    answer = api.get(f"/sandboxes/{name}")
    assert answer.status_code in {400, 404}
    assert answer.json()["error"]["code"] in {"invalid_request", "not_found"}


def test_paths_and_bodies(api, create):
    """Paths with `..`, bodies that do not fit: 400, and what is there stays."""
    sandbox = create()
    url = f"/sandboxes/{sandbox['id']}"
    for path in ("/tmp/../etc/passwd", "relative", "", "/a\0b", "/" + "x" * 5000):
        answer = api.post(f"{url}/files/read", json={"path": path})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request"), path[:20]
    for body in (b"{", b"[]", b'{"cmd": 1}', b'{"cmd": "true", "what": 1}', b"\xff"):
        answer = api.post(f"{url}/exec", content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, body
    assert api.post(f"{url}/exec", json={"cmd": "x" * (2 * MIB)}).status_code == 413


def test_an_upload_of_200_mb_is_refused(platform, api, create):
    """More than 100 MiB: 413, the file is not there, and nobody held it in memory."""
    sandbox = create()
    before = resident(daemons(platform))
    form = {"path": (None, "/root/big"), "file": ("big", os.urandom(MIB) * 200)}
    answer = api.post(f"/sandboxes/{sandbox['id']}/files/write", files=form)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    assert api.post(f"/sandboxes/{sandbox['id']}/files/read", json={"path": "/root/big"}).status_code == 404
    assert resident(daemons(platform)) - before < 64


def test_a_guest_that_floods_stdout(platform, api, create, run, poll):
    """Endless output: 413 with its beginning, bounded memory, the neighbour answers meanwhile."""
    flooder, neighbour = create(), create()
    before = resident(daemons(platform))
    with ThreadPoolExecutor(8) as pool:
        url = f"/sandboxes/{flooder['id']}/exec"
        floods = [pool.submit(api.post, url, json={"cmd": "yes flood"}) for _ in range(8)]
        assert run(neighbour, "echo fine")["stdout"] == "fine\n"
        for flood in floods:
            answer = flood.result()
            assert (answer.status_code, answer.json()["error"]["code"]) == (413, "output_too_large")
            assert answer.json()["error"]["stdout"].startswith("flood\n")
    assert run(flooder, "echo alive")["stdout"] == "alive\n"
    poll(lambda: run(flooder, "pgrep -c yes || true")["stdout"] == "0\n", 20, "all of them dead and reaped")
    assert resident(daemons(platform)) - before < 400


def test_a_guest_that_fills_its_disk(api, create, run):
    """A full disk is an error inside the guest and a typed one outside; the sandbox and its neighbour live on."""
    filler, neighbour = create(), create()
    filled = run(filler, "dd if=/dev/zero of=/fill bs=1M count=4000 2>&1; df / | tail -1", timeout_sec=300)
    assert "No space left on device" in filled["stdout"]
    form = {"path": (None, "/root/more"), "file": ("more", b"x" * MIB)}
    answer = api.post(f"/sandboxes/{filler['id']}/files/write", files=form)
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "disk_full")
    assert run(neighbour, "echo fine")["stdout"] == "fine\n"
    assert run(filler, "rm /fill && echo again")["stdout"] == "again\n"


def test_a_thousand_execs_at_once(platform, api, create, run):
    """1 000 execs in one sandbox: each is answered, done or told to come back; the neighbour is served meanwhile."""
    crowded, neighbour = create(memory_mb=512), create()
    before = resident(daemons(platform))
    url = f"/sandboxes/{crowded['id']}/exec"

    address = urlsplit(platform.ready["url"])
    headers = {"X-API-Key": platform.ready["api_key"], "Content-Type": "application/json"}
    body = json.dumps({"cmd": "true", "args": [], "timeout_sec": 120})

    def execute(_):
        connection = HTTPConnection(address.hostname, address.port, timeout=150)  # a thread each, a connection each
        try:
            connection.request("POST", f"/v1{url}", body, headers)
            return connection.getresponse().status
        finally:
            connection.close()

    with ThreadPoolExecutor(1000) as pool:
        answers = [pool.submit(execute, number) for number in range(1000)]
        assert run(neighbour, "echo fine", timeout_sec=120)["stdout"] == "fine\n"
        counts = Counter(answer.result() for answer in answers)
    assert set(counts) <= {200, 429}, counts
    assert counts[200] >= 32, counts
    assert run(crowded, "echo alive")["stdout"] == "alive\n"
    assert resident(daemons(platform)) - before < 300
