"""The daemon as a whole over a fake host: real TLS on loopback, real signals, a control plane's HTTP side in memory."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import asynccontextmanager
from functools import partial
from ipaddress import ip_address
from uuid import UUID

import httpx
import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from sandbox_world import create_body, sandbox_id

from agent import daemon
from agent.actor.peer import OpenerPeer
from agent.actor.tls import connect_tls
from agent.config import Settings
from agent.enrol.registration import ControlPlane
from agent.sandboxes.adoption import StateDirectoryInUse
from agent.wire.faults import Fault, FaultCode
from capsule.hosts.ca import CLIENT_LIFETIME, CertificateAuthority, Identity
from capsule.hosts.tls import client_context

LOOPBACK = "127.0.0.1"
HOST_ID = UUID(int=7)
ONE, TWO = sandbox_id(1), sandbox_id(2)

pytestmark = pytest.mark.real_threads


@pytest.fixture(scope="module")
def authority():
    return CertificateAuthority.create()


class Fleet:
    """A host with a daemon on it, and the control plane around it."""

    def __init__(self, host, authority, monkeypatch):
        self.host = host
        self.authority = authority
        self.requests = []
        self.locks = []
        with socket.socket() as probe:
            probe.bind((LOOPBACK, 0))
            self.port = probe.getsockname()[1]
        self.settings = partial(
            Settings,
            state=str(host.state.root),
            images=str(host.images.path),
            url="http://control.invalid",
            token="one-time",
            bind_port=self.port,
            memory_mb=2048,
            drain_seconds=1.0,
            golden=False,
        )
        lock = daemon.lock_state_directory
        monkeypatch.setattr(daemon, "lock_host_network", lambda: None)
        monkeypatch.setattr(daemon, "ensure_host_network", lambda _: None)
        monkeypatch.setattr(daemon, "make_parts", self.make_parts)
        monkeypatch.setattr(daemon, "lock_state_directory", lambda root: self.locks.append(lock(root)))
        transport = httpx.MockTransport(self.answer)
        monkeypatch.setattr(daemon, "ControlPlane", partial(ControlPlane, transport=transport))

    async def make_parts(self, settings, state):
        self.host.dead = False
        return self.host.new_agent().parts

    def answer(self, request):
        self.requests.append(request.url.path)
        if not request.url.path.endswith("/register"):
            return httpx.Response(204)
        address = x509.IPAddress(ip_address(LOOPBACK))
        certificate = self.authority.issue_host_certificate(_csr(request), HOST_ID, address)
        body = {"host": {"id": f"host-{HOST_ID}"}, "token": "a.b.c", "refresh_token": "r"}
        return httpx.Response(200, json=body | {"cert_pem": certificate, "ca_cert_pem": self.authority.cert_pem})

    @asynccontextmanager
    async def daemon(self, **changes):
        """Run the daemon; at the end it gets SIGTERM and must end by itself."""
        with trio.fail_after(90):
            async with trio.open_nursery() as nursery:
                ended = trio.Event()
                nursery.start_soon(self._serve, self.settings(**changes), ended)
                yield ended
                if not ended.is_set():
                    os.kill(os.getpid(), signal.SIGTERM)
                await ended.wait()

    async def _serve(self, settings, ended):
        try:
            await daemon.serve(settings)
        finally:
            signal.alarm(0)
            while self.locks:
                os.close(self.locks.pop())
            ended.set()

    @asynccontextmanager
    async def connection(self, identity=None):
        context = client_context(identity or self.authority.issue_client_identity(), self.authority.cert_pem)
        while True:
            try:
                stream = await connect_tls(LOOPBACK, self.port, context)
                break
            except trio.BrokenResourceError:
                await trio.sleep(0.01)  # a level, bounded by `daemon`
        async with trio.open_nursery() as nursery:
            peer = OpenerPeer(stream)
            await nursery.start(peer.run)
            yield peer
            nursery.cancel_scope.cancel()


def _csr(request):
    return json.loads(request.content)["csr_pem"]


@pytest.fixture
def fleet(host, authority, monkeypatch):
    return Fleet(host, authority, monkeypatch)


async def test_from_registration_to_adoption(fleet):
    """Registers once, serves, is stopped by SIGTERM with its VM running, and the next one has it."""
    async with fleet.daemon(), fleet.connection() as control_plane:
        state = await control_plane.call("sandbox.create", create_body(ONE), timeout=20)
        assert state["status"] == "running"
        description = await control_plane.call("host.describe", {}, timeout=20)
        assert description["memory_mb"] == 2048
        assert [image["name"] for image in description["templates"]] == ["minimal"]
    assert fleet.host.running() == {ONE}
    assert fleet.requests.count("/v1/hosts/register") == 1
    async with fleet.daemon(token="", url=""), fleet.connection() as control_plane:
        listing = await control_plane.call("host.list", {}, timeout=20)
        assert [(one["sandbox_id"], one["status"]) for one in listing["sandboxes"]] == [(ONE, "running")]
        answer = await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "true"}, timeout=20)
        assert answer["exit_code"] == 0
        await control_plane.call("sandbox.destroy", {"sandbox_id": ONE}, timeout=20)
    assert fleet.host.running() == set()
    assert fleet.host.directories() == set()
    assert fleet.requests.count("/v1/hosts/register") == 1


async def test_a_stop_in_the_middle_of_a_build(fleet):
    """The half-made sandbox's VM is not ended by the stop, but by the next start, with all that belongs to it."""
    fleet.host.guest_options = {"boots": False}
    async with fleet.daemon(), fleet.connection() as control_plane, trio.open_nursery() as nursery:

        async def create():
            with pytest.raises(Fault):
                await control_plane.call("sandbox.create", create_body(ONE), timeout=20)

        nursery.start_soon(create)
        while not fleet.host.running():
            await trio.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
    async with fleet.daemon(), fleet.connection() as control_plane:
        assert await control_plane.call("host.list", {}, timeout=20) == {}
        assert fleet.host.running() == set()
        assert fleet.host.directories() == set()


async def test_draining(fleet):
    """After SIGTERM: what runs may finish, nothing new begins, watchers go, and then it ends, before its time is up."""
    release = trio.Event()

    async def answer(method, body, stream):
        if method != "configure":
            await release.wait()
        return {}

    fleet.host.guest_options = {"answer": answer}
    finished = []
    async with fleet.daemon(drain_seconds=15.0) as ended, fleet.connection() as control_plane:
        await control_plane.call("sandbox.create", create_body(ONE), timeout=20)
        async with trio.open_nursery() as nursery:

            async def call():
                finished.append(await control_plane.call("exec", {"sandbox_id": ONE, "cmd": "x"}, timeout=20))

            nursery.start_soon(call)
            while control_plane.link.open_streams() == 0:
                await trio.sleep(0.01)
            async with control_plane.open_stream("host.watch", {}) as watch:
                await anext(watch)
                os.kill(os.getpid(), signal.SIGTERM)
                assert await watch.reply() == {}
            with pytest.raises(Fault) as caught:
                await control_plane.call("sandbox.create", create_body(TWO), timeout=20)
            assert caught.value.code == FaultCode.DRAINING
            assert not ended.is_set()
            release.set()
        await ended.wait()
    assert finished == [{}]
    assert fleet.host.running() == {ONE}


async def test_a_stop_before_it_serves(fleet, monkeypatch):
    """Whatever its start waits for, a stop ends it at once."""
    begun = trio.Event()

    async def hang(settings, state):
        begun.set()
        await trio.sleep_forever()

    monkeypatch.setattr(daemon, "make_parts", hang)
    async with fleet.daemon() as ended:
        await begun.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        with trio.fail_after(30):
            await ended.wait()


async def test_a_second_stop_does_not_put_the_end_off(fleet, monkeypatch):
    """The kernel's alarm is set once: whatever hangs, the process has gone by then."""
    alarms = []
    monkeypatch.setattr(daemon.signal, "alarm", alarms.append)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(daemon._watch_signals, stop)
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            await stop.wait()
            await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    assert alarms == [daemon.HARD_DEADLINE]


async def test_a_second_agent_on_the_directory(fleet, host):
    """Refused before it has touched anything."""
    async with fleet.daemon(), fleet.connection():
        with pytest.raises(StateDirectoryInUse, match="another agent serves"):
            await daemon.serve(fleet.settings())


async def test_not_registered(fleet):
    """Without credentials and token it says what to set."""
    with pytest.raises(ExceptionGroup) as caught:
        await daemon.serve(fleet.settings(token=""))
    assert caught.group_contains(daemon.NotRegistered, match="CAPSULE_AGENT_TOKEN", depth=1)
    os.close(fleet.locks.pop())


async def test_only_a_control_plane_is_obeyed(fleet, authority):
    """A client certificate of our own CA that does not have the role: refused before it can say anything."""
    key = ec.generate_private_key(ec.SECP256R1())
    issued = authority._issue(
        key.public_key(),
        "somebody",
        names=[x509.UniformResourceIdentifier("urn:capsule:somebody")],
        usage=ExtendedKeyUsageOID.CLIENT_AUTH,
        lifetime=CLIENT_LIFETIME,
        now=None,
    )
    stranger = Identity(
        cert_pem=issued.public_bytes(Encoding.PEM).decode(),
        key_pem=key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
    )
    async with fleet.daemon(), fleet.connection() as control_plane:
        with pytest.raises(BaseExceptionGroup) as caught:
            async with fleet.connection(stranger):
                pass
        assert caught.group_contains(Fault, match="lost")
        assert await control_plane.call("host.list", {}, timeout=20) == {}


async def test_a_damaged_control_plane_connection_costs_itself(fleet):
    """Another connection goes on, and so do the sandboxes."""
    async with fleet.daemon(), fleet.connection() as good, fleet.connection() as bad:
        await good.call("sandbox.create", create_body(ONE), timeout=20)
        await bad._stream.send_all(b"\xff" * 100)
        await bad.closed.wait()
        listing = await good.call("host.list", {}, timeout=20)
        assert len(listing["sandboxes"]) == 1
