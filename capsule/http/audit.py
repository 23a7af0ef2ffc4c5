"""/v1/audit-logs: who did what."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule import errors
from capsule.http import fields, ids
from capsule.http.answers import Timestamp, given, timestamp
from capsule.http.operations import Call, Operation, Success, json_response
from capsule.model import Position
from capsule.people.views import AuditFilter, Outcome, Scope
from capsule.principals import ActorType

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.people_ports import AuditService
    from capsule.people.views import AuditEntry

MOMENT_FORM = (
    r"^[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?"
    rf"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9]){fields.END}"
)
"""RFC 3339. More digits than microseconds are refused: they would have to be dropped, and rows with them."""

WORD_FORM = rf"^[a-z][a-z0-9_]{{0,63}}{fields.END}"
MAX_WORDS = 32

_MOMENT = re.compile(MOMENT_FORM)

Word = Annotated[str, Meta(pattern=WORD_FORM)]
ResourceTypes = Annotated[
    list[Word],
    Meta(
        min_length=1,
        max_length=MAX_WORDS,
        description="Only rows of these, such as `sandbox`; repeat it or separate by commas. One that is not "
        "known (yet) matches nothing.",
    ),
]
Actions = Annotated[
    list[Word],
    Meta(
        min_length=1,
        max_length=MAX_WORDS,
        description="Only rows with these, such as `create`; repeat it or separate by commas. Both given: rows that "
        "match both.",
    ),
]
Before = Annotated[
    str,
    Meta(
        pattern=MOMENT_FORM,
        description="`next_before` of the last page, together with `before_id`: RFC 3339, to the microsecond.",
        extra_json_schema={"format": "date-time"},
    ),
]
BeforeId = Annotated[
    str, Meta(pattern=ids.LOG_FORM, description="`next_before_id` of the last page, together with `before`.")
]


class ListAuditLogsQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which rows, and which page of them."""

    before: Before | UnsetType = UNSET
    before_id: BeforeId | UnsetType = UNSET
    limit: fields.Limit = 50
    resource_type: ResourceTypes | UnsetType = UNSET
    action: Actions | UnsetType = UNSET


class AuditLog(Struct, kw_only=True):
    """A row of the trail. All texts are plain data, whatever they look like: escape them where they are shown."""

    id: str
    created_at: Timestamp
    actor_type: ActorType
    actor_id: (
        Annotated[str, Meta(description="A user's or an API key's id; the system, and nobody known, have none.")]
        | UnsetType
    ) = UNSET
    actor_name: Annotated[str, Meta(description="A user's address, an API key's name, or a part of the system.")]
    resource_type: str
    resource_id: str
    action: str
    scope: Annotated[Scope, Meta(description="`admin` rows are for admins and owners of the team.")]
    status: Outcome
    metadata: dict[str, str]

    @classmethod
    def of(cls, entry: AuditEntry) -> AuditLog:
        """As the API shows it."""
        return cls(
            id=ids.log_id(entry.id),
            created_at=timestamp(entry.created_at),
            actor_type=entry.actor_type,
            actor_id=given(_actor_id(entry)),
            actor_name=entry.actor_name,
            resource_type=entry.resource_type,
            resource_id=entry.resource_id,
            action=entry.action,
            scope=entry.scope,
            status=entry.status,
            metadata=dict(entry.metadata),
        )


class AuditPage(Struct, kw_only=True):
    """Newest first. `next_before` and `next_before_id` are there when older rows follow."""

    items: list[AuditLog]
    next_before: Timestamp | UnsetType = UNSET
    next_before_id: str | UnsetType = UNSET


def operations(service: AuditService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = AuditHandlers(service)
    return [
        Operation(
            name="listAuditLogs",
            method="GET",
            path="/v1/audit-logs",
            handler=handlers.list,
            summary="Read the audit trail",
            description="Of your session's team. Members see scope `team`, admins and owners also `admin`.",
            tag="audit",
            query=ListAuditLogsQuery,
            successes=(Success(status=200, description="A page.", body=AuditPage),),
            errors=(errors.NoTeam, errors.DatabaseUnavailable),
        )
    ]


class AuditHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: AuditService) -> None:
        self._service = service

    async def list(self, call: Call[None, ListAuditLogsQuery]) -> TrioResponse:
        query = call.query
        wanted = AuditFilter(
            resource_types=frozenset() if query.resource_type is UNSET else frozenset(query.resource_type),
            actions=frozenset() if query.action is UNSET else frozenset(query.action),
        )
        page = await self._service.list(call.principal, wanted, query.limit, parse_before(query))
        answer = AuditPage(items=[AuditLog.of(entry) for entry in page.items])
        if page.after is not None:
            answer.next_before = timestamp(page.after.created_at)
            answer.next_before_id = ids.log_id(page.after.id)
        return json_response(answer)


def parse_before(query: ListAuditLogsQuery) -> Position | None:
    """Where the last page ended; InvalidRequest for half of it, and for a day or an hour that is not."""
    if query.before is UNSET and query.before_id is UNSET:
        return None
    if query.before is UNSET or query.before_id is UNSET:
        missing = "before" if query.before is UNSET else "before_id"
        raise errors.InvalidRequest(
            f"{missing}: is missing; give `before` and `before_id` together, as the last page had them.", field=missing
        )
    return Position(parse_moment(query.before), ids.parse_log_id(query.before_id))


def parse_moment(text: str) -> datetime:
    """RFC 3339 with up to 6 digits of a second's fraction; InvalidRequest for anything else."""
    try:
        moment = datetime.fromisoformat(text.upper()) if _MOMENT.fullmatch(text) else None
        if moment is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):  # a 31st of June; beyond the years 1 to 9999 in UTC
        pass
    raise errors.InvalidRequest(
        "before: must be a moment as in 2026-01-31T23:59:59.123456Z (RFC 3339; a + is %2B in a query).", field="before"
    )


def _actor_id(entry: AuditEntry) -> str | None:
    if entry.actor_id is None:
        return None
    return ids.key_id(entry.actor_id) if entry.actor_type == "api_key" else ids.user_id(entry.actor_id)
