"""The terminal we run in: raw while it shows a remote one, and given back as it was, whatever happens."""

from __future__ import annotations

import os
import termios
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from capsule.cli import stdio

DEFAULT_SIZE = (80, 24)
LARGEST = 4096
LEAVE_MODES = (
    b"\x1b[?1047l\x1b[?1000l\x1b[?1002l\x1b[?1003l\x1b[?1004l\x1b[?1006l\x1b[?2004l\x1b[?1l\x1b>\x1b[?25h\x1b[0m\r\n"
)
"""Ends what a full-screen program may have begun, when it is cut off: other screen, mouse, pasting, keys, cursor."""


@dataclass(slots=True)
class LocalTerminal:
    """Keys come from `input`, the picture goes to `output`."""

    input: int = stdio.STDIN
    output: int = stdio.STDOUT
    _before: list[Any] | None = field(default=None, repr=False)

    @contextmanager
    def raw(self) -> Iterator[None]:
        """Every key comes as it is typed, Ctrl-C too. Afterwards as before."""
        self._before = termios.tcgetattr(self.input)
        try:
            tty.setraw(self.input, termios.TCSANOW)
            yield
        finally:
            before, self._before = self._before, None
            with suppress(termios.error):  # it has gone: its window was closed
                termios.tcsetattr(self.input, termios.TCSANOW, before)

    def raw_again(self) -> None:
        """After we were stopped and continued: the shell has set the terminal to its own liking meanwhile."""
        with suppress(termios.error, OSError):
            if self._before is not None and os.tcgetpgrp(self.input) == os.getpgrp():
                tty.setraw(self.input, termios.TCSANOW)

    def size(self) -> tuple[int, int]:
        """Columns and rows, as a remote terminal can have them."""
        for fd in (self.output, self.input):
            try:
                cols, rows = os.get_terminal_size(fd)
            except OSError:  # redirected
                continue
            if cols and rows:
                return min(cols, LARGEST), min(rows, LARGEST)
        return DEFAULT_SIZE
