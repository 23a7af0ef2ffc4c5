"""TlsStream over real loopback TLS with certificates made here: Trio's own conformance suite, and our servers."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import ipaddress
import re
import socket
import ssl
import struct
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent.actor import tls
from agent.actor.peer import OpenerPeer
from agent.actor.server import ServerPeer
from agent.actor.tls import READ_BYTES, TlsStream, connect_tls, serve_tls

CLIENT_PEM = re.compile("-----BEGIN CERTIFICATE-----.*", re.DOTALL)
LINGER_0 = struct.pack("ii", 1, 0)


def self_signed(directory: Path, name: str) -> Path:
    """A certificate that is its own authority, and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = directory / f"{name}.pem"
    pkcs8 = (serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(key.private_bytes(*pkcs8) + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def context(side: int, own: Path, trusted: Path) -> ssl.SSLContext:
    made = ssl.SSLContext(side)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(own)
    made.load_verify_locations(trusted)
    return made


@pytest.fixture(scope="session")
def contexts(tmp_path_factory):
    """(client, server, a client the server does not know, the client's certificate as a file)."""
    directory = tmp_path_factory.mktemp("certificates")
    host, control, stranger = (self_signed(directory, name) for name in ("host", "control", "stranger"))
    return (
        context(ssl.PROTOCOL_TLS_CLIENT, control, host),
        context(ssl.PROTOCOL_TLS_SERVER, host, control),
        context(ssl.PROTOCOL_TLS_CLIENT, stranger, host),
        control,
    )


@pytest.fixture
def make_pair(contexts):
    """`await make_pair()` gives two connected TlsStreams."""

    async def make() -> tuple[TlsStream, TlsStream]:
        pair = []

        async def keep(stream: TlsStream) -> None:
            pair.append(stream)
            await trio.sleep_forever()

        client, server, *_ = contexts
        async with trio.open_nursery() as nursery:
            port = await nursery.start(partial(serve_tls, keep, host="127.0.0.1", port=0, context=server))
            near = await connect_tls("127.0.0.1", port, client)
            while not pair:
                await trio.lowlevel.checkpoint()
            [far] = pair
            # The server closes its streams when it ends: take the socket away from it.
            pair = [near, copy.copy(far)]
            far._sock = socket.socket()
            nursery.cancel_scope.cancel()
        return pair[0], pair[1]

    return make


async def make_clogged_pair(contexts):
    """A pair of which both have sent until nothing more fits. Over a UNIX socket: on a TCP connection the kernel's
    timers make room again a fifth of a second later."""
    client, server, *_ = contexts
    near, far = socket.socketpair()
    for sock in (near, far):
        sock.setblocking(False)
    pair = TlsStream(near, client, server_side=False), TlsStream(far, server, server_side=True)
    async with trio.open_nursery() as nursery:
        for stream in pair:
            nursery.start_soon(stream.handshake)
    async with trio.open_nursery() as nursery:
        for stream in pair:
            nursery.start_soon(stream.send_all, b"x" * 10_000_000)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    return pair


async def test_conformance(make_pair, contexts):
    """Trio's suite for two-way streams, on real sockets."""
    await trio.testing.check_two_way_stream(make_pair, partial(make_clogged_pair, contexts))


async def test_large_writes_arrive_whole(make_pair):
    """More than any buffer in between, in one call, while the other side reads in its own pace."""
    near, far = await make_pair()
    content = bytes(range(256)) * 32_768

    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(near.send_all, content)
        got = bytearray()
        while len(got) < len(content):
            data = await far.receive_some()
            assert 0 < len(data) <= READ_BYTES
            got += data
        assert got == content


async def test_small_reads_of_large_writes(make_pair):
    """What was decrypted and not asked for waits; records that are cut by the socket's pieces are whole again."""
    near, far = await make_pair()
    content = bytes(range(256)) * 1024
    async with near, far, trio.open_nursery() as nursery:
        nursery.start_soon(near.send_all, content)
        got = bytearray()
        while len(got) < len(content):
            data = await far.receive_some(10_007)
            assert 0 < len(data) <= 10_007
            got += data
        assert got == content


async def test_a_cut_connection_is_an_end_or_broken(make_pair):
    """Reset by the peer: BrokenResourceError or an end, in both directions, and never anything else."""
    near, far = await make_pair()
    async with near:
        far._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        await far.aclose()
        with contextlib.suppress(trio.BrokenResourceError):
            assert await near.receive_some() == b""
        with pytest.raises(trio.BrokenResourceError):
            await near.send_all(b"x" * 10_000_000)


async def test_noise_instead_of_tls_is_broken(make_pair):
    """Bytes that are no TLS record, in the middle of a connection."""
    near, far = await make_pair()
    async with near, far:
        with socket.socket(fileno=socket.dup(far._sock.fileno())) as raw:
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" * 10)
        with pytest.raises(trio.BrokenResourceError):
            await near.receive_some()


class Server:
    """A listener whose handler says the certificate it saw."""

    def __init__(self) -> None:
        self.seen: list[bytes] = []

    async def handle(self, stream: TlsStream) -> None:
        self.seen.append(stream.peer_certificate())
        await stream.send_all(b"hello")


@pytest.fixture
def listening(contexts):
    """`async with listening() as (port, server)`."""

    @contextlib.asynccontextmanager
    async def listen():
        server = Server()
        async with trio.open_nursery() as nursery:
            serve = partial(serve_tls, server.handle, host="127.0.0.1", port=0, context=contexts[1])
            port = await nursery.start(serve)
            yield port, server
            nursery.cancel_scope.cancel()

    return listen


async def greeting(port: int, client: ssl.SSLContext) -> bytes:
    stream = await connect_tls("127.0.0.1", port, client)
    async with stream:
        return await stream.receive_some()


async def test_the_server_sees_the_clients_certificate(listening, contexts):
    """Both ends know whom they talk to; the server's stream is closed when its handler returns."""
    async with listening() as (port, server):
        stream = await connect_tls("127.0.0.1", port, contexts[0])
        async with stream:
            assert stream.peer_certificate().startswith(b"\x30\x82")
            assert await stream.receive_some() == b"hello"
            assert await stream.receive_some() == b""
            assert server.seen == [ssl.PEM_cert_to_DER_cert(CLIENT_PEM.search(contexts[3].read_text()).group())]


async def test_a_client_the_server_does_not_know_is_refused(listening, contexts):
    """Its handler never runs (in TLS 1.3 the client hears of it when it reads)."""
    async with listening() as (port, server):
        with pytest.raises(trio.BrokenResourceError):
            await greeting(port, contexts[2])
        assert await greeting(port, contexts[0]) == b"hello"
        assert len(server.seen) == 1


async def test_a_server_the_client_does_not_know_is_refused(listening, contexts, tmp_path):
    """With OpenSSL's reason in words."""
    other = context(ssl.PROTOCOL_TLS_CLIENT, self_signed(tmp_path, "a"), self_signed(tmp_path, "b"))
    async with listening() as (port, server):
        with pytest.raises(trio.BrokenResourceError, match=r"TLS handshake failed.*certificate verify failed"):
            await greeting(port, other)
        assert server.seen == []


@pytest.mark.parametrize("words", [b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00"])
@pytest.mark.parametrize("linger", [None, LINGER_0])
async def test_clients_that_do_not_finish_the_handshake_harm_nobody(listening, contexts, words, linger):
    """Silence, another protocol, half a hello, each closed or reset at once: the next client is served."""
    async with listening() as (port, _):
        for _ in range(5):
            with socket.socket() as raw:
                raw.connect(("127.0.0.1", port))
                raw.sendall(words)
                if linger:
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        assert await greeting(port, contexts[0]) == b"hello"


@pytest.mark.parametrize("words", [b"", b"\x16"])
async def test_a_client_gone_before_the_server_looked_is_broken(words, contexts):
    """The connection is accepted only after its client has reset it: refused as broken, the socket is closed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname()) as raw:
            raw.sendall(words)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_0)
        accepted, _ = listener.accept()
    plain = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
    with pytest.raises(trio.BrokenResourceError, match="TLS"):
        await tls._secure(plain, contexts[1], server_side=True)


async def test_a_handshake_that_never_comes_times_out(contexts, monkeypatch):
    """Both sides give up after HANDSHAKE_TIMEOUT."""
    monkeypatch.setattr(tls, "HANDSHAKE_TIMEOUT", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(trio.BrokenResourceError, match="timed out"):
        await connect_tls("127.0.0.1", silent.getsockname()[1], contexts[0])


async def test_nobody_listens(contexts):
    """A refused connection says where it wanted to go."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(trio.BrokenResourceError, match=f"cannot connect to 127.0.0.1:{port}"):
        await connect_tls("127.0.0.1", port, contexts[0])


async def test_peers_over_tls(make_pair, joined):
    """The whole stack: calls, and a megabyte each way, over mutual TLS."""

    async def echo(method, body, stream):
        async for channel, data in stream:
            await stream.send(data, channel=channel)
        return body

    near, far = await make_pair()
    content = bytes(range(256)) * 4096
    with trio.fail_after(30):
        async with joined(echo, (near, far)) as (opener, server):
            assert isinstance(opener, OpenerPeer)
            assert isinstance(server, ServerPeer)
            async with opener.open_stream("m", {"k": "v"}, timeout=20) as stream, trio.open_nursery() as nursery:

                async def pour() -> None:
                    await stream.send(content)
                    await stream.end()

                nursery.start_soon(pour)
                assert b"".join([data async for _, data in stream]) == content
                assert await stream.reply() == {"k": "v"}
