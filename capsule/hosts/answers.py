"""What agents say, made fit to be acted on and stored: a host is a peer over the network, and may be anybody's."""

from __future__ import annotations

import ipaddress
from typing import Any, TypeVar

import msgspec
import structlog

from agent.wire.faults import Fault, FaultCode

B = TypeVar("B", bound=msgspec.Struct)
log = structlog.get_logger()

MAX_TEXT = 1000
"""Characters kept of a host's explanation."""


def parse_answer(kind: type[B], body: dict[str, Any]) -> B:
    """An answer as `kind`. Fault `internal` when it does not fit: that is the host's failure, never the client's."""
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as err:
        log.warning("host_answer_refused", kind=kind.__name__, reason=str(err))
        raise Fault(FaultCode.INTERNAL, "the sandbox's host gave an answer that makes no sense; try again") from err


def storable_text(text: str) -> str:
    """An explanation for people: one bounded line without control characters (PostgreSQL refuses NUL)."""
    return "".join(one if one.isprintable() else " " for one in text[:MAX_TEXT]).strip()


def storable_address(text: str) -> str | None:
    """An IP address without a zone, or None when it is none."""
    try:
        return None if "%" in text else str(ipaddress.ip_address(text))
    except ValueError:
        return None
