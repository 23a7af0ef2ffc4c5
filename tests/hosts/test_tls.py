"""Real handshakes on loopback between what capsule.hosts.tls dials with and what agent.enrol.identity serves with."""

from __future__ import annotations

import contextlib
import ipaddress
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import uuid4

import pytest
import trio
from cryptography import x509
from msgspec.structs import replace

from agent.actor.tls import connect_tls, serve_tls
from agent.enrol.credentials import Credentials
from agent.enrol.errors import CredentialsInvalid
from agent.enrol.identity import (
    certificate_request,
    install_certificate,
    is_control_plane,
    new_key,
    server_ssl_context,
)
from capsule.hosts.ca import CLIENT_LIFETIME, CertificateAuthority, Identity, fingerprint
from capsule.hosts.tls import ClientContexts, PinMismatch, check_pin, client_context

HERE = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
LONG_AGO = datetime.now(UTC) - timedelta(days=365)


def enrolled(authority, *, now=None):
    """Credentials of a fresh host, as an agent keeps them."""
    key_pem = new_key()
    cert_pem = authority.issue_host_certificate(certificate_request(key_pem), uuid4(), HERE, now=now)
    return Credentials(
        url="http://127.0.0.1",
        host_id=f"host-{uuid4()}",
        token="t",
        token_received_at=0,
        token_lifetime=1,
        refresh_token="r",
        key_pem=key_pem,
        cert_pem=cert_pem,
        ca_cert_pem=authority.cert_pem,
    )


@pytest.fixture(scope="module")
def authority():
    return CertificateAuthority.create()


@pytest.fixture(scope="module")
def other():
    """Another fleet's authority, with the same names in it."""
    return CertificateAuthority.create()


@dataclass
class Outcome:
    """What became of one dial: what the dialler read, and the certificate each side saw of the other."""

    text: bytes = b""
    of_server: bytes = b""
    of_client: bytes = b""


async def dial(server, client):
    """Serve with one context, dial with the other, read once."""
    outcome = Outcome()

    async def answer(stream):
        async with stream:
            outcome.of_client = stream.peer_certificate()
            await stream.send_all(b"welcome")

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            start = partial(serve_tls, answer, host="127.0.0.1", port=0, context=server)
            port = await nursery.start(start)
            with contextlib.suppress(trio.BrokenResourceError):
                stream = await connect_tls("127.0.0.1", port, client)
                try:
                    outcome.of_server = stream.peer_certificate()
                    outcome.text = await stream.receive_some()
                finally:
                    await trio.aclose_forcefully(stream)
            nursery.cancel_scope.cancel()
    return outcome


async def test_both_sides_accept_their_counterpart(authority):
    """The control plane sees exactly the pinned certificate, the agent sees the control plane's role."""
    credentials = enrolled(authority)
    outcome = await dial(server_ssl_context(credentials), ClientContexts(authority).current())
    assert outcome.text == b"welcome"
    check_pin(outcome.of_server, fingerprint(credentials.cert_pem))
    assert is_control_plane(outcome.of_client)


async def test_another_host_at_the_address_is_not_the_pinned_one(authority):
    """A host of our own fleet, with a sound certificate, is still not the host we meant."""
    meant, there = enrolled(authority), enrolled(authority)
    outcome = await dial(server_ssl_context(there), ClientContexts(authority).current())
    with pytest.raises(PinMismatch):
        check_pin(outcome.of_server, fingerprint(meant.cert_pem))
    with pytest.raises(PinMismatch):
        check_pin(None, fingerprint(meant.cert_pem))


async def test_the_agent_refuses_a_host_certificate_as_client(authority):
    """A stolen host key cannot command other hosts: its certificate is not made for clients."""
    thief = enrolled(authority)
    client = client_context(Identity(thief.cert_pem, thief.key_pem), authority.cert_pem)
    outcome = await dial(server_ssl_context(enrolled(authority)), client)
    assert (outcome.text, outcome.of_client) == (b"", b"")


async def test_the_agent_refuses_a_client_of_another_authority(authority, other):
    """The role counts only under our own root."""
    client = client_context(other.issue_client_identity(), authority.cert_pem)
    outcome = await dial(server_ssl_context(enrolled(authority)), client)
    assert (outcome.text, outcome.of_client) == (b"", b"")


async def test_the_agent_refuses_a_client_without_certificate(authority):
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=authority.cert_pem)
    outcome = await dial(server_ssl_context(enrolled(authority)), client)
    assert (outcome.text, outcome.of_client) == (b"", b"")


async def test_the_agent_refuses_an_expired_client(authority):
    client = client_context(authority.issue_client_identity(now=LONG_AGO), authority.cert_pem)
    outcome = await dial(server_ssl_context(enrolled(authority)), client)
    assert (outcome.text, outcome.of_client) == (b"", b"")


async def test_the_control_plane_refuses_an_expired_host(authority):
    outcome = await dial(server_ssl_context(enrolled(authority, now=LONG_AGO)), ClientContexts(authority).current())
    assert outcome.of_server == b""


async def test_the_control_plane_refuses_a_host_of_another_authority(authority, other):
    """Our client certificate would be good there; its server certificate is not good here."""
    server = server_ssl_context(enrolled(other))
    server.load_verify_locations(cadata=authority.cert_pem)
    outcome = await dial(server, ClientContexts(authority).current())
    assert outcome.of_server == b""


async def test_tls_1_2_is_refused(authority):
    client = ClientContexts(authority).current()
    client.minimum_version = client.maximum_version = ssl.TLSVersion.TLSv1_2
    outcome = await dial(server_ssl_context(enrolled(authority)), client)
    assert outcome.of_server == b""


async def test_a_renewed_certificate_is_served_from_the_next_handshake_on(authority):
    """Renewal needs no new listener."""
    old = enrolled(authority)
    request = certificate_request(old.key_pem)
    renewed = replace(old, cert_pem=authority.issue_host_certificate(request, uuid4(), HERE))
    server = server_ssl_context(old)
    install_certificate(server, renewed)
    outcome = await dial(server, ClientContexts(authority).current())
    check_pin(outcome.of_server, fingerprint(renewed.cert_pem))


def test_a_certificate_of_another_key_is_not_installed(authority):
    """A mixed-up credentials file is refused in words, at start and not at the first dial."""
    one, two = enrolled(authority), enrolled(authority)
    with pytest.raises(CredentialsInvalid):
        server_ssl_context(replace(one, cert_pem=two.cert_pem))


def test_the_client_context_is_made_anew_at_half_life(authority):
    """A process that runs for months never dials with an expired certificate, nor makes one for each dial."""
    now = datetime.now(UTC)
    clock = [now]
    contexts = ClientContexts(authority, now=lambda: clock[0])
    first = contexts.current()
    clock[0] = now + CLIENT_LIFETIME / 2
    assert contexts.current() is first
    clock[0] += timedelta(seconds=1)
    assert contexts.current() is not first


@pytest.mark.parametrize("certificate", [b"", b"nonsense"])
def test_no_certificate_is_the_control_planes(certificate):
    assert not is_control_plane(certificate)


def test_a_host_is_not_the_control_plane(authority):
    """The second fence, should TLS ever let a host certificate through."""
    assert not is_control_plane(ssl.PEM_cert_to_DER_cert(enrolled(authority).cert_pem))
    assert not is_control_plane(ssl.PEM_cert_to_DER_cert(authority.cert_pem))
