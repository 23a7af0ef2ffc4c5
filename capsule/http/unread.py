"""Large answers that their clients have not read yet: how many bytes of them this server holds at most."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from capsule.errors import Busy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from quart_trio.wrappers import TrioResponse

    from capsule.http.requests import ApiRequest

SMALL_BYTES = 256 * 1024
"""Answers up to this size are not counted: the number of connections bounds them."""

MAX_UNREAD_BYTES = 256 * 1024 * 1024
"""A command's output can be six times as long in JSON (control characters), and a client may take hours to read it."""


class UnreadAnswers:
    """One for the whole server."""

    def __init__(self, limit: int = MAX_UNREAD_BYTES) -> None:
        self._limit = limit
        self.held = 0

    def admit(self, request: ApiRequest, answer: TrioResponse) -> TrioResponse:
        """Count `answer` until it has been sent or given up. Busy when too much waits already: it is dropped then."""
        size = answer.content_length or 0
        if size > SMALL_BYTES:
            request.cleanup.enter_context(self._hold(size))
        return answer

    @contextmanager
    def _hold(self, size: int) -> Iterator[None]:
        if self.held + size > self._limit:
            raise Busy("Too many large answers wait for clients that do not read; try again.", retry_after=5)
        self.held += size
        try:
            yield
        finally:
            self.held -= size
