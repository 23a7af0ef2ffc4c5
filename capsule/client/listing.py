"""Lists, which come in pages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from msgspec import Struct

from capsule.client.answers import ProcessInfo
from capsule.client.transport import Transport, decode, given, segment

PAGE = 200


class TrioProcesses:
    """What exec and streams have started in a sandbox and still runs."""

    def __init__(self, transport: Transport, sandbox: str) -> None:
        self._transport = transport
        self._path = f"{sandbox}/processes"

    async def list(self) -> list[ProcessInfo]:
        """All of them, by pid."""
        found: list[ProcessInfo] = []
        cursor: str | None = None
        while True:
            params = given(limit=PAGE, cursor=cursor)
            page = await self._transport.call(_ProcessPage, "GET", self._path, params=params, again=True)
            found += page.items
            cursor = page.next_cursor
            if cursor is None:
                return found

    async def signal(self, process: int | str, signal: str | int = "SIGTERM") -> None:
        """Send a signal to the process with this pid or tag, and to its whole process group. NotFound."""
        await self._transport.send("DELETE", f"{self._path}/{segment(process)}", params={"signal": str(signal)})


async def pages(transport: Transport, item: type[Struct], path: str, params: Mapping[str, Any]) -> AsyncIterator[Any]:
    """The items of a bare array, page by page, as its Link headers lead."""
    cursor: str | None = None
    while True:
        sent = {**params, "limit": PAGE, **given(cursor=cursor)}
        response = await transport.send("GET", path, params=sent, again=True)
        for one in decode(response.content, list[item]):  # type: ignore[valid-type]
            yield one
        following = response.links.get("next", {}).get("url", "")
        cursor = next(iter(parse_qs(urlsplit(following).query).get("cursor", [])), None)  # never its host
        if cursor is None:
            return


class _ProcessPage(Struct):
    items: list[ProcessInfo]
    next_cursor: str | None = None
