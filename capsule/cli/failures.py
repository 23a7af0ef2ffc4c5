"""How the command line fails: one line on stderr, and an exit code no process of a sandbox means by accident."""

from __future__ import annotations

from contextlib import suppress
from typing import IO, Any

import click

OWN_FAILURE = 125
"""Ours, not the process's: as docker, `env` and `timeout` have it."""
INTERRUPTED = 130
BROKEN_PIPE = 141
"""128 + SIGPIPE: whoever read our output has gone."""


class Failure(click.ClickException):
    """Something the user should know, and what to do about it."""

    exit_code = OWN_FAILURE

    def show(self, file: IO[Any] | None = None) -> None:
        """In one line, on stderr."""
        say(self.format_message(), file)


def say(message: str, file: IO[Any] | None = None) -> None:
    """One line on stderr, ours. What came from afar cannot steer the terminal."""
    text = " ".join(message.split())
    line = "capsule: " + "".join(letter if letter.isprintable() else "\ufffd" for letter in text)
    with suppress(OSError):  # nobody can be told; the exit code still says it
        click.echo(line, file, err=True)
