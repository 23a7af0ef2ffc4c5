"""Everything at once, in random order: afterwards every row is true, every VM is known, and nobody was lied to."""

from __future__ import annotations

import os
import random
from contextlib import suppress
from dataclasses import replace

import pytest
import trio

from agent.wire.faults import Fault, FaultCode
from agent.wire.lifecycle import FINAL
from capsule import errors
from capsule.db.errors import DatabaseUnavailable
from capsule.model import CreateSnapshot
from capsule.monitor import copies, host

STORMS = int(os.environ.get("CAPSULE_TEST_STORMS", "4"))
"""Each is a seed; hundreds of them are a night's work."""
ACTIONS = 90
METHODS = [
    "sandbox.create",
    "sandbox.destroy",
    "sandbox.pause",
    "sandbox.resume",
    "snapshot.create",
    "snapshot.remove",
    "host.list",
]
SECONDS = 6.0
"""Of the virtual clock, between actions, at most."""


class Chaos:
    """Clients, and everything that can happen to them."""

    def __init__(self, world, request, seed, nursery):
        self.random = random.Random(seed)
        self.world = world
        self.request = request
        self.planes = []
        self.made = {}
        self.destroyed = set()
        self.surprises = []
        self._nursery = nursery

    async def run(self):
        for _ in range(2):
            self.planes.append(await self.world.control_plane(monitor=True))
        actions = [
            *[self.create] * 8,
            *[self.destroy] * 4,
            *[self.pause] * 4,
            *[self.resume] * 4,
            *[self.auto_pause] * 2,
            *[self.fork] * 2,
            *[self.freeze] * 2,
            self.delete_snapshot,
            self.fill_disk,
            self.restart_agent,
            self.cut_connections,
            self.cut_off,
            self.lose_answers,
            self.kill_vm,
            self.lose_vm,
            self.slow_host,
            self.failing_host,
            self.restart_control_plane,
            self.end_database_sessions,
        ]
        for _ in range(ACTIONS):
            await self.random.choice(actions)()
            await trio.sleep(self.random.uniform(0, SECONDS))

    def _agent(self):
        return self.random.choice(list(self.world.agents.values()))

    def _plane(self):
        return self.random.choice(self.planes)

    # clients

    async def create(self):
        key = self.random.choice([None, f"key {self.random.randrange(10)}"])
        patience = self.random.choice([0.0, 0.5, 5, 1000, 1000, 1000])
        template = "minimal" if key else self.random.choice(["minimal", "minimal", "a", "b"])
        request = replace(self.request, template=template, metadata={"key": str(key)})
        self._nursery.start_soon(self._client, self._create, self._plane(), request, key, patience)

    async def pause(self):
        await self._act_on_one(lambda plane, one, _: plane.sandboxes.pause(self.world.principal, one))

    async def resume(self):
        await self._act_on_one(lambda plane, one, _: plane.sandboxes.resume(self.world.principal, one))

    async def fork(self):
        key = self.random.choice([None, f"fork {self.random.randrange(5)}"])
        count = self.random.randrange(1, 4)
        await self._act_on_one(lambda plane, one, _: plane.sandboxes.fork(self.world.principal, one, count, key))

    async def freeze(self):
        name = self.random.choice([None, "a", "b"])
        pause = self.random.random() < 0.3

        async def freeze(plane, one, _):
            request = CreateSnapshot(sandbox=one, name=name, pause=pause)
            await plane.templates.create(self.world.principal, request, None)

        await self._act_on_one(freeze)

    async def delete_snapshot(self):
        name = self.random.choice(["a", "b"])
        await self._act_on_one(lambda plane, _, __: plane.templates.delete(self.world.principal, name))

    async def _act_on_one(self, work):
        with suppress(DatabaseUnavailable):
            alive = [one for one, row in (await self.world.rows()).items() if row.status not in FINAL]
            if alive:
                patience = self.random.choice([0.0, 1, 1000, 1000])
                one = self.random.choice(alive)
                self._nursery.start_soon(self._client, work, self._plane(), one, None, patience)

    async def auto_pause(self):
        agent = self._agent()
        running = [one for one, vm in agent.vms.items() if vm["status"] == "running"]
        if running:
            self._nursery.start_soon(agent.auto_pause, self.random.choice(running))

    async def fill_disk(self):
        agent = self._agent()
        agent.disk_full = True

        def empty():
            agent.disk_full = False

        self._later(10, empty)

    async def _create(self, plane, request, key):
        view = await plane.sandboxes.create(self.world.principal, request, key)
        if key is not None and self.made.setdefault(key, view.id) != view.id:
            self.surprises.append(f"{key} made {view.id} and {self.made[key]}")

    async def destroy(self):
        with suppress(DatabaseUnavailable):
            alive = [one for one, row in (await self.world.rows()).items() if row.status not in FINAL]
            if alive:
                patience = self.random.choice([0.0, 1, 1000, 1000])
                self._nursery.start_soon(
                    self._client, self._destroy, self._plane(), self.random.choice(alive), None, patience
                )

    async def _destroy(self, plane, sandbox, _):
        await plane.sandboxes.destroy(self.world.principal, sandbox)
        self.destroyed.add(sandbox)

    async def _client(self, work, plane, what, key, patience):
        with trio.move_on_after(patience):
            try:
                await work(plane, what, key)
            except errors.Internal:
                self.surprises.append(f"{work.__name__} met a bug")
            except errors.CapsuleError:
                return

    # hosts

    async def restart_agent(self):
        self._agent().restart()

    async def cut_connections(self):
        self._agent().drop_connections()

    async def cut_off(self):
        agent = self._agent()
        agent.cut_off()
        self._later(self.random.choice([2, 20, 150]), agent.come_back)

    async def lose_answers(self):
        self._agent().lose_answer_of |= {self.random.choice([*METHODS, "host.acknowledge"])}

    async def kill_vm(self):
        agent = self._agent()
        if agent.vms:
            agent.die(self.random.choice(list(agent.vms)), "chaos")

    async def lose_vm(self):
        agent = self._agent()
        if there := [*agent.vms, *agent.paused]:
            agent.forget(self.random.choice(there))

    async def slow_host(self):
        agent = self._agent()
        agent.delay = self.random.choice([0, 1, 10])

    async def failing_host(self):
        agent = self._agent()
        method = self.random.choice([*METHODS, "host.describe"])
        agent.faults[method] = Fault(self.random.choice(list(FaultCode)), "chaos", retryable=self.random.random() < 0.5)
        self._later(self.random.choice([1, 20]), agent.faults.clear)

    def _later(self, seconds, action):
        async def run():
            await trio.sleep(seconds)
            action()

        self._nursery.start_soon(run)

    # the rest

    async def restart_control_plane(self):
        plane = self._plane()
        self.planes.remove(plane)
        plane.kill()
        self.planes.append(await self.world.control_plane(monitor=True))

    async def end_database_sessions(self):
        with suppress(DatabaseUnavailable):
            await self.world.sql(
                """select pg_terminate_backend(pid) from pg_stat_activity
                   where datname = current_database() and pid <> pg_backend_pid()"""
            )


@pytest.mark.parametrize("seed", range(STORMS))
async def test_after_the_storm(virtual_clock, world, request_body, nursery, monkeypatch, seed):
    """Two hosts, two control planes, an hour of everything; then calm."""
    for _ in range(2):
        await world.add_host()
    nursery.start_soon(world.beat)
    async with trio.open_nursery() as storm:
        chaos = Chaos(world, request_body, seed, storm)
        await chaos.run()
    for agent in world.agents.values():
        agent.come_back()
        agent.faults.clear()
        agent.lose_answer_of.clear()
        agent.delay = 0
    with trio.fail_after(1000):  # a fork's replay may wait for children that the monitor has to end
        while any(plane.operations.running() for plane in chaos.planes):
            await trio.sleep(1)
    # Nobody makes anything any more: what was left behind may go sooner. 900 seconds of two monitors' rounds are most
    # of a minute of real time where other tests run beside, and each new leader counts them from the start.
    monkeypatch.setattr(copies, "SNAPSHOT_GRACE", 60.0)
    monkeypatch.setattr(host, "RESTING_GRACE", 60.0)
    await world.settle(seconds=1500)
    assert chaos.surprises == []
    rows = await world.rows()
    assert len(rows) > 5
    for one in chaos.destroyed:
        assert rows[one].status in FINAL
    assert sum(plane.monitor.leading for plane in chaos.planes) == 1
    for row in rows.values():
        assert (row.status == "error") <= bool(row.reason)
