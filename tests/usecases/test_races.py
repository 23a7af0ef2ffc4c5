"""Many clients at once against a model: pause, resume, fork, destroy and the host's own reaper, in bursts."""

from __future__ import annotations

import os
from functools import partial
from itertools import pairwise

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from agent.wire.lifecycle import FINAL
from capsule import errors

EXAMPLES = int(os.environ.get("CAPSULE_TEST_RACES", "12"))
"""Sequences of bursts; thousands of them are a night's work."""

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["pause", "resume", "fork", "reaper", "exec"]),
        st.sampled_from([0.0, 0.0, 0.3, 1.1]),
        st.integers(0, 1),
    ),
    min_size=2,
    max_size=7,
)
"""What is asked for, when, and of which control plane."""


class Burst:
    """Clients of one sandbox at the same time, and what each of them got."""

    def __init__(self, world, planes, agent, sandbox):
        self.world = world
        self.planes = planes
        self.agent = agent
        self.sandbox = sandbox
        self.got = []

    async def run(self, calls):
        async with trio.open_nursery() as nursery:
            for verb, after, plane in calls:
                nursery.start_soon(self._client, verb, after, self.planes[plane])
        return self.got

    async def _client(self, verb, after, plane):
        await trio.sleep(after)
        who, one = self.world.principal, self.sandbox
        works = {
            "pause": partial(plane.sandboxes.pause, who, one),
            "resume": partial(plane.sandboxes.resume, who, one),
            "fork": partial(plane.sandboxes.fork, who, one, 1, None),
            "exec": partial(plane.sandboxes.ping, who, one),
            "reaper": partial(self.agent.auto_pause, one),
            "destroy": partial(plane.sandboxes.destroy, who, one),
        }
        try:
            answer = await works[verb]()
        except errors.CapsuleError as err:
            self.got.append((verb, err))
        else:
            self.got.append((verb, getattr(answer, "status", answer)))


class Races(RuleBasedStateMachine):
    """The model of one sandbox, over a world that lives in Trio's thread; subclassed with that."""

    world = agent = token = None
    planes = ()

    @initialize(delay=st.sampled_from([0.0, 0.5]))
    def begin(self, delay):
        self.run(self._begin, delay)

    @precondition(lambda self: self.status == "stopped")
    @rule(delay=st.sampled_from([0.0, 0.5]))
    def another(self, delay):
        self.run(self._begin, delay)

    async def _begin(self, delay):
        row = await self.world.insert(self.agent, "running")
        self.agent.add_vm(row.id)
        self.agent.delay = delay
        self.sandbox, self.status = row.id, "running"

    def run(self, work, *args):
        trio.from_thread.run(work, *args, trio_token=self.token)

    @precondition(lambda self: self.status != "stopped")
    @rule(calls=CALLS)
    def burst(self, calls):
        self.run(self._burst, calls)

    @precondition(lambda self: self.status != "stopped")
    @rule(verb=st.sampled_from(["pause", "resume"]), count=st.integers(2, 6))
    def everybody(self, verb, count):
        """All ask for the same: one does it, all get it, the row takes each step once."""
        self.run(self._everybody, verb, count)

    @precondition(lambda self: self.status != "stopped")
    @rule(calls=CALLS, after=st.sampled_from([0.0, 0.3, 0.6]))
    def end(self, calls, after):
        self.run(self._burst, [*calls, ("destroy", after, 0), ("destroy", after, 1)])

    async def _everybody(self, verb, count):
        before = await self.world.row(self.sandbox)
        there = {"pause": "paused", "resume": "running"}[verb]
        got = await self._burst([(verb, 0.0, number % 2) for number in range(count)])
        assert {answer for _, answer in got} == {there}
        after = await self.world.row(self.sandbox)
        assert after.generation == before.generation + (0 if before.status == there else 2)

    async def _burst(self, calls):
        got = await Burst(self.world, self.planes, self.agent, self.sandbox).run(calls)
        for _, answer in got:
            if isinstance(answer, errors.CapsuleError):  # nobody is away or broken: no 5xx, but one that says why
                assert isinstance(answer, errors.InvalidState | errors.Busy), answer
        await self._calm()
        asked = {verb for verb, _, _ in calls}
        row = await self.world.row(self.sandbox)
        assert row.status in self._possible(asked), (self.status, calls, got)
        self.status = row.status
        return got

    def _possible(self, asked):
        """Where some order of the calls leads to."""
        if "destroy" in asked:
            assert self.status != "stopped"
            return {"stopped"}
        possible = {self.status}
        if asked & {"pause", "reaper"}:
            possible.add("paused")
        if "resume" in asked:
            possible.add("running")
        if asked <= {"pause", "exec"} and "pause" in asked:
            possible = {"paused"}
        return possible

    async def _calm(self):
        """Rows and hosts agree; the trail has each change of rest once."""
        await self.world.settle(seconds=60)
        trail = [
            row["action"]
            for row in await self.world.sql(
                """select action from audit_logs where resource_id = $1 and action in ('pause', 'resume')
                   order by created_at, id""",
                f"sb-{self.sandbox}",
            )
        ]
        assert all(one != other for one, other in pairwise(trail)), trail

    def teardown(self):
        self.run(self._end_all)

    async def _end_all(self):
        for row in (await self.world.rows()).values():
            if row.status not in FINAL:
                await self.planes[0].sandboxes.destroy(self.world.principal, row.id)
        await self.world.settle(seconds=60)
        assert (self.agent.vms, self.agent.paused, self.agent.snapshots) == ({}, {}, {})


async def test_against_the_model(virtual_clock, world, agent, nursery):
    """Two control planes on one database, one of them leads: one winner each, no 5xx, nothing left over."""
    nursery.start_soon(world.beat)
    planes = [await world.control_plane(monitor=True) for _ in range(2)]
    parts = {"world": world, "planes": planes, "agent": agent, "token": trio.lowlevel.current_trio_token()}
    races = type("RacesHere", (Races,), parts)
    chosen = settings(
        max_examples=EXAMPLES,
        stateful_step_count=8,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    await trio.to_thread.run_sync(partial(run_state_machine_as_test, races, settings=chosen))


@pytest.fixture(autouse=True)
def _bounded(monkeypatch):
    """More real time than other tests of the virtual clock have."""
    monkeypatch.setattr("tests.fixtures.clock.REAL_BOUND", 300.0)
