"""Many clients on few sandboxes: pause, resume, exec, fork and destroy at once, in an order that Hypothesis chooses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

ACTIONS = ("pause", "resume", "exec", "fork", "ping", "destroy", "snapshot")
ALLOWED = {
    "pause": {200, 409, 404},
    "resume": {200, 409, 503, 404},
    "exec": {200, 409, 404},
    "ping": {204, 409, 404},
    "fork": {201, 409, 503, 404},
    "destroy": {204},
    "snapshot": {201, 409, 404},
}
MAX_LIVE = 5


class Races(RuleBasedStateMachine):
    """One step = up to six requests at once. After each: rows are at rest, what runs answers, what is over stays so."""

    platform = None
    poll = None

    @initialize()
    def begin(self):
        self.api = self.platform.client()
        self.over = set()
        self.names = []
        self.sandboxes = [self._create()]

    def _create(self):
        answer = self.api.post("/sandboxes", json={"memory_mb": 128})
        assert answer.status_code == 201, answer.text
        sandbox = answer.json()["id"]
        self._exec(sandbox, f"mount -t tmpfs none /mnt; echo {sandbox} > /mnt/me")
        return sandbox

    def _exec(self, sandbox, cmd="true"):
        return self.api.post(f"/sandboxes/{sandbox}/exec", json={"cmd": cmd})

    def _ask(self, job):
        action, sandbox = job
        match action:
            case "exec":
                return self._exec(sandbox)
            case "destroy":
                return self.api.delete(f"/sandboxes/{sandbox}")
            case "snapshot":
                return self.api.post("/snapshots", json={"sandbox_id": sandbox})
            case "fork":
                return self.api.post(f"/sandboxes/{sandbox}/fork", json={"count": 1})
            case _:
                return self.api.post(f"/sandboxes/{sandbox}/{action}")

    @rule(actions=st.lists(st.sampled_from(ACTIONS), min_size=2, max_size=6), data=st.data())
    def at_once(self, actions, data):
        live = [one for one in self.sandboxes if one not in self.over]
        if not live:
            live = self.sandboxes = [self._create()]
        target = data.draw(st.sampled_from(live))
        if len(live) >= MAX_LIVE:
            actions = [action for action in actions if action != "fork"]
        jobs = [(action, target) for action in actions]
        with ThreadPoolExecutor(max(len(jobs), 1)) as pool:
            answers = list(pool.map(self._ask, jobs))
        for (action, _), answer in zip(jobs, answers, strict=True):
            assert answer.status_code in ALLOWED[action], (action, answer.status_code, answer.text)
            if action == "fork" and answer.status_code == 201:
                self.sandboxes += [item["id"] for item in answer.json()["items"] if "id" in item]
            if action == "snapshot" and answer.status_code == 201:
                self.names.append(answer.json()["name"])
        if "destroy" in actions:
            self.over.add(target)

    @invariant()
    def rows_are_true(self):
        if not hasattr(self, "api"):
            return
        for sandbox in self.sandboxes:
            status = self.poll(lambda one=sandbox: self._at_rest(one), 60, f"{sandbox} at rest")
            if sandbox in self.over:
                assert status == "stopped"
            else:
                assert status in {"running", "paused"}
                if status == "running":
                    assert self._exec(sandbox, "cat /mnt/me").json()["stdout"].startswith("sb-")

    def _at_rest(self, sandbox):
        status = self.api.get(f"/sandboxes/{sandbox}").json()["status"]
        return status if status in {"running", "paused", "stopped", "error"} else None

    def teardown(self):
        if hasattr(self, "api"):
            for sandbox in self.sandboxes:
                self.api.delete(f"/sandboxes/{sandbox}")
            for name in self.names:
                assert self.api.delete(f"/snapshots/{name}").status_code == 204
            self.api.close()


@pytest.mark.usefixtures("own_host")
def test_one_winner_each(platform, poll):
    """No 5xx but the typed 503, no row that stays on its way, no sandbox lost, nothing left over."""
    machine = type("RacesHere", (Races,), {"platform": platform, "poll": staticmethod(poll)})
    case = machine.TestCase
    case.settings = settings(
        max_examples=3,
        stateful_step_count=6,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    case("runTest").runTest()
    poll(lambda: list((platform.data / "agent/sandboxes").iterdir()) == [], 120, "no directories left over")
