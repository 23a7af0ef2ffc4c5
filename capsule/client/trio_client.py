"""The client for Trio programs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import trio

from capsule.client.answers import Login
from capsule.client.credentials import resolve
from capsule.client.sandboxes import TrioSandboxes
from capsule.client.templates import TrioApiKeys, TrioTemplates
from capsule.client.transport import Transport


class TrioClient:
    """A server, and who asks it. Use it as a context manager; one is enough for a program, for any number of tasks.

    `url`, and `api_key` or `token` (of a user's session): what is None comes from CAPSULE_URL and CAPSULE_API_KEY, then
    from the file that `capsule login` writes. ConfigurationError when no URL is found; when there is no credential, at
    the first call that needs one.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, token: str | None = None) -> None:
        self._transport = Transport(resolve(url, api_key, token))
        self.sandboxes = TrioSandboxes(self._transport)
        self.templates = TrioTemplates(self._transport)
        self.api_keys = TrioApiKeys(self._transport)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self.url}>"

    @property
    def url(self) -> str:
        """The server's."""
        return self._transport.credentials.url

    async def login(self, email: str, password: str) -> Login:
        """A session of a user; this client goes on as before. Unauthorized."""
        return await self._transport.anonymous(Login, "/v1/auth/login", {"email": email, "password": password})

    async def aclose(self) -> None:
        """Close its connections. Streams end with their own contexts."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        with trio.move_on_after(5, shield=True):
            await self.aclose()
