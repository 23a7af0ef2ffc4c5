"""Hosts that talk rubbish, and our own bugs: one of them is not the end of the others."""

from __future__ import annotations

from uuid import UUID

import pytest
import trio

from capsule.monitor import host as module

BAD_LISTINGS = {
    "id": {"sandboxes": [{"sandbox_id": "../../etc"}]},
    "no list": {"sandboxes": 5},
    "sequence": {"outbox": [{"sequence": "x"}]},
    "event": {"outbox": [{"sequence": 1, "sandbox_id": str(UUID(int=1)), "event": "x", "reason": "", "at": 0.0}]},
}
BAD_TEMPLATES = {
    "name": {"name": "'; drop table"},
    "nul": {"name": "a\x00"},
    "size": {"size_bytes": -1},
    "large": {"name": "large", "size_bytes": 2**64 - 1},
    "type": {"size_bytes": "x"},
}


@pytest.mark.parametrize("listing", BAD_LISTINGS.values(), ids=BAD_LISTINGS)
async def test_a_host_that_talks_rubbish(virtual_clock, world, agent, follow, status, listing):
    """Nothing of it is believed, nobody else is disturbed, and when it comes to its senses it is followed again."""
    other = await world.add_host()
    row, theirs = await world.insert(agent, "running"), await world.insert(other, "running")
    other.add_vm(theirs.id)
    agent.listing_extra = listing
    await follow()
    await follow(of=other)
    await trio.sleep(20)
    assert (await world.row(row.id)).status == "running"
    other.die(theirs.id)
    await status(theirs.id, "error", 1)
    agent.listing_extra = {}
    await status(row.id, "error", 10)


@pytest.mark.parametrize("template", BAD_TEMPLATES.values(), ids=BAD_TEMPLATES)
async def test_a_host_with_rubbish_for_templates(virtual_clock, world, agent, follow, status, template):
    """At most that template is not there; rubbish of a wrong type is an answer that makes no sense."""
    row = await world.insert(agent, "running")
    agent.templates = [{**agent.templates[0], **template}, {**agent.templates[0], "name": "good"}]
    await follow()
    if template == {"size_bytes": "x"}:
        return
    await status(row.id, "error", 1)
    names = {one["name"] for one in await world.sql("select name from templates")}
    assert {"minimal", "good"} <= names <= {"minimal", "good", "large"}


async def test_a_bug_with_one_host_is_not_the_end(virtual_clock, world, agent, follow, status, monkeypatch):
    """Logged, and tried again with growing pauses."""
    row = await world.insert(agent, "running")
    failures = [RuntimeError("bug")] * 3
    plan = module.plan

    def buggy(*args):
        if failures:
            raise failures.pop()
        return plan(*args)

    monkeypatch.setattr(module, "plan", buggy)
    await follow()
    await status(row.id, "error", 30)


async def test_a_bug_beside_a_follower_is_not_the_end(virtual_clock, world, agent, plane, follow, status, monkeypatch):
    """In ending what nobody needs: logged; the rows go on, and the next round tries again."""
    stray, row = await world.insert(agent, "stopped"), await world.insert(agent, "running")
    agent.add_vm(stray.id)
    agent.add_vm(row.id)
    failures = [RuntimeError("bug")] * 3
    call = plane.links.call

    async def buggy(host, method, *args, **kwargs):
        if method == "sandbox.destroy" and failures:
            raise failures.pop()
        return await call(host, method, *args, **kwargs)

    monkeypatch.setattr(plane.links, "call", buggy)
    await follow()
    agent.die(row.id)
    await status(row.id, "error", 5)
    await trio.sleep(30)
    assert (failures, agent.vms) == ([], {})
