"""The key of this host, its certificate request, and the TLS it serves: only its own control plane gets in."""

from __future__ import annotations

import os
import ssl
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from agent.enrol.errors import CredentialsInvalid

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent.enrol.credentials import Credentials

CONTROL_PLANE_URI = "urn:capsule:control-plane"
"""Subject alternative name of the only role we obey (capsule.hosts.ca issues the same text)."""


def new_key() -> str:
    """A fresh EC P-256 private key, PKCS#8 PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()


def certificate_request(key_pem: str) -> str:
    """A request for a certificate of this key, PEM. It names nobody: the control plane says who we are."""
    key = load_pem_private_key(key_pem.encode(), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CredentialsInvalid("this host's private key is not an EC key; register it again")
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, SHA256())
    return request.public_bytes(Encoding.PEM).decode()


def server_ssl_context(credentials: Credentials) -> ssl.SSLContext:
    """TLS 1.3 that demands a client certificate of our CA, made for clients (OpenSSL checks the key usage itself).

    Check `is_control_plane` after each handshake as well. No session tickets: a resumed session would skip both.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0
    install_certificate(context, credentials)
    return context


def install_certificate(context: ssl.SSLContext, credentials: Credentials) -> None:
    """Serve with renewed credentials from the next handshake on; connections that are open go on.

    After a registration with another fleet the old fleet's CA stays trusted until the next start.
    """
    check_identity(credentials)
    context.load_verify_locations(cadata=credentials.ca_cert_pem)
    with _as_file(credentials.cert_pem + credentials.key_pem) as path:
        context.load_cert_chain(path)


def check_identity(credentials: Credentials) -> None:
    """CredentialsInvalid unless key, certificate and CA certificate can be read and belong together."""
    try:
        key = load_pem_private_key(credentials.key_pem.encode(), None)
        certificate = x509.load_pem_x509_certificate(credentials.cert_pem.encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(credentials.ca_cert_pem.encode()))
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as err:
        raise CredentialsInvalid("this host's key or certificates are damaged, or of different fleets") from err
    if key.public_key() != certificate.public_key():
        raise CredentialsInvalid("this host's certificate is not for its key")


def is_control_plane(certificate: bytes) -> bool:
    """Whether a peer's certificate (DER; the handshake has proven our CA signed it) is the control plane's."""
    try:
        names = x509.load_der_x509_certificate(certificate).extensions.get_extension_for_class(
            x509.SubjectAlternativeName
        )
    except (ValueError, x509.ExtensionNotFound):
        return False
    return CONTROL_PLANE_URI in names.value.get_values_for_type(x509.UniformResourceIdentifier)


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """A path for OpenSSL, which reads keys only from files: anonymous memory, so there is no second copy on disk."""
    descriptor = os.memfd_create("capsule-identity")
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
