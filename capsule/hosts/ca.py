"""The control plane as certificate authority of its fleet: one CA per database, made on first use.

Host certificates may only serve, control-plane certificates may only dial (extended key usage), so that TLS itself
refuses a stolen host certificate that plays control plane. EC P-256 throughout.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from capsule.config import HOW_TO_MAKE_A_KEY
from capsule.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

CONTROL_PLANE_URI = "urn:capsule:control-plane"
"""Subject alternative name of the role that agents obey (agent.enrol.identity checks the same text)."""

AUTHORITY_LIFETIME = timedelta(days=3650)
"""Hosts hold the CA's certificate; changing it means enrolling the fleet afresh, so it is long."""

HOST_LIFETIME = timedelta(days=60)
"""As long as a refresh token: a host away for longer has to register again anyhow."""

CLIENT_LIFETIME = timedelta(days=7)
"""Lives in the memory of one process and is made anew at half-life (capsule.hosts.tls)."""

CLOCK_SKEW = timedelta(minutes=5)
"""Certificates start this much in the past: a host's clock may be behind ours."""

MAX_CSR_CHARACTERS = 8192
"""A P-256 request is under 1 KiB; the rest is room for the extensions that we ignore."""


class AuthorityLocked(Exception):  # noqa: N818 - reads as what happened
    """The CA's private key in the database does not open with our secret key; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A certificate with its private key, both PEM. The key never leaves the process's memory."""

    cert_pem: str
    key_pem: str


class CertificateAuthority:
    """The fleet's root: issues and nothing else. Stateless but for its key, so any task may use it."""

    def __init__(self, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self._certificate = certificate
        self._key = key
        self.cert_pem = _pem(certificate)

    @classmethod
    def create(cls) -> CertificateAuthority:
        """A new root with a new key."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name("Capsule fleet authority")
        now = datetime.now(UTC)
        builder = (
            x509.CertificateBuilder(issuer_name=name, subject_name=name, public_key=key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + AUTHORITY_LIFETIME)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_key_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        )
        return cls(builder.sign(key, SHA256()), key)

    @classmethod
    def unlock(cls, cert_pem: str, key_pem: str, passphrase: bytes) -> CertificateAuthority:
        """The root as it was stored by `locked_key`; AuthorityLocked when the pass phrase is not the one it had."""
        try:
            key = load_pem_private_key(key_pem.encode(), passphrase)
        except ValueError as err:
            raise AuthorityLocked(
                "the fleet's certificate authority in this database was made with another CAPSULE_SECRET_KEY: "
                f"put that one back, or start with a fresh database (for a key, {HOW_TO_MAKE_A_KEY})"
            ) from err
        certificate = x509.load_pem_x509_certificate(cert_pem.encode())
        if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
            raise AuthorityLocked("certificate and key of the fleet's authority do not belong together")
        return cls(certificate, key)

    def locked_key(self, passphrase: bytes) -> str:
        """The private key as encrypted PKCS#8 PEM, fit for the database."""
        return self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(passphrase)).decode()

    def issue_host_certificate(
        self, csr_pem: str, host_id: UUID, address: x509.GeneralName, *, now: datetime | None = None
    ) -> str:
        """Certify the key of a request for one host at one address (IP address or DNS name); returns PEM.

        Names and extensions in the request are ignored: a host says which key it has, we say who it is. InvalidRequest
        when the request is malformed, not signed by its own key, or of another key type.
        """
        public_key = requested_key(csr_pem)
        names = [x509.UniformResourceIdentifier(host_uri(host_id)), address]
        issued = self._issue(
            public_key,
            str(host_id),
            names=names,
            usage=ExtendedKeyUsageOID.SERVER_AUTH,
            lifetime=HOST_LIFETIME,
            now=now,
        )
        return _pem(issued)

    def issue_client_identity(self, *, now: datetime | None = None) -> Identity:
        """A fresh key and certificate of the control plane, for dialling agents."""
        key = ec.generate_private_key(ec.SECP256R1())
        names = [x509.UniformResourceIdentifier(CONTROL_PLANE_URI)]
        issued = self._issue(
            key.public_key(),
            "control-plane",
            names=names,
            usage=ExtendedKeyUsageOID.CLIENT_AUTH,
            lifetime=CLIENT_LIFETIME,
            now=now,
        )
        key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
        return Identity(cert_pem=_pem(issued), key_pem=key_pem)

    def _issue(
        self,
        public_key: ec.EllipticCurvePublicKey,
        common_name: str,
        *,
        names: Sequence[x509.GeneralName],
        usage: x509.ObjectIdentifier,
        lifetime: timedelta,
        now: datetime | None,
    ) -> x509.Certificate:
        now = now or datetime.now(UTC)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        return (
            x509.CertificateBuilder()
            .issuer_name(self._certificate.subject)
            .subject_name(_name(common_name))
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - CLOCK_SKEW)
            .not_valid_after(now + lifetime)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
            .add_extension(authority, critical=False)
            .sign(self._key, SHA256())
        )


def fingerprint(cert_pem: str) -> str:
    """SHA-256 of the certificate (DER) as 64 hex digits: what is pinned on the host row."""
    return x509.load_pem_x509_certificate(cert_pem.encode()).fingerprint(SHA256()).hex()


def host_uri(host_id: UUID) -> str:
    """The name a host's certificate carries besides its address."""
    return f"urn:capsule:host:{host_id}"


def requested_key(csr_pem: str) -> ec.EllipticCurvePublicKey:
    """The public key of a sound request; InvalidRequest for any other."""
    if len(csr_pem) > MAX_CSR_CHARACTERS:
        raise InvalidRequest(f"csr_pem has more than {MAX_CSR_CHARACTERS} characters", field="csr_pem")
    try:
        request = x509.load_pem_x509_csr(csr_pem.encode())
        key = request.public_key()
        sound = request.is_signature_valid
    except (ValueError, UnsupportedAlgorithm, InvalidSignature) as err:
        raise InvalidRequest("csr_pem is not a PEM certificate signing request", field="csr_pem") from err
    if not sound:
        raise InvalidRequest("csr_pem is not signed by the key it asks a certificate for", field="csr_pem")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidRequest("csr_pem must hold an EC key on curve P-256", field="csr_pem")
    return key


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _pem(certificate: x509.Certificate) -> str:
    return certificate.public_bytes(Encoding.PEM).decode()
