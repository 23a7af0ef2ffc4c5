"""An address is proven, not believed: who is online, who waits, and what a claim takes from others (nothing)."""

from __future__ import annotations

import pytest
import structlog.testing
import trio

from capsule import control
from capsule.db.queries import hosts
from capsule.monitor import proof
from tests.fixtures import fleet

HERE = "192.0.2.7:7443"
ELSEWHERE = "192.0.2.8:7443"


@pytest.fixture
async def beats(world, nursery):
    """The heartbeats of all agents that are well: none of them is a proof."""
    nursery.start_soon(world.beat)


@pytest.fixture
async def leader(world, beats):
    """A control plane that follows the hosts."""
    plane = await world.control_plane(monitor=True)
    while not plane.monitor.leading:
        await trio.sleep(0.1)
    return plane


@pytest.fixture
def wait_for(world):
    """Waits for a status of a host."""

    async def wait(host, wanted, seconds):
        with trio.move_on_after(seconds):
            while (await status_of(world, host)) != wanted:
                await trio.sleep(0.1)
        assert await status_of(world, host) == wanted

    return wait


async def status_of(world, host):
    return (await world.sql("select status from hosts where id = $1", host))[0]["status"]


async def marks(world):
    return [row["action"] for row in await world.sql("select action from audit_logs where resource_type = 'host'")]


async def test_one_that_is_there_is_online_at_once(virtual_clock, world, leader, wait_for):
    """Nobody waits for the next round; the trail has nothing to say, since nothing was down."""
    host = await world.register(HERE)
    world.put(host, HERE)
    leader.monitor.nudge()
    await wait_for(host, "online", 1)
    assert await marks(world) == []


async def test_one_that_is_not_there_waits(virtual_clock, world, leader, wait_for):
    """It stays pending, however it beats; it is dialled ever more seldom, and found when it comes after all."""
    host = await world.register(HERE)
    agent = world.put(host, ELSEWHERE)
    leader.monitor.nudge()
    with structlog.testing.capture_logs() as logs:
        await trio.sleep(600)
    assert await status_of(world, host) == "pending"
    refusals = [entry for entry in logs if entry["event"] == "address_not_proven"]
    assert 600 / 30 < len(refusals) < 600 / 12
    assert refusals[0]["address"] == HERE
    world.agents[HERE] = agent
    await wait_for(host, "online", 2 * proof.BACKOFF.max_delay)


async def test_a_claim_takes_nothing(virtual_clock, world, leader, wait_for):
    """A host that registers with another's address stays what it was, and the other one loses nothing: neither its
    address nor its connection nor a sandbox. Were that one gone, its address is still its own until it is deleted."""
    host = await world.register(HERE)
    agent = world.put(host, HERE)
    leader.monitor.nudge()
    await wait_for(host, "online", 1)
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    claimant = await world.register(HERE)
    leader.monitor.nudge()
    for _ in range(30):
        await trio.sleep(10)
        assert await status_of(world, host) == "online"
        assert (await world.row(row.id)).status == "running"
    assert await status_of(world, claimant) == "pending"
    assert leader.links.statistics()[host].connected
    world.agents["gone:1"] = agent
    agent.cut_off()
    world.put(claimant, HERE)
    with structlog.testing.capture_logs() as logs:
        await trio.sleep(150)
    assert (await status_of(world, host), await status_of(world, claimant)) == ("unreachable", "pending")
    assert any("another host" in entry["reason"] for entry in logs if entry["event"] == "address_not_proven")
    await world.sql("update sandboxes set status = 'error', host_ip = null, generation = generation + 1")
    await world.sql("update hosts set deleted_at = now() where id = $1", host)
    await wait_for(claimant, "online", 2 * proof.BACKOFF.max_delay)


async def test_of_two_claimants_the_one_that_is_there_wins(virtual_clock, world, leader, wait_for):
    """Whichever came first; the other one is online as soon as it says where it is."""
    first, second = await world.register(HERE), await world.register(HERE)
    world.put(second, HERE)
    world.put(first, ELSEWHERE)
    leader.monitor.nudge()
    await wait_for(second, "online", 1)
    await trio.sleep(60)
    assert await status_of(world, first) == "pending"
    await world.register(ELSEWHERE, host=first)
    control._on_registration(leader.links, leader.monitor)(first)
    await wait_for(first, "online", 1)
    assert await status_of(world, second) == "online"


async def test_one_that_registers_anew(virtual_clock, world, leader, wait_for):
    """It is away until it was reached, which the trail says; its sandboxes are not, for so short a while."""
    host = await world.register(HERE)
    agent = world.put(host, HERE)
    leader.monitor.nudge()
    await wait_for(host, "online", 1)
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    generation = row.generation
    await world.register(HERE, host=host)
    assert await status_of(world, host) == "unreachable"
    await wait_for(host, "online", 10)  # nobody nudged: another control plane did the registering
    assert await marks(world) == ["marked_up"]
    assert (await world.row(row.id)).generation == generation


async def test_an_older_connection_proves_nothing(virtual_clock, world, leader, wait_for):
    """It registered anew with an address where it is not, while we still have a connection to where it was."""
    host = await world.register(HERE)
    agent = world.put(host, HERE)
    leader.monitor.nudge()
    await wait_for(host, "online", 1)
    await world.register(ELSEWHERE, host=host)
    assert leader.links.statistics()[host].connected
    leader.monitor.nudge()
    await trio.sleep(120)
    assert await status_of(world, host) == "unreachable"
    world.agents[ELSEWHERE] = agent
    await wait_for(host, "online", 2 * proof.BACKOFF.max_delay)


async def test_one_whose_credentials_ended(virtual_clock, world, leader, wait_for):
    """Nothing is asked of it, its sandboxes are missing, and no heartbeat brings it back; a new registration does."""
    host = await world.register(HERE)
    agent = world.put(host, HERE)
    leader.monitor.nudge()
    await wait_for(host, "online", 1)
    row = await world.insert(agent, "running")
    agent.add_vm(row.id)
    await world.db.transaction(hosts.revoke_credentials, host)
    await trio.sleep(60)
    assert await status_of(world, host) == "unreachable"
    assert (await world.row(row.id)).status == "missing"
    asked = len(agent.asked)
    await trio.sleep(300)
    assert len(agent.asked) == asked
    await world.register(HERE, host=host)
    leader.monitor.nudge()
    await wait_for(host, "online", 1)
    await trio.sleep(5)
    assert (await world.row(row.id)).status == "running"


async def test_one_that_is_drained_stays_so(virtual_clock, world, leader, wait_for):
    """Registered anew, or silent for long: it is not online again by that. Silent, its sandboxes are missing."""
    host = await world.register(HERE)
    agent = world.put(host, HERE)
    leader.monitor.nudge()
    await wait_for(host, "online", 1)
    await world.sql("update hosts set status = 'draining', generation = generation + 1 where id = $1", host)
    await world.register(HERE, host=host)
    leader.monitor.nudge()
    await trio.sleep(10)
    [seen] = await world.sql("select status, proven_epoch from hosts where id = $1", host)
    assert tuple(seen) == ("draining", 2)
    agent.cut_off()
    row = await world.insert(agent, "running")
    await trio.sleep(150)
    assert (await status_of(world, host), (await world.row(row.id)).status) == ("draining", "missing")
    agent.come_back()
    await trio.sleep(60)
    assert await status_of(world, host) == "draining"


async def test_a_certificate_renewed_after_the_dial(virtual_clock, world, monkeypatch):
    """The connection proves nothing any more: it is dialled again, once, after a pause."""
    plane = await world.control_plane()
    host = await world.register(HERE)
    world.put(host, HERE)
    await plane.links.reach(host, timeout=5)
    await world.db.transaction(hosts.pin_certificate, host, "e" * 64)
    monkeypatch.setattr(fleet, "certificate", lambda _: "e" * 64)
    reads = []
    get = hosts.get

    async def counted(tx, one):
        reads.append(one)
        return await get(tx, one)

    monkeypatch.setattr(hosts, "get", counted)
    with trio.fail_after(1):
        assert await proof.prove_address(host, world.db, plane.links)
    assert len(reads) <= 6
    assert await status_of(world, host) == "online"
