"""Ids as the API spells them: a prefix, a dash, a lower-case UUID. Inside the program they are bare UUIDs."""

from __future__ import annotations

import re
from uuid import UUID

from capsule.errors import InvalidRequest

UUID_FORM = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
SANDBOX_FORM = rf"^(sb-{UUID_FORM}|[0-9a-f]{{32}})$"
HOST_FORM = rf"^host-{UUID_FORM}$"

_SANDBOX = re.compile(SANDBOX_FORM.strip("^$"))
_HOST = re.compile(HOST_FORM.strip("^$"))


def parse_sandbox_id(text: str) -> UUID:
    """`sb-{uuid}`, or the bare 32 digits (host names cannot carry the dashes). Anything else is InvalidRequest."""
    if not _SANDBOX.fullmatch(text):
        raise InvalidRequest("A sandbox id is `sb-` and a lower-case UUID, or its 32 hex digits.", field="sandbox_id")
    return UUID(text.removeprefix("sb-"))


def parse_host_id(text: str) -> UUID:
    """`host-{uuid}`; anything else is InvalidRequest."""
    if not _HOST.fullmatch(text):
        raise InvalidRequest("A host id is `host-` and a lower-case UUID.", field="host_id")
    return UUID(text.removeprefix("host-"))


def sandbox_id(value: UUID) -> str:
    """A sandbox's id as the API spells it."""
    return f"sb-{value}"


def host_id(value: UUID) -> str:
    """A host's id as the API spells it."""
    return f"host-{value}"


def team_id(value: UUID) -> str:
    """A team's id as the API spells it."""
    return f"team-{value}"
