"""Idempotency-Key: the same request at two control planes, one of which commits between two looks of the other."""

from __future__ import annotations

import pytest


@pytest.fixture
async def other(world, plane):
    """Another control plane."""
    return await world.control_plane()


async def test_a_create_that_found_no_host(virtual_clock, world, agent, plane, other, request_body, overtake):
    """The first one's sandbox is no more than the team may have: it is the one that was asked for."""
    await world.sql("update teams set max_sandboxes = 1 where id = $1", world.principal.team_id)
    await world.sql("update hosts set cordoned = true")
    first = []

    async def create():
        await world.sql("update hosts set cordoned = false")
        first.append(await plane.sandboxes.create(world.principal, request_body, "key"))

    overtaking = overtake(create, before="select from teams")  # the quota, when it knows that there is no host
    second = await other.sandboxes.create(world.principal, request_body, "key")
    assert overtaking.done
    assert second.id == first[0].id
