"""How an account begins, and in which team its holder lands. Parts of other use-cases' transactions."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, cast
from uuid import UUID

from email_validator import SPECIAL_USE_DOMAIN_NAMES, EmailNotValidError, validate_email

from capsule import errors
from capsule.auth.sessions import SessionHolder
from capsule.db.queries import audit, sessions, teams, users
from capsule.people.views import Authenticated

if TYPE_CHECKING:
    from capsule.auth.sessions import SessionTokens
    from capsule.db.connection import Connection
    from capsule.db.queries.users import UserRow
    from capsule.principals import Role

# The library's way to allow a name. People of a company's own network (`.internal`, `.local`, `.test`) sign up too;
# only what never is in an address stays refused.
SPECIAL_USE_DOMAIN_NAMES[:] = ["arpa", "invalid"]

MAX_TEAM_NAME = 128
FALLBACK_TEAM_NAME = "My Team"
MAX_EMAIL = 320
"""Characters, as the database has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Landing:
    """What a session begins with. `issued_at` is the database's clock, and so is `authenticated_at`: of the login that
    it goes on from, None for a login."""

    holder: SessionHolder
    issued_at: datetime
    authenticated_at: datetime | None = None

    def session(self, tokens: SessionTokens) -> Authenticated:
        """With a token of its own."""
        holder = self.holder
        return Authenticated(
            token=tokens.issue(holder, self.issued_at, self.authenticated_at),
            user_id=holder.user_id,
            team_id=holder.team_id,
            email=holder.email,
            name=holder.name,
        )


async def register(
    tx: Connection, *, email: str, name: str, password_hash: str | None, user_id: UUID | None = None
) -> UserRow:
    """A new account that owns its default team. ConstraintViolated("users_email_key") when the address is taken."""
    user = await users.insert(tx, email=email, name=name, password_hash=password_hash, user_id=user_id)
    team = await teams.insert(tx, name=default_team_name(name), owner_id=user.id, is_default=True)
    await audit.append(
        tx,
        actor_type="user",
        actor_id=user.id,
        actor_name=user.email,
        team_id=team.id,
        resource_type="team",
        resource_id=f"team-{team.id}",
        action="create",
        scope="admin",
    )
    return user


async def land(tx: Connection, user: UserRow) -> Landing:
    """Their session as of now, in the default team if that lives, else in the live one they joined first, else in none.

    Call it with the user's row locked (`users.hold`, or made by this transaction), so that a change of password comes
    either before the session or after it, and ends it.
    """
    row = await sessions.landing(tx, user.id)
    return landing_in(user, row.team_id, cast("Role | None", row.role), row.now)


def landing_in(
    user: UserRow,
    team_id: UUID | None,
    role: Role | None,
    issued_at: datetime,
    authenticated_at: datetime | None = None,
) -> Landing:
    """Their session in a team that is known."""
    holder = SessionHolder(
        user_id=user.id, email=user.email, name=user.name, is_admin=user.is_admin, team_id=team_id, role=role
    )
    return Landing(holder=holder, issued_at=issued_at, authenticated_at=authenticated_at)


def default_team_name(name: str) -> str:
    """`<name>'s Team` in the letters that a team's name may have; what is not among them is dropped."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    kept = " ".join("".join(letter for letter in plain if letter.isalnum() or letter in " _-@'").split())
    ending = "'s Team"
    kept = kept[: MAX_TEAM_NAME - len(ending)].strip()
    return kept + ending if kept else FALLBACK_TEAM_NAME


def email_address(text: str) -> str:
    """The address in its one form, by which an account is stored and found: NFC, all in small letters, the domain as
    IDNA (UTS 46) has it; InvalidRequest.

    Nothing is looked up, and names that mean something in one network only (`.internal`, `.test`, a bare host name) do.
    """
    try:
        found = validate_email(text, check_deliverability=False, globally_deliverable=False).normalized
    except EmailNotValidError as err:
        raise errors.InvalidRequest(f"email: {err}", field="email") from err
    if len(found) > MAX_EMAIL:
        raise errors.InvalidRequest(f"email: at most {MAX_EMAIL} characters.", field="email")
    small = small_letters(found)
    if small is None:
        raise errors.InvalidRequest("email: it has a letter whose small form is not one letter.", field="email")
    return small


def small_letters(text: str) -> str | None:
    """NFC, in small letters; None where that is no form to go by: a letter becomes several (`İ`), or others the second
    time. The database's own `lower` leaves the result alone in every locale, and never makes two of them one."""
    composed = unicodedata.normalize("NFC", text)
    small = composed.lower()
    if any(len(letter.lower()) != 1 for letter in composed):
        return None
    return small if unicodedata.normalize("NFC", small).lower() == small else None
