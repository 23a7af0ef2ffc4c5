"""Links over real sockets and TLS: the pin decides whom we talk to."""

from __future__ import annotations

import ipaddress
from functools import partial
from uuid import uuid4

import pytest
import trio
from cryptography import x509
from msgspec.structs import replace

from agent.actor.server import ServerPeer
from agent.actor.tls import serve_tls
from agent.enrol.credentials import Credentials
from agent.enrol.identity import certificate_request, install_certificate, new_key, server_ssl_context
from agent.wire.faults import Fault
from capsule.config import Settings
from capsule.hosts.ca import CertificateAuthority, fingerprint
from capsule.hosts.directory import Endpoint
from capsule.hosts.links import HostLinks, tls_dial
from capsule.hosts.tls import ClientContexts

SETTINGS = Settings(database_url="x", secret_key="s" * 32, connect_timeout=20.0)
"""A handshake has two sides in this process, and a busy machine."""
HERE = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))


class FakeDirectory:
    def __init__(self):
        self.rows = {}

    async def find(self, host):
        await trio.lowlevel.checkpoint()
        return self.rows.get(host)

    async def find_all(self, hosts):
        await trio.lowlevel.checkpoint()
        return {host: self.rows[host] for host in hosts if host in self.rows}


class Agent:
    """A host's listener with its own key and certificate."""

    def __init__(self, authority):
        self.authority = authority
        self.host = uuid4()
        key_pem = new_key()
        self.credentials = Credentials(
            url="http://127.0.0.1",
            host_id=f"host-{self.host}",
            token="t",
            token_received_at=0,
            token_lifetime=1,
            refresh_token="r",
            key_pem=key_pem,
            cert_pem=self.issue(key_pem),
            ca_cert_pem=authority.cert_pem,
        )
        self.context = server_ssl_context(self.credentials)
        self.port = 0

    def issue(self, key_pem):
        return self.authority.issue_host_certificate(certificate_request(key_pem), self.host, HERE)

    async def start(self, nursery):
        async def serve(stream):
            async def answer(method, body, _):
                if method == "slow":
                    await trio.sleep(body["seconds"])
                await trio.lowlevel.checkpoint()
                return {"method": method, "host": str(self.host), **body}

            await ServerPeer(stream, answer).run()

        start = partial(serve_tls, serve, host="127.0.0.1", port=0, context=self.context)
        self.port = await nursery.start(start)
        return self

    def endpoint(self, *, pinned=None, earlier=None):
        earlier = None if earlier is None else fingerprint(earlier)
        return Endpoint(f"127.0.0.1:{self.port}", fingerprint(pinned or self.credentials.cert_pem), 1, earlier)


@pytest.fixture(scope="module")
def authority():
    return CertificateAuthority.create()


@pytest.fixture
def directory():
    return FakeDirectory()


@pytest.fixture
async def links(authority, directory, nursery):
    links = HostLinks(directory, tls_dial(ClientContexts(authority)), SETTINGS)
    await nursery.start(links.run)
    return links


@pytest.fixture
async def hasty_links(authority, directory, nursery):
    """For hosts that are not reached."""
    links = HostLinks(directory, tls_dial(ClientContexts(authority)), replace(SETTINGS, connect_timeout=1.0))
    await nursery.start(links.run)
    return links


async def test_the_pinned_agent_is_reached(authority, directory, links, nursery):
    agent = await Agent(authority).start(nursery)
    directory.rows[agent.host] = agent.endpoint()
    with trio.fail_after(30):
        assert (await links.call(agent.host, "echo", {}, timeout=20))["host"] == str(agent.host)


async def test_another_host_at_the_address_is_never_asked(authority, directory, hasty_links, nursery):
    """A host that took over an address gets no request, and the caller a retryable fault."""
    agent, other = await Agent(authority).start(nursery), Agent(authority)
    directory.rows[other.host] = agent.endpoint(pinned=other.credentials.cert_pem)
    with trio.fail_after(30), pytest.raises(Fault) as caught:
        await hasty_links.call(other.host, "echo", {}, timeout=5)
    assert (caught.value.code, caught.value.retryable) == ("unavailable", True)


async def test_an_agent_of_another_fleet_is_refused(directory, hasty_links, nursery):
    """Even when its certificate is the pinned one: our root comes first."""
    agent = await Agent(CertificateAuthority.create()).start(nursery)
    directory.rows[agent.host] = agent.endpoint()
    with trio.fail_after(30), pytest.raises(Fault):
        await hasty_links.call(agent.host, "echo", {}, timeout=5)


async def test_a_row_ahead_of_its_agent_is_waited_for(authority, directory, links, nursery):
    """The new certificate is pinned a moment before the agent serves with it; a call in that moment succeeds."""
    agent = await Agent(authority).start(nursery)
    renewed = replace(agent.credentials, cert_pem=agent.issue(agent.credentials.key_pem))
    directory.rows[agent.host] = agent.endpoint(pinned=renewed.cert_pem)
    answers = []

    async def ask():
        answers.append(await links.call(agent.host, "echo", {}, timeout=20))

    with trio.fail_after(30):
        async with trio.open_nursery() as callers:
            callers.start_soon(ask)
            while not any(link.failed_dials for link in links.statistics().values()):
                await trio.sleep(0.01)
            install_certificate(agent.context, renewed)
    assert len(answers) == 1


async def at_least(count, things):
    while len(things) < count:
        await trio.sleep(0.01)


@pytest.fixture
def quick_looks(monkeypatch):
    """Links look at their host's row twenty times a second."""
    monkeypatch.setattr("capsule.hosts.links.CHECK_INTERVAL", 0.05)


async def test_a_renewal_drops_no_request(quick_looks, authority, directory, links, nursery):
    """Three renewals under a stream of calls, short ones and ones that outlast a connection: the row is ahead of the
    agent for longer than a link to it lives, and one answer is lost. Every call succeeds, no dial fails."""
    agent = await Agent(authority).start(nursery)
    directory.rows[agent.host] = agent.endpoint()
    answers = {"echo": 0, "slow": 0}
    connections, failures = set(), 0
    done = trio.Event()

    async def ask(method):
        while not done.is_set():
            await links.call(agent.host, method, {"seconds": 0.3}, timeout=20)
            answers[method] += 1
            await trio.sleep(0.005)

    async def watch():
        nonlocal failures
        while not done.is_set():
            connections.update({links._links.get(agent.host)} - {None})
            failures += sum(link.failed_dials for link in links.statistics().values())
            await trio.sleep(0.01)

    served = agent.credentials
    with trio.fail_after(60):
        async with trio.open_nursery() as callers:
            for method in ("echo", "slow", "slow"):
                callers.start_soon(ask, method)
            await links.call(agent.host, "echo", {}, timeout=20)
            callers.start_soon(watch)
            await at_least(1, connections)
            for lost in (False, True, False):
                renewals = [agent.issue(served.key_pem) for _ in range(2 if lost else 1)]
                for cert_pem in renewals:  # of two, the first never arrives
                    directory.rows[agent.host] = agent.endpoint(pinned=cert_pem, earlier=served.cert_pem)
                    await at_least(len(connections) + 1, connections)
                    await trio.sleep(0.3)
                served = replace(served, cert_pem=renewals[-1])
                install_certificate(agent.context, served)
                await trio.sleep(0.2)
            while min(answers.values()) < 5:
                await trio.sleep(0.01)
            done.set()
    assert failures == 0


async def test_a_certificate_before_the_earlier_one_is_refused(authority, directory, hasty_links, nursery):
    agent = await Agent(authority).start(nursery)
    second, third = (agent.issue(agent.credentials.key_pem) for _ in range(2))
    directory.rows[agent.host] = agent.endpoint(pinned=third, earlier=second)
    with trio.fail_after(30), pytest.raises(Fault):
        await hasty_links.call(agent.host, "echo", {}, timeout=5)


@pytest.mark.parametrize("address", ["127.0.0.1:1", f"{'x' * 63}.invalid:1"])
async def test_an_address_nobody_listens_at_is_unavailable(directory, hasty_links, address, monkeypatch):
    """Refused or unknown, it is the same to the caller."""

    async def resolve(*_, **__):
        await trio.lowlevel.checkpoint()
        raise OSError("no such name")

    if "invalid" in address:
        monkeypatch.setattr(trio.socket, "getaddrinfo", resolve)
    host = uuid4()
    directory.rows[host] = Endpoint(address, "0" * 64, 1)
    with trio.fail_after(30), pytest.raises(Fault) as caught:
        await hasty_links.call(host, "echo", {}, timeout=5)
    assert caught.value.code == "unavailable"


async def test_a_listener_that_never_answers_is_given_up(directory, hasty_links):
    """TCP accepts, TLS stays silent: the caller's connect time-out, not more."""
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        host = uuid4()
        directory.rows[host] = Endpoint(f"127.0.0.1:{listener.socket.getsockname()[1]}", "0" * 64, 1)
        with trio.fail_after(30), pytest.raises(Fault) as caught:
            await hasty_links.call(host, "echo", {}, timeout=5)
    assert caught.value.code == "unavailable"
