"""/v1/api-keys: what programs are let in with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule import errors
from capsule.http import cursors, fields, ids
from capsule.http.answers import Timestamp, optional_time, timestamp
from capsule.http.bodies import Cursor
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.http.sandboxes import LINK, page_response

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.people_ports import ApiKeyService
    from capsule.people.views import ApiKeyView, FoundUser
    from capsule.people.views import NewApiKey as MadeKey

TAG = "api keys"
PATH = "/v1/api-keys"

LastUsed = Annotated[Timestamp | UnsetType, Meta(description="To the minute; absent: never.")]


class CreateApiKeyBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A key to be made."""

    name: Annotated[fields.Name, Meta(description="What it is for; the audit trail says it.")]


class ListApiKeysQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which page of the keys."""

    limit: fields.Limit = 50
    cursor: Cursor | UnsetType = UNSET


class KeyCreator(Struct, kw_only=True):
    """Who made a key."""

    user_id: str
    email: str
    name: str

    @classmethod
    def of(cls, person: FoundUser | None) -> KeyCreator | UnsetType:
        """Nothing for a key whose maker's account is gone."""
        if person is None:
            return UNSET
        return cls(user_id=ids.user_id(person.user_id), email=person.email, name=person.name)


class ApiKey(Struct, kw_only=True):
    """A key without its secret: `prefix` is its first 12 characters."""

    id: str
    name: str
    prefix: str
    created_at: Timestamp
    last_used: LastUsed = UNSET
    created_by: KeyCreator | UnsetType = UNSET

    @classmethod
    def of(cls, view: ApiKeyView) -> ApiKey:
        """As the API shows it."""
        return cls(
            id=ids.key_id(view.id),
            name=view.name,
            prefix=view.prefix,
            created_at=timestamp(view.created_at),
            last_used=optional_time(view.last_used),
            created_by=KeyCreator.of(view.created_by),
        )


class NewApiKey(Struct, kw_only=True):
    """A key at the only moment when all of it is known."""

    id: str
    name: str
    prefix: str
    key: Annotated[str, Meta(description="The key. Keep it: it is shown this once.")]
    created_at: Timestamp
    created_by: KeyCreator | UnsetType = UNSET

    @classmethod
    def of(cls, made: MadeKey) -> NewApiKey:
        """As the API shows it."""
        view = made.view
        return cls(
            id=ids.key_id(view.id),
            name=view.name,
            prefix=view.prefix,
            key=made.key,
            created_at=timestamp(view.created_at),
            created_by=KeyCreator.of(view.created_by),
        )


def operations(service: ApiKeyService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = ApiKeyHandlers(service)
    return [
        Operation(
            name="createApiKey",
            method="POST",
            path=PATH,
            handler=handlers.create,
            summary="Make an API key",
            description="For your session's team. The answer is the only one that has the key in it; the same "
            "Idempotency-Key gets it again, within 24 hours.",
            tag=TAG,
            body=CreateApiKeyBody,
            idempotent=True,
            successes=(Success(status=201, description="The key.", body=NewApiKey),),
            errors=(
                errors.NoTeam,
                errors.QuotaExceeded,
                errors.IdempotencyKeyReused,
                errors.Conflict,
                errors.DatabaseUnavailable,
            ),
        ),
        Operation(
            name="listApiKeys",
            method="GET",
            path=PATH,
            handler=handlers.list,
            summary="List API keys",
            description="Newest first, without those that were revoked: members see their own, admins and owners all "
            "of the team.",
            tag=TAG,
            query=ListApiKeysQuery,
            successes=(Success(status=200, description="A page.", body=list[ApiKey], headers=LINK),),
            errors=(errors.NoTeam, errors.DatabaseUnavailable),
        ),
        Operation(
            name="revokeApiKey",
            method="DELETE",
            path=f"{PATH}/{{key_id}}",
            handler=handlers.revoke,
            summary="Revoke an API key",
            description="It is dead with the next request. Members end their own, admins and owners any of the team.",
            tag=TAG,
            successes=(Success(status=204, description="It is dead."),),
            errors=(errors.NoTeam, errors.Forbidden, errors.NotFound, errors.DatabaseUnavailable),
        ),
    ]


class ApiKeyHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: ApiKeyService) -> None:
        self._service = service

    async def create(self, call: Call[CreateApiKeyBody, None]) -> TrioResponse:
        made = await self._service.create(
            call.principal, name=call.body.name, idempotency_key=call.request.idempotency_key()
        )
        return json_response(NewApiKey.of(made), 201)

    async def list(self, call: Call[None, ListApiKeysQuery]) -> TrioResponse:
        query = call.query
        before = None if query.cursor is UNSET else cursors.parse_position(query.cursor)
        page = await self._service.list(call.principal, query.limit, before)
        shown = [ApiKey.of(view) for view in page.items]
        return page_response(shown, page, call.request.path, [("limit", str(query.limit))])

    async def revoke(self, call: Call[None, None]) -> TrioResponse:
        await self._service.revoke(call.principal, ids.parse_key_id(call.path["key_id"]))
        return no_content()
