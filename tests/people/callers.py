"""Kinds of callers; what each is to be told is computed from the operation's row of the table of access."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import jwt
import trio

from agent.wire.faults import Fault, FaultCode
from capsule.auth.access import Credential, reaches
from capsule.db.queries import sessions
from tests.people.bodies import minimal
from tests.people.stage import build

OWN_RULES = {
    # What the use-case knows better than the table, as the contract has it: status and code by role in the team.
    ("switchTeam", None): (403, "forbidden"),
    ("revokeApiKey", "member"): (403, "forbidden"),  # the key in the path is the owner's
}
REFUSED_TO_ALL = {"exchangeLoginCode": (401, "unauthorized"), "startOAuth": (404, "provider_not_found")}
"""Open to anybody, and yet refused here: no provider is set up."""
IN_BODY = frozenset({"createSnapshot"})
"""These name an object of the team in their body."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """Somebody who asks. `headers` makes what they send from (people, stage). `credential`: what it is good for; None
    for nothing at all, "bad" for what is there and no good, "none" for nobody."""

    name: str
    headers: Callable[[Any, Any], Any]
    credential: str = "bad"
    team: str | None = "team"
    """Whose credential: "team", "others", None for no live team."""
    role: str | None = None
    """In the team that the path names."""
    admin_somewhere: bool = False
    permitted: bool = False
    spoils: bool = False
    """`headers` changes the stage for all who come after."""


def _session(who, team="team"):
    def headers(people, stage):
        return _bearer(people.token(stage.users[who], team and getattr(stage, team)))

    return headers


def _bearer(token):
    return {"Authorization": f"Bearer {token}"}


def _key(name):
    return lambda _people, stage: {"X-API-Key": stage.keys[name]}


def _good(people, stage):
    return people.token(stage.users["owner"], stage.team)


def _changed(**how):
    """The owner's token, spoilt."""

    def headers(people, stage):
        claims = jwt.decode(_good(people, stage), options={"verify_signature": False})
        claims.update(how.get("claims", {}))
        algorithm = how.get("algorithm", "HS256")
        key = how["key"](people) if "key" in how else people.signing_key()
        return _bearer(jwt.encode(claims, key if algorithm != "none" else None, algorithm))

    return headers


def _tampered(people, stage):
    head, claims, signature = _good(people, stage).split(".")
    return _bearer(".".join([head, claims, ("A" if signature[0] != "A" else "B") + signature[1:]]))


async def _logged_out(people, stage):
    token = _good(people, stage)
    said = people.tokens.check(token)

    async def end(tx):
        await sessions.revoke(tx, jti=said.session_id, user_id=said.user_id, expires_at=said.expires_at)

    await people.world.db.transaction(end)
    return _bearer(token)


async def _before_change(people, stage):
    token = people.token(stage.users["owner"], stage.team, issued_at=datetime.now(UTC) - timedelta(minutes=1))
    await people.sql("update users set sessions_valid_from = now() where id = $1", stage.users["owner"])
    return _bearer(token)


async def _key_of_deleted_team(people, stage):
    await people.sql("update teams set deleted_at = now() where id = $1", stage.others)
    return {"X-API-Key": stage.keys["stranger"]}


async def _session_of_deleted_team(people, stage):
    await people.sql("update teams set deleted_at = now() where id = $1", stage.others)
    return _bearer(people.token(stage.users["stranger"], stage.others))


KINDS = (
    Kind(name="nobody", headers=lambda _p, _s: {}, credential="none"),
    Kind(name="malformed key", headers=lambda _p, _s: {"X-API-Key": "cap_short"}),
    Kind(name="unknown key", headers=lambda _p, _s: {"X-API-Key": f"cap_{secrets.token_hex(20)}"}),
    Kind(name="revoked key", headers=_key("revoked")),
    Kind(name="session's token as a key", headers=lambda p, s: {"X-API-Key": _good(p, s)}),
    Kind(name="host's token as a key", headers=lambda _p, s: {"X-API-Key": s.host_token}),
    Kind(
        name="bad key beside a good session",
        headers=lambda p, s: {**_bearer(_good(p, s)), "X-API-Key": f"cap_{secrets.token_hex(20)}"},
    ),
    Kind(name="key as a session", headers=lambda _p, s: _bearer(s.keys["owner"])),
    Kind(name="host's token as a session", headers=lambda _p, s: _bearer(s.host_token)),
    Kind(name="session's token as a host's", headers=lambda p, s: {"X-Host-Token": _good(p, s)}, credential="none"),
    Kind(name="key as a host's token", headers=lambda _p, s: {"X-Host-Token": s.keys["owner"]}, credential="none"),
    Kind(name="session without its signature", headers=_changed(algorithm="none")),
    Kind(name="session of another secret", headers=_changed(key=lambda _: b"another secret, which is long enough")),
    Kind(name="session signed with the root", headers=_changed(key=lambda p: p.settings.secret_key.encode())),
    Kind(name="session of nobody we know", headers=_changed(claims={"sub": f"usr-{UUID(int=0)}"})),
    Kind(name="tampered session", headers=_tampered),
    Kind(name="expired session", headers=_changed(claims={"exp": 1_700_000_000})),
    Kind(name="logged-out session", headers=_logged_out),
    Kind(name="session from before a change of password", headers=_before_change, spoils=True),
    Kind(name="host", headers=lambda _p, s: {"X-Host-Token": s.host_token}, credential="host"),
    Kind(name="key", headers=_key("owner"), credential="key", role="member"),
    Kind(name="key of another team", headers=_key("stranger"), credential="key", team="others"),
    Kind(name="key of a deleted team", headers=_key_of_deleted_team, spoils=True, credential="key", team=None),
    Kind(
        name="key beside a session",
        headers=lambda p, s: {**_bearer(_good(p, s)), **_key("owner")(p, s)},
        credential="key",
        role="member",
    ),
    Kind(name="member", headers=_session("member"), credential="session", role="member"),
    Kind(name="admin", headers=_session("admin"), credential="session", role="admin", admin_somewhere=True),
    Kind(name="owner", headers=_session("owner"), credential="session", role="owner", admin_somewhere=True),
    Kind(
        name="owner of another team",
        headers=_session("stranger", "others"),
        credential="session",
        team="others",
        admin_somewhere=True,
    ),
    Kind(
        name="owner of a deleted team", headers=_session_of_deleted_team, spoils=True, credential="session", team=None
    ),
    Kind(
        name="owner of another team, with a session for this one",
        headers=_session("stranger"),
        credential="session",
        team=None,
        admin_somewhere=True,
    ),
    Kind(name="removed member", headers=_session("removed"), credential="session", team=None),
    Kind(name="somebody without a team", headers=_session("homeless", None), credential="session", team=None),
    Kind(
        name="admin, with a session for no team",
        headers=_session("admin", None),
        credential="session",
        team=None,
        role="admin",
        admin_somewhere=True,
    ),
    Kind(name="platform admin", headers=_session("director", None), credential="session", team=None, permitted=True),
    Kind(name="platform admin of nothing", headers=_session("nominal", None), credential="session", team=None),
)


class Matrix:
    """Asks as anybody for anything, on a stage where nobody before has changed anything: whoever is refused has not."""

    kinds = KINDS

    async def begin(self, people):
        self._people = people
        self._agent, self._host_token = await people.host()
        self._agent.guest = _guest
        self._stage = None

    async def ask(self, row, kind):
        """Status and code (None without) of a minimal good request by that kind of caller."""
        if self._stage is None or kind.spoils:
            self._stage = await build(self._people, self._agent, self._host_token)
        stage = self._stage
        headers = kind.headers(self._people, stage)
        if not isinstance(headers, dict):
            headers = await headers
        answer = await self._people.nobody.ask(
            row.method, stage.path(row.path), headers=headers, follow_redirects=False, **minimal(row, stage)
        )
        refused = answer.status_code in {401, 403, 404}
        if kind.spoils or not refused:
            self._stage = None
        return answer.status_code, answer.json()["error"]["code"] if answer.status_code >= 400 else None

    def expected(self, row, kind):
        """The answers that do: (status, "allowed") stands for any that is no refusal."""
        name = row.alias_of or row.name
        if not row.access.credentials:
            return [REFUSED_TO_ALL[name]] if name in REFUSED_TO_ALL else _Allowed()
        if Credential.HOST in row.access.credentials:
            return _Allowed() if kind.credential == "host" else [(401, "unauthorized")]
        if kind.credential not in {"key", "session"}:
            return [(401, "unauthorized")]
        if kind.credential == "key":
            return _of_key(row, kind)
        return _of_session(row, name, kind)


class _Allowed:
    """Success; or what only a request that came through to the played guest, or to a WebSocket, is told."""

    def __contains__(self, answer):
        status, code = answer
        return status < 400 or (status, code) in {(409, "invalid_state"), (426, "upgrade_required")}

    def __repr__(self):
        return "allowed"


def _of_key(row, kind):
    if kind.team is None:
        return [(403, "no_team")]
    if Credential.API_KEY not in row.access.credentials:
        return [(403, "forbidden")]
    return _own(row, kind)


def _of_session(row, name, kind):
    access = row.access
    if access.team == "host":
        return _of_host(row, kind)
    if access.permission is not None and not kind.permitted:
        return [(403, "forbidden")]
    if access.team == "any" and not kind.admin_somewhere:
        return [(403, "forbidden")]
    if access.team == "path" and kind.role is None:
        return [(404, "not_found")]
    if access.team == "path" and (not reaches(kind.role, access.role) or kind.role == access.barred):
        return [(403, "forbidden")]
    if access.team == "own":
        if kind.team is None:
            return [(403, "no_team")]
        if kind.team == "team" and (name, kind.role) in OWN_RULES:
            return [OWN_RULES[name, kind.role]]
        return _own(row, kind)
    return [OWN_RULES[name, kind.role]] if (name, kind.role) in OWN_RULES else _Allowed()


def _of_host(row, kind):
    """The host in the path is the team's own; one that is made is a regular one."""
    if row.name == "createHost":
        return _Allowed() if kind.permitted else [(403, "forbidden")]
    if "{" not in row.path:
        return _Allowed() if kind.permitted or kind.team is not None else [(403, "no_team")]
    if kind.role is None and not kind.permitted:
        return [(404, "not_found")]
    reading = row.access.role == "member"
    may = kind.permitted and reading if kind.role is None else reaches(kind.role, row.access.role)
    return _Allowed() if may else [(403, "forbidden")]


def _own(row, kind):
    """For an object of the team: one of another team is as good as none."""
    names_one = "{" in row.path or (row.alias_of or row.name) in IN_BODY
    return [(404, "not_found")] if names_one and kind.team != "team" else _Allowed()


async def _guest(_method, _body, _stream):
    """A guest that answers nothing: the call came through."""
    await trio.lowlevel.checkpoint()
    raise Fault(FaultCode.INVALID_STATE, "this guest is played", details={"status": "running"})
