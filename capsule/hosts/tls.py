"""The control plane's side of mutual TLS: what it shows to agents, and which one certificate it accepts."""

from __future__ import annotations

import hashlib
import os
import ssl
from contextlib import contextmanager
from datetime import UTC, datetime
from hmac import compare_digest
from typing import TYPE_CHECKING

from capsule.hosts.ca import CLIENT_LIFETIME

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capsule.hosts.ca import CertificateAuthority, Identity


class PinMismatch(Exception):  # noqa: N818
    """The certificate at this address is of our CA, but not the one pinned to the host row."""


class ClientContexts:
    """The SSL context for dialling agents, made anew at half of its certificate's life."""

    def __init__(
        self, authority: CertificateAuthority, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._authority = authority
        self._now = now
        self._made_at = datetime.min.replace(tzinfo=UTC)
        self._context: ssl.SSLContext | None = None

    def current(self) -> ssl.SSLContext:
        """A context whose certificate is good for at least half its life. Shared: do not change it."""
        now = self._now()
        if self._context is None or now - self._made_at > CLIENT_LIFETIME / 2:
            identity = self._authority.issue_client_identity(now=now)
            self._context = client_context(identity, self._authority.cert_pem)
            self._made_at = now
        return self._context


def client_context(identity: Identity, ca_cert_pem: str) -> ssl.SSLContext:
    """TLS 1.3, our CA as the only root. Names are not compared: `check_pin` is stricter."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.load_verify_locations(cadata=ca_cert_pem)
    with _as_file(identity.cert_pem + identity.key_pem) as path:
        context.load_cert_chain(path)
    return context


def check_pin(peer_certificate: bytes | None, fingerprint: str, *others: str) -> None:
    """Compare the peer's certificate (DER, after the handshake) with the pinned one, and with others that the agent may
    still have; PinMismatch unless equal to one of them."""
    seen = hashlib.sha256(peer_certificate or b"").hexdigest()
    if not any(compare_digest(seen, pinned) for pinned in (fingerprint, *others)):
        raise PinMismatch(f"expected certificate {fingerprint[:16]}…, was shown {seen[:16]}…")


@contextmanager
def _as_file(text: str) -> Iterator[str]:
    """A path for OpenSSL, which reads keys only from files: anonymous memory, so the key never touches a disk."""
    descriptor = os.memfd_create("capsule-identity")
    try:
        os.write(descriptor, text.encode())
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)
