"""Heartbeat and loss together, over a network that fails and a control plane that judges tokens by the clock."""

from __future__ import annotations

import base64
import json
from uuid import UUID

import httpx
import pytest
import trio
from cryptography import x509
from sandbox_world import sandbox_id

from agent.enrol.credentials import CredentialsFile
from agent.enrol.heartbeat import INTERVAL, Heartbeat
from agent.enrol.registration import CALL_TIMEOUT, Capacity, ControlPlane
from agent.sandboxes.loss import REASON, Loss
from capsule.hosts.ca import CertificateAuthority

HOST = UUID(int=7)
LIFETIME = 3600.0
"""Of a token; a week of fake beats takes real minutes."""
ONE, TWO = sandbox_id(1), sandbox_id(2)
PATIENCE = 3 * INTERVAL + CALL_TIMEOUT
"""Three beats, and the time of the third one's answer."""
CAPACITY = Capacity(arch="x86_64", cpu_cores=1, memory_mb=1024, disk_gb=1)


class Fleet:
    """A control plane behind a network: tokens live for an hour of the fake clock, refresh tokens for one use."""

    def __init__(self):
        self.authority = CertificateAuthority.create()
        self.reachable = True
        self.known = True
        self.number = 0
        self.refreshes = 0
        self.expires = {}

    def answer(self, request):
        if not self.reachable:
            raise httpx.ConnectError("partition")
        if request.url.path.endswith("/heartbeat"):
            good = self.known and self.expires.get(request.headers["X-Host-Token"], 0) > trio.current_time()
            return httpx.Response(204) if good else refusal()
        body = json.loads(request.content)
        if request.url.path.endswith("/refresh"):
            self.refreshes += 1
            if not self.known or body["refresh_token"] != f"refresh-{self.number}":
                return refusal()
        return self.issue(body)

    def issue(self, body):
        self.number += 1
        now = trio.current_time()
        claims = json.dumps({"iat": now, "exp": now + LIFETIME, "n": self.number}).encode()
        token = f"h.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.s"
        self.expires = {token: now + LIFETIME}
        cert_pem = self.authority.issue_host_certificate(body["csr_pem"], HOST, x509.DNSName("agent.example"))
        answer = {"host": {"id": f"host-{HOST}"}, "token": token, "refresh_token": f"refresh-{self.number}"}
        return httpx.Response(201, json=answer | {"cert_pem": cert_pem, "ca_cert_pem": self.authority.cert_pem})


def refusal():
    return httpx.Response(401, json={"error": {"code": "unauthorized", "message": "no"}})


@pytest.fixture
def fleet():
    return Fleet()


@pytest.fixture
def begin(fleet, tmp_path):
    """Register (once), and run heartbeat and loss beside an agent's sandboxes."""

    async def begin(agent):
        transport = httpx.MockTransport(fleet.answer)
        control_plane = ControlPlane("http://control.invalid", transport=transport, wall=trio.current_time)
        file = CredentialsFile(tmp_path / "credentials.json")
        credentials = await file.load()
        if credentials is None:
            credentials = await control_plane.register("htok", "agent.example:7443", CAPACITY)
            await file.save(credentials)
        heartbeat = Heartbeat(control_plane, file, credentials, wall=trio.current_time, jitter=lambda: 1.0)
        await agent.nursery.start(heartbeat.run)
        agent.nursery.start_soon(Loss(agent.manager, heartbeat.presence).run)
        return heartbeat

    return begin


async def test_the_token_expires_during_a_long_partition(host, fleet, begin, autojump_clock):
    """Everything is paused after three beats, not before; hours later the refresh token brings the host back, at
    once and not when the next try would have been due; nothing is resumed by itself."""
    async with host.agent() as agent:
        heartbeat = await begin(agent)
        await heartbeat.presence.wait_for("online")
        await agent.create(ONE)
        await trio.sleep_until(1000)
        fleet.reachable = False
        await trio.sleep_until(990 + PATIENCE - 1)
        assert agent.statuses() == {ONE: "running"}
        await trio.sleep_until(990 + PATIENCE + 1)
        assert agent.statuses() == {ONE: "paused"}
        assert [(entry.sandbox_id, entry.reason) for entry in agent.outbox.entries()] == [(ONE, REASON)]
        await trio.sleep(2 * LIFETIME)
        assert heartbeat.presence.value.state == "lost"
        fleet.reachable = True
        back = trio.current_time()
        await heartbeat.presence.wait_for("online")
        assert trio.current_time() <= back + INTERVAL
        assert fleet.number == 2
        await trio.sleep(100)
        assert agent.statuses() == {ONE: "paused"}
        await agent.resume(ONE)
        await trio.sleep(LIFETIME)
        assert agent.statuses() == {ONE: "running"}


async def test_refused_and_refresh_refused(host, fleet, begin, autojump_clock):
    """The host was deleted: paused at the next beat; nothing is ever removed, not even the credentials."""
    async with host.agent() as agent:
        heartbeat = await begin(agent)
        await agent.create(ONE)
        await trio.sleep(100)
        fleet.known = False
        await trio.sleep(INTERVAL + 1)
        assert heartbeat.presence.value.state == "refused"
        assert agent.statuses() == {ONE: "paused"}
        await trio.sleep(3 * LIFETIME)
        assert agent.statuses() == {ONE: "paused"}
        assert host.directories() == {ONE}
        fleet.known = True
        await trio.sleep(120)
        assert heartbeat.presence.value.state == "online"


async def test_a_restart_without_a_control_plane(host, fleet, begin, autojump_clock):
    """The three intervals are counted from the start of the agent; a control plane that is back in time saves all."""
    async with host.agent() as agent:
        await begin(agent)
        await agent.create(ONE)
    fleet.reachable = False
    async with host.agent() as agent:
        heartbeat = await begin(agent)
        start = trio.current_time()
        await trio.sleep(2 * INTERVAL)
        fleet.reachable = True
        await heartbeat.presence.wait_for("online", "lost")
        await trio.sleep_until(start + 1000)
        assert agent.statuses() == {ONE: "running"}
    fleet.reachable = False
    async with host.agent() as agent:
        heartbeat = await begin(agent)
        start = trio.current_time()
        await heartbeat.presence.wait_for("lost")
        assert trio.current_time() == start + PATIENCE
        await trio.sleep(1)
        assert agent.statuses() == {ONE: "paused"}


async def test_a_short_partition_pauses_nothing(host, fleet, begin, autojump_clock):
    """Two intervals of silence are not three."""
    async with host.agent() as agent:
        heartbeat = await begin(agent)
        await agent.create(ONE)
        for _ in range(10):
            await trio.sleep(100)
            fleet.reachable = False
            await trio.sleep(INTERVAL)
            fleet.reachable = True
            await trio.sleep(INTERVAL)
        assert heartbeat.presence.value.state == "online"
        assert agent.statuses() == {ONE: "running"}
        assert agent.told() == []
