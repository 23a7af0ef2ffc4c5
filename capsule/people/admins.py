"""Who is a platform admin: for an operator at the machine, not over HTTP. The first one can come from nowhere else.

Every change is in the audit trail, of no team: what was given, or taken, and to whom.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, cast

from capsule import errors
from capsule.auth.passwords import Passwords, check_length
from capsule.db.errors import ConstraintViolated
from capsule.db.queries import audit, users
from capsule.db.queries import platform as rows
from capsule.people.names import check_name
from capsule.people.registration import email_address, register
from capsule.people.views import AdminView

if TYPE_CHECKING:
    from collections.abc import Sequence

    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.users import UserRow
    from capsule.principals import Permission


class Admins:
    """Each method is one transaction. InvalidRequest for an address that is none; capsule.db.errors."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = db
        self._settings = settings

    async def promote(self, email: str, permissions: Sequence[Permission]) -> bool:
        """Give permissions to an account; False when there is none with this address. Its password stays."""
        return await self._db.transaction(_promote, email_address(email), permissions)

    async def create(self, *, email: str, name: str, password: str, permissions: Sequence[Permission]) -> None:
        """An account with its own team, and permissions. EmailTaken, InvalidRequest."""
        address = email_address(email)
        check_length(password, "password")
        check_name(name)
        password_hash = await Passwords(self._settings).hash(password)
        try:
            await self._db.transaction(
                partial(_create, email=address, name=name, password_hash=password_hash, permissions=permissions)
            )
        except ConstraintViolated as err:
            if err.name != "users_email_key":
                raise
            raise errors.EmailTaken("somebody made an account with this address meanwhile; try again") from err

    async def list(self) -> list[AdminView]:
        """All of them, by address."""
        return [
            AdminView(email=row.email, name=row.name, permissions=frozenset(cast("list[Permission]", row.permissions)))
            for row in await self._db.run(rows.admins)
        ]

    async def revoke(self, email: str) -> bool:
        """They are none any more; False when they were none. The account stays."""
        return await self._db.transaction(_revoke, email_address(email))


async def _promote(tx: Connection, email: str, permissions: Sequence[str]) -> bool:
    user = await users.by_email(tx, email)
    if user is None:
        return False
    await _grant(tx, user, permissions)
    return True


async def _revoke(tx: Connection, email: str) -> bool:
    user = await users.by_email(tx, email)
    permissions = None if user is None else await rows.revoke(tx, user.id)
    if user is None or permissions is None:
        return False
    await _record(tx, user, "admin_revoke", permissions)
    return True


async def _create(tx: Connection, *, email: str, name: str, password_hash: str, permissions: Sequence[str]) -> None:
    user = await register(tx, email=email, name=name, password_hash=password_hash)
    await _grant(tx, user, permissions)


async def _grant(tx: Connection, user: UserRow, permissions: Sequence[str]) -> None:
    await rows.grant(tx, user.id, permissions)
    await _record(tx, user, "admin_grant", permissions)


async def _record(tx: Connection, user: UserRow, action: str, permissions: Sequence[str]) -> None:
    await audit.append(
        tx,
        actor_type="system",
        actor_id=None,
        actor_name="capsule admin",
        team_id=None,
        resource_type="user",
        resource_id=f"usr-{user.id}",
        action=action,
        scope="admin",
        status="warning",
        metadata={"permissions": ", ".join(sorted(set(permissions)))},
    )
