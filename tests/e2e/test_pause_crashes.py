"""kill -9 of agent, pager and VMMs in the middle of pauses, resumes, forks and compactions: exactly before or after."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

ROUNDS = int(os.environ.get("CAPSULE_PAUSE_CRASH_ROUNDS", "6"))
LONG = 30
"""So many rounds have a kill in a compaction for certain; few may miss it."""
SEED = int(os.environ.get("CAPSULE_CRASH_SEED", "0")) or random.randrange(1, 10**6)
SANDBOXES = 2
MAX_LIVE = 4
AIMED = 3
"""Every so many rounds the agent is killed in the middle of a compaction."""
GENERATIONS = 3
AHEAD = 2
WITNESS = """
import sys
held = sys.argv[1]
while True:
    asked = input()
    open("/mnt/answer", "w").write(held)
"""
START = "mount -t tmpfs none /mnt; mkfifo /mnt/ask; (while :; do cat /mnt/ask; done) | python3 /root/witness {token}"
DEAD = "dead"
QUESTION = (
    "cat /mnt/token /root/token; rm -f /mnt/answer; echo > /mnt/ask; "
    "while ! [ -s /mnt/answer ]; do sleep 0.05; done; cat /mnt/answer"
)


class Crashes:
    """What the rounds share: the platform, the dice, what each sandbox must remember."""

    def __init__(self, platform, dice):
        self.platform = platform
        self.dice = dice
        self.tokens = {}
        self.notes = {}
        self.vmm_killed = set()
        self.unexpected = []
        self.kills = Counter()
        self.in_compaction = 0
        self.state = platform.data / "agent"
        self.store = self.state / "snapshots" / "snapshots"

    def call(self, method, path, **fields):
        """One request; None when there is no answer. 5xx other than 503 are noted."""
        with suppress(httpx.TransportError, FileNotFoundError, KeyError), self.platform.client() as api:
            answer = api.request(method, path, **fields)
            if answer.status_code >= 500 and answer.status_code != 503:
                self.unexpected.append((method, path, answer.status_code, answer.text))
            return answer
        return None

    def done(self, method, path, **fields):
        """Whether a request was answered, and well."""
        answer = self.call(method, path, **fields)
        return answer is not None and answer.is_success

    def status(self, sandbox):
        answer = self.call("GET", f"/sandboxes/{sandbox}")
        return answer.json()["status"] if answer is not None and answer.status_code == 200 else None

    def exec(self, sandbox, cmd):
        answer = self.call("POST", f"/sandboxes/{sandbox}/exec", json={"cmd": cmd, "timeout_sec": 20})
        return answer.json()["stdout"] if answer is not None and answer.status_code == 200 else None

    def live(self):
        """Ids by status of everything that lives or rests."""
        answer = self.call("GET", "/sandboxes", params={"limit": 200})
        return {one["id"]: one["status"] for one in answer.json()} if answer is not None and answer.is_success else {}

    def new(self, poll):
        """A sandbox with a process that remembers a token in its memory, a file in tmpfs and one on the disk."""
        token = f"t{self.dice.randrange(10**9)}"

        def make():
            answer = self.call("POST", "/sandboxes", json={"memory_mb": 128})
            return answer.json()["id"] if answer is not None and answer.status_code == 201 else None

        sandbox = poll(make, 60, "a new sandbox")
        form = {"path": (None, "/root/witness"), "file": ("witness", WITNESS.encode())}
        poll(lambda: self.done("POST", f"/sandboxes/{sandbox}/files/write", files=form), 30, "the witness")
        body = {"cmd": START.format(token=token), "background": True}
        poll(lambda: self.done("POST", f"/sandboxes/{sandbox}/exec", json=body), 30, "the witness to start")
        poll(lambda: self.exec(sandbox, "test -p /mnt/ask && echo ok"), 30, "the pipe")
        self.tokens[sandbox] = token
        self.note(sandbox, poll)
        return sandbox

    def note(self, sandbox, poll):
        """Write something new into memory and on the disk, to be found again; False when its VMM was a victim."""
        note = self.notes[sandbox] = f"n{self.dice.randrange(10**9)}"
        line = f"echo {note} > /mnt/token; echo {note} > /root/token; sync; echo ok"

        def written():
            return (self.exec(sandbox, line) == "ok\n" and "written") or (self.is_lost(sandbox) and "lost")

        return poll(written, 60, f"a note in {sandbox} (seed {SEED})") == "written"

    def is_lost(self, sandbox):
        """Whether its VMM was a victim while it ran; its row says so a moment later."""
        return sandbox in self.vmm_killed and self.status(sandbox) in {"error", "stopped"}

    def expected(self, sandbox):
        """What QUESTION prints there, without line ends."""
        return " ".join([self.notes[sandbox]] * 2 + [self.tokens[sandbox]])

    def victims(self, kind):
        """Pids to kill."""
        if kind == "agent":
            return list(self.platform.ready["agent_pids"])
        if kind == "pager":
            return [pid for pid in self.platform.pids() if b"agent.pager" in _cmdline(pid)]
        pids = self.platform.vmm_pids()
        return [self.dice.choice(pids)] if pids else []

    def kill(self, kind):
        """kill -9; returns the pids."""
        pids = self.victims(kind)
        for pid in pids:
            if kind == "vmm" and (owner := _owner(pid)):
                self.vmm_killed.add(owner)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def round(self):
        """Something on every sandbox at once, and a kill in the middle."""
        with ThreadPoolExecutor(8) as pool:
            jobs = []
            for sandbox, status in self.live().items():
                if status == "running":
                    action = self.dice.choice(["pause", "pause", "fork"] if len(self.tokens) < MAX_LIVE else ["pause"])
                elif status == "paused":
                    action = self.dice.choice(["resume", "resume", "nothing"])
                else:
                    continue
                if action != "nothing":
                    jobs.append((sandbox, action, pool.submit(self.call, "POST", f"/sandboxes/{sandbox}/{action}")))
            time.sleep(self.dice.uniform(0, self.dice.choice([0.2, 0.5, 1.2])))
            kind = self.dice.choice(["agent", "agent", "pager", "vmm"])
            during = sorted(action for _, action, job in jobs if not job.done())
            if self.kill(kind):
                self.kills.update((kind, action) for action in during or ["nothing"])
            for sandbox, action, job in jobs:
                self.adopt_children(sandbox, action, job.result())

    def adopt_children(self, sandbox, action, answer):
        """Forks remember what their source did."""
        if action == "fork" and answer is not None and answer.status_code == 201:
            for item in answer.json()["items"]:
                if "id" in item:
                    self.tokens[item["id"]] = self.tokens.get(sandbox)
                    self.notes[item["id"]] = self.notes.get(sandbox)

    def aimed_round(self, poll):
        """Pause a sandbox until a compaction follows, each time with something new to remember; kill in the middle."""
        known = sorted(name for name, token in self.tokens.items() if token is not None)
        sandbox = self.dice.choice(known) if known else self.new(poll)
        for _ in range(GENERATIONS + 1):
            if not self.wake(sandbox, poll) or not self.note(sandbox, poll):
                return None
            with ThreadPoolExecutor(1) as pool:
                job = pool.submit(self.call, "POST", f"/sandboxes/{sandbox}/pause")
                draft = self.watch(sandbox, job)
                if draft is not None:
                    self.kill_in_compaction(draft, poll)
                    return sandbox
        return None

    def wake(self, sandbox, poll):
        """Have it run; False when its VMM was a victim."""

        def state():
            status = self.status(sandbox)
            if status == "paused":
                self.call("POST", f"/sandboxes/{sandbox}/resume")
            return status if status == "running" or self.is_lost(sandbox) else None

        return poll(state, 90, f"{sandbox} runs (seed {SEED})") == "running"

    def watch(self, sandbox, job):
        """What a compaction is about to make; None when none follows the pause that `job` is."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            for draft in self.store.glob(".partial-*"):
                with suppress(OSError):  # a pause has its own state written; a compaction takes over the old one
                    if (draft / "vm.state").stat().st_nlink > 1:
                        return draft
            if job.done() and not self.due(sandbox):
                return None
            time.sleep(0.002)
        raise AssertionError(f"{sandbox} is due for a compaction that does not come (seed {SEED})")

    def due(self, sandbox):
        """Whether a paused sandbox waits for its compaction, as its record has it."""
        record = self.record(sandbox)
        return record.get("phase") == "paused" and record.get("scattered", False)

    def record(self, sandbox):
        with suppress(FileNotFoundError):
            return json.loads((self.state / "sandboxes" / sandbox.removeprefix("sb-") / "record.json").read_bytes())
        return {}

    def kill_in_compaction(self, draft, poll):
        """Now or a moment later; noted only if what the dead agent left is half a compaction."""
        if self.in_compaction:  # once at least it is met for certain
            time.sleep(self.dice.choice([0, self.dice.uniform(0, 0.3)]))
        pids = self.kill("agent")
        poll(lambda: all(_is_dead(pid) for pid in pids), 30, "the agent's death")
        made = draft.with_name(draft.name.removeprefix(".partial-"))
        bases = {self.record(name).get("base") for name in self.live_on_disk()}
        half = draft.exists() or (made.exists() and made.name not in bases)
        self.in_compaction += half
        self.kills["agent", "compaction" if half else "after compaction"] += 1

    def live_on_disk(self):
        return [path.name for path in (self.state / "sandboxes").iterdir()]


def _cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _is_dead(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _owner(pid):
    with suppress(OSError):
        return "sb-" + Path(f"/proc/{pid}/cwd").readlink().name
    return None


@pytest.mark.usefixtures("own_host")
def test_exactly_before_or_exactly_after(start_platform, slots, poll):
    """After every round each sandbox runs or rests (or its VMM was the victim), and has all it had; at the end the host
    holds just what the rows say."""
    dice = random.Random(SEED)
    settings = {
        "CAPSULE_CREATE_TIMEOUT": "40",
        "CAPSULE_CALL_TIMEOUT": "15",
        "CAPSULE_PAUSE_TIMEOUT": "20",
        "CAPSULE_RESUME_TIMEOUT": "20",
        "CAPSULE_AGENT_SLOTS_AHEAD": str(AHEAD),
        "CAPSULE_AGENT_COMPACT_GENERATIONS": str(GENERATIONS),
    }
    with start_platform(**settings) as platform:
        crashes = Crashes(platform, dice)
        for number in range(ROUNDS):
            while len(crashes.live()) < SANDBOXES:
                crashes.new(poll)
            aimed = crashes.aimed_round(poll) if number % AIMED == 0 else crashes.round()
            poll(lambda: set(crashes.live().values()) <= {"running", "paused"}, 90, f"settled rows (seed {SEED})")
            _check(crashes, poll)
            if aimed:
                _remembers(crashes, aimed, poll)
        for sandbox, token in list(crashes.tokens.items()):
            if token is not None:
                _remembers(crashes, sandbox, poll)
        _compacts(crashes, poll)
        compacted = poll(lambda: platform.log.read_bytes().count(b"sandbox_compacted"), 30, f"one done (seed {SEED})")
        print(f"{ROUNDS} rounds, kills by what they met: {dict(crashes.kills)}; {compacted} compactions done")  # noqa: T201
        assert crashes.unexpected == [], f"seed {SEED}"
        assert crashes.in_compaction > 0 or ROUNDS < LONG, f"no kill met a compaction (seed {SEED})"
        _nothing_left_over(crashes, platform, slots, poll)


def _check(crashes, poll):
    """What lives has its memory, its processes and its disk; what does not was killed by us."""
    live = crashes.live()
    for sandbox in list(crashes.tokens):
        if sandbox not in live:
            assert crashes.status(sandbox) in {"error", "stopped"}
            assert sandbox in crashes.vmm_killed, f"{sandbox} is lost, nobody killed its VMM (seed {SEED})"
            del crashes.tokens[sandbox]
    for sandbox, status in live.items():
        token = crashes.tokens.get(sandbox)
        if status == "running" and token is not None and crashes.dice.random() < 0.7:
            _remembers(crashes, sandbox, poll)
        elif status == "running" and token is None:
            crashes.call("DELETE", f"/sandboxes/{sandbox}")  # a child whose fork gave no answer


def _remembers(crashes, sandbox, poll):
    """It runs, if need be again, and has all it had; or we have killed its VMM."""
    if crashes.wake(sandbox, poll):
        answer = poll(lambda: _witnessed(crashes, sandbox), 60, f"an answer of {sandbox} (seed {SEED})")
        assert answer in {crashes.expected(sandbox), DEAD}, f"{sandbox} (seed {SEED})"


def _witnessed(crashes, sandbox):
    """What the guest remembers; DEAD when we have killed its VMM, which its row said a moment later."""
    answer = crashes.exec(sandbox, QUESTION)
    if answer is None and sandbox in crashes.vmm_killed and crashes.status(sandbox) == "error":
        return DEAD
    return None if answer is None else " ".join(answer.split())


def _compacts(crashes, poll):
    """One that nobody kills is brought to its end, and has all it had: in the rounds there may have been none."""
    known = sorted(name for name, token in crashes.tokens.items() if token is not None)
    sandbox = next((name for name in known if crashes.wake(name, poll)), None) or crashes.new(poll)
    for _ in range(GENERATIONS + 1):
        assert crashes.wake(sandbox, poll)
        url = f"/sandboxes/{sandbox}/pause"
        poll(lambda url=url: crashes.done("POST", url), 60, f"a pause of {sandbox} (seed {SEED})")
        poll(lambda: not crashes.due(sandbox), 60, f"a compaction of {sandbox} (seed {SEED})")
    _remembers(crashes, sandbox, poll)


def _nothing_left_over(crashes, platform, slots, poll):
    live = crashes.live()
    running = {name.removeprefix("sb-") for name, status in live.items() if status == "running"}
    known = {name.removeprefix("sb-") for name in live}
    state = platform.data / "agent"
    poll(lambda: {p.name for p in (state / "sandboxes").iterdir()} == known, 120, f"directories (seed {SEED})")
    poll(lambda: len(platform.vmm_pids()) <= len(running) + 1, 120, f"{len(running)} VMs (seed {SEED})")
    poll(lambda: len(slots()) <= len(running) + AHEAD + 1, 120, f"slots (seed {SEED})")
    for sandbox in live:
        poll(lambda one=sandbox: _deleted(crashes, one), 60, f"the end of {sandbox} (seed {SEED})")
    store = state / "snapshots"
    poll(lambda: not list((state / "sandboxes").iterdir()), 120, "no directories")
    poll(lambda: _owned_snapshots(store) == [], 120, f"no snapshots (seed {SEED})")
    poll(lambda: _unused_parts(store) == [], 120, f"no builds or layers of what is gone (seed {SEED})")


def _deleted(crashes, sandbox):
    answer = crashes.call("DELETE", f"/sandboxes/{sandbox}")
    return answer is not None and answer.status_code == 204


def _owned_snapshots(store):
    """Snapshots of sandboxes. A named one that a killed fork left is collected by the monitor after its grace."""
    drafts = [path.name for path in store.glob("snapshots/.*")]
    return drafts + [text for text in _manifests(store) if '"kind":"sandbox"' in text]


def _unused_parts(store):
    """Memory builds and disk layers that no manifest names."""
    texts = "".join(_manifests(store))
    return [path.name for path in (*store.glob("builds/*"), *store.glob("layers/*")) if path.stem not in texts]


def _manifests(store):
    found = []
    for path in store.glob("snapshots/*/manifest.json"):
        with suppress(FileNotFoundError):
            found.append(path.read_text())
    return found
