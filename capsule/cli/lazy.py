"""Commands that are imported when they are called, so that `capsule exec` does not wait for the platform."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import click

from capsule.cli.failures import INTERRUPTED, Failure

NOT_EVERYWHERE = frozenset({"termios", "tty", "fcntl", "pwd", "grp", "resource"})
"""Python's own, of Unix: nothing to install brings them."""


@dataclass(frozen=True, slots=True)
class Lazy:
    """Where a command is, and what the list of commands says of it. `extra`: the extra of the package it needs."""

    module: str
    name: str
    help: str
    extra: str = "client"

    def load(self) -> click.Command:
        """Import it."""
        command = getattr(importlib.import_module(self.module), self.name)
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.module}.{self.name} is no command")
        return command


class LazyGroup(click.Group):
    """A group of `Lazy` commands."""

    def __init__(self, name: str, lazy: Mapping[str, Lazy], **settings: Any) -> None:
        super().__init__(name, **settings)
        self._lazy = dict(lazy)

    def list_commands(self, ctx: click.Context) -> list[str]:
        """By name."""
        del ctx
        return sorted(self._lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import it now. A library that is not installed is said in a line."""
        del ctx
        entry = self._lazy.get(cmd_name)
        if entry is None:
            return None
        try:
            return entry.load()
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] in {"agent", "capsule"}:
                raise
            if error.name in NOT_EVERYWHERE:
                raise Failure(f"`capsule {cmd_name}` does not work on this system: it has no {error.name}") from error
            raise Failure(
                f"`capsule {cmd_name}` needs {error.name}, which is not installed: pip install 'capsule[{entry.extra}]'"
            ) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """As click does, without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, self._lazy[name].help) for name in self.list_commands(ctx)])

    def invoke(self, ctx: click.Context) -> Any:
        """Ctrl-C is no failure to be explained."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
