"""/v1/hosts: what agents call. They register with a one-time token, refresh their credentials, and say they live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from capsule import errors
from capsule.http import credentials, fields, ids
from capsule.http.answers import Timestamp, given, optional_time, timestamp
from capsule.http.operations import Call, Operation, Success, json_response, no_content
from capsule.model import HostCredentials, HostRegistration, HostType, HostView

if TYPE_CHECKING:
    from quart_trio.wrappers import TrioResponse

    from capsule.http.ports import HostService

TAG = "hosts"


class RegisterHostBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """An agent with its one-time token; it keeps its private key."""

    token: fields.TokenText
    address: Annotated[
        str, Meta(min_length=1, max_length=255, pattern=fields.NO_NUL, description="host:port of its wire listener.")
    ]
    arch: Literal["x86_64", "aarch64"]
    cpu_cores: Annotated[int, Meta(ge=1, le=4096)]
    memory_mb: Annotated[int, Meta(ge=1, le=2**31 - 1)]
    disk_gb: Annotated[int, Meta(ge=0, le=2**31 - 1)]
    csr_pem: fields.PemText


class RefreshHostBody(Struct, kw_only=True, forbid_unknown_fields=True):
    """A refresh token, spent by this; with a CSR the certificate is renewed too."""

    refresh_token: fields.TokenText
    csr_pem: fields.PemText | UnsetType = UNSET


class Host(Struct, kw_only=True):
    """A machine that runs sandboxes."""

    id: str
    type: HostType
    status: Annotated[
        str,
        Meta(description="`pending` until it joins, `online`, `unreachable`, or `draining` until it is uncordoned."),
    ]
    cordoned: Annotated[bool, Meta(description="It takes no new sandboxes.")]
    address: str | UnsetType = UNSET
    arch: str | UnsetType = UNSET
    cpu_cores: int | UnsetType = UNSET
    memory_mb: int | UnsetType = UNSET
    disk_gb: int | UnsetType = UNSET
    team_id: str | UnsetType = UNSET
    provider: str | UnsetType = UNSET
    availability_zone: str | UnsetType = UNSET
    tags: list[str]
    created_at: Timestamp
    last_heartbeat_at: Timestamp | UnsetType = UNSET

    @classmethod
    def of(cls, view: HostView) -> Host:
        return cls(
            id=ids.host_id(view.id),
            type=view.type,
            status=view.status,
            cordoned=view.cordoned,
            address=given(view.address),
            arch=given(view.arch),
            cpu_cores=given(view.cpu_cores),
            memory_mb=given(view.memory_mb),
            disk_gb=given(view.disk_gb),
            team_id=UNSET if view.team_id is None else ids.team_id(view.team_id),
            provider=given(view.provider),
            availability_zone=given(view.availability_zone),
            tags=list(view.tags),
            created_at=timestamp(view.created_at),
            last_heartbeat_at=optional_time(view.last_heartbeat_at),
        )


class RegisteredHost(Struct, kw_only=True):
    """A host's credentials, shown once."""

    host: Host
    token: Annotated[str, Meta(description="For X-Host-Token; 7 days.")]
    refresh_token: Annotated[str, Meta(description="For one refresh; 60 days.")]
    cert_pem: str
    ca_cert_pem: str

    @classmethod
    def of(cls, credentials: HostCredentials) -> RegisteredHost:
        return cls(
            host=Host.of(credentials.host),
            token=credentials.token,
            refresh_token=credentials.refresh_token,
            cert_pem=credentials.cert_pem,
            ca_cert_pem=credentials.ca_cert_pem,
        )


def operations(service: HostService) -> list[Operation[Any, Any]]:
    """The rows of the route table."""
    handlers = HostHandlers(service)
    return [
        Operation(
            name="registerHost",
            method="POST",
            path="/v1/hosts/register",
            handler=handlers.register,
            summary="Register a host",
            description="Spends the one-time token in the body. The agent keeps its private key.",
            tag=TAG,
            body=RegisterHostBody,
            successes=(Success(status=201, description="Its credentials.", body=RegisteredHost),),
            errors=(
                errors.Unauthorized,
                errors.Forbidden,
                errors.NotFound,
                errors.Conflict,
                errors.RateLimited,
                errors.DatabaseUnavailable,
                errors.TokensUnavailable,
            ),
        ),
        Operation(
            name="refreshHost",
            method="POST",
            path="/v1/hosts/auth/refresh",
            handler=handlers.refresh,
            summary="Refresh a host's credentials",
            description="Spends the refresh token. With `csr_pem` the certificate is renewed too.",
            tag=TAG,
            body=RefreshHostBody,
            successes=(Success(status=200, description="Its new credentials.", body=RegisteredHost),),
            errors=(
                errors.Unauthorized,
                errors.Forbidden,
                errors.NotFound,
                errors.RateLimited,
                errors.DatabaseUnavailable,
            ),
        ),
        Operation(
            name="heartbeat",
            method="POST",
            path="/v1/hosts/{host_id}/heartbeat",
            handler=handlers.heartbeat,
            summary="Say that a host lives",
            tag=TAG,
            successes=(Success(status=204, description="Heard."),),
            errors=(errors.Forbidden, errors.NotFound, errors.DatabaseUnavailable),
        ),
    ]


class HostHandlers:
    """Parse, ask the service, render."""

    def __init__(self, service: HostService) -> None:
        self._service = service

    async def register(self, call: Call[RegisterHostBody, None]) -> TrioResponse:
        body = call.body
        request = HostRegistration(
            token=body.token,
            address=body.address,
            arch=body.arch,
            cpu_cores=body.cpu_cores,
            memory_mb=body.memory_mb,
            disk_gb=body.disk_gb,
            csr_pem=body.csr_pem,
        )
        return json_response(RegisteredHost.of(await self._service.register(request)), 201)

    async def refresh(self, call: Call[RefreshHostBody, None]) -> TrioResponse:
        body = call.body
        csr_pem = None if body.csr_pem is UNSET else body.csr_pem
        return json_response(RegisteredHost.of(await self._service.refresh(body.refresh_token, csr_pem)))

    async def heartbeat(self, call: Call[None, None]) -> TrioResponse:
        token = credentials.host_token(call.request.headers)
        await self._service.heartbeat(ids.parse_host_id(call.path["host_id"]), token)
        return no_content()
