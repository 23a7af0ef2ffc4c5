"""What the HTTP layer needs from the rest, and nothing more. Implemented by capsule.sandboxes, .auth, .hosts; by fakes
in the tests. Every method may raise any class of capsule.errors; anything else is a bug and answered 500.

A client that hangs up cancels the call at its next checkpoint: work that must not stop half-way belongs to an actor,
and the call only waits for it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from capsule.http.fleet_port import FleetService
from capsule.http.people_ports import PeopleServices
from capsule.http.stream_ports import StreamService
from capsule.model import (
    CreateSandbox,
    CreateSnapshot,
    ExecCall,
    ExecResult,
    ExecStarted,
    FileEntry,
    Forked,
    HostCredentials,
    HostRegistration,
    Page,
    Position,
    ProcessView,
    SandboxStatus,
    SandboxView,
    TemplateType,
    TemplateView,
)
from capsule.principals import Principal, User


class Authenticator(Protocol):
    """Turns credentials into principals."""

    async def api_key(self, key: str) -> Principal:
        """The holder of `key` (always `cap_` and 40 lower-case hex digits here). Unauthorized when it is unknown or
        revoked, NoTeam when its team is gone. Compares hashes in constant time."""
        ...

    async def session(self, token: str) -> User:
        """The person whose session `token` is, with the role that the database has for them now. Unauthorized when it
        is not ours, expired, logged out, or older than a change of password; a team that is gone is just absent."""
        ...


class SandboxService(Protocol):
    """Sandboxes of the principal's team. NotFound for another team's sandbox, as for none."""

    async def create(self, principal: Principal, request: CreateSandbox, idempotency_key: str | None) -> SandboxView:
        """Make a sandbox and wait until it runs."""
        ...

    async def list(
        self,
        principal: Principal,
        statuses: frozenset[SandboxStatus] | None,
        limit: int,
        before: Position | None,
    ) -> Page[SandboxView]:
        """Newest first. `statuses` None: all but stopped and error."""
        ...

    async def get(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """Also for stopped ones."""
        ...

    async def destroy(self, principal: Principal, sandbox: UUID) -> None:
        """End it; nothing to do for one that is stopped."""
        ...

    async def pause(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """Put it to rest and wait until it is; nothing to do for one that is."""
        ...

    async def resume(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """Wake it and wait until it runs; nothing to do for one that does."""
        ...

    async def fork(
        self, principal: Principal, sandbox: UUID, count: int, idempotency_key: str | None
    ) -> Sequence[Forked]:
        """Make `count` children of a running sandbox, and wait until each runs or has failed."""
        ...

    async def exec(self, principal: Principal, sandbox: UUID, call: ExecCall) -> ExecResult | ExecStarted:
        """Run a command; ExecStarted if and only if `call.background`. ExecTimeout and OutputTooLarge carry output."""
        ...

    async def ping(self, principal: Principal, sandbox: UUID) -> None:
        """Reset the idle clock."""
        ...

    async def processes(self, principal: Principal, sandbox: UUID) -> Sequence[ProcessView]:
        """All processes started by exec that still run."""
        ...

    async def signal_process(self, principal: Principal, sandbox: UUID, process: int | str, signal: int) -> None:
        """Signal a process group by pid or tag."""
        ...

    async def write_file(
        self, principal: Principal, sandbox: UUID, path: str, size: int, source: AsyncIterator[bytes]
    ) -> None:
        """Write exactly `size` bytes from `source`, atomically."""
        ...

    def read_file(
        self, principal: Principal, sandbox: UUID, path: str
    ) -> AbstractAsyncContextManager[tuple[int | None, AsyncIterator[bytes]]]:
        """Entering answers whether the file can be read (FileNotFound, IsADirectory, …) with its size when known.
        An exception from the iterator breaks the client's connection."""
        ...

    async def list_files(self, principal: Principal, sandbox: UUID, path: str, depth: int) -> Sequence[FileEntry]:
        """Entries below a directory, down to `depth` levels."""
        ...

    async def mkdir(self, principal: Principal, sandbox: UUID, path: str) -> FileEntry:
        """Make a directory and its parents; Conflict when it exists."""
        ...

    async def remove_file(self, principal: Principal, sandbox: UUID, path: str) -> None:
        """Remove a file, or a directory with all below it."""
        ...


class TemplateService(Protocol):
    """What sandboxes can start from."""

    async def create(self, principal: Principal, request: CreateSnapshot, idempotency_key: str | None) -> TemplateView:
        """Freeze a sandbox of the team. Conflict when the name is taken."""
        ...

    async def delete(self, principal: Principal, name: str) -> None:
        """Forget a template of the team. InUse while sandboxes depend on it; Forbidden for the platform's."""
        ...

    async def list(
        self, principal: Principal, kind: TemplateType | None, limit: int, before: Position | None
    ) -> Page[TemplateView]:
        """Newest first: the platform's and the team's; `kind` None: all."""
        ...


class HostService(Protocol):
    """The agents' side of the API."""

    async def register(self, request: HostRegistration) -> HostCredentials:
        """Spend a one-time token. Unauthorized when it is unknown, spent or expired."""
        ...

    async def refresh(self, refresh_token: str, csr_pem: str | None) -> HostCredentials:
        """Spend a refresh token; with a CSR the certificate is renewed as well. Unauthorized when it is spent."""
        ...

    async def heartbeat(self, host: UUID, token: str) -> None:
        """The host is alive. Unauthorized for a bad token, Forbidden for another host's, NotFound for a deleted one."""
        ...


class Readiness(Protocol):
    """Whether requests can be served."""

    async def __call__(self) -> bool:
        """True when the database answers."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """All of them, as the application is built from."""

    authenticator: Authenticator
    sandboxes: SandboxService
    streams: StreamService
    templates: TemplateService
    hosts: HostService
    people: PeopleServices
    fleet: FleetService
    ready: Readiness
