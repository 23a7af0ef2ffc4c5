"""Links over memory streams and Trio's fake clock; tests/hosts/test_links_tls.py has the sockets."""

from __future__ import annotations

from uuid import uuid4

import pytest
import trio
import trio.testing

from agent.actor.server import ServerPeer
from agent.wire.faults import Fault
from capsule.config import Settings
from capsule.db.errors import DatabaseUnavailable
from capsule.hosts.directory import Endpoint
from capsule.hosts.link import Unreachable
from capsule.hosts.links import CHECK_INTERVAL, HostLinks

SETTINGS = Settings(database_url="x", secret_key="s" * 32)
ENDPOINT = Endpoint("192.0.2.7:7443", "f" * 64, 1)


class FakeFleet:
    """Agents behind memory streams, host rows in a dict, and what was asked of both."""

    def __init__(self, nursery):
        self.rows = {}
        self.dials = []
        self.agents = []
        self.down = None
        self.database_down = False
        self.mute = False
        self.held = trio.Event()
        self._nursery = nursery

    async def find(self, host):
        await trio.lowlevel.checkpoint()
        if self.database_down:
            raise DatabaseUnavailable("down")
        return self.rows.get(host)

    async def find_all(self, hosts):
        await trio.lowlevel.checkpoint()
        if self.database_down:
            raise DatabaseUnavailable("down")
        return {host: self.rows[host] for host in hosts if host in self.rows}

    async def dial(self, endpoint):
        self.dials.append((trio.current_time(), endpoint))
        await trio.lowlevel.checkpoint()
        if self.down:
            raise Unreachable(self.down)
        ours, theirs = trio.testing.memory_stream_pair()
        if not self.mute:
            agent = ServerPeer(theirs, self.serve)
            self.agents.append(agent)
            self._nursery.start_soon(agent.run)
        return ours

    async def serve(self, method, body, stream):
        if method == "hold":
            await self.held.wait()
        await trio.lowlevel.checkpoint()
        return {"method": method, **body}

    def add_host(self):
        host = uuid4()
        self.rows[host] = ENDPOINT
        return host


@pytest.fixture
async def fleet(nursery):
    return FakeFleet(nursery)


@pytest.fixture
async def links(fleet, nursery):
    links = HostLinks(fleet, fleet.dial, SETTINGS)
    await nursery.start(links.run)
    return links


async def test_calls_share_one_lazily_made_connection(links, fleet, autojump_clock):
    """Nothing is dialled before the first call; a hundred calls at once make one connection."""
    host = fleet.add_host()
    assert fleet.dials == []
    answers = []

    async def ask(number):
        answers.append((await links.call(host, "echo", {"n": number}, timeout=5))["n"])

    async with trio.open_nursery() as nursery:
        for number in range(100):
            nursery.start_soon(ask, number)
    assert sorted(answers) == list(range(100))
    assert len(fleet.dials) == 1
    assert links.statistics()[host].connected


async def test_a_stream_reaches_the_agent(links, fleet, autojump_clock):
    host = fleet.add_host()
    async with links.open_stream(host, "echo", {}, timeout=5) as stream:
        await stream.end()
        assert await stream.reply() == {"method": "echo"}


async def test_a_host_that_is_down_fails_within_the_connect_timeout(links, fleet, autojump_clock):
    """The caller gets a retryable `unavailable` that names no address; dials come with growing pauses meanwhile."""
    host = fleet.add_host()
    fleet.down = "192.0.2.7:7443 refused"
    begun = trio.current_time()
    with pytest.raises(Fault) as caught:
        await links.call(host, "echo", {}, timeout=60)
    assert (caught.value.code, caught.value.retryable) == ("unavailable", True)
    assert "192.0.2" not in caught.value.message
    assert trio.current_time() - begun <= SETTINGS.connect_timeout
    times = [when - begun for when, _ in fleet.dials]
    assert times == pytest.approx([0, 0.1, 0.3, 0.7, 1.5, 3.1])


async def test_while_backing_off_callers_fail_at_once_and_cause_no_dial(links, fleet, autojump_clock):
    """A thousand calls to a dead host cost it nothing and wait for nothing."""
    host = fleet.add_host()
    fleet.down = "refused"
    for _ in range(2):
        with pytest.raises(Fault):
            await links.call(host, "echo", {}, timeout=60)
    dials, begun = len(fleet.dials), trio.current_time()
    for _ in range(10):
        with pytest.raises(Fault):
            await links.call(host, "echo", {}, timeout=60)
    assert (len(fleet.dials), trio.current_time()) == (dials, begun)


async def test_an_agent_that_restarts_is_waited_for(links, fleet, autojump_clock):
    """A call that comes while the agent is away for a second succeeds."""
    host = fleet.add_host()
    fleet.down = "refused"

    async def come_back():
        await trio.sleep(1)
        fleet.down = None

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        assert (await links.call(host, "echo", {}, timeout=60))["method"] == "echo"


async def test_a_lost_connection_fails_what_is_under_way_and_the_next_call_dials(links, fleet, autojump_clock):
    host = fleet.add_host()

    async def lose():
        await trio.testing.wait_all_tasks_blocked()
        fleet.agents[0].close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lose)
        with pytest.raises(Fault) as caught:
            await links.call(host, "hold", {}, timeout=60)
    assert (caught.value.code, caught.value.retryable) == ("unavailable", True)
    assert (await links.call(host, "echo", {}, timeout=5))["method"] == "echo"
    assert len(fleet.dials) == 2


async def test_an_agent_that_never_says_hello_is_given_up(links, fleet, autojump_clock):
    """A listener that accepts and stays silent costs the connect time-out, not the caller's whole time."""
    host = fleet.add_host()
    fleet.mute = True
    with pytest.raises(Fault) as caught:
        await links.call(host, "echo", {}, timeout=60)
    assert caught.value.code == "unavailable"
    assert trio.current_time() <= SETTINGS.connect_timeout + 1


async def test_the_time_out_covers_connecting_and_the_answer(links, fleet, autojump_clock):
    host = fleet.add_host()
    with pytest.raises(Fault) as caught:
        await links.call(host, "hold", {}, timeout=3)
    assert caught.value.code == "deadline_exceeded"
    assert trio.current_time() <= 6


async def test_an_idle_link_is_closed_and_dialled_again_on_use(links, fleet, autojump_clock):
    """At the idle time-out, not before, and never under a call that is still waiting."""
    host = fleet.add_host()
    await links.call(host, "echo", {}, timeout=5)
    await trio.sleep(SETTINGS.link_idle_timeout - 1)
    assert host in links.statistics()
    await trio.sleep(2)
    assert host not in links.statistics()
    assert fleet.agents[0].closed.is_set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: links.call(host, "hold", {}, timeout=2 * SETTINGS.link_idle_timeout))
        await trio.sleep(SETTINGS.link_idle_timeout + 10)
        assert links.statistics()[host].connected
        fleet.held.set()


async def test_a_host_that_is_gone_is_not_dialled(links, fleet, autojump_clock):
    with pytest.raises(Fault) as caught:
        await links.call(uuid4(), "echo", {}, timeout=5)
    assert caught.value.code == "unavailable"
    assert fleet.dials == []
    await trio.testing.wait_all_tasks_blocked()
    assert links.statistics() == {}


async def test_a_database_that_is_away_is_waited_for(links, fleet, autojump_clock):
    """Not knowing where the host is counts as a failed dial, and so is tried again."""
    host = fleet.add_host()
    fleet.database_down = True

    async def come_back():
        await trio.sleep(1)
        fleet.database_down = False

    async with trio.open_nursery() as nursery:
        nursery.start_soon(come_back)
        await links.call(host, "echo", {}, timeout=60)


async def test_a_renewed_certificate_drops_no_request(links, fleet, autojump_clock):
    """The old connection ends with its last request; new requests go over a new one, pinned to the new certificate."""
    host = fleet.add_host()
    answers = []
    async with trio.open_nursery() as nursery:

        async def ask():
            answers.append(await links.call(host, "hold", {}, timeout=60))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        fleet.rows[host] = Endpoint(ENDPOINT.address, "e" * 64, 1)
        await trio.sleep(CHECK_INTERVAL + 1)
        await links.call(host, "echo", {}, timeout=5)
        assert [endpoint.fingerprint[0] for _, endpoint in fleet.dials] == ["f", "e"]
        fleet.held.set()
    assert len(answers) == 1
    await trio.testing.wait_all_tasks_blocked()
    assert fleet.agents[0].closed.is_set()


@pytest.mark.parametrize("row", [None, Endpoint(ENDPOINT.address, "e" * 64, 2)])
async def test_a_deleted_or_re_registered_host_loses_its_link_at_once(links, fleet, row, autojump_clock):
    """Whoever held the old registration is not trusted with another second."""
    host = fleet.add_host()

    async with links.open_stream(host, "hold", {}, timeout=60) as stream:
        await trio.testing.wait_all_tasks_blocked()
        fleet.rows.pop(host) if row is None else fleet.rows.update({host: row})
        with pytest.raises(Fault) as caught:
            await stream.reply()
    assert caught.value.code == "unavailable"
    assert trio.current_time() <= CHECK_INTERVAL + 1


@pytest.mark.parametrize("told", [True, False])
async def test_what_was_retired_is_forgotten_too(links, fleet, told, autojump_clock):
    """A call on the connection of before a renewal, and one on today's: the host is deleted, and both end at once when
    we are told, or when the row is looked at. Nothing is remembered of them."""
    host = fleet.add_host()
    ended = []

    async def ask():
        with pytest.raises(Fault) as caught:
            await links.call(host, "hold", {}, timeout=600)
        assert caught.value.code == "unavailable"
        ended.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        fleet.rows[host] = Endpoint(ENDPOINT.address, "e" * 64, 1)
        await trio.sleep(CHECK_INTERVAL + 1)
        nursery.start_soon(ask)
        await trio.sleep(2 * CHECK_INTERVAL)
        assert (len(fleet.dials), ended) == (2, [])
        began = trio.current_time()
        links.forget(host) if told else fleet.rows.pop(host)
    assert max(ended) - began <= (0 if told else CHECK_INTERVAL)
    await trio.testing.wait_all_tasks_blocked()
    assert (links._links, links._retired) == ({}, {})


async def test_one_that_is_forgotten_while_it_dials(links, fleet, autojump_clock, monkeypatch):
    """It may get through to the old registration yet: it is dropped as soon as the row is looked at."""
    host = fleet.add_host()
    dial, ready = links._dial, trio.Event()

    async def slow(endpoint):
        await ready.wait()
        return await dial(endpoint)

    monkeypatch.setattr(links, "_dial", slow)
    async with trio.open_nursery() as nursery:

        async def ask():
            with pytest.raises(Fault):
                await links.call(host, "hold", {}, timeout=600)

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        fleet.rows[host] = Endpoint(ENDPOINT.address, "e" * 64, 2)
        links.forget(host)
        ready.set()
        began = trio.current_time()
    assert trio.current_time() - began <= 2 * CHECK_INTERVAL


async def test_a_database_outage_closes_no_link(links, fleet, autojump_clock):
    host = fleet.add_host()
    await links.call(host, "echo", {}, timeout=5)
    fleet.database_down = True
    await trio.sleep(4 * CHECK_INTERVAL)
    assert (await links.call(host, "echo", {}, timeout=5))["method"] == "echo"
    assert len(fleet.dials) == 1


async def test_a_draining_agent_is_left_to_finish(links, fleet, autojump_clock):
    """GOAWAY: what is under way gets its answer; new calls use a new connection."""
    host = fleet.add_host()
    answers = []
    async with trio.open_nursery() as nursery:

        async def ask():
            answers.append(await links.call(host, "hold", {}, timeout=60))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(fleet.agents[0].drain, "restart")
        await trio.testing.wait_all_tasks_blocked()
        await links.call(host, "echo", {}, timeout=5)
        assert len(fleet.dials) == 2
        fleet.held.set()
    assert len(answers) == 1


async def test_a_caller_that_goes_away_leaves_the_link_to_the_others(links, fleet, autojump_clock):
    host = fleet.add_host()
    with trio.move_on_after(1):
        await links.call(host, "hold", {}, timeout=60)
    await links.call(host, "echo", {}, timeout=5)
    assert len(fleet.dials) == 1
    assert links.statistics()[host].users == 0


async def test_after_the_end_every_call_is_refused(fleet, autojump_clock):
    """Shutting down: calls fail at once with a fault, never hang."""
    host = fleet.add_host()
    links = HostLinks(fleet, fleet.dial, SETTINGS)
    async with trio.open_nursery() as nursery:
        await nursery.start(links.run)
        await links.call(host, "echo", {}, timeout=5)
        nursery.cancel_scope.cancel()
    with pytest.raises(Fault):
        await links.call(host, "echo", {}, timeout=5)
    assert links.statistics() == {}
