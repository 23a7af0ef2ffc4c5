"""How a machine becomes a host and stays one: one-time token, refresh, heartbeat.

Each step is one transaction: a crash at any moment leaves the token unspent or the host registered, never half of
either.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import structlog
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from capsule import errors
from capsule.db.errors import ConstraintViolated, DatabaseUnavailable
from capsule.db.queries import audit
from capsule.db.queries import hosts as host_rows
from capsule.db.queries import refresh_tokens as refresh_rows
from capsule.hosts import tokens
from capsule.hosts.addresses import parse_address
from capsule.hosts.ca import fingerprint, requested_key
from capsule.hosts.registration_tokens import store_of
from capsule.hosts.rotation import exchange
from capsule.model import HostCredentials, HostView

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from capsule.config import Settings
    from capsule.db.connection import Connection
    from capsule.db.pool import Database
    from capsule.db.queries.hosts import HostRow
    from capsule.hosts.addresses import HostAddress
    from capsule.hosts.ca import CertificateAuthority
    from capsule.model import HostRegistration, HostType

log = structlog.get_logger()

HEARTBEAT_TIMEOUT = 5.0
"""Seconds for the database: the agent gives a whole heartbeat ten."""

TOKEN_SPENT = "the registration token is unknown, expired or already used; make a new one for this host"  # noqa: S105
ADDRESS_HELD = "another host has this address; give this one an address of its own, or delete the other host"
REFRESH_SPENT = "the refresh token is unknown, expired or spent; register this host again with a new token"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewHost:
    """What an operator of a host is to do. Unknown outside of the answer: only the hash is stored."""

    host: HostView
    registration_token: str


class HostEnrolment:
    """See the module's docstring. `forget` is told of hosts whose connection is not to be trusted any more."""

    def __init__(
        self,
        db: Database,
        authority: CertificateAuthority,
        settings: Settings,
        *,
        forget: Callable[[UUID], None] = lambda _: None,
    ) -> None:
        self._db = db
        self._registration_tokens = store_of(settings, db)
        self._authority = authority
        self._host_tokens = tokens.HostTokens(settings)
        self._refresh_tokens = tokens.RefreshTokens(settings)
        self._forget = forget

    async def create_host(
        self,
        kind: HostType = "regular",
        *,
        team_id: UUID | None = None,
        provider: str | None = None,
        availability_zone: str | None = None,
        created_by: UUID | None = None,
    ) -> NewHost:
        """A host that is `pending` until its agent has registered with the token, within an hour, and was reached.

        A crash, or TokensUnavailable, leaves a host without a token: `new_token` makes one.
        """
        with _translated():
            row = await self._db.transaction(
                partial(
                    host_rows.insert,
                    type=kind,
                    team_id=team_id,
                    provider=provider,
                    availability_zone=availability_zone,
                )
            )
        return NewHost(host=view(row), registration_token=await self._keep_token(row.id, created_by))

    async def new_token(self, host: UUID, *, created_by: UUID | None = None) -> str:
        """A fresh one-time token for a host; its older ones are void. NotFound when it is gone; TokensUnavailable."""
        with _translated():
            _alive(await self._db.run(host_rows.get, host))
        return await self._keep_token(host, created_by)

    async def _keep_token(self, host: UUID, created_by: UUID | None) -> str:
        token = tokens.new_registration_token()
        with _translated():
            await self._registration_tokens.keep(host, tokens.digest(token), created_by=created_by)
        return token

    async def register(self, request: HostRegistration) -> HostCredentials:
        """Spend a one-time token; the host is online when it was reached at its address, soon after.

        Unauthorized when the token is unknown, spent or expired; Conflict when another host is at the address;
        InvalidRequest; TokensUnavailable. A failure leaves the token unspent.
        """
        if not tokens.is_well_formed(request.token, tokens.REGISTRATION_PREFIX):
            raise errors.Unauthorized(TOKEN_SPENT)
        address = parse_address(request.address)
        refresh_token = tokens.new_refresh_token()

        async def use(tx: Connection, host: UUID) -> tuple[HostRow, str]:
            return await self._register(tx, host, request, address, refresh_token)

        with _translated():
            registered = await self._registration_tokens.spend(tokens.digest(request.token), use)
        if registered is None:
            raise errors.Unauthorized(TOKEN_SPENT)
        host, cert_pem = registered
        self._forget(host.id)
        log.info("host_registered", host_id=str(host.id), address=host.address, epoch=host.credential_epoch)
        return self._credentials(host, refresh_token, cert_pem)

    async def _register(
        self, tx: Connection, host_id: UUID, request: HostRegistration, address: HostAddress, refresh_token: str
    ) -> tuple[HostRow, str]:
        cert_pem = self._authority.issue_host_certificate(request.csr_pem, host_id, address.name)
        if await host_rows.holds_address(tx, address.text, other_than=host_id):
            raise errors.Conflict(ADDRESS_HELD)
        row = await host_rows.register(
            tx,
            host_id,
            address=address.text,
            cert_fingerprint=fingerprint(cert_pem),
            arch=request.arch,
            cpu_cores=request.cpu_cores,
            memory_mb=request.memory_mb,
            disk_gb=request.disk_gb,
        )
        await refresh_rows.insert(
            tx,
            host_id=host_id,
            family=uuid4(),
            sha256=tokens.digest(refresh_token),
            expires_at=datetime.now(UTC) + tokens.REFRESH_LIFETIME,
        )
        return _alive(row), cert_pem

    async def refresh(self, refresh_token: str, csr_pem: str | None) -> HostCredentials:
        """Spend a refresh token; with a CSR the certificate is renewed as well, without one `cert_pem` is empty.

        Unauthorized when the token is unknown, expired or spent. A spent one ends the whole family, since one of two
        holders stole it, unless the same key asks again and nobody used the answer: then that answer was lost.
        """
        if not tokens.is_well_formed(refresh_token, tokens.REFRESH_PREFIX):
            raise errors.Unauthorized(REFRESH_SPENT)
        public_key = None if csr_pem is None else _key_bytes(csr_pem)
        following = self._refresh_tokens.following(refresh_token, public_key)
        with _translated():
            renewed = await self._db.transaction(self._refresh, refresh_token, following, csr_pem)
        if renewed is None:
            raise errors.Unauthorized(REFRESH_SPENT)
        host, cert_pem = renewed
        return self._credentials(host, following, cert_pem)

    async def _refresh(
        self, tx: Connection, refresh_token: str, following: str, csr_pem: str | None
    ) -> tuple[HostRow, str] | None:
        """None: refused. Returned, not raised: what a theft changes must be committed."""
        exchanged = await exchange(tx, refresh_token, following)
        host = None if exchanged is None else await host_rows.get(tx, exchanged.row.host_id)
        if exchanged is None or host is None:
            return None
        if csr_pem is None or host.address is None:
            return host, ""
        address = parse_address(host.address)
        cert_pem = self._authority.issue_host_certificate(csr_pem, host.id, address.name)
        await host_rows.pin_certificate(tx, host.id, fingerprint(cert_pem), again=exchanged.again)
        return host, cert_pem

    async def heartbeat(self, host: UUID, token: str) -> None:
        """The host is alive. Unauthorized for a bad token, Forbidden for another host's, NotFound for a deleted one."""
        claims = self._host_tokens.check(token)
        if claims.host_id != host:
            raise errors.Forbidden("this token is another host's")
        with _translated():
            await self._db.transaction(_heard, claims, timeout=HEARTBEAT_TIMEOUT)

    def _credentials(self, host: HostRow, refresh_token: str, cert_pem: str) -> HostCredentials:
        return HostCredentials(
            host=view(host),
            token=self._host_tokens.issue(host.id, host.credential_epoch),
            refresh_token=refresh_token,
            cert_pem=cert_pem,
            ca_cert_pem=self._authority.cert_pem,
        )


async def _heard(tx: Connection, claims: tokens.HostClaims) -> None:
    row = _alive(await host_rows.heartbeat(tx, claims.host_id))
    if row.credential_epoch != claims.epoch:
        raise errors.Unauthorized("this host was registered anew since this token was issued")
    if row.status != "unreachable" or not row.proven:
        return
    back = await host_rows.mark_status(
        tx, row.id, from_status=row.status, generation=row.generation, to_status="online"
    )
    if back is not None:
        await audit.append(
            tx,
            actor_type="system",
            actor_id=None,
            actor_name="system",
            team_id=row.team_id,
            resource_type="host",
            resource_id=f"host-{row.id}",
            action="marked_up",
            scope="admin",
        )
        log.info("host_marked_up", host_id=str(row.id))


def view(row: HostRow) -> HostView:
    """A row as its owners see it."""
    return HostView(
        id=row.id,
        type="byoc" if row.type == "byoc" else "regular",
        status=row.status,
        created_at=row.created_at,
        address=row.address,
        arch=row.arch,
        cpu_cores=row.cpu_cores,
        memory_mb=row.memory_mb,
        disk_gb=row.disk_gb,
        team_id=row.team_id,
        provider=row.provider,
        availability_zone=row.availability_zone,
        tags=tuple(row.tags),
        last_heartbeat_at=row.last_heartbeat,
        cordoned=row.cordoned,
    )


def _alive(row: HostRow | None) -> HostRow:
    if row is None:
        raise errors.NotFound("there is no such host; it may have been deleted")
    return row


def _key_bytes(csr_pem: str) -> bytes:
    return requested_key(csr_pem).public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


@contextmanager
def _translated() -> Iterator[None]:
    """What the database says, in the words of the API."""
    try:
        yield
    except DatabaseUnavailable as err:
        raise errors.DatabaseUnavailable("the database does not answer; try again", retry_after=1) from err
    except ConstraintViolated as err:
        if err.name in {"hosts_cpu_cores", "hosts_memory_mb", "hosts_disk_gb"}:
            field = err.name.removeprefix("hosts_")
            raise errors.InvalidRequest(f"{field} must be at least 1", field=field) from err
        raise
