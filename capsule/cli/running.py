"""Runs a command's work with a client, and turns what goes wrong into a line and an exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import click
import trio

from capsule.cli import stdio
from capsule.cli.failures import BROKEN_PIPE, OWN_FAILURE, say
from capsule.client import CapsuleError, TrioClient

DEBUG_VARIABLE = "CAPSULE_DEBUG"

T = TypeVar("T")


class Command(click.Command):
    """A command whose failures are a line on stderr."""

    def invoke(self, ctx: click.Context) -> Any:
        """Call it."""
        stdio.hold_places()
        with failures_in_a_line():
            return super().invoke(ctx)


def run(action: Callable[[TrioClient], Awaitable[T]]) -> T:
    """Do it with a client for the server and the credentials that are set; what it returns."""

    async def act() -> T:
        async with TrioClient() as capsule:
            return await action(capsule)

    return trio.run(act)


@contextmanager
def failures_in_a_line() -> Iterator[None]:
    """Errors that are to be expected, also within groups; bugs of ours, too, but those say so."""
    try:
        yield
    except (Exception, BaseExceptionGroup) as error:  # noqa: BLE001 - told apart below, none is lost
        found = list(_leaves(error))
    else:
        return
    _leave(found)


def _leave(errors: list[BaseException]) -> NoReturn:
    for error in errors:
        if not isinstance(error, Exception) or isinstance(error, click.exceptions.Exit | click.Abort):
            raise error  # Ctrl-C, sys.exit
    if all(isinstance(error, BrokenPipeError) for error in errors):
        _let_go_of_stdout()
        sys.exit(BROKEN_PIPE)
    for error in errors:
        if isinstance(error, click.ClickException):
            raise error
    for line in dict.fromkeys(_explanation(error) for error in errors):
        say(line)
    sys.exit(OWN_FAILURE)


def _explanation(error: BaseException) -> str:
    if isinstance(error, CapsuleError):
        return str(error)
    if isinstance(error, UnicodeEncodeError):
        return f"{error.object!r} is not UTF-8, as names and arguments in a sandbox are"
    if isinstance(error, OSError):
        return ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error)
    return f"a bug of ours: {type(error).__name__}: {error} (with {DEBUG_VARIABLE}=1 it says where)"


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The single errors of a group, however nested."""
    if isinstance(error, BaseExceptionGroup):
        for one in error.exceptions:
            yield from _leaves(one)
    else:
        yield error


def _let_go_of_stdout() -> None:
    """The interpreter flushes it once more at its end, and would complain."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)
