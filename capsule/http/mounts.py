"""Resources that answer under two names from the same handlers: `/v1/sandboxes` and `/v1/capsules`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsule.http.operations import Operation

NAMES = ("/v1/sandboxes", "/v1/capsules")


def under_both_names(rows: list[Operation[Any, Any]]) -> list[Operation[Any, Any]]:
    """The rows, and each once more under the other name. Fields in JSON keep their names (`sandbox_id`)."""
    return [*rows, *(_alias(row) for row in rows)]


def _alias(row: Operation[Any, Any]) -> Operation[Any, Any]:
    return replace(
        row,
        name=f"{row.name}UnderCapsules",
        alias_of=row.name,
        path=NAMES[1] + row.path.removeprefix(NAMES[0]),
        tag="capsules",
        summary=f"{row.summary} (the same as under {NAMES[0]})",
    )
