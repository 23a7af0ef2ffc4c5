"""Sandboxes as the HTTP layer sees them (`capsule.http.ports.SandboxService`): each call checks the team first."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from capsule.db.queries import sandboxes, templates
from capsule.model import Page, Position, TemplateView
from capsule.sandboxes.rows import view

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from uuid import UUID

    from capsule.db.connection import Connection
    from capsule.model import (
        CreateSandbox,
        CreateSnapshot,
        ExecCall,
        ExecResult,
        ExecStarted,
        FileEntry,
        Forked,
        ProcessView,
        SandboxStatus,
        SandboxView,
        TemplateType,
    )
    from capsule.principals import Principal
    from capsule.sandboxes.create import Creator
    from capsule.sandboxes.destroy import Destroyer
    from capsule.sandboxes.execs import Execs
    from capsule.sandboxes.files import Files
    from capsule.sandboxes.fork import Forker
    from capsule.sandboxes.pause import Pauser
    from capsule.sandboxes.resume import Resumer
    from capsule.sandboxes.rows import SandboxRows
    from capsule.sandboxes.snapshots import Snapshots

V = TypeVar("V", "SandboxView", "TemplateView")


@dataclass(frozen=True, kw_only=True)
class Sandboxes:
    """The use-cases, one method each."""

    rows: SandboxRows
    creator: Creator
    destroyer: Destroyer
    pauser: Pauser
    resumer: Resumer
    forker: Forker
    execs: Execs
    files: Files

    async def create(self, principal: Principal, request: CreateSandbox, idempotency_key: str | None) -> SandboxView:
        """See `create.Creator`."""
        return await self.creator.create(principal, request, idempotency_key)

    async def list(
        self, principal: Principal, statuses: frozenset[SandboxStatus] | None, limit: int, before: Position | None
    ) -> Page[SandboxView]:
        """Newest first; one row more is read to know whether another page follows."""

        async def page(connection: Connection) -> list[sandboxes.SandboxRow]:
            position = None if before is None else (before.created_at, before.id)
            return await sandboxes.list_page(
                connection, principal.team_id, statuses=statuses, limit=limit + 1, before=position
            )

        rows = await self.rows.run(page)
        return _page([view(row) for row in rows], limit)

    async def get(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """Also for one that has ended."""
        return view(await self.rows.get(principal, sandbox))

    async def destroy(self, principal: Principal, sandbox: UUID) -> None:
        """See `destroy.Destroyer`."""
        await self.destroyer.destroy(principal, sandbox)

    async def pause(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """See `pause.Pauser`."""
        return await self.pauser.pause(principal, sandbox)

    async def resume(self, principal: Principal, sandbox: UUID) -> SandboxView:
        """See `resume.Resumer`."""
        return await self.resumer.resume(principal, sandbox)

    async def fork(
        self, principal: Principal, sandbox: UUID, count: int, idempotency_key: str | None
    ) -> Sequence[Forked]:
        """See `fork.Forker`."""
        return await self.forker.fork(principal, sandbox, count, idempotency_key)

    async def exec(self, principal: Principal, sandbox: UUID, call: ExecCall) -> ExecResult | ExecStarted:
        """See `execs.Execs`."""
        return await self.execs.exec(await self.rows.running(principal, sandbox), call)

    async def ping(self, principal: Principal, sandbox: UUID) -> None:
        """Reset the idle clock in the database and on the host."""
        await self.execs.ping(await self.rows.running(principal, sandbox))

    async def processes(self, principal: Principal, sandbox: UUID) -> Sequence[ProcessView]:
        """Everything started by exec that still runs."""
        return await self.execs.processes(await self.rows.running(principal, sandbox))

    async def signal_process(self, principal: Principal, sandbox: UUID, process: int | str, signal: int) -> None:
        """Signal a process group."""
        await self.execs.signal(await self.rows.running(principal, sandbox), process, signal)

    async def write_file(
        self, principal: Principal, sandbox: UUID, path: str, size: int, source: AsyncIterator[bytes]
    ) -> None:
        """Write a file, atomically."""
        await self.files.write(await self.rows.running(principal, sandbox), path, size, source)

    @asynccontextmanager
    async def read_file(
        self, principal: Principal, sandbox: UUID, path: str
    ) -> AsyncIterator[tuple[int | None, AsyncIterator[bytes]]]:
        """Read a file."""
        async with self.files.read(await self.rows.running(principal, sandbox), path) as opened:
            yield opened

    async def list_files(self, principal: Principal, sandbox: UUID, path: str, depth: int) -> Sequence[FileEntry]:
        """List a directory."""
        return await self.files.list(await self.rows.running(principal, sandbox), path, depth)

    async def mkdir(self, principal: Principal, sandbox: UUID, path: str) -> FileEntry:
        """Make a directory."""
        return await self.files.mkdir(await self.rows.running(principal, sandbox), path)

    async def remove_file(self, principal: Principal, sandbox: UUID, path: str) -> None:
        """Remove a file or a tree."""
        await self.files.remove(await self.rows.running(principal, sandbox), path)


@dataclass(frozen=True, kw_only=True)
class Templates:
    """What sandboxes start from (`capsule.http.ports.TemplateService`)."""

    rows: SandboxRows
    snapshots: Snapshots

    async def create(self, principal: Principal, request: CreateSnapshot, idempotency_key: str | None) -> TemplateView:
        """See `snapshots.Snapshots`."""
        return _template(await self.snapshots.create(principal, request, idempotency_key))

    async def delete(self, principal: Principal, name: str) -> None:
        """See `snapshots.Snapshots`."""
        await self.snapshots.delete(principal, name)

    async def list(
        self, principal: Principal, kind: TemplateType | None, limit: int, before: Position | None
    ) -> Page[TemplateView]:
        """The platform's and the team's, newest first."""

        async def page(connection: Connection) -> list[templates.TemplateRow]:
            position = None if before is None else (before.created_at, before.id)
            return await templates.list_page(connection, principal.team_id, type=kind, limit=limit + 1, before=position)

        return _page([_template(row) for row in await self.rows.run(page)], limit)


def _page(views: list[V], limit: int) -> Page[V]:
    shown = tuple(views[:limit])
    after = Position(shown[-1].created_at, shown[-1].id) if len(views) > limit else None
    return Page(shown, after)


def _template(row: templates.TemplateRow) -> TemplateView:
    return TemplateView(
        id=row.id,
        name=row.name,
        type="base" if row.type == "base" else "snapshot",
        size_bytes=row.size_bytes,
        platform=row.platform,
        created_at=row.created_at,
        vcpus=row.vcpus,
        memory_mb=row.memory_mb,
    )
