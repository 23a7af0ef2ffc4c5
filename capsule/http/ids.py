"""Ids as the API spells them: a prefix, a dash, a lower-case UUID. Inside the program they are bare UUIDs."""

from __future__ import annotations

import re
from uuid import UUID

from capsule.errors import InvalidRequest

UUID_FORM = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
SANDBOX_FORM = rf"^(sb-{UUID_FORM}|[0-9a-f]{{32}})$"
HOST_FORM = rf"^host-{UUID_FORM}$"
KEY_FORM = rf"^key-{UUID_FORM}$"
LOG_FORM = rf"^log-{UUID_FORM}$"
TEAM_FORM = rf"^team-{UUID_FORM}$"
USER_FORM = rf"^usr-{UUID_FORM}$"

_SANDBOX = re.compile(SANDBOX_FORM.strip("^$"))
_HOST = re.compile(HOST_FORM.strip("^$"))
_KEY = re.compile(KEY_FORM.strip("^$"))
_LOG = re.compile(LOG_FORM.strip("^$"))
_TEAM = re.compile(TEAM_FORM.strip("^$"))
_USER = re.compile(USER_FORM.strip("^$"))


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


def parse_key_id(text: str) -> UUID:
    """`key-{uuid}`; anything else is InvalidRequest."""
    if not _KEY.fullmatch(text):
        raise InvalidRequest("An API key's id is `key-` and a lower-case UUID.", field="key_id")
    return UUID(text.removeprefix("key-"))


def parse_log_id(text: str) -> UUID:
    """`log-{uuid}`; anything else is InvalidRequest."""
    if not _LOG.fullmatch(text):
        raise InvalidRequest("The id of an audit row is `log-` and a lower-case UUID.", field="before_id")
    return UUID(text.removeprefix("log-"))


def parse_team_id(text: str) -> UUID:
    """`team-{uuid}`; anything else is InvalidRequest."""
    if not _TEAM.fullmatch(text):
        raise InvalidRequest("A team id is `team-` and a lower-case UUID.", field="team_id")
    return UUID(text.removeprefix("team-"))


def parse_user_id(text: str) -> UUID:
    """`usr-{uuid}`; anything else is InvalidRequest."""
    if not _USER.fullmatch(text):
        raise InvalidRequest("A person's id is `usr-` and a lower-case UUID.", field="user_id")
    return UUID(text.removeprefix("usr-"))


def sandbox_id(value: UUID) -> str:
    """A sandbox's id as the API spells it."""
    return f"sb-{value}"


def host_id(value: UUID) -> str:
    """A host's id as the API spells it."""
    return f"host-{value}"


def team_id(value: UUID) -> str:
    """A team's id as the API spells it."""
    return f"team-{value}"


def key_id(value: UUID) -> str:
    """An API key's id as the API spells it."""
    return f"key-{value}"


def log_id(value: UUID) -> str:
    """The id of a row of the audit trail as the API spells it."""
    return f"log-{value}"


def user_id(value: UUID) -> str:
    """A person's id as the API spells it."""
    return f"usr-{value}"
