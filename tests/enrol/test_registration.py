from __future__ import annotations

import gzip
import json

import httpx
import msgspec
import pytest
import trio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from agent.enrol.errors import ControlPlaneRefused, ControlPlaneUnreachable, CredentialsInvalid
from agent.enrol.identity import certificate_request
from agent.enrol.registration import CALL_TIMEOUT, MAX_ANSWER_BYTES, Capacity, ControlPlane
from capsule.hosts.ca import CertificateAuthority

CAPACITY = Capacity(arch="x86_64", cpu_cores=4, memory_mb=8192, disk_gb=100)
URL = "http://127.0.0.1:8080/"
HOST = "host-00000000-0000-0000-0000-000000000001"


def speaking_to(handler, *, wall=lambda: 5000.0):
    return ControlPlane(URL, transport=httpx.MockTransport(handler), wall=wall)


@pytest.fixture
def answer(make_token, issue, authority):
    """What a control plane answers to a request, with some of it changed."""

    def make(request, **changes):
        body = {
            "host": {"id": HOST, "status": "online"},
            "token": make_token(3600),
            "refresh_token": "hrt-1",
            "cert_pem": issue(json.loads(request.content)["csr_pem"]),
            "ca_cert_pem": authority.cert_pem,
        }
        return httpx.Response(201, json={**body, **changes})

    return make


async def test_register_sends_what_the_contract_says_and_keeps_the_key(answer, authority):
    """The private key stays here; the request is signed with it."""
    seen = {}

    def handle(request):
        seen.update(json.loads(request.content), path=request.url.path)
        return answer(request)

    async with speaking_to(handle) as control_plane:
        got = await control_plane.register("htok-1", "192.0.2.7:7443", CAPACITY)
    csr = x509.load_pem_x509_csr(seen.pop("csr_pem").encode())
    assert csr.is_signature_valid
    assert csr.public_key() == load_pem_private_key(got.key_pem.encode(), None).public_key()
    assert seen == {
        "path": "/v1/hosts/register",
        "token": "htok-1",
        "address": "192.0.2.7:7443",
        "arch": "x86_64",
        "cpu_cores": 4,
        "memory_mb": 8192,
        "disk_gb": 100,
    }
    assert (got.url, got.host_id, got.ca_cert_pem) == (URL.rstrip("/"), HOST, authority.cert_pem)
    assert x509.load_pem_x509_certificate(got.cert_pem.encode()).public_key() == csr.public_key()
    assert (got.token_received_at, got.token_lifetime, got.refresh_due_at) == (5000.0, 3600.0, 6800.0)


async def test_refresh_asks_with_the_same_key_and_keeps_what_was_not_renewed(answer, credentials):
    requests = []

    def handle(request):
        requests.append(json.loads(request.content))
        return answer(request, cert_pem="")

    async with speaking_to(handle) as control_plane:
        joined = msgspec.structs.replace(credentials, address="192.0.2.7:7443")
        got = await control_plane.refresh(joined)
        await control_plane.refresh(joined)
    assert got.address == "192.0.2.7:7443"
    keys = {x509.load_pem_x509_csr(each["csr_pem"].encode()).public_key().public_numbers() for each in requests}
    assert len(keys) == 1
    assert [each["refresh_token"] for each in requests] == ["refresh-0", "refresh-0"]
    assert (got.refresh_token, got.cert_pem, got.key_pem) == ("hrt-1", credentials.cert_pem, credentials.key_pem)


async def test_heartbeat_carries_the_token(credentials):
    seen = []

    def handle(request):
        seen.append((request.url.path, request.headers["X-Host-Token"]))
        return httpx.Response(204)

    async with speaking_to(handle) as control_plane:
        await control_plane.heartbeat(credentials)
    assert seen == [(f"/v1/hosts/{credentials.host_id}/heartbeat", "token-0")]


@pytest.mark.parametrize(
    ("status", "code", "credential"),
    [
        (401, "unauthorized", True),
        (403, "forbidden", True),
        (404, "not_found", True),
        (401, "some_code", False),
        (403, "some_code", False),
        (400, "invalid_request", False),
        (409, "conflict", False),
        (422, "unauthorized", False),
    ],
)
async def test_a_no_is_a_refusal_in_the_control_planes_words(credentials, status, code, credential):
    def handle(_):
        return httpx.Response(status, json={"error": {"code": code, "message": "do this"}})

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneRefused, match="do this") as caught:
            await control_plane.heartbeat(credentials)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert caught.value.is_about_credentials() is credential


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_page_of_somebody_in_between_is_no_refusal_of_credentials(credentials, status):
    async with speaking_to(lambda _: httpx.Response(status, text="<html>Access denied")) as control_plane:
        with pytest.raises(ControlPlaneRefused, match="is this the URL of a control plane") as caught:
            await control_plane.heartbeat(credentials)
    assert not caught.value.is_about_credentials()


@pytest.mark.parametrize("status", [301, 302, 408, 425, 429, 500, 502, 503, 504])
async def test_anything_else_is_no_refusal(credentials, status):
    """A proxy in the way or an overloaded server must never look like a deleted host."""

    def handle(_):
        return httpx.Response(status, headers={"Location": "http://192.0.2.1/"}, text="<html>")

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneUnreachable):
            await control_plane.heartbeat(credentials)


@pytest.mark.parametrize(
    "error",
    [httpx.ConnectError("no route"), httpx.ReadError(""), httpx.RemoteProtocolError("x"), httpx.InvalidURL("x")],
)
async def test_network_errors_are_no_refusal(credentials, error):
    def handle(_):
        raise error

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneUnreachable):
            await control_plane.heartbeat(credentials)


async def test_a_call_ends_after_its_time_whatever_the_peer_does(credentials, autojump_clock):
    """Not even a peer that sends a byte now and then holds a heartbeat up."""

    async def trickle():
        while True:
            await trio.sleep(1)
            yield b"x"

    def handle(_):
        return httpx.Response(200, content=trickle())

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneUnreachable, match="no answer"):
            await control_plane.heartbeat(credentials)
    assert trio.current_time() == pytest.approx(CALL_TIMEOUT)


async def test_a_compressed_answer_is_not_unpacked(credentials):
    """A few kilobytes could be gigabytes."""

    def handle(_):
        return httpx.Response(200, headers={"Content-Encoding": "gzip"}, content=gzip.compress(b"{}"))

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneUnreachable):
            await control_plane.refresh(credentials)


async def test_an_endless_answer_is_cut_off(credentials):
    sent = 0

    async def flood():
        nonlocal sent
        while True:
            sent += 65536
            await trio.lowlevel.checkpoint()
            yield b"x" * 65536

    def handle(_):
        return httpx.Response(200, content=flood())

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneUnreachable):
            await control_plane.refresh(credentials)
    assert sent <= MAX_ANSWER_BYTES + 2 * 65536


@pytest.mark.parametrize(
    "change",
    [
        {"host": {"id": "../../admin"}},
        {"host": None},
        {"token": "a\r\nX-Evil: 1"},
        {"token": 7},
        {"refresh_token": ""},
        {"cert_pem": ""},
        {"ca_cert_pem": ""},
        {"cert_pem": "nonsense"},
        {"ca_cert_pem": "nonsense"},
        {"ca_cert_pem": CertificateAuthority.create().cert_pem},
    ],
)
async def test_an_answer_that_is_no_control_planes_changes_nothing(answer, change):
    def handle(request):
        return answer(request, **change)

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneUnreachable):
            await control_plane.register("htok-1", "192.0.2.7:7443", CAPACITY)


async def test_a_certificate_for_another_key_is_not_taken(answer, credentials):
    """Serving with it would fail at every handshake; asking again may help, so it is no refusal."""

    def handle(request):
        return answer(request, cert_pem=credentials.cert_pem)

    async with speaking_to(handle) as control_plane:
        with pytest.raises(ControlPlaneUnreachable, match="not for its key"):
            await control_plane.register("htok-1", "192.0.2.7:7443", CAPACITY)


@pytest.mark.parametrize("token", ["opaque", "a.b.c", "a.e30.c", "a.eyJpYXQiOjUsImV4cCI6NX0.c", "..."])
async def test_a_token_that_tells_no_lifetime_is_refreshed_within_a_day(answer, token):
    def handle(request):
        return answer(request, token=token)

    async with speaking_to(handle) as control_plane:
        got = await control_plane.register("htok-1", "192.0.2.7:7443", CAPACITY)
    assert got.token_lifetime == 86400


def test_another_kind_of_key_is_refused_in_words():
    from cryptography.hazmat.primitives.asymmetric import ed25519  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat  # noqa: PLC0415

    pem = ed25519.Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(CredentialsInvalid, match="register it again"):
        certificate_request(pem.decode())
