"""Keeps the files that tell of our programs up to date: `programs.json` always, the ready file while we are ready.

Owns: both files. Owned by: the dev nursery. Takes: `changed`. Emits: the files. Dies when: cancelled; a write in
progress is finished first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from capsule.dev import files

if TYPE_CHECKING:
    from collections.abc import Callable

LOOK_INTERVAL = 1.0
"""Seconds between looks that nothing asked for: the database server is restarted without a word."""


class Ready(msgspec.Struct, frozen=True):
    """The ready file."""

    url: str
    api_key: str
    agent_pids: list[int]
    control_pids: list[int]
    postgres_pids: list[int]


class Recorder:
    """See the module's docstring. `pids`: of the programs to be remembered; `ready`: None while we are not."""

    def __init__(
        self, data: Path, ready_file: Path | None, *, pids: Callable[[], list[int]], ready: Callable[[], Ready | None]
    ) -> None:
        self._data = data
        self._ready_file = ready_file
        self._pids = pids
        self._ready = ready
        self._written: tuple[list[int], Ready | None] | None = None
        self._writing = trio.Lock()
        self._wanted = trio.Event()

    def changed(self) -> None:
        """Something is different from what the files say."""
        self._wanted.set()

    async def run(self) -> None:
        """Write after every change, until cancelled."""
        while True:
            with trio.move_on_after(LOOK_INTERVAL):
                await self._wanted.wait()
            self._wanted = trio.Event()
            if (self._pids(), self._ready()) != self._written:
                await self.write()

    async def write(self) -> None:
        """Have the files say what is; on disk when this returns."""
        async with self._writing:  # of two writers the later one has the later state
            state = self._pids(), self._ready()
            await trio.to_thread.run_sync(self._write, *state)
            self._written = state

    def _write(self, pids: list[int], ready: Ready | None) -> None:
        files.remember_programs(self._data, pids)
        if self._ready_file is None:
            return
        if ready is None:
            self._ready_file.unlink(missing_ok=True)
        else:
            files.replace(self._ready_file, msgspec.json.format(msgspec.json.encode(ready)) + b"\n")
