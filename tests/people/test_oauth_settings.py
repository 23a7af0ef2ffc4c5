"""What the control plane refuses to start with, and what it is without GitHub."""

from __future__ import annotations

import pytest

from agent.actor.settings import SettingsError
from capsule.config import load
from capsule.people.providers.registry import configured

GOOD = {"CAPSULE_DATABASE_URL": "postgresql:///capsule", "CAPSULE_SECRET_KEY": "k" * 32}
APP = {"CAPSULE_GITHUB_CLIENT_ID": "id", "CAPSULE_GITHUB_CLIENT_SECRET": "hush"}
PUBLIC = {"CAPSULE_PUBLIC_URL": "https://capsule.example"}


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"CAPSULE_GITHUB_CLIENT_ID": "id", **PUBLIC}, "CLIENT_ID is set without CAPSULE_GITHUB_CLIENT_SECRET"),
        ({"CAPSULE_GITHUB_CLIENT_SECRET": "hush", **PUBLIC}, "CLIENT_SECRET is set without CAPSULE_GITHUB_CLIENT_ID"),
        (APP, "CAPSULE_PUBLIC_URL must be set"),
        ({**APP, **PUBLIC, "CAPSULE_GITHUB_URL": "github.com"}, "CAPSULE_GITHUB_URL"),
        ({**APP, **PUBLIC, "CAPSULE_GITHUB_API_URL": "https://["}, "CAPSULE_GITHUB_API_URL"),
        ({**APP, **PUBLIC, "CAPSULE_GITHUB_API_URL": "https://x/?a=1"}, "CAPSULE_GITHUB_API_URL"),
    ],
)
def test_half_a_configuration_is_refused(values, said):
    """Saying which variable, and never the secret."""
    with pytest.raises(SettingsError, match=said) as refused:
        load({**GOOD, **values})
    assert "hush" not in str(refused.value)


def test_a_whole_one_makes_the_provider():
    """And none without."""
    settings = load({**GOOD, **APP, **PUBLIC})
    assert list(configured(settings)) == ["github"]
    assert "hush" not in repr(settings)
    assert configured(load(GOOD)) == {}


async def test_without_a_provider_nobody_signs_in_through_it(people):
    """404 at the start, a redirect from the callback; signing up is as ever."""
    answer = await people.client.get("/v1/auth/oauth/github")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "provider_not_found")
    answer = await people.client.get("/v1/auth/oauth/github/callback?code=x&state=y")
    assert answer.headers["Location"] == f"{people.settings.url}/login?error=invalid_state"
    assert "Secure" not in answer.headers["Set-Cookie"]  # http: it would never come back
    await people.sign_up()
