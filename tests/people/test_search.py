"""Finding people by the beginning of their address."""

from __future__ import annotations

from urllib.parse import quote


async def find(person, prefix):
    answer = await person.get(f"/v1/users/search?email={quote(prefix)}")
    assert answer.status_code == 200, answer.text
    return [one["email"] for one in answer.json()]


async def test_by_the_beginning(people):
    """In whatever case, by address; only what begins so, with exactly three fields."""
    ada = await people.sign_up("Ada", email="ada@one.example")
    await people.sign_up("Ada", email="Ada@Two.example")
    await people.sign_up("Bob", email="bob@one.example")
    await people.sign_up("Lada", email="lada@one.example")
    assert [one.lower() for one in await find(ada, "ADA@")] == ["ada@one.example", "ada@two.example"]
    answer = (await ada.get("/v1/users/search?email=ada@o")).json()
    assert answer == [{"user_id": ada.wire_id, "email": ada.email, "name": "Ada"}]


async def test_at_most_ten(people):
    """However many there are."""
    ada = await people.sign_up("Ada")
    for number in range(12):
        await people.sign_up("X", email=f"x@d{number:02}.example")
    assert await find(ada, "x@d") == [f"x@d{number:02}.example" for number in range(10)]


async def test_patterns_are_text(people):
    """What means something to LIKE finds itself only."""
    ada = await people.sign_up("Ada", email="a_a@one.example")
    await people.sign_up("Eve", email="axa@one.example")
    assert await find(ada, "a_a@") == ["a_a@one.example"]
    for prefix in ("%%@", "___@", "a%@one", "axa@%", "\\\\@", "a\\_a@", "axa@one.example\\"):
        assert await find(ada, prefix) == [], prefix


async def test_what_is_too_little(people):
    """Three characters or more, one of them an @; nothing else in the query."""
    ada = await people.sign_up("Ada")
    for query in (
        "",
        "email=",
        "email=ada",
        "email=a@",
        "email=ada%40x&limit=3",
        f"email=@{'a' * 320}",
        "email=a%00@b",
    ):
        answer = await ada.get(f"/v1/users/search?{query}")
        assert answer.status_code == 400, query


async def test_who_may(people):
    """Admins and owners of some team that lives; counted for members, too, and not without end."""
    team = await people.team_of_three()
    member = team.member
    assert await find(member, "nobody@") == []  # owns a team of their own
    await people.sql("update teams set deleted_at = now() where id <> $1 and slug <> '000000-000000'", team.id)
    for person, status in ((team.owner, 200), (team.admin, 200), (member, 403)):
        assert (await person.get("/v1/users/search?email=x@y")).status_code == status
    found, answer = 0, None
    while answer is None or answer.status_code == 200:
        answer = await team.admin.get("/v1/users/search?email=x@y")
        found += answer.status_code == 200
        assert found <= 120  # a minute's share, and another's if it turns meanwhile
    assert found >= 50
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "rate_limited")
    assert 1 <= int(answer.headers["retry-after"]) <= 61
