"""…/files/stream: files of any size, and directories as tar."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from capsule.http.operations import Operation
    from capsule.http.spool import Spool
    from capsule.http.stream_ports import StreamService


def operations(service: StreamService, spool: Spool) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    return []
