"""Templates and API keys: what a team has besides its sandboxes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Literal, Protocol

from capsule.client.answers import ApiKey, NewApiKey, Template
from capsule.client.listing import pages
from capsule.client.transport import LONG_TIMEOUT, Transport, given, segment


class HasId(Protocol):
    """A sandbox of either client."""

    @property
    def id(self) -> str:
        """Of the sandbox."""
        ...


class TrioTemplates:
    """What sandboxes start from: the platform's, and your team's snapshots."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(
        self,
        sandbox: HasId | str,
        name: str | None = None,
        *,
        pause: bool = False,
        idempotency_key: str | None = None,
    ) -> Template:
        """Make one of a running or paused sandbox (it, or its id): memory, processes and disk of this moment."""
        sandbox_id = sandbox if isinstance(sandbox, str) else sandbox.id
        body = given(sandbox_id=sandbox_id, name=name, pause=pause)
        return await self._transport.create(Template, "/v1/snapshots", body, idempotency_key)

    async def list(self, *, type: Literal["base", "snapshot"] | None = None) -> AsyncIterator[Template]:  # noqa: A002
        """All of them, newest first, fetched page by page."""
        async for template in pages(self._transport, Template, "/v1/snapshots", given(type=type)):
            yield template

    async def delete(self, name: str) -> None:
        """Delete one of your team's. Conflict (`in_use`, with `sandbox_ids` in its details), NotFound."""
        path = f"/v1/snapshots/{segment(name)}"
        await self._transport.send("DELETE", path, read_timeout=LONG_TIMEOUT)


class TrioApiKeys:
    """The team's API keys. For a user's session (`TrioClient(token=…)`): keys make no keys."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(self, name: str, *, idempotency_key: str | None = None) -> NewApiKey:
        """A new key: its text is in this answer and nowhere else."""
        return await self._transport.create(NewApiKey, "/v1/api-keys", {"name": name}, idempotency_key, read_timeout=60)

    async def list(self) -> AsyncIterator[ApiKey]:
        """All that you may see, newest first."""
        async for key in pages(self._transport, ApiKey, "/v1/api-keys", {}):
            yield key

    async def delete(self, key_id: str) -> None:
        """It ends at once. NotFound."""
        await self._transport.send("DELETE", f"/v1/api-keys/{segment(key_id)}")
