"""Sessions of people: JWTs of 6 hours, signed with a key of their own (no host's token is ever one).

What a token says of role, team and name is a hint for its holder; who they are and what they may is read from the
database for every request. So a member who is removed has lost everything with the next request.

A session for another team goes on from this one, for 6 hours more: `auth_time` (OpenID Connect Core 1.0 §2) says since
when it has gone on so, and ends that.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID, uuid4

import jwt

from capsule.db.queries import sessions as rows
from capsule.db.translated import TranslatedDatabase
from capsule.errors import Unauthorized
from capsule.principals import Permission, Role, Session, User

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.pool import Database

LIFETIME = timedelta(hours=6)
GOES_ON = timedelta(days=7)
"""For so long after a login one session may follow another: a stolen one ends, too."""
FRESH = timedelta(minutes=10)
"""For so long after a login a session may do what would be worth stealing it for."""
KEY_PURPOSE = "user-session"
ALGORITHM = "HS256"
REMEMBERED = 4096
"""Tokens whose signature is not computed again. Only sound ones are remembered: what strangers send takes no room."""
REQUIRED = ("sub", "iat", "exp", "jti", "auth_time")
EXPIRED = "the session has expired; log in again"
DEAD = "the session is not valid any more; log in again"


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionClaims:
    """What a sound token says. `team_id` None: of a person without a team."""

    user_id: UUID
    team_id: UUID | None
    session_id: UUID
    issued_at: datetime
    expires_at: datetime
    authenticated_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionHolder:
    """What goes into a token: as of now, and only for its holder to read."""

    user_id: UUID
    email: str
    name: str
    is_admin: bool
    team_id: UUID | None
    role: Role | None


class SessionTokens:
    """Signs and checks the tokens. Whether a session was ended is the database's to say."""

    def __init__(self, settings: Settings) -> None:
        self._key = settings.derive_key(KEY_PURPOSE)
        self._sound = lru_cache(REMEMBERED)(self._verify)

    def issue(self, holder: SessionHolder, issued_at: datetime, authenticated_at: datetime | None = None) -> str:
        """A token. `issued_at` is the database's clock: it is compared with the moment of a change of password.
        `authenticated_at` None: just now, too."""
        claims: dict[str, Any] = {
            "sub": f"usr-{holder.user_id}",
            "team_id": "" if holder.team_id is None else f"team-{holder.team_id}",
            "role": holder.role or "",
            "email": holder.email,
            "name": holder.name,
            "iat": issued_at.timestamp(),
            "exp": (issued_at + LIFETIME).timestamp(),
            "auth_time": (authenticated_at or issued_at).timestamp(),
            "jti": str(uuid4()),
        }
        if holder.is_admin:
            claims["is_admin"] = True
        return jwt.encode(claims, self._key, ALGORITHM)

    def check(self, token: str) -> SessionClaims:
        """The claims of a token that we signed and that has not expired; Unauthorized otherwise."""
        claims = self._sound(token)
        if claims.expires_at <= datetime.now(UTC):
            raise Unauthorized(EXPIRED)
        return claims

    def _verify(self, token: str) -> SessionClaims:
        """The same of a token that we have not seen, or have forgotten."""
        try:
            claims = jwt.decode(
                token, self._key, [ALGORITHM], options={"require": list(REQUIRED), "verify_iat": False}
            )  # another clock
            return SessionClaims(
                user_id=_id_of(claims["sub"], "usr-"),
                team_id=_id_of(claims["team_id"], "team-") if claims.get("team_id") else None,
                session_id=UUID(claims["jti"]),
                issued_at=datetime.fromtimestamp(claims["iat"], UTC),
                expires_at=datetime.fromtimestamp(claims["exp"], UTC),
                authenticated_at=datetime.fromtimestamp(claims["auth_time"], UTC),
            )
        except jwt.ExpiredSignatureError as err:
            raise Unauthorized(EXPIRED) from err
        except (jwt.InvalidTokenError, ValueError, TypeError, AttributeError, OverflowError, OSError) as err:
            raise Unauthorized("the session's token is not valid; log in") from err


class SessionAuthenticator:
    """Turns tokens into people."""

    def __init__(self, db: Database, tokens: SessionTokens) -> None:
        self._db = TranslatedDatabase(db)
        self._tokens = tokens

    async def session(self, token: str) -> User:
        """See `capsule.http.ports.Authenticator.session`."""
        claims = self._tokens.check(token)
        row = await self._db.run(_holder, claims)
        if row is None:
            raise Unauthorized(DEAD)
        return User(
            id=row.id,
            email=row.email,
            name=row.name,
            session=Session(
                id=claims.session_id,
                issued_at=claims.issued_at,
                expires_at=claims.expires_at,
                authenticated_at=claims.authenticated_at,
            ),
            team_id=row.team_id,
            role=cast("Role | None", row.role),
            permissions=frozenset(cast("list[Permission]", row.permissions)),
        )


def logged_in_within(limit: timedelta, session: Session, now: datetime) -> bool:
    """Whether the login that the session goes back to is no longer ago than that, by the database's clock."""
    return session.authenticated_at is not None and now - session.authenticated_at <= limit


async def _holder(connection: Any, claims: SessionClaims) -> rows.HolderRow | None:
    return await rows.holder(
        connection,
        user_id=claims.user_id,
        jti=claims.session_id,
        issued_at=claims.issued_at,
        team_id=claims.team_id,
    )


def _id_of(text: str, prefix: str) -> UUID:
    if not text.startswith(prefix):
        raise ValueError(f"{prefix} is missing")
    return UUID(text.removeprefix(prefix))
