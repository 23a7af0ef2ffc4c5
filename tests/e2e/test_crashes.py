"""kill -9 of the agent, the control plane and PostgreSQL, each in the middle of creates and execs."""

from __future__ import annotations

import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import httpx
import pytest

ROUNDS = int(os.environ.get("CAPSULE_CRASH_ROUNDS", "15"))
LIVE_AT_ONCE = 4
SEED = int(os.environ.get("CAPSULE_CRASH_SEED", "0")) or random.randrange(1, 10**6)
AHEAD = 2


class Round:
    """One create, execs in what lives, now and then a destroy: all at once, whatever becomes of them."""

    def __init__(self, platform, dice):
        self.platform = platform
        self.dice = dice
        self.unexpected = []

    def call(self, method, path, **fields):
        """One request; answers that are no answer, or 5xx of the wrong kind, are noted."""
        with suppress(httpx.TransportError, FileNotFoundError, KeyError), self.platform.client() as api:
            answer = api.request(method, path, **fields)
            if answer.status_code >= 500 and answer.status_code != 503:
                self.unexpected.append((method, path, answer.status_code, answer.text))
            return answer
        return None

    def live(self):
        """What runs; None when there is no answer."""
        answer = self.call("GET", "/sandboxes", params={"status": "running"})
        return [one["id"] for one in answer.json()] if answer is not None and answer.status_code == 200 else None

    def run(self, victim):
        """Do it, and kill `victim` in the middle."""
        live = self.live() or []
        with ThreadPoolExecutor(8) as pool:
            jobs = []
            if len(live) < LIVE_AT_ONCE:
                jobs.append(pool.submit(self.call, "POST", "/sandboxes", json={"memory_mb": 128}))
            for sandbox in live[:3]:
                body = {"cmd": "sleep 0.2; echo done", "timeout_sec": 20}
                jobs.append(pool.submit(self.call, "POST", f"/sandboxes/{sandbox}/exec", json=body))
            if len(live) >= LIVE_AT_ONCE - 1:
                jobs.append(pool.submit(self.call, "DELETE", f"/sandboxes/{self.dice.choice(live)}"))
            time.sleep(self.dice.uniform(0, 2.5))
            with suppress(FileNotFoundError, ProcessLookupError):
                for pid in self.platform.ready[victim]:
                    os.kill(pid, signal.SIGKILL)
            for job in jobs:
                job.result()


@pytest.mark.usefixtures("own_host")
def test_rows_are_true_after_every_crash(start_platform, slots, poll):
    """After all rounds: every row is final or running, every running one answers, and the host holds just those."""
    dice = random.Random(SEED)
    settings = {
        "CAPSULE_CREATE_TIMEOUT": "40",
        "CAPSULE_CALL_TIMEOUT": "15",
        "CAPSULE_AGENT_SLOTS_AHEAD": str(AHEAD),
    }
    with start_platform(**settings) as platform:
        rounds = Round(platform, dice)
        for _ in range(ROUNDS):
            rounds.run(dice.choice(["agent_pids", "control_pids", "postgres_pids"]))
        assert rounds.unexpected == [], f"seed {SEED}"
        statuses = "pending,starting,stopping,pausing,resuming,missing"
        poll(lambda: _settled(rounds, statuses), 120, f"rows that are settled (seed {SEED})")
        running = poll(lambda: (found := rounds.live()) is not None and (found,), 30, "a list")[0]
        for sandbox in running:
            poll(lambda one=sandbox: _answers(rounds, one), 60, f"an answer from {sandbox} (seed {SEED})")
        known = {name.removeprefix("sb-") for name in running}
        poll(lambda: len(platform.vmm_pids()) == len(known), 120, f"{len(known)} VMs (seed {SEED})")
        poll(lambda: {p.name for p in (platform.data / "agent/sandboxes").iterdir()} == known, 120, "directories")
        poll(lambda: len(slots()) == len(known) + AHEAD, 120, f"slots of {len(known)} sandboxes (seed {SEED})")


def _settled(rounds, statuses):
    answer = rounds.call("GET", "/sandboxes", params={"status": statuses, "limit": 200})
    return answer is not None and answer.status_code == 200 and answer.json() == []


def _answers(rounds, sandbox):
    answer = rounds.call("POST", f"/sandboxes/{sandbox}/exec", json={"cmd": "echo alive"})
    return answer is not None and answer.status_code == 200 and answer.json()["stdout"] == "alive\n"
