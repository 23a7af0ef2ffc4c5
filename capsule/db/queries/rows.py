"""Rows as frozen structs: one struct per result, its fields named like the columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import msgspec

from capsule.db.connection import Record

S = TypeVar("S", bound=msgspec.Struct)


def columns(kind: type[msgspec.Struct], table: str = "") -> str:
    """The struct's fields as a list for `select` or `returning`, each with `table.` before it when given."""
    prefix = f"{table}." if table else ""
    return ", ".join(f"{prefix}{field}" for field in kind.__struct_fields__)


def one(kind: type[S], record: Record | None) -> S | None:
    """The row, or None when there is none."""
    return None if record is None else kind(**dict(record.items()))


def only(kind: type[S], record: Record | None) -> S:
    """The row of a statement that always gives one, such as an insert."""
    if record is None:
        raise AssertionError(f"a statement gave no {kind.__name__}")
    return kind(**dict(record.items()))


def many(kind: type[S], records: Iterable[Record]) -> list[S]:
    """All rows."""
    return [kind(**dict(record.items())) for record in records]
