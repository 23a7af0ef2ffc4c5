"""Settings of a daemon: a frozen struct filled from the environment, with `.env` files beneath it.

A field `database_url` of a struct loaded with prefix `CAPSULE_` comes from `CAPSULE_DATABASE_URL`. Real environment
variables win over `.env`; an unknown value type or a value that does not fit is a SettingsError naming the variable.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

import msgspec
from dotenv import dotenv_values

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

S = TypeVar("S", bound=msgspec.Struct)


class SettingsError(Exception):
    """A setting is missing or does not fit; the message names the variable and says what it takes."""


def environment(dotenv: Path | None) -> dict[str, str]:
    """The process's environment over the values of `dotenv` (a missing file is an empty one)."""
    below = dotenv_values(dotenv) if dotenv is not None and dotenv.is_file() else {}
    return {**{k: v for k, v in below.items() if v is not None}, **os.environ}


def load_settings(kind: type[S], values: Mapping[str, str], *, prefix: str) -> S:
    """Fill `kind` from the variables in `values` that start with `prefix`; an empty value counts as absent."""
    given = {}
    for field in msgspec.structs.fields(kind):
        value = values.get(prefix + field.name.upper(), "")
        if value != "":
            given[field.name] = value
        elif field.required:
            raise SettingsError(f"{prefix}{field.name.upper()} is not set")
    try:
        return msgspec.convert(given, kind, strict=False)
    except msgspec.ValidationError as err:
        raise SettingsError(_named(str(err), prefix)) from err


def _named(message: str, prefix: str) -> str:
    """Turn msgspec's path (`$.port`) into the variable's name."""
    text, _, path = message.partition(" - at `$.")
    return f"{prefix}{path.rstrip('`').upper()}: {text}" if path else message
