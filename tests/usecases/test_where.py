"""Which host a sandbox goes to: its team's own or a regular one, with the tags that were asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from capsule import errors
from capsule.config import load
from capsule.scheduler.placement import STRATEGIES, LeastLoaded, RoundRobin


@pytest.fixture
def own(world):
    """Makes a host the own one of the world's team, and switches its BYOC on."""

    async def own(agent, *, enabled=True):
        team = world.principal.team_id
        await world.sql("update teams set is_byoc = $2 where id = $1", team, enabled)
        if agent is not None:
            await world.sql("update hosts set type = 'byoc', team_id = $2 where id = $1", agent.host, team)

    return own


@pytest.fixture
def tag(world):
    async def tag(agent, *tags):
        for one in tags:
            await world.sql("insert into host_tags (host_id, tag) values ($1, $2)", agent.host, one)

    return tag


async def test_a_team_that_brings_its_own_hosts_uses_those_only(virtual_clock, world, agent, plane, request_body, own):
    """All others use the regular ones; who has none of its own left is told so."""
    ours = await world.add_host()
    await own(ours)
    for _ in range(3):
        view = await plane.sandboxes.create(world.principal, request_body, None)
        assert view.host_id == ours.host
    stranger = await world.add_team()
    for _ in range(3):
        assert (await plane.sandboxes.create(stranger, request_body, None)).host_id == agent.host
    await world.sql("update hosts set cordoned = true where id = $1", ours.host)
    with pytest.raises(errors.NoHostsAvailable, match="your team brings its own hosts") as caught:
        await plane.sandboxes.create(world.principal, request_body, None)
    assert caught.value.extra == {"limits": ["hosts"]}


async def test_what_was_made_before_stays_where_it_is(virtual_clock, world, agent, plane, request_body, own):
    """BYOC switched on: old sandboxes pause, resume and fork on the regular host; new ones go home only."""
    old = await plane.sandboxes.create(world.principal, request_body, None)
    await own(None)
    await plane.sandboxes.pause(world.principal, old.id)
    assert (await plane.sandboxes.resume(world.principal, old.id)).host_id == agent.host
    (child,) = await plane.sandboxes.fork(world.principal, old.id, 1, None)
    assert child.host_id == agent.host
    with pytest.raises(errors.NoHostsAvailable, match="own hosts"):
        await plane.sandboxes.create(world.principal, request_body, None)
    await own(None, enabled=False)
    assert (await plane.sandboxes.create(world.principal, request_body, None)).host_id == agent.host


async def test_tags_in_the_metadata_ask_for_hosts(virtual_clock, world, agent, plane, request_body, tag):
    """All of them have to be there; the metadata is kept as it was sent."""
    both = await world.add_host()
    await tag(agent, "gpu")
    await tag(both, "gpu", "eu")
    request = replace(request_body, metadata={"host_tags": "eu, gpu"})
    for _ in range(3):
        view = await plane.sandboxes.create(world.principal, request, None)
        assert (view.host_id, view.metadata) == (both.host, {"host_tags": "eu, gpu"})
    with pytest.raises(
        errors.NoHostsAvailable, match="none of the 2 online hosts has all of the tags eu, us"
    ) as caught:
        await plane.sandboxes.create(world.principal, replace(request, metadata={"host_tags": "eu,us"}), None)
    assert caught.value.extra == {"limits": ["tags"]}


@pytest.mark.parametrize("text", ["", ",", "gpu,", "-gpu", "gp u", "gpu\n", "x" * 65, "gpü"])
async def test_tags_that_are_none(virtual_clock, world, agent, plane, request_body, text):
    """400 that names the field, before anything else is looked at; nothing is written down."""
    with pytest.raises(errors.InvalidRequest) as caught:
        await plane.sandboxes.create(world.principal, replace(request_body, metadata={"host_tags": text}), "key")
    assert caught.value.extra == {"field": "metadata"}
    assert await world.rows() == {}


def test_the_strategy_is_a_setting():
    """By its name; another one is refused with the variable's."""
    values = {"CAPSULE_DATABASE_URL": "postgresql://", "CAPSULE_SECRET_KEY": "s" * 32}
    assert isinstance(STRATEGIES[load(values).scheduler], RoundRobin)
    chosen = load({**values, "CAPSULE_SCHEDULER": "least_loaded"})
    assert isinstance(STRATEGIES[chosen.scheduler], LeastLoaded)
    with pytest.raises(Exception, match="CAPSULE_SCHEDULER"):
        load({**values, "CAPSULE_SCHEDULER": "random"})
