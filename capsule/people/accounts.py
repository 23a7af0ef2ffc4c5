"""Accounts and their sessions: sign-up, login, logout, one's own profile."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

from capsule import errors
from capsule.auth.decoys import Decoys
from capsule.auth.passwords import check_length
from capsule.auth.rate_limits import subject_of
from capsule.auth.sessions import DEAD, SessionTokens
from capsule.db.errors import ConstraintViolated
from capsule.db.queries import sessions, users
from capsule.db.translated import TranslatedDatabase
from capsule.people import account_changes as changes
from capsule.people.account_changes import SignUp
from capsule.people.registration import email_address
from capsule.people.views import AccountView, Authenticated

if TYPE_CHECKING:
    from capsule.auth.passwords import Passwords
    from capsule.auth.rate_limits import RateLimits
    from capsule.config import Settings
    from capsule.db.pool import Database
    from capsule.db.queries.users import UserRow
    from capsule.people.registration import Landing
    from capsule.principals import User

WRONG = "the e-mail address or the password is wrong"
NO_ADDRESS = ""
"""What is looked for instead of text that is no address: it takes as long, and finds nobody."""


class Accounts:
    """See `capsule.http.people_ports.AccountService`."""

    def __init__(self, db: Database, settings: Settings, limits: RateLimits, passwords: Passwords) -> None:
        self._db = TranslatedDatabase(db)
        self._tokens = SessionTokens(settings)
        self._limits = limits
        self._passwords = passwords
        self._decoys = Decoys(db, settings)

    async def sign_up(
        self, *, email: str, password: str, name: str, address: str, idempotency_key: str | None
    ) -> Authenticated:
        """An account with its own team. EmailTaken, InvalidRequest, RateLimited. The same Idempotency-Key again, with
        the password, is another session of the same account; IdempotencyKeyReused without it."""
        check_length(password, "password")
        request = SignUp(email=email_address(email), name=name, idempotency_key=idempotency_key)
        await self._limits.hit("sign_up", subject_of(address))
        if (earlier := await self._db.run(changes.earlier, request)) is not None:
            return await self._sign_up_again(earlier, password, address)
        password_hash = await self._passwords.hash(password)
        try:
            made = await self._db.transaction(changes.sign_up, request, password_hash, uuid4())
        except ConstraintViolated as err:
            if err.name != "users_email_key":
                raise
            raise errors.EmailTaken(changes.TAKEN) from err
        if isinstance(made, UUID):
            return await self._sign_up_again(made, password, address)
        return made.session(self._tokens)

    async def log_in(self, *, email: str, password: str, address: str) -> Authenticated:
        """Unauthorized, after the same time and in the same words whatever was wrong; RateLimited."""
        wanted = _normal(email)
        await self._count_login(wanted, address)
        user = await self._db.run(users.by_email, wanted)
        landing = await self._enter(user, wanted, password)
        if landing is None:
            await self._db.transaction(changes.record_failure, user, address)
            raise errors.Unauthorized(WRONG)
        return landing.session(self._tokens)

    async def log_out(self, user: User) -> None:
        """End the session."""
        await self._db.run(
            partial(sessions.revoke, jti=user.session.id, user_id=user.id, expires_at=user.session.expires_at)
        )

    async def switch_team(self, user: User, team: UUID) -> Authenticated:
        """A session for another team of theirs. NotFound for one that is not or was deleted, Forbidden for one they are
        no member of; Unauthorized a week after the login."""
        return (await self._db.transaction(changes.switch, user, team)).session(self._tokens)

    async def me(self, user: User) -> AccountView:
        """Their account."""
        return _view(user, await self._row(user))

    async def update_me(self, user: User, *, name: str | None) -> AccountView:
        """Change what is given."""
        return _view(user, await self._db.transaction(changes.update, user.id, name))

    async def change_password(self, user: User, *, current: str | None, new: str, address: str) -> None:
        """`current` may be None only for an account without a password, soon after the login. Ends all other sessions.
        Forbidden when `current` is wrong, or that was long ago; RateLimited."""
        check_length(new, "new_password")
        await self._limits.hit("login_address", subject_of(address))
        await self._limits.hit("password", str(user.id))
        row = await self._row(user)
        has_to_know = row.password_hash is not None or current is not None
        if has_to_know and not await self._matches(row.password_hash, row.email, current or ""):
            raise errors.Forbidden("current_password: that is not your current password")
        password_hash = await self._passwords.hash(new)
        await self._db.transaction(changes.change_password, user, row, password_hash)

    async def _row(self, user: User) -> UserRow:
        row = await self._db.run(users.get, user.id)
        if row is None:
            raise errors.Unauthorized(DEAD)
        return row

    async def _sign_up_again(self, account: UUID, password: str, address: str) -> Authenticated:
        """The key was used for this account: who knows its password gets a session. A login by another name, counted
        and recorded as one."""
        user = await self._db.run(users.get, account)
        email = NO_ADDRESS if user is None else user.email
        await self._count_login(email, address)
        landing = await self._enter(user, email, password)
        if landing is None:
            await self._db.transaction(changes.record_failure, user, address)
            raise errors.IdempotencyKeyReused(changes.REUSED)
        return landing.session(self._tokens)

    async def _count_login(self, email: str, address: str) -> None:
        """Before it is tried. Who guesses from one address locks the account for that address only."""
        subject = subject_of(address)
        await self._limits.hit("login_address", subject)
        await self._limits.hit("login_account", f"{email} {subject}")
        await self._limits.hit("login_anywhere", email)

    async def _matches(self, stored: str | None, email: str, password: str) -> bool:
        return await self._passwords.matches(stored, password, decoy=await self._decoys.of(email))

    async def _enter(self, user: UserRow | None, email: str, password: str) -> Landing | None:
        """A session for who knows the password; None for who does not. Whatever is wrong, one verification is done."""
        stored = None if user is None else user.password_hash
        if not await self._matches(stored, email, password) or user is None or stored is None:
            return None
        better = await self._passwords.hash(password) if self._passwords.outdated(stored) else None
        return await self._db.transaction(changes.enter, user, better)


def _normal(email: str) -> str:
    """As it would be stored, or nobody's when it is no address. Never as it was typed: the database might find in that
    an address which we do not."""
    try:
        return email_address(email)
    except errors.InvalidRequest:
        return NO_ADDRESS


def _view(user: User, row: UserRow) -> AccountView:
    return AccountView(
        user_id=row.id,
        email=row.email,
        name=row.name,
        has_password=row.password_hash is not None,
        created_at=row.created_at,
        team_id=user.team_id,
        role=user.role,
        permissions=user.permissions,
    )
