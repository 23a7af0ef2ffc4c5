from __future__ import annotations

import base64
import json
from uuid import uuid4

import pytest
from cryptography import x509

from agent.enrol.credentials import Credentials
from agent.enrol.identity import certificate_request, new_key
from capsule.hosts.ca import CertificateAuthority


def token_of(lifetime, serial=0):
    """A JWT as far as an agent reads it."""
    claims = json.dumps({"iat": 1000, "exp": 1000 + lifetime, "n": serial}).encode()
    return f"h.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.s"


@pytest.fixture
def make_token():
    return token_of


@pytest.fixture(scope="session")
def authority():
    return CertificateAuthority.create()


@pytest.fixture(scope="session")
def issue(authority):
    """A control plane's certificate for a request."""
    return lambda csr_pem: authority.issue_host_certificate(csr_pem, uuid4(), x509.DNSName("agent.example"))


@pytest.fixture(scope="session")
def key_pem():
    return new_key()


@pytest.fixture(scope="session")
def cert_pem(issue, key_pem):
    return issue(certificate_request(key_pem))


@pytest.fixture
def credentials(key_pem, cert_pem, authority):
    return Credentials(
        url="http://127.0.0.1:8080",
        host_id="host-00000000-0000-0000-0000-000000000001",
        token="token-0",
        token_received_at=0.0,
        token_lifetime=7 * 86400.0,
        refresh_token="refresh-0",
        key_pem=key_pem,
        cert_pem=cert_pem,
        ca_cert_pem=authority.cert_pem,
    )
