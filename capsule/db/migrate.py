"""Bringing a database to the schema of this version.

Each step of `migrations/` runs in a transaction of its own under an advisory lock, together with the row that records
it: several control planes may start at once, and one that dies leaves a step done or not begun.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec
import structlog
import trio

from capsule.db.connection import Connection
from capsule.db.errors import MigrationChanged, SchemaTooNew
from capsule.db.pool import Database

log = structlog.get_logger()

LOCK = 0x6361_7073_756C_65
"""Advisory lock of whoever migrates ("capsule")."""


class Migration(msgspec.Struct, frozen=True):
    """One file of `migrations/`; `name` is the file's."""

    name: str
    sql: str
    sha256: bytes


def sql_directory() -> Path:
    """Where schema.sql and migrations/ lie: inside the package in a wheel, at the top of the source tree else."""
    packaged = Path(__file__).parent
    return packaged if (packaged / "schema.sql").is_file() else packaged.parents[1]


def load_migrations(directory: Path | None = None) -> list[Migration]:
    """All steps in order. Blocks on the file system."""
    files = sorted((directory or sql_directory() / "migrations").glob("[0-9][0-9][0-9][0-9]_*.sql"))
    texts = [(file.name, file.read_bytes()) for file in files]
    return [Migration(name, text.decode(), hashlib.sha256(text).digest()) for name, text in texts]


async def migrate(
    db: Database,
    *,
    directory: Path | None = None,
    timeout: float = 60.0,  # noqa: ASYNC109 - of each step
) -> list[str]:
    """Apply what is missing; return the names of the steps this call applied.

    Raises MigrationChanged, SchemaTooNew, DatabaseUnavailable, and whatever a faulty step makes the server say. Steps
    before the failing one stay applied.
    """
    migrations = await trio.to_thread.run_sync(load_migrations, directory)
    known = {migration.name: migration.sha256 for migration in migrations}
    await db.transaction(_check, known, timeout=timeout)
    applied = []
    for migration in migrations:
        if await db.transaction(_apply, migration, timeout=timeout):
            log.info("migration_applied", name=migration.name)
            applied.append(migration.name)
    return applied


async def _check(tx: Connection, known: dict[str, bytes]) -> None:
    done = await _done(tx)
    if unknown := sorted(done.keys() - known.keys()):
        raise SchemaTooNew(unknown)
    for name, sha256 in done.items():
        if known[name] != sha256:
            raise MigrationChanged(name)


async def _apply(tx: Connection, migration: Migration) -> bool:
    await tx.execute("select pg_advisory_xact_lock($1)", LOCK)
    if (sha256 := (await _done(tx)).get(migration.name)) is not None:
        if sha256 != migration.sha256:
            raise MigrationChanged(migration.name)
        return False
    await tx.execute(migration.sql)
    await tx.execute("insert into schema_migrations (name, sha256) values ($1, $2)", migration.name, migration.sha256)
    return True


async def _done(tx: Connection) -> dict[str, bytes]:
    """Name and hash of what was applied; the first step makes the table.

    Asks the catalog's rows: to_regclass may answer from a cache older than the lock just waited for.
    """
    table = "select from pg_tables where schemaname = any(current_schemas(false)) and tablename = 'schema_migrations'"
    if await tx.fetchrow(table) is None:
        return {}
    return {row["name"]: row["sha256"] for row in await tx.fetch("select name, sha256 from schema_migrations")}
