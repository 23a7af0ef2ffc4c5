"""What is tried too often about teams: 429 before anything is looked up, whatever the answer would have been."""

from __future__ import annotations

from functools import partial

import pytest

from tests.fixtures.people import quick_settings
from tests.people.together import at_once, refusal

LIMIT = 5


@pytest.fixture
def people_settings():
    return quick_settings(rate_limits=f"add_member={LIMIT}/3600,create_team={LIMIT}/3600")


async def test_who_has_an_account_is_not_found_out_by_adding_members(people):
    """Unknown addresses, members and new ones count alike, and all at once count as one after the other; somebody
    else's tries do not."""
    ada, bob = await people.sign_up("Ada"), await people.sign_up("Bob")
    path = f"/v1/teams/team-{ada.team}/members"
    addresses = [bob.email, ada.email, *(f"nobody{number}@example.com" for number in range(2 * LIMIT))]
    answers = await at_once([partial(ada.post, path, {"email": one}) for one in addresses])
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) == len(addresses) - LIMIT
    assert {answer.status_code for answer in answers} <= {201, 404, 409, 429}
    for answer in refused:
        refusal(answer, 429, "rate_limited")
        assert int(answer.headers["retry-after"]) >= 1
    assert (await bob.post(path, {"email": "nobody@example.com"})).status_code != 429


async def test_teams_are_not_made_without_end(people):
    """Those that were deleted again count, too."""
    ada = await people.sign_up("Ada")
    for number in range(LIMIT):
        made = await ada.post("/v1/teams", {"name": f"Team {number}"})
        assert made.status_code == 201
        assert (await ada.delete(f"/v1/teams/{made.json()['id']}")).status_code == 204
    refusal(await ada.post("/v1/teams", {"name": "Another"}), 429, "rate_limited")
    assert await people.sql("select from teams where name = 'Another'") == []
    assert (await (await people.sign_up("Bob")).post("/v1/teams", {"name": "Bob's"})).status_code == 201
