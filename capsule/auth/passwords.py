"""Passwords: argon2id (RFC 9106), whose cost is the operator's to set and stands in each hash.

Hashing is slow on purpose, and takes memory: it is done in a few threads of its own, and few wait for one.
"""

from __future__ import annotations

import unicodedata
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

import structlog
import trio
from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError, VerifyMismatchError

from capsule import errors

if TYPE_CHECKING:
    from collections.abc import Callable

    from capsule.config import Settings

MIN_CHARACTERS = 8
MAX_BYTES = 1024
"""In UTF-8."""

MAX_WAITING = 64
"""Passwords that wait for a thread."""

RETRY_AFTER = 2.0
"""Seconds that many take, about."""

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

log = structlog.get_logger()


class Passwords:
    """Makes and checks hashes, for the whole process."""

    def __init__(self, settings: Settings) -> None:
        self._hasher = PasswordHasher(
            time_cost=settings.argon2_time_cost,
            memory_cost=settings.argon2_memory_kib,
            parallelism=settings.argon2_parallelism,
        )
        self._limiter = trio.CapacityLimiter(settings.password_threads)

    async def hash(self, password: str) -> str:
        """What to store. Busy."""
        return await self._in_thread(self._hasher.hash, _bytes_of(password))

    async def matches(self, stored: str | None, password: str, *, decoy: str) -> bool:
        """Whether it is the password of this hash. None (nobody, or somebody without a password): the work that `decoy`
        takes (`capsule.auth.decoys`), for nothing. Busy."""
        return await self._in_thread(self._verify, stored, decoy, _bytes_of(password))

    def outdated(self, stored: str) -> bool:
        """Whether the hash was made at another cost than is set now."""
        return self._hasher.check_needs_rehash(stored)

    def _verify(self, stored: str | None, decoy: str, password: bytes) -> bool:
        try:
            if stored is not None:
                return self._hasher.verify(stored, password)
        except VerifyMismatchError:
            return False
        except (InvalidHashError, VerificationError) as err:
            log.error("password_hash_unusable", reason=type(err).__name__)  # noqa: TRY400 - no traceback: it may show it
        with suppress(VerifyMismatchError):
            self._hasher.verify(decoy, password)
        return False

    async def _in_thread(self, work: Callable[[*Ts], T], *args: *Ts) -> T:
        if self._limiter.statistics().tasks_waiting >= MAX_WAITING:
            raise errors.Busy("too many people are signing in at once; try again", retry_after=RETRY_AFTER)
        return await trio.to_thread.run_sync(work, *args, limiter=self._limiter)


def check_length(password: str, field: str) -> None:
    """InvalidRequest for a password that nobody may choose."""
    if len(password) < MIN_CHARACTERS or len(_bytes_of(password)) > MAX_BYTES:
        raise errors.InvalidRequest(
            f"{field}: a password has at least {MIN_CHARACTERS} characters and at most {MAX_BYTES} bytes in UTF-8.",
            field=field,
        )


def _bytes_of(password: str) -> bytes:
    """Keyboards differ in how they compose letters (RFC 8265 §4.2.2: NFC)."""
    return unicodedata.normalize("NFC", password).encode()
