"""schema.sql, the migrations, and the program that applies them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import asyncpg
import pytest
import trio

from capsule.db.connection import Connection
from capsule.db.errors import MigrationChanged, SchemaTooNew
from capsule.db.migrate import load_migrations, migrate, sql_directory
from capsule.db.pool import Database, open_database
from capsule.db.programs import find_programs

STEPS = [migration.name for migration in load_migrations()]

DATA = """
    insert into users (id, email, name) values ('00000000-0000-0000-0000-0000000000a1', 'ada@example.com', 'Ada');
    insert into teams (id, name, slug) values ('00000000-0000-0000-0000-0000000000b1', 'T', 'aaaaaa-bbbbbb');
    insert into memberships (team_id, user_id, role, is_default)
      values ('00000000-0000-0000-0000-0000000000b1', '00000000-0000-0000-0000-0000000000a1', 'owner', true);
    insert into hosts (id, type) values ('00000000-0000-0000-0000-0000000000c1', 'regular');
    insert into templates (team_id, name, type) values ('00000000-0000-0000-0000-000000000000', 'minimal', 'base');
    insert into sandboxes (id, team_id, template, vcpus, memory_mb, disk_mb, transition_deadline)
      values ('00000000-0000-0000-0000-0000000000d1', '00000000-0000-0000-0000-0000000000b1', 'minimal', 1, 512, 1024,
              now());
    insert into audit_logs (actor_type, resource_type, resource_id, action, scope, status)
      values ('system', 'sandbox', 'sb', 'create', 'team', 'success');
"""


async def _dump(dsn: str) -> str:
    """Schema and seed rows as pg_dump writes them, without what differs by itself."""
    seeds = ["--table=teams", "--table=sandbox_transitions"]
    program = await trio.to_thread.run_sync(lambda: find_programs(None).directory / "pg_dump")
    text = ""
    for options in (["--schema-only"], ["--data-only", "--inserts", "--column-inserts", *seeds]):
        done = await trio.run_process([program, *options, "--no-owner", f"--dbname={dsn}"], capture_stdout=True)
        lines = done.stdout.decode().splitlines()
        text += "\n".join(sorted(lines) if "--data-only" in options else lines) + "\n"
    text = re.sub(r"(?m)^(--|\\).*\n", "", text)
    return re.sub(r"\d{4}-\d\d-\d\d [\d:.]+\+00", "NOW", text)


async def _contents(db: Database) -> dict[str, list[str]]:
    async def read(tx: Connection) -> dict[str, list[str]]:
        tables = await tx.fetch("select tablename from pg_tables where schemaname = 'public' order by 1")
        return {
            name: sorted(row["r"] for row in await tx.fetch(f"select t::text as r from {name} t"))  # noqa: S608
            for name in (row["tablename"] for row in tables)
        }

    return await db.run(read)


async def _execute(dsn: str, sql: str) -> None:
    async with open_database(dsn) as db:
        await db.transaction(lambda tx: tx.execute(sql))


async def test_schema_and_migrations_give_the_same_database(empty_postgres_dsn: str, postgres_dsn: str):
    """A database made from schema.sql and one brought up by migrations/ have the same catalog and seed rows."""
    schema = await trio.Path(sql_directory() / "schema.sql").read_text()
    await _execute(empty_postgres_dsn, schema)
    assert await _dump(empty_postgres_dsn) == await _dump(postgres_dsn)


async def test_migrating_a_database_made_from_the_schema_changes_nothing(empty_postgres_dsn: str):
    """Somebody who loads schema.sql by hand can go on with migrations."""
    await _execute(empty_postgres_dsn, await trio.Path(sql_directory() / "schema.sql").read_text())
    before = await _dump(empty_postgres_dsn)
    async with open_database(empty_postgres_dsn) as db:
        assert await migrate(db) == STEPS
    assert await _dump(empty_postgres_dsn) == before


async def test_each_step_can_be_repeated_and_leaves_data_alone(postgres_dsn: str):
    """Every file run again, over a database with rows in it: same catalog, same rows."""
    async with open_database(postgres_dsn) as db:
        await db.transaction(lambda tx: tx.execute(DATA))
        catalog, rows = await _dump(postgres_dsn), await _contents(db)
        assert rows["sandboxes"]
        for migration in load_migrations():
            await db.transaction(lambda tx, sql=migration.sql: tx.execute(sql))
            assert await _contents(db) == rows, migration.name
        assert await _dump(postgres_dsn) == catalog


async def test_steps_are_applied_once_in_order(empty_postgres_dsn: str):
    """The first call applies all of them, the second none."""
    async with open_database(empty_postgres_dsn) as db:
        assert await migrate(db) == STEPS
        assert await migrate(db) == []
    assert [int(name[:4]) for name in STEPS] == list(range(1, len(STEPS) + 1))


async def test_two_control_planes_start_at_once(empty_postgres_dsn: str):
    """Each step is applied by exactly one of them, and both succeed."""
    applied: list[str] = []

    async def start() -> None:
        async with open_database(empty_postgres_dsn) as db:
            applied.extend(await migrate(db))

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(start)
    assert sorted(applied) == STEPS


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """A copy of migrations/ to tamper with."""
    return Path(shutil.copytree(sql_directory() / "migrations", tmp_path / "migrations"))


async def test_a_changed_step_is_refused(postgres_dsn: str, steps: Path):
    """History is not rewritten: an applied file with other bytes stops the start."""
    with (steps / STEPS[1]).open("a") as file:
        file.write("-- harmless\n")
    async with open_database(postgres_dsn) as db:
        with pytest.raises(MigrationChanged, match=STEPS[1]):
            await migrate(db, directory=steps)


async def test_a_database_from_the_future_is_refused(postgres_dsn: str, steps: Path):
    """An old program does not write into a newer schema."""
    (steps / STEPS[-1]).unlink()
    async with open_database(postgres_dsn) as db:
        with pytest.raises(SchemaTooNew, match=STEPS[-1]):
            await migrate(db, directory=steps)


async def test_a_failing_step_leaves_nothing_of_itself(postgres_dsn: str, steps: Path):
    """The step before it stays, the failing one is undone; mended, it is applied by the next start."""
    (steps / "9001_good.sql").write_text("create table good (id int);")
    broken = steps / "9002_broken.sql"
    broken.write_text("create table half (id int); select 1/0;")
    async with open_database(postgres_dsn) as db:
        with pytest.raises(asyncpg.DivisionByZeroError):
            await migrate(db, directory=steps)
        tables = await _contents(db)
        assert "good" in tables
        assert "half" not in tables
        broken.write_text("create table half (id int);")
        assert await migrate(db, directory=steps) == ["9002_broken.sql"]


def test_the_wheel_carries_the_sql_beside_the_code():
    """The build configuration puts both where `sql_directory` looks first."""
    text = (sql_directory() / "pyproject.toml").read_text()
    assert '"schema.sql" = "capsule/db/schema.sql"' in text
    assert '"migrations" = "capsule/db/migrations"' in text
    assert subprocess.run(["git", "check-ignore", "-q", "schema.sql"], cwd=sql_directory(), check=False).returncode == 1
