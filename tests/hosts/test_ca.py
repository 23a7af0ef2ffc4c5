from __future__ import annotations

import ipaddress
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agent.enrol.identity import certificate_request, new_key
from capsule.errors import InvalidRequest
from capsule.hosts.ca import AuthorityLocked, CertificateAuthority, fingerprint, host_uri

PASSPHRASE = b"p" * 32
HERE = x509.IPAddress(ipaddress.ip_address("192.0.2.7"))


@pytest.fixture(scope="module")
def authority():
    return CertificateAuthority.create()


def request_of(key, *, names=()):
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "control-plane")])
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else SHA256()
    return builder.sign(key, digest).public_bytes(Encoding.PEM).decode()


def test_the_stored_key_opens_with_its_passphrase_only(authority):
    """Round trip through the form that lies in the database; another key gets words that help."""
    locked = authority.locked_key(PASSPHRASE)
    assert "ENCRYPTED" in locked
    opened = CertificateAuthority.unlock(authority.cert_pem, locked, PASSPHRASE)
    assert opened.cert_pem == authority.cert_pem
    with pytest.raises(AuthorityLocked, match="CAPSULE_SECRET_KEY"):
        CertificateAuthority.unlock(authority.cert_pem, locked, b"q" * 32)


def test_a_key_that_is_not_the_certificates_is_refused(authority):
    """Two halves of different rows never make an authority."""
    other = CertificateAuthority.create().locked_key(PASSPHRASE)
    with pytest.raises(AuthorityLocked, match="belong together"):
        CertificateAuthority.unlock(authority.cert_pem, other, PASSPHRASE)


@pytest.mark.parametrize("name", [HERE, x509.DNSName("agent.example")])
def test_a_host_certificate_says_what_we_say(authority, name):
    """Names and extensions of the request are dropped; ours are host id and address; it serves, and only that."""
    host_id = uuid4()
    key = ec.generate_private_key(ec.SECP256R1())
    asked = request_of(key, names=[x509.UniformResourceIdentifier("urn:capsule:control-plane")])
    now = datetime.now(UTC)
    issued = x509.load_pem_x509_certificate(authority.issue_host_certificate(asked, host_id, name, now=now).encode())
    extension = issued.extensions.get_extension_for_class
    assert list(extension(x509.SubjectAlternativeName).value) == [
        x509.UniformResourceIdentifier(host_uri(host_id)),
        name,
    ]
    assert extension(x509.BasicConstraints).value.ca is False
    assert list(extension(x509.ExtendedKeyUsage).value) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert issued.public_key() == key.public_key()
    assert abs(issued.not_valid_after_utc - now - timedelta(days=60)) < timedelta(seconds=2)
    issued.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.cert_pem.encode()))


@pytest.mark.parametrize(
    "key",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(65537, 2048),
    ],
)
def test_other_key_types_are_refused(authority, key):
    with pytest.raises(InvalidRequest, match="P-256"):
        authority.issue_host_certificate(request_of(key), uuid4(), HERE)


def test_a_request_signed_by_another_key_is_refused(authority):
    """Without it a host could have another host's public key certified as its own."""
    mine, theirs = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    point = [key.public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint) for key in (mine, theirs)]
    der = x509.load_pem_x509_csr(request_of(mine).encode()).public_bytes(Encoding.DER)
    forged = x509.load_der_x509_csr(der.replace(point[0], point[1])).public_bytes(Encoding.PEM).decode()
    with pytest.raises(InvalidRequest, match="not signed"):
        authority.issue_host_certificate(forged, uuid4(), HERE)


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE REQUEST-----", "x" * 9000, "\N{SNOWMAN}"])
def test_garbage_is_refused(authority, text):
    with pytest.raises(InvalidRequest, match="csr_pem"):
        authority.issue_host_certificate(text, uuid4(), HERE)


def test_two_certificates_of_one_key_have_two_fingerprints(authority):
    """The pin names one certificate: a renewed one has to be pinned anew."""
    request = certificate_request(new_key())
    prints = {fingerprint(authority.issue_host_certificate(request, uuid4(), HERE)) for _ in range(2)}
    assert len(prints) == 2
