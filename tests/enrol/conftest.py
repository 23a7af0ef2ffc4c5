from __future__ import annotations

import base64
import json

import pytest

from agent.enrol.credentials import Credentials
from agent.enrol.identity import new_key


def token_of(lifetime, serial=0):
    """A JWT as far as an agent reads it."""
    claims = json.dumps({"iat": 1000, "exp": 1000 + lifetime, "n": serial}).encode()
    return f"h.{base64.urlsafe_b64encode(claims).decode().rstrip('=')}.s"


@pytest.fixture
def make_token():
    return token_of


@pytest.fixture(scope="session")
def key_pem():
    return new_key()


@pytest.fixture
def credentials(key_pem):
    return Credentials(
        url="http://127.0.0.1:8080",
        host_id="host-00000000-0000-0000-0000-000000000001",
        token="token-0",
        token_received_at=0.0,
        token_lifetime=7 * 86400.0,
        refresh_token="refresh-0",
        key_pem=key_pem,
        cert_pem="cert",
        ca_cert_pem="ca",
    )
