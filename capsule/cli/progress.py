"""How far a copy is, on a terminal's stderr: one line that is written over, a few times a second."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field

from capsule.cli import stdio
from capsule.cli.output import printable, size

BETWEEN = 0.1
"""Seconds between two pictures."""
NAME_WIDTH = 32
BAR_WIDTH = 24


@dataclass(slots=True)
class Progress:
    """Call it with the bytes that have gone, and how many there are. Shows nothing where nobody looks."""

    name: str
    shown: bool = field(default_factory=lambda: stdio.is_terminal(stdio.STDERR))
    _began: float = field(default_factory=time.monotonic)
    _drawn: float | None = None

    def __call__(self, done: int, total: int | None) -> None:
        """So far."""
        now = time.monotonic()
        if not self.shown or (self._drawn is not None and now - self._drawn < BETWEEN and done != total):
            return
        self._drawn = now
        self._draw(self.line(done, total, now - self._began))

    def close(self) -> None:
        """What was shown stays; what comes next stands below it."""
        if self._drawn is not None:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def line(self, done: int, total: int | None, seconds: float) -> str:
        """`name  [####----]  50%  1.0 MiB  3.1 MiB/s`"""
        name = printable(self.name)
        name = name if len(name) <= NAME_WIDTH else f"…{name[1 - NAME_WIDTH :]}"
        rate = f"{size(int(done / seconds))}/s" if seconds > 0 else ""
        if not total:
            return f"{name}  {size(done)}  {rate}"
        share = min(done / total, 1.0)
        filled = int(share * BAR_WIDTH)
        bar = "#" * filled + "-" * (BAR_WIDTH - filled)
        return f"{name}  [{bar}] {share:4.0%}  {size(done)}  {rate}"

    @staticmethod
    def _draw(line: str) -> None:
        try:
            width = os.get_terminal_size(stdio.STDERR).columns - 1
        except OSError:
            width = 0
        sys.stderr.write("\r\x1b[K" + (line[:width] if width > 0 else line))
        sys.stderr.flush()
