"""Any order of creates, pauses, resumes, snapshots, forks, destroys, deaths, kills and restarts, against a model.

Hypothesis calls rules from its own thread; the host and its agents live in a Trio run in another one.
"""

from __future__ import annotations

import random
import shutil
import tempfile
import threading
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from sandbox_world import Host, request, sandbox_id
from trio.testing import MockClock, wait_all_tasks_blocked

from agent.sandboxes import checkpoint, compaction, pausing, resuming
from agent.sandboxes import purge as purging
from agent.snapshots import drafts
from agent.wire.faults import Fault
from tests.fixtures.drivers import Crash
from tests.fixtures.threads import without_threads

NAMES = [sandbox_id(number) for number in range(1, 5)]
SNAPSHOTS = [sandbox_id(number) for number in range(100, 106)]
ORDERS = st.tuples(
    st.sampled_from(["pause", "pause", "resume", "resume", "snapshot", "fork"]),
    st.sampled_from(NAMES),
    st.sampled_from(SNAPSHOTS),
    st.booleans(),
)
NUMBERS = random.Random(0)
SECONDS_PER_RULE = 60
EXPECTED = {"invalid_state", "invalid_argument", "not_found", "unavailable", "no_capacity", "busy", "draining"}


class Loop:
    """A Trio run in a thread, whose clock only `jump` moves."""

    def __init__(self):
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()

    def _run(self):
        self.clock = MockClock()
        trio.run(self._serve, clock=self.clock)

    async def _serve(self):
        self._token = trio.lowlevel.current_trio_token()
        self._stop = trio.Event()
        async with trio.open_nursery() as self.nursery:
            self._ready.set()
            await self._stop.wait()
            self.nursery.cancel_scope.cancel()

    def call(self, function, *arguments):
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def close(self):
        trio.from_thread.run_sync(self._stop.set, trio_token=self._token)
        self._thread.join(SECONDS_PER_RULE)
        assert not self._thread.is_alive()


class Machine(RuleBasedStateMachine):
    """Names wanted by somebody, seen alive (running or paused), dead, destroyed; snapshots that were promised, or
    removed; and one host below."""

    patch: pytest.MonkeyPatch

    def __init__(self):
        super().__init__()
        trio._core._run._r.seed(0)  # the same history again is the same order of tasks, and the same names
        NUMBERS.seed(0)
        self.root = Path(tempfile.mkdtemp(prefix="capsule-machine-"))
        self.loop = Loop()
        self.host = Host(self.root / "host", self.patch, slots=len(NAMES) + 1)
        self.agent = None
        self.creating, self.running, self.destroying, self.gone = set(), set(), set(), set()
        self.deaths = set()
        self.promised, self.unwanted = set(), set()

    def teardown(self):
        self.loop.call(self._stop_agent)
        self.loop.close()
        shutil.rmtree(self.root)

    # rules

    @initialize()
    def begin(self):
        self.restart(0)
        for name in NAMES[:3]:
            self.create(name, boots=True)

    @precondition(lambda self: self.agent is not None)
    @rule(name=st.sampled_from(NAMES), boots=st.sampled_from([True] * 5 + [False]))
    def create(self, name, boots):
        """`boots` False: its guest does not answer until `guests_come_up`."""
        self.host.guest_options = {"boots": boots}
        self.loop.call(self._create, name)

    @precondition(lambda self: self.agent is not None)
    @rule(name=st.sampled_from(NAMES))
    def destroy(self, name):
        self.destroying.add(name)
        self.loop.call(self._destroy, name)

    @precondition(lambda self: self.agent is not None)
    @rule(orders=st.lists(ORDERS, min_size=3, max_size=10))
    def ask(self, orders):
        """Several things, one after the other or at once."""
        self.host.guest_options = {}
        for what, name, snapshot, wait in orders:
            if self.agent is None:
                return
            self.loop.call(self._ask, partial(self._do, what, name, snapshot), wait)
        self.loop.call(self._settle)

    async def _do(self, what, name, snapshot, agent):
        match what:
            case "pause":
                await agent.pause(name)
            case "resume":
                await agent.resume(name)
            case "fork":
                sandbox = await agent.manager.create(request(name, snapshot_id=snapshot))
                self.creating.add(name)
                if name not in self.running:
                    self.destroying.discard(name)
                await sandbox.started.wait()
            case "snapshot":
                await agent.snapshot(snapshot, name)
                if snapshot not in self.unwanted:
                    self.promised.add(snapshot)

    @precondition(lambda self: self.agent is not None)
    @rule(snapshot=st.sampled_from(SNAPSHOTS))
    def remove_snapshot(self, snapshot):
        self.unwanted.add(snapshot)
        self.promised.discard(snapshot)
        self.loop.call(self._ask, lambda agent: agent.manager.named.remove(snapshot), True)

    @precondition(lambda self: self.host.running())
    @rule(data=st.data())
    def die(self, data):
        name = data.draw(st.sampled_from(sorted(self.host.running())))
        self.loop.call(self._die, name)

    @precondition(lambda self: self.agent is not None)
    @rule()
    def guests_come_up(self):
        self.loop.call(self._guests_come_up)

    @precondition(lambda self: self.agent is not None)
    @rule(seconds=st.sampled_from([0.5, 5, 70]))
    def wait(self, seconds):
        self.loop.call(self._wait, seconds)

    @precondition(lambda self: self.agent is not None)
    @rule(steps=st.integers(1, 100))
    def plan_a_kill(self, steps):
        """kill -9 in the middle of what comes next."""
        self.host.crash_at = len(self.host.steps) + steps

    @precondition(lambda self: self.agent is not None)
    @rule()
    def kill(self):
        self.loop.call(self._kill)

    @precondition(lambda self: self.agent is not None)
    @rule()
    def stop(self):
        self.loop.call(self._stop_agent)

    @precondition(lambda self: self.agent is None)
    @rule(crash_at=st.sampled_from([0, 0, 0, 3, 9, 27]))
    def restart(self, crash_at):
        self.host.crash_at = crash_at or None
        self.loop.call(self._restart)

    @precondition(lambda self: self.agent is not None)
    @rule()
    def acknowledge(self):
        told = {name for name, _ in self.agent.told()}
        self.loop.call(self._acknowledge)
        self.deaths -= told  # also if the agent was killed meanwhile: the one who asked knows them

    @precondition(lambda self: self.agent is None)
    @rule()
    def purge(self):
        self.loop.call(self._purge)
        assert not self.host.running()
        assert not self.host.directories()
        assert not self.host.slots._slots
        self.creating.clear()
        self.running.clear()
        self.promised.clear()

    # what must be true

    @invariant()
    def the_agent_knows_what_there_is(self):
        if self.agent is None:
            return
        statuses = self.agent.statuses()
        busy = {name for name, status in statuses.items() if status not in {"running", "paused"}}
        paused = {name for name, status in statuses.items() if status == "paused"}
        assert self.host.running() - busy == statuses.keys() - busy - paused
        assert self.host.directories() - busy == statuses.keys() - busy
        told = {name for name, _ in self.agent.told()}  # a purge tells of those that it finds dead, too
        assert self.deaths <= told, "a death is told until it is acknowledged"

    @invariant()
    def nothing_that_was_promised_is_lost(self):
        assert self.running - self.destroying <= self._alive()
        assert self.promised <= self._named()
        if self.agent is not None:
            assert set(self.agent.manager.named.ids()) == self._named()
        if self.agent is not None:
            assert not self.gone & self.host.directories()
            assert not self.gone & self.agent.statuses().keys()

    @invariant()
    def slots_are_accounted_for(self):
        if self.agent is not None:
            figures = self.agent.slots.statistics()
            assert figures.in_use == len([one for one in self.agent.manager.listing().sandboxes if one.host_ip])
            assert len(self.host.slots._slots) == figures.in_use + figures.ready

    @invariant()
    def nobody_stands_still(self):
        """What runs, as the agent says, does; also after a pause that failed, or was given up half-way."""
        if self.agent is not None:
            running = {name for name, status in self.agent.statuses().items() if status == "running"}
            assert not any(self.host.vms.machine(name).paused for name in running & self.host.running())

    def _alive(self):
        """VMs that run, and sandboxes that rest."""
        known = self.host.state.load()
        return self.host.running() | {name for name, one in known.items() if one and one.phase == "paused"}

    def _named(self):
        if not self.host.state.snapshots.exists():
            return set()
        return {str(one.id) for one in self.host.store().list() if one.manifest.kind == "named"}

    # inside the loop

    async def _settle(self):
        await wait_all_tasks_blocked()
        if self.agent is not None and self.agent.killed:
            self.agent = None
        if self.agent is not None:
            self.running |= {n for n, status in self.agent.statuses().items() if status in {"running", "paused"}}
        self.host.pager.forget_dead()
        self.running &= self._alive() | self.destroying

    async def _ask(self, ask, settle):
        """Somebody asks. `settle`: until it is decided, or cannot be now."""
        agent = self.agent

        async def wait():
            try:
                await ask(agent)
            except Fault as fault:
                assert fault.code in EXPECTED, fault  # noqa: PT017

        agent.nursery.start_soon(wait)
        if settle:
            await self._settle()

    async def _create(self, name):
        try:
            await self.agent.manager.create(request(name, memory_mb=128))
            self.creating.add(name)
            if name not in self.running:
                self.destroying.discard(name)
        except Fault as fault:
            assert (fault.code, fault.message) == ("invalid_state", "the sandbox has ended")  # noqa: PT017
        await self._settle()

    async def _destroy(self, name):
        agent = self.agent

        async def destroy():
            await agent.destroy(name)
            if not agent.killed and self.agent is agent:
                self.gone.add(name)
                self.running.discard(name)

        agent.nursery.start_soon(destroy)
        await self._settle()

    async def _die(self, name):
        record = self.host.state.load().get(name)
        if name in self.running and record is not None and record.phase == "running":  # else it is to rest, or rests
            self.running.discard(name)
            self.deaths.add(name)
            self.deaths -= self.destroying
        self.host.vms.machine(name).die("its kernel panicked")
        await self._settle()

    async def _guests_come_up(self):
        for guest in self.host.guests.values():
            guest.boots = True
        await self._wait(2)

    async def _wait(self, seconds):
        end = trio.current_time() + seconds
        while (left := end - trio.current_time()) > 0:
            await wait_all_tasks_blocked()
            due = trio.lowlevel.current_statistics().seconds_to_next_deadline
            self.loop.clock.jump(max(0.001, min(due, left)))
        await self._settle()

    async def _kill(self):
        self.agent.kill()
        await self._settle()

    async def _stop_agent(self):
        if self.agent is not None:
            self.agent.nursery.cancel_scope.cancel()
            await wait_all_tasks_blocked()
            self.agent = None

    async def _restart(self):
        crash_at = self.host.crash_at
        working = trio.Event()

        async def work(agent):
            self.agent = agent
            working.set()
            await trio.sleep_forever()

        async def live():
            await self.host.live(work, crash_at=crash_at)
            self.agent = None

        self.creating.clear()
        self.unwanted.clear()
        self.gone.clear()  # ended ids are remembered by one agent only: the monitor ends what a late create brings back
        self.loop.nursery.start_soon(live)
        await self._settle()

    async def _acknowledge(self):
        entries = self.agent.outbox.entries()
        if entries:
            try:
                await self.agent.outbox.acknowledge(entries[-1].sequence)
            except Crash:
                self.agent.kill()
        await self._settle()

    async def _purge(self):
        self.host.dead = False
        self.host.crash_at = None
        await purging.purge(self.host.new_agent().parts, self.root / "host-network.json", trio.lowlevel.checkpoint)


def test_any_history(monkeypatch):
    """See the module."""
    without_threads(monkeypatch)
    monkeypatch.setattr(trio._core._run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    for module in (pausing, resuming, checkpoint, compaction, drafts):
        monkeypatch.setattr(module, "uuid4", lambda: UUID(int=NUMBERS.getrandbits(128), version=4))
    monkeypatch.setattr(purging, "remove_host_network", lambda _: None)
    Machine.patch = SimpleNamespace(setattr=monkeypatch.setattr)
    Machine.TestCase.settings = settings(
        max_examples=100,
        stateful_step_count=40,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    state_machine_test = Machine.TestCase("runTest")
    state_machine_test.runTest()
