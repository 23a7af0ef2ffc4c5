"""Sessions: which tokens are good, what ends them, and what shows of them. Every decision is the database's."""

from __future__ import annotations

import logging
from base64 import urlsafe_b64decode, urlsafe_b64encode
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial

import jwt
import msgspec
import pytest
import structlog
import trio
from cryptography.hazmat.primitives.asymmetric import rsa

from capsule import control, errors
from capsule.auth.passwords import Passwords
from capsule.auth.rate_limits import RateLimits
from capsule.auth.sessions import SessionAuthenticator, SessionHolder, SessionTokens
from capsule.db.queries import sessions
from capsule.people.accounts import Accounts
from tests.fixtures.people import PASSWORD, quick_settings

NEW = "another password"
HS512 = pytest.mark.filterwarnings("ignore::jwt.warnings.InsecureKeyLengthWarning")
"""Wants a longer key than ours."""


async def status(people, token):
    """What /v1/me answers to a token; never a 5xx."""
    answer = await people.nobody.get("/v1/me", headers={"Authorization": b"Bearer " + token.encode("latin-1")})
    if answer.status_code != 200:
        assert answer.json()["error"]["code"] == "unauthorized"
        assert answer.headers["www-authenticate"].startswith("Bearer ")
    return answer.status_code


async def log_in(people, person, password=PASSWORD):
    answer = await people.nobody.post("/v1/auth/login", {"email": person.email, "password": password})
    assert answer.status_code == 200, answer.text
    return people.person(answer.json(), password)


async def change(person, current, new):
    answer = await person.post("/v1/me/password", {"current_password": current, "new_password": new})
    return answer.status_code


def flipped(token, part):
    """With one bit of the header, the claims or the signature the other way."""
    parts = token.split(".")
    raw = bytearray(urlsafe_b64decode(parts[part] + "=="))
    raw[len(raw) // 2] ^= 1
    parts[part] = urlsafe_b64encode(raw).decode().rstrip("=")
    return ".".join(parts)


def bad_tokens(people, ada):
    """Name → a token that is none."""
    forged = partial(people.forged, ada)
    key = people.signing_key()
    rsa_key = rsa.generate_private_key(65537, 2048)
    other = SessionTokens(quick_settings(secret_key="another secret of another installation"))
    holder = SessionHolder(user_id=ada.id, email="", name="", is_admin=True, team_id=ada.team, role="owner")
    said = jwt.decode(ada.token, options={"verify_signature": False})
    missing = {
        f"without {claim}": jwt.encode({name: value for name, value in said.items() if name != claim}, key, "HS256")
        for claim in ("sub", "iat", "exp", "jti", "auth_time")
    }
    return {
        **{f"tampered {part}": flipped(ada.token, part) for part in range(3)},
        **missing,
        "expired": people.expired(ada),
        "of another secret": other.issue(holder, datetime.now(UTC)),
        "signed with the secret itself": jwt.encode(said, people.settings.secret_key, "HS256"),
        "not signed": forged(algorithm="none"),
        "signature cut off": ada.token.rpartition(".")[0] + ".",
        "HS512": forged(key=key, algorithm="HS512"),
        "RS256": jwt.encode(said, rsa_key, "RS256"),
        "a foreign prefix": forged(key=key, sub=f"team-{ada.id}"),
        "no prefix": forged(key=key, sub=str(ada.id)),
        "a foreign team": forged(key=key, team_id=f"usr-{ada.team}"),
        "a team that is a number": forged(key=key, team_id=7),
        "a jti that is no UUID": forged(key=key, jti="x"),
        "iat that is text": forged(key=key, iat="soon"),
        "iat at the end of time": forged(key=key, iat=1e300),
        "auth_time that is text": forged(key=key, auth_time="long ago"),
        "auth_time at the end of time": forged(key=key, auth_time=1e300),
        "exp that is no number": forged(key=key, exp=float("nan")),
        "exp for ever": forged(key=key, exp=float("inf")),
        "exp that is text": forged(key=key, exp="soon"),
        "not yet good": forged(key=key, nbf=9_999_999_999),
        "of nobody": people.token("00000000-0000-0000-0000-000000000001"),
        "huge": "a" * 9000,
        "huge and signed": forged(key=key, name="x" * 9000),
        "padding alone": "=",
        "dots": "..",
        "not ASCII": "é" * 20,
        "not base64": "a.b.c=",
        "twice": f"{ada.token}.{ada.token}",
        "an API key": "cap_" + "0" * 40,
    }


@HS512
async def test_bad_tokens(people):
    """Each is 401, whatever is wrong with it; and the one they were made from is good all along."""
    ada = await people.sign_up("Ada")
    for name, token in bad_tokens(people, ada).items():
        assert await status(people, token) == 401, name
    assert await status(people, ada.token) == 200


async def test_tokens_of_hosts_and_people_are_apart(people):
    """Neither passes for the other, in either header."""
    ada = await people.sign_up("Ada")
    agent, host_token = await people.host()
    assert await status(people, host_token) == 401
    for token in (ada.token, people.forged(ada, key=people.signing_key(), typ="host", sub=f"host-{agent.host}")):
        answer = await people.nobody.post(f"/v1/hosts/host-{agent.host}/heartbeat", {}, headers={"X-Host-Token": token})
        assert answer.status_code in {400, 401}
        assert answer.status_code == 401 or answer.json()["error"]["code"] == "invalid_request"


async def test_hints_in_a_token_are_hints(people):
    """Who signs "owner" and "is_admin" into a token of ours is what the database says."""
    ada, eve = [await people.sign_up(name) for name in ("Ada", "Eve")]
    token = people.forged(
        eve, key=people.signing_key(), team_id=f"team-{ada.team}", role="owner", is_admin=True, email=ada.email
    )
    me = (await people.nobody.get("/v1/me", headers={"Authorization": f"Bearer {token}"})).json()
    assert me["email"] == eve.email
    assert not {"role", "team_id", "permissions"} & set(me)


async def test_claims(people):
    """As the contract lists them, and when the login was; is_admin only when it is so."""
    ada = await people.sign_up("Ada")
    said = jwt.decode(ada.token, people.signing_key(), ["HS256"])
    assert sorted(said) == ["auth_time", "email", "exp", "iat", "jti", "name", "role", "sub", "team_id"]
    assert said["exp"] - said["iat"] == 6 * 3600
    assert said["auth_time"] == said["iat"]
    await people.make_admin(ada)
    again = jwt.decode((await log_in(people, ada)).token, people.signing_key(), ["HS256"])
    assert again["is_admin"] is True


async def test_logout(people):
    """Ends this session, at once and on every control plane; others go on."""
    ada = await people.sign_up("Ada")
    other = await log_in(people, ada)
    assert (await ada.post("/v1/auth/logout")).status_code == 204
    assert await status(people, ada.token) == 401
    assert (await ada.post("/v1/auth/logout")).status_code == 401
    with pytest.raises(errors.Unauthorized):
        await SessionAuthenticator(people.world.db, SessionTokens(people.settings)).session(ada.token)
    assert await status(people, other.token) == 200


async def test_a_change_of_password_ends_the_other_sessions(people):
    """The one that asked lives on; after two changes too, and it can be ended then."""
    ada = await people.sign_up("Ada")
    first = await log_in(people, ada)
    assert await change(ada, PASSWORD, NEW) == 204
    assert await status(people, first.token) == 401
    assert await status(people, ada.token) == 200
    second = await log_in(people, ada, NEW)
    assert await change(ada, NEW, PASSWORD) == 204
    assert await status(people, second.token) == 401
    assert await status(people, ada.token) == 200
    third = await log_in(people, ada)
    assert await change(third, PASSWORD, NEW) == 204
    assert await status(people, ada.token) == 401, "kept by an earlier change, not by this one"
    assert await status(people, third.token) == 200
    assert (await third.post("/v1/auth/logout")).status_code == 204
    assert await status(people, third.token) == 401


async def test_a_session_after_a_change_can_switch(people):
    """What begins after the change is good, even though the server's clock was set back meanwhile."""
    ada = await people.sign_up("Ada")
    assert await change(ada, PASSWORD, NEW) == 204
    await people.sql("update users set sessions_valid_from = sessions_valid_from + interval '10 seconds'")
    answer = await ada.post("/v1/auth/switch-team", {"team_id": f"team-{ada.team}"})
    assert answer.status_code == 200
    assert await status(people, answer.json()["token"]) == 200
    assert await status(people, (await log_in(people, ada, NEW)).token) == 200


async def test_switching_teams(people):
    """A session for another team of theirs, with the role there; what is not theirs or gone is refused."""
    ada, bob = [await people.sign_up(name) for name in ("Ada", "Bob")]
    await people.join(bob.team, ada, "admin")
    await ada.patch("/v1/me", {"name": "Countess"})
    there = people.person((await ada.post("/v1/auth/switch-team", {"team_id": f"team-{bob.team}"})).json())
    assert (there.team, there.name) == (bob.team, "Countess")
    assert (await there.get("/v1/me")).json()["role"] == "admin"
    assert await status(people, ada.token) == 200

    async def refused(team):
        return (await ada.post("/v1/auth/switch-team", {"team_id": team})).status_code

    eve = await people.sign_up("Eve")
    assert await refused(f"team-{eve.team}") == 403
    assert await refused(f"team-{ada.id}") == 404
    assert await refused(str(bob.team)) == 400
    assert await refused("team-00000000-0000-0000-0000-000000000000") == 403
    await people.sql("update teams set deleted_at = now() where id = $1", bob.team)
    assert await refused(f"team-{bob.team}") == 404


def since(people, person, **ago):
    """The person with a session that goes back to a login so long ago."""
    moment = datetime.now(UTC) - timedelta(**ago)
    token = people.forged(person, key=people.signing_key(), auth_time=moment.timestamp())
    return replace(person, token=token, headers={"Authorization": f"Bearer {token}"}), moment


async def test_sessions_follow_each_other_for_a_week(people):
    """However often a session is switched, it goes back to the same login; a week after that one has to log in. The
    last one ends when it says."""
    ada = await people.sign_up("Ada")
    switch = {"team_id": f"team-{ada.team}"}
    early, moment = since(people, ada, days=6, hours=23)
    for _ in range(3):
        early = people.person((await early.post("/v1/auth/switch-team", switch)).json())
        said = jwt.decode(early.token, people.signing_key(), ["HS256"])
        assert said["auth_time"] == pytest.approx(moment.timestamp(), abs=1e-6)
        assert said["iat"] > moment.timestamp() + 6 * 24 * 3600
    late, _ = since(people, ada, days=7, minutes=1)
    refused = await late.post("/v1/auth/switch-team", switch)
    assert refused.status_code == 401
    assert "log in again" in refused.json()["error"]["message"]
    assert await status(people, late.token) == 200
    assert (await (await log_in(people, ada)).post("/v1/auth/switch-team", switch)).status_code == 200


async def test_a_first_password_is_set_soon_after_the_login(people):
    """Who found an open session gets no more than that; after another login it goes. Who has a password proves it by
    that, whenever."""
    ada = await people.sign_up("Ada")
    await people.sql("update users set password_hash = null where id = $1", ada.id)
    found, _ = since(people, ada, minutes=11)
    switched = await found.post("/v1/auth/switch-team", {"team_id": f"team-{ada.team}"})
    for session in (found, people.person(switched.json())):
        answer = await session.post("/v1/me/password", {"new_password": NEW})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert "sign in again" in answer.json()["error"]["message"]
    assert (await ada.get("/v1/me")).json()["has_password"] is False
    fresh, _ = since(people, ada, minutes=9)
    assert (await fresh.post("/v1/me/password", {"new_password": NEW})).status_code == 204
    assert await change(since(people, fresh, days=6)[0], NEW, PASSWORD) == 204


async def test_a_removed_member_has_nothing_left(people):
    """With the next request: the session is a person's, not the team's any more."""
    team = await people.team_of_three()
    assert (await team.member.get("/v1/sandboxes")).status_code == 200
    await people.sql("delete from memberships where user_id = $1 and team_id = $2", team.member.id, team.id)
    assert (await team.member.get("/v1/sandboxes")).json()["error"]["code"] == "no_team"
    me = (await team.member.get("/v1/me")).json()
    assert not {"role", "team_id"} & set(me)


async def test_an_account_that_is_gone(people):
    """Its sessions are dead, and so is the wish to end one."""
    ada = await people.sign_up("Ada")
    user = await SessionAuthenticator(people.world.db, people.tokens).session(ada.token)
    await people.sql("update teams set deleted_at = now() where id = $1", ada.team)
    await people.sql("delete from users where id = $1", ada.id)
    assert await status(people, ada.token) == 401
    accounts = control._people(people.settings, people.world.db).accounts
    await accounts.log_out(user)
    for ask in (
        partial(accounts.me, user),
        partial(accounts.update_me, user, name="x"),
        partial(accounts.switch_team, user, ada.team),
        partial(accounts.change_password, user, current=PASSWORD, new=NEW, address=""),
    ):
        with pytest.raises(errors.Unauthorized):
            await ask()


class SlowPasswords(Passwords):
    """Says that a password was right only when it is let to."""

    def __init__(self, settings):
        super().__init__(settings)
        self.verified = trio.Event()
        self.go_on = trio.Event()

    async def matches(self, stored, password, *, decoy):
        right = await super().matches(stored, password, decoy=decoy)
        self.verified.set()
        await self.go_on.wait()
        return right


async def beside_a_change(people, ada, act):
    """What `act(accounts)` comes to when the password is changed after it was verified and before it is used."""
    settings = quick_settings()
    slow = SlowPasswords(settings)
    accounts = Accounts(people.world.db, settings, RateLimits(people.world.db), slow)
    outcome = []

    async def run():
        try:
            outcome.append(await act(accounts))
        except errors.CapsuleError as err:
            outcome.append(type(err))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await slow.verified.wait()
        assert await change(ada, PASSWORD, NEW) == 204
        slow.go_on.set()
    return outcome[0]


async def test_a_login_beside_a_change_of_password(people):
    """With the old password, verified a moment too early: no session outlives the change."""
    ada = await people.sign_up("Ada")
    login = partial(Accounts.log_in, email=ada.email, password=PASSWORD, address="")
    assert await beside_a_change(people, ada, login) is errors.Unauthorized


async def test_two_changes_at_once(people):
    """The one who was quicker decides; the other's session is over, and their password is not set."""
    ada = await people.sign_up("Ada")
    thief = await SessionAuthenticator(people.world.db, people.tokens).session((await log_in(people, ada)).token)

    def steal(accounts):
        return accounts.change_password(thief, current=PASSWORD, new="mine now, it is", address="")

    assert await beside_a_change(people, ada, steal) is errors.Unauthorized
    await log_in(people, ada, NEW)


async def test_switching_beside_a_change_of_password(people):
    """A session that was found good a moment ago, and was ended since, begins no other."""
    ada = await people.sign_up("Ada")
    other = await SessionAuthenticator(people.world.db, people.tokens).session((await log_in(people, ada)).token)
    assert await change(ada, PASSWORD, NEW) == 204
    accounts = control._people(people.settings, people.world.db).accounts
    with pytest.raises(errors.Unauthorized):
        await accounts.switch_team(other, ada.team)


async def test_ended_sessions_are_forgotten_with_their_tokens(people):
    """Not before."""
    ada = await people.sign_up("Ada")
    assert (await ada.post("/v1/auth/logout")).status_code == 204
    await people.world.db.transaction(sessions.prune)
    assert len(await people.sql("select from revoked_sessions")) == 1
    await people.sql("update revoked_sessions set expires_at = now() - interval '1 second'")
    await people.world.db.transaction(sessions.prune)
    assert not await people.sql("select from revoked_sessions")


def test_the_moment_of_a_session_survives_its_token():
    """To the microsecond: it is compared with the moment of a change of password."""
    tokens = SessionTokens(quick_settings())
    start = datetime(2026, 1, 1, tzinfo=UTC)
    for number in range(2000):
        moment = start + timedelta(seconds=number * 7919, microseconds=number * 499_979 % 1_000_000)
        user = SessionHolder(
            user_id="00000000-0000-0000-0000-000000000001", email="", name="", is_admin=False, team_id=None, role=None
        )
        claims = jwt.decode(tokens.issue(user, moment), options={"verify_signature": False})
        assert datetime.fromtimestamp(claims["iat"], UTC) == moment


@HS512
async def test_no_secret_is_logged(people, caplog, capfd):
    """Neither passwords nor tokens nor hashes, whatever went well or wrong with them."""
    caplog.set_level(logging.DEBUG)
    with structlog.testing.capture_logs() as events:
        ada = await people.sign_up("Ada")
        other = await log_in(people, ada)
        tokens = bad_tokens(people, ada)
        for token in tokens.values():
            await status(people, token)
        for body in ({"email": ada.email, "password": "a wrong password"}, {"password": PASSWORD}, {"email": 7}):
            await people.nobody.post("/v1/auth/login", body)
        await people.nobody.post("/v1/auth/login", [PASSWORD])
        await people.nobody.get(f"/v1/me?token={ada.token}")
        assert await change(ada, PASSWORD, NEW) == 204
        assert await change(ada, PASSWORD, "a third password") == 403
        await people.sql("update users set password_hash = '$argon2id$v=19$broken' where id = $1", ada.id)
        await people.nobody.post("/v1/auth/login", {"email": ada.email, "password": NEW})
        await other.post("/v1/auth/logout")
        await ada.post("/v1/auth/logout")
    ours = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # not the client's
    shown = msgspec.json.encode([events, ours], enc_hook=repr).decode() + "".join(capfd.readouterr())
    assert "http_request" in shown
    for secret in (PASSWORD, NEW, "a wrong password", "a third password", "$argon2", ada.token, other.token):
        assert secret not in shown
    signatures = [token.rpartition(".")[2] for token in (ada.token, other.token)]
    assert not [one for one in signatures if one in shown]
    assert not [name for name, token in tokens.items() if len(token) > 20 and token in shown]
    assert quick_settings().secret_key not in shown
