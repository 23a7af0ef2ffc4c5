"""What the README promises, on real VMs."""

from __future__ import annotations

import base64
import os
import re
import signal
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from urllib.parse import urlsplit


def test_create_exec_files_delete(api, create, run):
    """The README's lines: a sandbox, uname and Python inside, a file in and out, gone."""
    sandbox = create(metadata={"purpose": "readme"}, envs={"GREETING": "hello"})
    assert re.match(r"^sb-[0-9a-f-]{36}$", sandbox["id"])
    assert sandbox["status"] == "running"
    assert run(sandbox, "uname -a")["stdout"].startswith("Linux ")
    assert run(sandbox, "python3", args=["-c", "print(1+1)"])["stdout"] == "2\n"
    assert run(sandbox, "echo $GREETING")["stdout"] == "hello\n"
    content = os.urandom(3 * 1024 * 1024)
    path = f"/capsules/{sandbox['id'].removeprefix('sb-').replace('-', '')}/files"
    written = api.post(f"{path}/write", files={"path": (None, "/data/blob"), "file": ("blob", content)})
    assert written.status_code == 204, written.text
    assert api.post(f"{path}/read", json={"path": "/data/blob"}).content == content
    listed = api.post(f"{path}/list", json={"path": "/data"}).json()["entries"]
    assert [(entry["name"], entry["size"]) for entry in listed] == [("blob", len(content))]
    assert api.delete(f"/sandboxes/{sandbox['id']}").status_code == 204
    assert api.delete(f"/sandboxes/{sandbox['id']}").status_code == 204
    assert api.get(f"/sandboxes/{sandbox['id']}").json()["status"] == "stopped"


def test_exec_says_what_happened(api, create, run, poll):
    """Exit codes, time-outs with the output so far, binary output, stdin, background processes and signals."""
    sandbox = create()
    assert run(sandbox, "exit 3")["exit_code"] == 3
    assert run(sandbox, "no-such-program", args=[])["exit_code"] == 127
    assert run(sandbox, "cat", args=[], stdin="through")["stdout"] == "through"
    binary = run(sandbox, "printf '\\377\\000'")
    assert (binary["encoding"], base64.b64decode(binary["stdout"])) == ("base64", b"\xff\x00")
    late = api.post(f"/sandboxes/{sandbox['id']}/exec", json={"cmd": "echo first; sleep 60", "timeout_sec": 3})
    assert late.status_code == 408
    assert late.json()["error"]["code"] == "exec_timeout"
    assert late.json()["error"]["stdout"] == "first\n"
    unnamed = api.post(f"/sandboxes/{sandbox['id']}/exec", json={"cmd": "sleep 1000", "background": True}).json()
    assert api.delete(f"/sandboxes/{sandbox['id']}/processes/{unnamed['tag']}").status_code == 204
    body = {"cmd": "sleep 1000", "background": True, "tag": "napper"}
    assert api.post(f"/sandboxes/{sandbox['id']}/exec", json=body).status_code == 202
    listed = partial(api.get, f"/sandboxes/{sandbox['id']}/processes")
    poll(lambda: [process["tag"] for process in listed().json()["items"]] == ["napper"], 20, "the napper alone")
    assert api.delete(f"/sandboxes/{sandbox['id']}/processes/napper").status_code == 204
    poll(lambda: run(sandbox, "pgrep -c sleep || true")["stdout"] == "0\n", 20, "all of them dead and reaped")


def test_ten_at_once_are_strangers_to_each_other(api, create, run):
    """Ten creates at once: ten addresses, and no guest reaches the host's own addresses or another guest."""
    with ThreadPoolExecutor(10) as pool:
        sandboxes = list(pool.map(lambda _: create(memory_mb=128), range(10)))
    assert len({sandbox["host_ip"] for sandbox in sandboxes}) == 10
    listener = subprocess.Popen(
        ["python3", "-m", "http.server", "9999", "--bind", "0.0.0.0"], stderr=subprocess.DEVNULL
    )
    try:
        host = [line.split()[3].split("/")[0] for line in _host_addresses()]
        others = [sandbox["host_ip"] for sandbox in sandboxes[1:3]]
        script = f"""
import socket
def reaches(address, port):
    try:
        socket.create_connection((address, port), 1).close()
        return True
    except OSError:
        return False
print([(a, p) for a in {["169.254.0.22", "169.254.169.254", *host[:6]]!r} for p in (9999, 8080, 7443) if reaches(a, p)])
print([(a, 5000) for a in {others!r} if reaches(a, 5000)])
print(reaches("169.254.0.21", 5000))
"""
        seen = run(sandboxes[0], "python3", args=["-c", script], timeout_sec=120)
        assert seen["stdout"].splitlines()[:2] == ["[]", "[]"], seen
        assert subprocess.run(["curl", "-sf", "-o", "/dev/null", "http://127.0.0.1:9999/"], check=False).returncode == 0
    finally:
        listener.kill()
        listener.wait()


def _host_addresses():
    output = subprocess.run(["ip", "-o", "-4", "addr"], capture_output=True, text=True, check=True).stdout
    return [line for line in output.splitlines() if " lo " not in line]


def test_a_killed_agent_adopts_its_vms(platform, api, create, run, poll):
    """kill -9 of the agent: the processes in the guest go on, and the next agent execs beside them."""
    sandbox = create()
    loop = "while :; do echo >> /tmp/count; sleep 0.1; done"  # grows: a reader never meets an empty file
    body = {"cmd": loop, "background": True, "tag": "counter"}
    started = api.post(f"/sandboxes/{sandbox['id']}/exec", json=body).json()
    [agent] = platform.ready["agent_pids"]
    [vmm] = platform.vmm_pids(sandbox)
    os.kill(agent, signal.SIGKILL)
    poll(lambda: platform.ready["agent_pids"] not in ([agent], []), 60, "another agent")
    ask = partial(api.post, f"/sandboxes/{sandbox['id']}/exec", json={"cmd": "wc -l < /tmp/count"})
    answer = poll(lambda: (answer := ask()).status_code == 200 and answer, 60, "an answer by the next agent")
    first = int(answer.json()["stdout"])
    poll(lambda: int(run(sandbox, "wc -l < /tmp/count")["stdout"]) > first, 30, "a counter that goes on")
    processes = api.get(f"/sandboxes/{sandbox['id']}/processes").json()["items"]
    assert [(p["pid"], p["tag"]) for p in processes] == [(started["pid"], "counter")]
    assert platform.vmm_pids(sandbox) == [vmm]


def test_a_vm_that_dies_is_an_error_with_a_reason(platform, api, create, poll):
    """The VMM is killed: soon the sandbox says `error`, and why; nothing of it is left."""
    sandbox = create()
    [vmm] = platform.vmm_pids(sandbox)
    os.kill(vmm, signal.SIGKILL)
    poll(lambda: api.get(f"/sandboxes/{sandbox['id']}").json()["status"] == "error", 30, "status error")
    answer = api.post(f"/sandboxes/{sandbox['id']}/exec", json={"cmd": "true"})
    assert answer.status_code == 409
    assert "QEMU" in answer.json()["error"]["message"]
    poll(lambda: not platform.directory(sandbox).exists(), 30, "nothing of it on the disk")


def test_a_client_that_hangs_up_changes_nothing(platform, api, poll):
    """The connection of a create is cut: the sandbox comes up all the same, known and usable."""
    before = {sandbox["id"] for sandbox in api.get("/sandboxes").json()}

    connection = HTTPConnection(urlsplit(platform.ready["url"]).netloc, timeout=30)
    headers = {"X-API-Key": platform.ready["api_key"], "Content-Type": "application/json"}
    connection.request("POST", "/v1/sandboxes", body='{"memory_mb": 192}', headers=headers)
    [new] = poll(lambda: {sandbox["id"] for sandbox in api.get("/sandboxes").json()} - before, 30, "a new row")
    connection.close()
    poll(lambda: api.get(f"/sandboxes/{new}").json()["status"] == "running", 60, "running")
    assert api.post(f"/sandboxes/{new}/exec", json={"cmd": "true"}).status_code == 200
