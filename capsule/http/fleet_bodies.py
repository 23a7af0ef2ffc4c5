"""Bodies of /v1/hosts, as operators send and get them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule.http import fields, ids
from capsule.http.bodies import Cursor
from capsule.http.platform import AnyHost
from capsule.model import HostType

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from capsule.fleet.views import FleetHost, Joining, MadeHost

Place = Annotated[str, Meta(min_length=1, max_length=128, pattern=fields.NO_NUL)]
RegistrationToken = Annotated[str, Meta(description="For one registration, within an hour; shown once.")]
JoinCommand = Annotated[str, Meta(description="All that is to be typed on the machine, as root.")]
HostTag = Annotated[
    str, Meta(pattern=fields.HOST_TAG, description="Letters, digits and `._:=-`, for example `gpu` or `zone=a`.")
]


class CreateHostBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A host to be."""

    type: Annotated[HostType, Meta(description="`regular`: the platform's; `byoc`: a team's own.")]
    team_id: (
        Annotated[str, Meta(pattern=ids.TEAM_FORM, description="Whose; the session's team unless given.")] | UnsetType
    ) = UNSET
    provider: Place | UnsetType = UNSET
    availability_zone: Place | UnsetType = UNSET


class HostTagBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A tag for a host."""

    tag: HostTag


class HostPageQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """Which page of the hosts."""

    limit: fields.Limit = 50
    cursor: Cursor | UnsetType = UNSET


class DeleteHostQuery(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to delete it."""

    force: Annotated[bool, Meta(description="End the sandboxes that live or rest there with it.")] = False


class CreatedHost(Struct, kw_only=True):
    """A host that nothing has joined yet."""

    host: AnyHost
    registration_token: RegistrationToken
    join_command: JoinCommand

    @classmethod
    def of(cls, made: MadeHost) -> CreatedHost:
        return cls(
            host=AnyHost.seen(made.host), registration_token=made.joining.token, join_command=made.joining.command
        )


class HostToken(Struct, kw_only=True):
    """What makes a machine this host."""

    registration_token: RegistrationToken
    join_command: JoinCommand

    @classmethod
    def of(cls, joining: Joining) -> HostToken:
        return cls(registration_token=joining.token, join_command=joining.command)


class Hosts(Struct, kw_only=True):
    """A page of hosts."""

    items: list[AnyHost]
    next_cursor: str | UnsetType = UNSET


class HostTags(Struct, kw_only=True):
    """All tags of a host, in the order of the alphabet; at most 64."""

    items: list[str]


class HostDeletion(Struct, kw_only=True):
    """What would end with a host."""

    host: AnyHost
    sandbox_ids: Annotated[list[str], Meta(description="That live or rest there, oldest first.")]

    @classmethod
    def of(cls, host: FleetHost, sandboxes: Sequence[UUID]) -> HostDeletion:
        return cls(host=AnyHost.seen(host), sandbox_ids=[ids.sandbox_id(one) for one in sandboxes])
