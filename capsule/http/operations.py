"""The route table's vocabulary: one Operation per handler. It registers the route and describes it in the OpenAPI
document, so neither can say what the other does not do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from uuid import UUID

import msgspec
from quart_trio.wrappers import TrioResponse

from capsule.auth.access import ACCESS, Access
from capsule.errors import CapsuleError
from capsule.http import ids
from capsule.http.requests import ApiRequest
from capsule.principals import Asker, Principal, User

B = TypeVar("B")
Q = TypeVar("Q")


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(Generic[B, Q]):
    """One request to an operation, checked: `body` and `query` are structs of the operation's types. `ask_again`: who
    asks, as things are now."""

    request: ApiRequest
    path: Mapping[str, str]
    body: B
    query: Q
    asker: Asker | None
    ask_again: Callable[[], Awaitable[Asker | None]]

    async def renewed(self) -> Call[B, Q]:
        """The same, when time has passed since: for a handler that reads the body itself. As the first time, refuses
        who is let in no more, or no more to this."""
        return replace(self, asker=await self.ask_again())

    @property
    def principal(self) -> Principal:
        """Who acts for a team, in an operation whose access asks for one."""
        principal = self.asker.principal() if isinstance(self.asker, User) else self.asker
        if principal is None:
            raise LookupError("this operation is not done for the asker's team")
        return principal

    @property
    def user(self) -> User:
        """The person who asks, in an operation for sessions only."""
        if not isinstance(self.asker, User):
            raise TypeError("this operation is not for sessions only")
        return self.asker

    @property
    def sandbox(self) -> UUID:
        """The sandbox in the path; InvalidRequest for text that is not a sandbox id."""
        return ids.parse_sandbox_id(self.path["sandbox_id"])


Handler = Callable[[Call[B, Q]], Awaitable[TrioResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Success:
    """One way to succeed. `body`: a struct (or list of them) sent as JSON, None for nothing; `raw`: bytes of
    `media_type` instead, or of `or_media_type`. `headers`: name → description of headers worth knowing."""

    status: int
    description: str
    body: Any = None
    media_type: str = "application/json"
    or_media_type: str = ""
    raw: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation(Generic[B, Q]):
    """A row of the route table.

    `path` is a template such as `/v1/sandboxes/{sandbox_id}`. `alias_of`: the operation that this is under another
    path; who may do it is that one's row in `capsule.auth.access`. `body`: struct of the JSON body, None for none;
    `body_optional`: an empty body is an empty object. `form`: multipart parts (name → JSON schema) that the handler
    reads itself, `optional_form`: those that need not come; `lenient_query`: so it does with the query string, and
    refuses nothing in it. `errors`: what the use-case can raise; those every operation has are added by the document.
    """

    name: str
    method: str
    path: str
    handler: Handler[B, Q]
    summary: str
    description: str = ""
    tag: str
    alias_of: str = ""
    body: type[msgspec.Struct] | None = None
    body_optional: bool = False
    form: Mapping[str, Any] = field(default_factory=dict)
    optional_form: Mapping[str, Any] = field(default_factory=dict)
    query: type[msgspec.Struct] | None = None
    lenient_query: bool = False
    idempotent: bool = False
    successes: tuple[Success, ...]
    errors: tuple[type[CapsuleError], ...] = ()
    documented: bool = True

    @property
    def access(self) -> Access:
        """Who may do it."""
        return ACCESS[self.alias_of or self.name]


class StreamResponse(TrioResponse):
    """An answer whose bytes come from an iterator, as fast as the client takes them. `size` None: chunked.
    `patience`: seconds a client may take for each 64 KiB; None: what ordinary answers have.

    The iterator failing, or ending before or after `size` bytes, breaks the connection.
    """

    def __init__(
        self, chunks: AsyncIterator[bytes], size: int | None, media_type: str, *, patience: float | None = None
    ) -> None:
        super().__init__(b"", 200, {"Content-Type": media_type})
        self.chunks = chunks
        self.size = size
        self.patience = patience
        self.headers.remove("Content-Length")
        if size is not None:
            self.headers["Content-Length"] = str(size)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> TrioResponse:
    """`value` (structs, lists of structs) as JSON."""
    content = {"Content-Type": "application/json", **(headers or {})}
    return TrioResponse(msgspec.json.encode(value), status, content)


def no_content() -> TrioResponse:
    """204."""
    response = TrioResponse(b"", 204)
    response.headers.remove("Content-Type")
    response.headers.remove("Content-Length")
    return response
