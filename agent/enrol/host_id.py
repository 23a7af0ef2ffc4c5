"""Which host this machine is, in a file of its own: it outlives the credentials.

What lives here is that host's. Should this machine lose its credentials and come back as another host, the fleet would
take its sandboxes for strangers. Written before anything can be created, and again only when the id is another.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import structlog
import trio

from agent.enrol.credentials import replace_file
from agent.enrol.errors import HostForgotten

if TYPE_CHECKING:
    from pathlib import Path

log = structlog.get_logger()

_HOST_ID = re.compile(r"host-[0-9a-f-]{36}")


class HostIdFile:
    """Where the id is kept, as text. Reads and writes run in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path

    async def load(self) -> str:
        """The id. HostForgotten when there is none that can be read."""
        try:
            text = await trio.to_thread.run_sync(self.path.read_bytes)
        except OSError:
            text = b""
        found = text[:100].decode("ascii", "replace").strip()
        if not _HOST_ID.fullmatch(found):
            raise HostForgotten(
                f"there are sandboxes on this machine, and nothing says which host they are of: write that host's id "
                f"into {self.path} and join with a fresh token of it, or remove them first (capsule-agent purge)"
            )
        return found

    async def keep(self, host_id: str) -> None:
        """Write it, unless it is there. A disk that does not take it is no reason not to serve: it is logged."""
        try:
            await trio.to_thread.run_sync(self._keep, f"{host_id}\n".encode())
        except OSError as err:
            log.error("host_id_not_saved", path=str(self.path), reason=err.strerror)  # noqa: TRY400

    def _keep(self, text: bytes) -> None:
        try:
            if self.path.read_bytes() == text:
                return
        except FileNotFoundError:
            pass
        replace_file(self.path, text)
