"""Pause, resume, templates and forks, as their users have them: real guests, over HTTP."""

from __future__ import annotations

import json
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agent.snapshots.header import Header

ROUNDS = int(os.environ.get("CAPSULE_PAUSE_ROUNDS", "10"))
BLOB_MIB = 64
MIB = 1024 * 1024

PREPARE = f"""
set -e
mkdir -p /mnt/t && mount -t tmpfs -o size=100m tmpfs /mnt/t
head -c {BLOB_MIB * MIB} /dev/urandom > /mnt/t/blob
head -c {BLOB_MIB * MIB} /dev/urandom > /root/blob
sync
sha256sum /mnt/t/blob /root/blob > /root/sums
"""
COUNTER = """
import time
kept = open("/root/kept-open", "w+")
count = 0
while True:
    count += 1
    kept.seek(0); kept.write(str(count)); kept.flush()
    time.sleep(0.02)
"""
LOAD = (
    "head -c 2097152 /dev/urandom > /mnt/t/scratch; head -c 1048576 /dev/urandom > /root/scratch; "
    "ls -R /usr/lib > /dev/null"
)
NEW_MIB = 40
"""What a generation may hold after LOAD: 3 MiB of it, its page cache, dirty kernel pages of two execs and a shell."""


@pytest.fixture
def post(api):
    """`post(sandbox, "pause")` → its JSON; the status must be 2xx."""

    def call(sandbox, action, **body):
        answer = api.post(f"/sandboxes/{sandbox['id']}/{action}", json=body or None)
        assert answer.is_success, (action, answer.status_code, answer.text)
        return answer.json() if answer.content else None

    return call


def generations(platform, sandbox):
    """(generation, bytes of its own build) of the snapshot that a sandbox rests as."""
    root = platform.data / "agent/snapshots"
    while True:
        base = json.loads((platform.directory(sandbox) / "record.json").read_bytes())["base"]
        file = root / "snapshots" / base / "mem.header"
        try:
            header = Header.decode(file.read_bytes(), name=str(file))
            data = root / "builds" / str(header.build) / "data"
            return header.generation, data.stat().st_size if data.exists() else 0
        except FileNotFoundError:  # compacted meanwhile: the record names another one by now
            assert json.loads((platform.directory(sandbox) / "record.json").read_bytes())["base"] != base


def test_many_pauses_lose_nothing(platform, create, run, post, poll):
    """A counter goes on counting in an open file, blobs in tmpfs and on the disk keep their hashes, with load in
    between; each generation holds what changed, not the memory."""
    sandbox = create(memory_mb=512)
    run(sandbox, PREPARE, timeout_sec=120)
    run(sandbox, "python3", args=["-c", COUNTER], background=True)
    seen, sizes = 0, []
    for number in range(ROUNDS):
        run(sandbox, LOAD, timeout_sec=120)
        assert post(sandbox, "pause")["status"] == "paused"
        sizes.append(generations(platform, sandbox))
        assert post(sandbox, "resume")["status"] == "running"
        poll(lambda one=seen: _count(run, sandbox) > one, 30, f"a counter that goes on in round {number}")
        seen = _count(run, sandbox)
        if number % 5 == 4:
            assert run(sandbox, "sha256sum -c --quiet /root/sums", timeout_sec=120)["exit_code"] == 0
    assert run(sandbox, "sha256sum -c --quiet /root/sums", timeout_sec=120)["exit_code"] == 0
    own = [size for before, (generation, size) in zip([None, *sizes], sizes, strict=False) if _grew(before, generation)]
    assert len(own) >= ROUNDS // 3, sizes
    assert max(own) < NEW_MIB * MIB, [size // MIB for size in own]


def _count(run, sandbox):
    """How far the counter has come; it writes over its file, which is empty only before the first time."""
    return int(run(sandbox, "cat /root/kept-open")["stdout"] or 0)


def _grew(before, generation):
    """Whether this one was made by a pause on top of the one before, not by compaction."""
    return before is not None and generation == before[0] + 1


def test_a_resumed_guest_is_of_today(create, run, post, poll):
    """After a resume: the clock is right within half a second, the name is its own, the processes are the same."""
    sandbox = create()
    run(sandbox, "sleep 100000", background=True)
    poll(lambda: run(sandbox, "pgrep -x sleep")["stdout"], 20, "a shell that has become the sleep")
    before = run(sandbox, "hostname; cat /etc/machine-id; pgrep -x sleep")["stdout"]
    post(sandbox, "pause")
    time.sleep(3)  # the guest's clock stands meanwhile: that is what is tested
    post(sandbox, "resume")

    def is_right():
        asked = time.time()
        told = float(run(sandbox, "date +%s.%N")["stdout"])
        return asked - 0.5 < told < time.time() + 0.5

    poll(is_right, 20, "a clock within 500 ms")
    assert run(sandbox, "hostname; cat /etc/machine-id; pgrep -x sleep")["stdout"] == before


def test_a_paused_sandbox_costs_nothing(platform, create, post, poll, slots):
    """Pausing ends the VMM and gives the slot back; everything it can do then is be resumed or destroyed."""
    before = len(slots())
    sandbox = create()
    assert len(platform.vmm_pids(sandbox)) == 1
    post(sandbox, "pause")
    poll(lambda: platform.vmm_pids(sandbox) == [], 30, "its VMM gone")
    poll(lambda: len(slots()) <= max(before, 4), 60, "its slot gone")


def test_calls_on_a_paused_sandbox(api, create, post):
    """409 `invalid_state` saying so, for everything that needs a running one; pausing again is 200."""
    sandbox = create()
    post(sandbox, "pause")
    url = f"/sandboxes/{sandbox['id']}"
    for path, body in (
        ("exec", {"cmd": "true"}),
        ("ping", None),
        ("files/read", {"path": "/etc/hostname"}),
        ("fork", {}),
    ):
        answer = api.post(f"{url}/{path}", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state"), (path, answer.text)
        assert answer.json()["error"]["status"] == "paused"
    assert post(sandbox, "pause")["status"] == "paused"
    assert api.get(url).json()["status"] == "paused"
    assert "host_ip" not in api.get(url).json()
    assert post(sandbox, "resume")["status"] == "running"
    assert post(sandbox, "resume")["status"] == "running"


def test_an_idle_sandbox_pauses_itself(api, create, run, post, poll):
    """`timeout_sec`: paused when idle, not while a command runs; after the resume the time-out counts again."""
    sandbox = create(timeout_sec=6)
    url = f"/sandboxes/{sandbox['id']}"
    assert run(sandbox, "sleep 9; echo awake", timeout_sec=30)["stdout"] == "awake\n"
    assert api.get(url).json()["status"] == "running"
    poll(lambda: api.get(url).json()["status"] == "paused", 30, "it to pause itself")
    post(sandbox, "resume")
    poll(lambda: api.get(url).json()["status"] == "paused", 30, "it to pause itself again")


def test_templates(api, create, run, post):
    """Freeze a running sandbox, which runs on; start two from it; each has the state of that moment and is its own."""
    source = create()
    run(source, "echo frozen > /root/state; mount -t tmpfs none /mnt; echo memory > /mnt/state")
    name = "tpl-e2e"
    answer = api.post("/snapshots", json={"sandbox_id": source["id"], "name": name})
    assert answer.status_code == 201, answer.text
    template = answer.json()
    assert (template["type"], template["vcpus"], template["memory_mb"]) == ("snapshot", 1, 256)
    assert template["size_bytes"] > MIB
    run(source, "echo later > /root/state; echo later > /mnt/state")
    clones = [create(template=name) for _ in range(2)]
    for clone in clones:
        assert run(clone, "cat /root/state /mnt/state")["stdout"] == "frozen\nmemory\n"
        run(clone, f"echo {clone['id']} > /root/state")
    for clone in clones:
        assert run(clone, "cat /root/state")["stdout"].strip() == clone["id"]
    assert run(source, "cat /root/state")["stdout"] == "later\n"
    assert api.get(f"/sandboxes/{source['id']}").json()["status"] == "running"
    refused = api.delete(f"/snapshots/{name}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "in_use")
    assert sorted(refused.json()["error"]["sandbox_ids"]) == sorted(clone["id"] for clone in clones)
    for clone in clones:
        api.delete(f"/sandboxes/{clone['id']}")
    assert api.delete(f"/snapshots/{name}").status_code == 204
    gone = api.post("/sandboxes", json={"template": name})
    assert gone.status_code == 404


def test_a_fork_goes_on_from_its_source(create, run, post, poll):
    """Children have the source's memory, processes and files of that moment; the source never stops."""
    source = create()
    run(source, "echo 41 > /root/n; mount -t tmpfs none /mnt; echo tmp > /mnt/n")
    run(source, "python3", args=["-c", COUNTER], background=True)
    poll(lambda: run(source, "test -s /root/kept-open")["exit_code"] == 0, 60, "the counter to count")
    items = post(source, "fork", count=3)["items"]
    assert len(items) == 3
    assert all(item.get("status") == "running" for item in items), items
    for child in items:
        first = int(run(child, "cat /root/kept-open")["stdout"])
        assert run(child, "cat /root/n /mnt/n")["stdout"] == "41\ntmp\n"
        poll(lambda one=child, then=first: _count(run, one) > then, 30, "a child's counter that goes on")
    assert run(source, "pgrep -fc kept-open")["exit_code"] == 0


def test_clones_share_no_random_numbers(create, run, post, poll):
    """A process that reads random numbers without a pause, before, during and after the snapshot: no number appears in
    two clones after it, or in a clone and the source. Names and machine ids differ too."""
    source = create()
    program = (
        "import os, time\nwith open('/root/random', 'a') as f:\n"
        "    while True:\n        f.write(os.urandom(8).hex() + '\\n'); f.flush(); time.sleep(0.001)\n"
    )
    run(source, "python3", args=["-c", program], background=True)
    poll(lambda: run(source, "test -s /root/random")["exit_code"] == 0, 60, "numbers")
    children = post(source, "fork", count=2)["items"]
    machines = [source, *children]
    numbers, identities = [], []
    for machine in machines:
        drawn = int(run(machine, "wc -l < /root/random")["stdout"])
        more = f"test $(wc -l < /root/random) -gt {drawn}"
        poll(lambda one=machine, line=more: run(one, line)["exit_code"] == 0, 30, "more numbers")
        numbers.append(run(machine, "cat /root/random")["stdout"].split())
        identities.append(run(machine, "hostname; cat /etc/machine-id")["stdout"])
    common = set.intersection(*(set(one) for one in numbers))
    assert common, "they should share what was drawn before the fork"
    after = [set(one) - common for one in numbers]
    assert all(after), "each should have gone on drawing"
    assert sum(len(one) for one in after) == len(set.union(*after)), "a number was drawn twice"
    assert len(set(identities)) == len(machines)
    assert all(re.fullmatch(r"[0-9a-f]{32}", one.split()[1]) for one in identities)


def test_many_pausers(platform, create, post, api):
    """Ten pauses at once, then ten resumes: everybody gets the same outcome, and it happened once."""
    sandbox = create()
    for action, status in (("pause", "paused"), ("resume", "running")):
        with ThreadPoolExecutor(10) as pool:
            answers = list(pool.map(lambda _, one=action: api.post(f"/sandboxes/{sandbox['id']}/{one}"), range(10)))
        assert {answer.status_code for answer in answers} == {200}, [answer.text for answer in answers]
        assert {answer.json()["status"] for answer in answers} == {status}
    assert platform.log.read_text(errors="replace").count("sandbox_paused") >= 1


def test_destroying_leaves_nothing(platform, api, create, post, poll):
    """Pause, resume, pause, destroy: no snapshot, build, layer, socket or pager record of it is left."""
    sandbox = create()
    kept = _stored(platform)
    post(sandbox, "pause")
    post(sandbox, "resume")
    post(sandbox, "pause")
    assert api.delete(f"/sandboxes/{sandbox['id']}").status_code == 204
    poll(lambda: _stored(platform) - kept == set(), 90, "no files of it")


def _read(path: Path) -> str:
    """A file that may be removed meanwhile."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return ""


def _stored(platform) -> set[Path]:
    """What lies in the snapshot store, beside the golden ones."""
    root = platform.data / "agent"
    golden = {
        path.parent.name for path in root.glob("snapshots/snapshots/*/manifest.json") if '"golden"' in _read(path)
    }
    owned = [path for path in root.glob("snapshots/snapshots/*") if path.name not in golden]
    return {*owned, *root.glob("sandboxes/*"), *root.glob("pager/*.json")}
