"""Behind a reverse proxy that the operator trusts, limits and the audit trail go by the client's own address."""

from __future__ import annotations

import pytest

from tests.fixtures.people import quick_settings


@pytest.fixture
def people_settings():
    """The tests' client is the proxy."""
    return quick_settings(trusted_proxies="127.0.0.0/8, ::1/128", rate_limits="login_address=3/86400")


async def test_the_forwarded_address_counts(people):
    """One client's guesses do not lock out another; what they write left of their own address changes nothing."""

    async def guess(forwarded):
        body = {"email": "ada@example.com", "password": "guess"}
        answer = await people.nobody.post("/v1/auth/login", body, headers={"X-Forwarded-For": forwarded})
        return answer.status_code

    assert [await guess(f"203.0.113.{n}, 198.51.100.1") for n in range(4)] == [401, 401, 401, 429]
    assert await guess("2001:db8:1:1::1") == 401
    rows = await people.sql("select distinct metadata::text from audit_logs where action = 'login_failed'")
    assert sorted(row["metadata"] for row in rows) == ['{"address": "198.51.100.1"}', '{"address": "2001:db8:1:1::1"}']
