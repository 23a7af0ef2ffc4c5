"""The transactions of accounts and sessions. They may be run again from the start.

Nothing slow happens in them: a password was verified before, against a row as it was then. So each looks again, with
the row locked, whether the password is still that one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import NAMESPACE_URL, UUID, uuid5

from capsule import errors
from capsule.auth.sessions import DEAD, FRESH, GOES_ON, logged_in_within
from capsule.db.queries import audit, idempotency, sessions, users
from capsule.people.registration import Landing, land, landing_in, register
from capsule.sandboxes.admission import fingerprint

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.queries.idempotency import IdempotencyRow
    from capsule.db.queries.users import UserRow
    from capsule.principals import Role, User

NOBODY = UUID(int=0)
SIGN_UP = "POST /v1/auth/signup"
TAKEN = "there is an account with this e-mail address; log in"
REUSED = "this Idempotency-Key was used for a different sign-up; use a new one"


@dataclass(frozen=True, slots=True, kw_only=True)
class SignUp:
    """An account to be made, and what the client calls the request. `email` in its one form."""

    email: str
    name: str
    idempotency_key: str | None

    @property
    def owner_id(self) -> UUID:
        """Whose Idempotency-Key it is: an address's, which may have no account yet."""
        return uuid5(NAMESPACE_URL, f"mailto:{self.email}")

    @property
    def request_hash(self) -> bytes:
        """Without the password: nothing is stored of it that could be guessed at speed."""
        return fingerprint({"email": self.email, "name": self.name})


async def earlier(connection: Connection, request: SignUp) -> UUID | None:
    """The account that this request made before; EmailTaken when another did; IdempotencyKeyReused."""
    # The account first: one that is there by now has its key there, too, whoever commits between the two looks.
    taken = await users.by_email(connection, request.email) is not None
    if request.idempotency_key is not None:
        claim = await idempotency.get(connection, request.owner_id, request.idempotency_key)
        if claim is not None:
            return _same_request(claim, request)
    if taken:
        raise errors.EmailTaken(TAKEN)
    return None


async def sign_up(tx: Connection, request: SignUp, password_hash: str, account: UUID) -> Landing | UUID:
    """A new account and its first session, or the account that the request made before. EmailTaken is
    ConstraintViolated("users_email_key") here; IdempotencyKeyReused."""
    if request.idempotency_key is not None:
        claim = await idempotency.claim(
            tx, request.owner_id, request.idempotency_key, request.request_hash, account, endpoint=SIGN_UP
        )
        if claim is not None:
            return _same_request(claim, request)
    user = await register(tx, email=request.email, name=request.name, password_hash=password_hash, user_id=account)
    return await land(tx, user)


async def enter(tx: Connection, verified: UserRow, better_hash: str | None) -> Landing | None:
    """A session for who gave the password of `verified`; None when it was changed since. `better_hash`: the same
    password at today's cost."""
    # Two that hold a row cannot both change it: who is going to locks it at once.
    user = await (users.hold if better_hash is None else users.lock)(tx, verified.id)
    if user is None or not _same_password(user, verified):
        return None
    if better_hash is not None and verified.password_hash is not None:
        await users.rehash(tx, verified.id, old_hash=verified.password_hash, new_hash=better_hash)
    return await land(tx, user)


async def record_failure(tx: Connection, user: UserRow | None, address: str) -> None:
    """The audit row of a failed login, in the team that a known person would have landed in. Nobody's takes as long."""
    place = await sessions.landing(tx, NOBODY if user is None else user.id)
    await audit.append(
        tx,
        actor_type="user",
        actor_id=None if user is None else user.id,
        actor_name="" if user is None else user.email,
        team_id=place.team_id,
        resource_type="auth",
        resource_id="" if user is None else f"usr-{user.id}",
        action="login_failed",
        scope="admin",
        status="warning",
        metadata={"address": address},
    )


async def switch(tx: Connection, user: User, team: UUID) -> Landing:
    """A session for another team. Unauthorized when theirs was ended meanwhile, or has gone on for too long; NotFound,
    Forbidden."""
    row = await users.hold(tx, user.id)
    if row is None or not await _lives(tx, user):
        raise errors.Unauthorized(DEAD)
    if not logged_in_within(GOES_ON, user.session, await sessions.now(tx)):
        raise errors.Unauthorized(f"you logged in more than {GOES_ON.days} days ago; log in again")
    place = await sessions.place(tx, user.id, team)
    if place is None:
        raise errors.NotFound("there is no such team, or it was deleted")
    if place.role is None:
        raise errors.Forbidden("you are not a member of that team")
    return landing_in(row, team, cast("Role", place.role), place.now, user.session.authenticated_at)


async def update(tx: Connection, user_id: UUID, name: str | None) -> UserRow:
    """Another name, where one is given; the row as it is then."""
    if name is not None:
        await users.rename(tx, user_id, name)
    row = await users.get(tx, user_id)
    if row is None:
        raise errors.Unauthorized(DEAD)
    return row


async def change_password(tx: Connection, user: User, verified: UserRow, password_hash: str) -> None:
    """Another password, and the end of all sessions but this one. Unauthorized when somebody else was quicker, or
    this session was ended meanwhile. Forbidden for a first password long after the login: who found an open session
    would have the account."""
    row = await users.lock(tx, user.id)
    if row is None or not _same_password(row, verified) or not await _lives(tx, user):
        raise errors.Unauthorized("the password was changed meanwhile; log in again")
    if row.password_hash is None and not logged_in_within(FRESH, user.session, await sessions.now(tx)):
        raise errors.Forbidden("a first password is set right after signing in; sign in again, then set it")
    await users.set_password(tx, user.id, password_hash, kept_session=user.session.id)


async def _lives(tx: Connection, user: User) -> bool:
    """Whether the asker's session does, seen from within the transaction."""
    holder = await sessions.holder(
        tx, user_id=user.id, jti=user.session.id, issued_at=user.session.issued_at, team_id=None
    )
    return holder is not None


def _same_password(row: UserRow, verified: UserRow) -> bool:
    """A change of password, and nothing else, moves the moment from which sessions are good."""
    return row.sessions_valid_from == verified.sessions_valid_from


def _same_request(claim: IdempotencyRow, request: SignUp) -> UUID:
    if claim.request_sha256 != request.request_hash:
        raise errors.IdempotencyKeyReused(REUSED)
    return claim.resource_id
