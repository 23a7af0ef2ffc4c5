"""NAME=VALUE on the command line."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import click


class Pair(click.ParamType):  # type: ignore[type-arg]  # generic in newer versions only
    """NAME=VALUE; `NAME` alone, where `from_environment`, takes our own environment's value, as docker does."""

    name = "NAME=VALUE"

    def __init__(self, *, from_environment: bool = False) -> None:
        self._from_environment = from_environment

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        """Cut at the first `=`."""
        if isinstance(value, tuple):
            return value
        name, separator, text = str(value).partition("=")
        if name and separator:
            return name, text
        if name and self._from_environment and name in os.environ:
            return name, os.environ[name]
        raise click.BadParameter(f"{value!r} is not NAME=VALUE", ctx, param)


def as_mapping(pairs: Iterable[tuple[str, str]]) -> dict[str, str] | None:
    """The last one of a name counts; None for none."""
    return dict(pairs) or None
