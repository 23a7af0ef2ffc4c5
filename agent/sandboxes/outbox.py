"""What the host did or saw by itself, until the control plane has it safe.

Entries are durable before anything is done that would make them untrue to repeat, numbered for the host's whole life,
and leave only by `acknowledge`: an answer lost on the way, or two readers, lose nothing.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Literal

import msgspec
import structlog
import trio

from agent.sandboxes.records import write_atomically
from agent.wire.calls import OutboxEntry

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger()

MAX_ENTRIES = 10_000
"""More unacknowledged entries than this host can have sandboxes: the oldest would be news to nobody."""

REASON_CHARACTERS = 500

Event = Literal["died", "destroyed", "auto_paused", "pause_failed"]
"""See `agent.wire.calls.OutboxEntry`."""


def _first_sequence() -> int:
    """Microseconds since the epoch: more than any outbox counted to before its file was lost."""
    return time.time_ns() // 1000


class _Stored(msgspec.Struct):
    next_sequence: int = msgspec.field(default_factory=_first_sequence)
    entries: list[OutboxEntry] = []


class Outbox:
    """A small file, rewritten whole: entries are rare and few."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = trio.Lock()
        self._stored = _Stored()

    def load(self) -> None:
        """Read what an earlier agent left (blocking; before the loop has work).

        A file that cannot be read is put aside: what it told is lost, which the control plane sees from the listing;
        a host that does not start would be worse.
        """
        if not self._path.exists():
            return
        data = self._path.read_bytes()
        try:
            self._stored = msgspec.json.decode(data, type=_Stored)
        except msgspec.MsgspecError as err:
            aside = self._path.with_name(f"{self._path.name}.broken")
            write_atomically(aside, data)
            self._stored = _Stored()
            write_atomically(self._path, msgspec.json.encode(self._stored))
            log.error("outbox_unreadable", kept_as=str(aside), error=str(err))  # noqa: TRY400 - the error says it

    def entries(self) -> list[OutboxEntry]:
        """Everything not acknowledged yet, oldest first."""
        return list(self._stored.entries)

    async def append(self, sandbox_id: str, event: Event, reason: str) -> None:
        """Add an entry; on disk when this returns. Raises OSError, and then has not changed."""
        async with self._lock:
            entry = OutboxEntry(
                sequence=self._stored.next_sequence,
                sandbox_id=sandbox_id,
                event=event,
                reason=reason[:REASON_CHARACTERS].encode(errors="replace").decode(),
                at=time.time(),
            )
            kept = [*self._stored.entries, entry][-MAX_ENTRIES:]
            await self._replace(_Stored(next_sequence=entry.sequence + 1, entries=kept))

    async def acknowledge(self, sequence: int) -> None:
        """Drop entries up to and including `sequence`."""
        async with self._lock:
            kept = [entry for entry in self._stored.entries if entry.sequence > sequence]
            if len(kept) != len(self._stored.entries):
                await self._replace(_Stored(next_sequence=self._stored.next_sequence, entries=kept))

    async def _replace(self, stored: _Stored) -> None:
        data = msgspec.json.encode(stored)
        await trio.to_thread.run_sync(write_atomically, self._path, data)
        self._stored = stored
