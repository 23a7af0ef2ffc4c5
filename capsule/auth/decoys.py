"""Hashes of no password, for who has none: verifying one costs what verifying somebody's would.

Each hash says what it costs, and there are several costs for a while after the operator set another one: a stored hash
changes only when its owner logs in. Were a decoy always at today's cost, time would tell who has an account. So it has
a cost that is in use, and always the same one for the same address: an address that costs this now and that then has
no account either.
"""

from __future__ import annotations

import hmac
import secrets
from base64 import b64encode
from typing import TYPE_CHECKING

import trio
from argon2 import DEFAULT_HASH_LENGTH, DEFAULT_RANDOM_SALT_LENGTH

from capsule.db.queries import users
from capsule.db.translated import TranslatedDatabase

if TYPE_CHECKING:
    from capsule.config import Settings
    from capsule.db.pool import Database

KEY_PURPOSE = "password-decoy"
REMEMBERED = 300.0
"""Seconds that the costs in use are good for: asking reads all accounts."""


class Decoys:
    """Knows which costs are in use."""

    def __init__(self, db: Database, settings: Settings) -> None:
        self._db = TranslatedDatabase(db)
        self._key = settings.derive_key(KEY_PURPOSE)
        self._todays = (
            f"$argon2id$v=19$m={settings.argon2_memory_kib},t={settings.argon2_time_cost},"
            f"p={settings.argon2_parallelism}$"
        )
        salt, digest = (
            b64encode(secrets.token_bytes(size)).decode().rstrip("=")
            for size in (DEFAULT_RANDOM_SALT_LENGTH, DEFAULT_HASH_LENGTH)
        )
        self._rest = f"{salt}${digest}"
        self._costs: list[str] = []
        self._good_until = 0.0
        self._asking = trio.Lock()

    async def of(self, address: str) -> str:
        """The address's: a hash in form, of no password anybody knows. Ask for it whether there is an account or not:
        now and then that, too, takes time."""
        async with self._asking:
            if trio.current_time() >= self._good_until:
                self._costs = await self._db.run(users.password_costs) or [self._todays]
                self._good_until = trio.current_time() + REMEMBERED
        return max(self._costs, key=lambda cost: self._weight(cost, address)) + self._rest

    def _weight(self, cost: str, address: str) -> bytes:
        """Whatever else comes into use or goes, of two costs an address always has the same one (rendezvous hashing,
        Thaler and Ravishankar 1998)."""
        return hmac.digest(self._key, f"{cost}{address}".encode(), "sha256")
