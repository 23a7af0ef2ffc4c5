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

from agent import daemon, enrolment
from agent.actor.peer import OpenerPeer
from agent.actor.tls import connect_tls
from agent.config import Settings
from agent.enrol.errors import AlreadyRegistered, AnotherHost, HostForgotten
from agent.enrol.joining import Joining
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
        self.addresses = []
        self.away = False
        self.host_id = HOST_ID
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
        if self.away:
            raise httpx.ConnectError("away")
        self.requests.append(request.url.path)
        if not request.url.path.endswith("/register"):
            return httpx.Response(204)
        self.addresses.append(json.loads(request.content)["address"])
        address = x509.IPAddress(ip_address(LOOPBACK))
        certificate = self.authority.issue_host_certificate(_csr(request), self.host_id, address)
        body = {"host": {"id": f"host-{self.host_id}"}, "token": "a.b.c", "refresh_token": "r"}
        return httpx.Response(200, json=body | {"cert_pem": certificate, "ca_cert_pem": self.authority.cert_pem})

    @asynccontextmanager
    async def daemon(self, *joining, **changes):
        """Run the daemon; at the end it gets SIGTERM and must end by itself."""
        before = signal.signal(signal.SIGTERM, lambda *_: None)  # one that it is too late for must not end us all
        try:
            with trio.fail_after(90):
                async with trio.open_nursery() as nursery:
                    ended = trio.Event()
                    nursery.start_soon(self._serve, self.settings(**changes), ended, *joining)
                    yield ended
                    if not ended.is_set():
                        os.kill(os.getpid(), signal.SIGTERM)
                    await ended.wait()
        finally:
            signal.signal(signal.SIGTERM, before)

    async def _serve(self, settings, ended, *joining):
        try:
            await daemon.serve(settings, *joining)
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


async def test_join(fleet):
    """Registers with the address on the route to the control plane (loopback, here), tells it, and serves; once is
    enough; with force its sandboxes stay, unless the token is another host's."""
    told = []
    url = f"http://{LOOPBACK}:8080"
    async with fleet.daemon(Joining(tell=told.append), url=url), fleet.connection() as control_plane:
        await control_plane.call("sandbox.create", create_body(ONE), timeout=20)
    assert [credentials.host_id for credentials in told] == [f"host-{HOST_ID}"]
    assert fleet.addresses == [f"{LOOPBACK}:{fleet.port}"]

    await refused(fleet, Joining(), AlreadyRegistered, url=url)
    assert len(fleet.addresses) == 1
    fleet.host_id = UUID(int=8)
    await refused(fleet, Joining(force=True), AnotherHost, url=url)
    fleet.host_id = HOST_ID
    async with fleet.daemon(Joining(force=True), url=url), fleet.connection() as control_plane:
        listing = await control_plane.call("host.list", {}, timeout=20)
        assert [(one["sandbox_id"], one["status"]) for one in listing["sandboxes"]] == [(ONE, "running")]
        await control_plane.call("sandbox.destroy", {"sandbox_id": ONE}, timeout=20)
    fleet.host_id = UUID(int=8)  # nothing lives here any more: it may become any host
    async with fleet.daemon(Joining(force=True), url=url), fleet.connection():
        assert told[-1].host_id == f"host-{HOST_ID}"


@pytest.mark.parametrize("joining", [None, Joining(), Joining(force=True)])
async def test_credentials_lost(fleet, joining):
    """The machine still knows which host it is: what lives there comes back with a token of that host, and of no other.
    Without that knowledge the token is not even spent."""
    async with fleet.daemon(), fleet.connection() as control_plane:
        await control_plane.call("sandbox.create", create_body(ONE), timeout=20)
    file, known = fleet.host.state.root / enrolment.CREDENTIALS_FILE, fleet.host.state.root / enrolment.HOST_ID_FILE
    assert known.read_text() == f"host-{HOST_ID}\n"
    file.rename(file.with_suffix(".lost"))
    if joining is not None and joining.force:
        file.write_text("{")
    url = f"http://{LOOPBACK}:8080"
    fleet.host_id = UUID(int=8)
    await refused(fleet, joining, AnotherHost, url=url)
    known.rename(known.with_suffix(".lost"))
    fleet.host_id = HOST_ID
    spent = fleet.requests.count("/v1/hosts/register")
    await refused(fleet, joining, HostForgotten, url=url)
    assert fleet.requests.count("/v1/hosts/register") == spent
    known.write_text(f" host-{HOST_ID} ")
    async with fleet.daemon(joining, url=url), fleet.connection() as control_plane:
        listing = await control_plane.call("host.list", {}, timeout=20)
        assert [(one["sandbox_id"], one["status"]) for one in listing["sandboxes"]] == [(ONE, "running")]
        await control_plane.call("sandbox.destroy", {"sandbox_id": ONE}, timeout=20)


async def refused(fleet, joining, error, **changes):
    with pytest.raises(ExceptionGroup) as caught:
        await daemon.serve(fleet.settings(**changes), joining)
    assert caught.group_contains(error)
    os.close(fleet.locks.pop())


async def test_join_without_serving(fleet):
    """It ends by itself; the next start serves as that host, where it joined, with no setting but its directories."""
    told = []
    url = f"http://{LOOPBACK}:8080"
    with trio.fail_after(30):
        await daemon.serve(fleet.settings(url=url), Joining(serve=False, tell=told.append))
    os.close(fleet.locks.pop())
    signal.alarm(0)
    assert "/heartbeat" not in "".join(fleet.requests)
    async with fleet.daemon(token="", url=""), fleet.connection() as control_plane:
        assert await control_plane.call("host.list", {}, timeout=20) == {}
    assert fleet.requests.count("/v1/hosts/register") == 1


async def test_join_beside_a_running_agent(fleet):
    """Refused before the token is spent."""
    async with fleet.daemon(), fleet.connection():
        with pytest.raises(StateDirectoryInUse, match="another agent serves"):
            await daemon.serve(fleet.settings(), Joining(force=True))
        assert fleet.requests.count("/v1/hosts/register") == 1


async def test_an_address_that_went_away(fleet, authority):
    """A machine whose address changed says what to do, instead of listening where nobody dials."""
    url = f"http://{LOOPBACK}:8080"
    await daemon.serve(fleet.settings(url=url), Joining(serve=False))
    os.close(fleet.locks.pop())
    file = fleet.host.state.root / enrolment.CREDENTIALS_FILE
    stored = json.loads(file.read_bytes())
    file.write_text(json.dumps(stored | {"address": "192.0.2.7:7443"}))
    await refused(fleet, None, daemon.CannotListen)
    async with fleet.daemon(bind_host="0.0.0.0"), fleet.connection():  # what is configured counts
        pass


async def test_beats_before_it_serves(fleet, monkeypatch):
    """A start that takes its time (many VMs to adopt) does not cost the host its place."""
    release = trio.Event()
    adopt = daemon.adopt_all

    async def slowly(parts):
        await release.wait()
        return await adopt(parts)

    monkeypatch.setattr(daemon, "adopt_all", slowly)
    async with fleet.daemon(heartbeat_interval=0.1):
        while sum(path.endswith("/heartbeat") for path in fleet.requests) < 3:
            await trio.sleep(0.01)  # a level, bounded by `daemon`
        release.set()


@pytest.mark.parametrize("pause_on_loss", [True, False])
async def test_the_control_plane_is_lost(fleet, pause_on_loss):
    """Three intervals after its last answer everything rests, if that is wanted; the wire is still obeyed."""
    async with (
        fleet.daemon(heartbeat_interval=0.2, pause_on_loss=pause_on_loss),
        fleet.connection() as control_plane,
    ):
        await control_plane.call("sandbox.create", create_body(ONE), timeout=20)
        fleet.away = True
        for _ in range(200 if pause_on_loss else 20):
            listing = await control_plane.call("host.list", {}, timeout=20)
            if listing.get("paused"):
                break
            await trio.sleep(0.05)  # a level
        assert listing.get("paused", []) == ([ONE] if pause_on_loss else [])
        told = [(entry["event"], entry["reason"]) for entry in listing.get("outbox", [])]
        assert told == ([("auto_paused", "its control plane was lost")] if pause_on_loss else [])


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
    assert caught.group_contains(enrolment.NotRegistered, match="CAPSULE_AGENT_TOKEN", depth=1)
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
