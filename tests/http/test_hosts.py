"""What agents call."""

from __future__ import annotations

from uuid import UUID

import pytest

REGISTRATION = {
    "token": "good",
    "address": "10.0.0.1:7600",
    "arch": "x86_64",
    "cpu_cores": 4,
    "memory_mb": 16_000,
    "disk_gb": 100,
    "csr_pem": "-----BEGIN",
}


async def test_register_and_refresh(api):
    """Neither needs a key; both answer the contract's shape."""
    shape = {"host", "token", "refresh_token", "cert_pem", "ca_cert_pem"}
    no_key = {"X-API-Key": ""}
    answer = await api.client.post("/v1/hosts/register", json=REGISTRATION, headers=no_key)
    assert answer.status_code == 201
    assert answer.json().keys() == shape
    assert answer.json()["host"]["id"] == f"host-{UUID(int=9)}"
    body = {"refresh_token": "good", "csr_pem": "-----BEGIN"}
    answer = await api.client.post("/v1/hosts/auth/refresh", json=body, headers=no_key)
    assert answer.status_code == 200
    assert answer.json().keys() == shape
    assert api.hosts.asked[-1] == ("refresh", ("good", "-----BEGIN"))


@pytest.mark.parametrize(
    ("field", "value"), [("token", ""), ("arch", "vax"), ("cpu_cores", 0), ("disk_gb", -1), ("more", 1)]
)
async def test_a_bad_registration_is_400(api, refused, field, value):
    """Each names its field."""
    answer = await api.client.post("/v1/hosts/register", json={**REGISTRATION, field: value})
    assert refused(answer, 400, "invalid_request")["field"] == field


async def test_spent_tokens_are_401(api, refused):
    """As the use-case says."""
    answer = await api.client.post("/v1/hosts/register", json={**REGISTRATION, "token": "spent"})
    refused(answer, 401, "unauthorized")
    refused(await api.client.post("/v1/hosts/auth/refresh", json={"refresh_token": "x"}), 401, "unauthorized")


async def test_heartbeat(api, refused):
    """By the host's token only; an API key is not one."""
    path = f"/v1/hosts/host-{UUID(int=9)}/heartbeat"
    assert (await api.client.post(path, headers={"X-Host-Token": "good"})).status_code == 204
    assert api.hosts.asked[-1] == ("heartbeat", (UUID(int=9), "good"))
    refused(await api.client.post(path), 401, "unauthorized")
    refused(await api.client.post(path, headers={"X-Host-Token": "bad"}), 401, "unauthorized")
    refused(await api.client.post("/v1/hosts/x/heartbeat", headers={"X-Host-Token": "good"}), 400, "invalid_request")
