"""Whose silence counts, by which clock."""

from __future__ import annotations

from datetime import timedelta
from types import SimpleNamespace
from uuid import uuid4

import pytest
import trio

from capsule.monitor import monitor as module
from capsule.monitor.monitor import INTERVAL
from capsule.monitor.silence import LONGEST_GAP, Silence

TIMEOUT = 90.0


@pytest.fixture
def wall_clock_off(monkeypatch):
    """The control plane's clock, so many seconds away from the database's."""

    def shift(seconds):
        real = module.datetime

        class Shifted:
            @staticmethod
            def now(zone):
                return real.now(zone) + timedelta(seconds=seconds)

        monkeypatch.setattr(module, "datetime", Shifted)

    return shift


async def status_of(world, agent):
    return (await world.sql("select status from hosts where id = $1", agent.host))[0]["status"]


@pytest.mark.parametrize("seconds", [3600, -3600])
async def test_the_clock_of_the_control_plane_is_off(virtual_clock, world, agent, nursery, wall_clock_off, seconds):
    """Ahead, it takes no host down that beats; behind, it still sees one that is gone; a step changes nothing."""
    nursery.start_soon(world.beat)
    await world.control_plane(monitor=True)
    await trio.sleep(60)
    wall_clock_off(seconds)
    await trio.sleep(300)
    assert await status_of(world, agent) == "online"
    assert await world.sql("select from audit_logs where resource_type = 'host'") == []
    agent.cut_off()
    await trio.sleep(world.settings.heartbeat_timeout + 3 * INTERVAL)
    assert await status_of(world, agent) == "unreachable"


async def test_a_new_leader_does_not_bring_back_who_is_away(virtual_clock, world, agent, nursery):
    """It has not heard the host itself: the host stays away until it beats."""
    nursery.start_soon(world.beat)
    plane = await world.control_plane(monitor=True)
    agent.cut_off()
    await trio.sleep(150)
    assert await status_of(world, agent) == "unreachable"
    plane.kill()
    await world.control_plane(monitor=True)
    await trio.sleep(60)
    assert await status_of(world, agent) == "unreachable"
    agent.come_back()
    await trio.sleep(30)
    assert await status_of(world, agent) == "online"


async def test_what_counts_as_silence(autojump_clock):
    """Time in which we looked; a long gap counts little, a beat ends it, whatever time it bears."""
    host = SimpleNamespace(id=uuid4(), last_heartbeat=1)
    silence = Silence(TIMEOUT)
    silence.look([host])
    assert (silence.is_lost(host.id), silence.is_heard(host.id)) == (False, False)
    await trio.sleep(3600)
    silence.look([host])
    assert not silence.is_lost(host.id)
    for _ in range(int(TIMEOUT / LONGEST_GAP)):
        await trio.sleep(LONGEST_GAP)
        silence.look([host])
    assert silence.is_lost(host.id)
    host.last_heartbeat = 0
    silence.look([host])
    assert (silence.is_lost(host.id), silence.is_heard(host.id)) == (False, True)


async def test_one_that_is_drained_and_goes_away(virtual_clock, world, agent, nursery):
    """Its status stays; the trail says once that it went and once that it came, whoever leads."""

    async def marks():
        rows = await world.sql("select action, status from audit_logs where resource_type = 'host' order by created_at")
        return [tuple(row) for row in rows]

    nursery.start_soon(world.beat)
    await world.sql("update hosts set status = 'draining', generation = generation + 1 where id = $1", agent.host)
    plane = await world.control_plane(monitor=True)
    await trio.sleep(60)
    assert await marks() == []
    for _ in range(2):
        before = await marks()
        agent.cut_off()
        await trio.sleep(150)
        went = [*before, ("marked_down", "error")]
        assert (await status_of(world, agent), await marks()) == ("draining", went)
        plane.kill()
        plane = await world.control_plane(monitor=True)
        await trio.sleep(150)
        assert await marks() == went
        agent.come_back()
        await trio.sleep(60)
        assert (await status_of(world, agent), await marks()) == ("draining", [*went, ("marked_up", "success")])
