"""Reading the audit trail: every row once, to whom it is for, and quickly."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from functools import partial
from uuid import UUID, uuid4

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capsule.config import Settings
from capsule.db.errors import ConstraintViolated
from capsule.db.pool import open_database
from capsule.db.queries import audit
from capsule.errors import InvalidRequest
from capsule.http.audit import ListAuditLogsQuery, parse_before, parse_moment
from capsule.model import Position
from capsule.people.audit import AuditTrail
from capsule.people.views import AuditFilter
from capsule.principals import Principal

SETTINGS = Settings(database_url="postgresql://", secret_key="s" * 32)
START = datetime(2026, 1, 1, tzinfo=UTC)
PAGE_BLOCKS = 300
"""8-KiB blocks that any page of 50 may touch: a fraction of what the rows fill."""


class Trail:
    """A team's rows and its readers."""

    def __init__(self, db):
        self.db = db
        self.team = uuid4()
        self.reader = AuditTrail(db, SETTINGS)

    def who(self, role):
        return Principal(team_id=self.team, actor_type="user", actor_id=uuid4(), actor_name="a@example.org", role=role)

    async def sql(self, statement, *parameters):
        return await self.db.run(lambda connection: connection.fetch(statement, *parameters), timeout=60)

    async def add(self, *, at=None, resource="sandbox", action="create", scope="team", team=None):
        """A row; returns its id."""
        (row,) = await self.sql(
            """insert into audit_logs (team_id, actor_type, actor_id, actor_name, resource_type, resource_id, action,
                 scope, status, metadata, created_at)
               values ($1, 'user', $2, 'a@example.org', $3, 'x', $4, $5, 'success', '{"k": "v"}', $6) returning id""",
            team or self.team, uuid4(), resource, action, scope, at or datetime.now(UTC),
        )  # fmt: skip
        return row["id"]

    async def all(self, role="owner", limit=50, wanted=AuditFilter(), between=None):  # noqa: B008 - frozen
        """Every entry, page by page; `between` is awaited after each page."""
        seen, before = [], None
        while True:
            page = await self.reader.list(self.who(role), wanted, limit, before)
            assert len(page.items) <= limit
            seen += page.items
            if between is not None:
                await between()
            if page.after is None:
                return seen
            before = page.after


@pytest.fixture
async def trail(postgres_dsn):
    async with open_database(postgres_dsn) as db:
        yield Trail(db)


KINDS = [("sandbox", "create", "team"), ("team", "create", "admin"), ("api_key", "create", "team")]


async def test_pages_of_any_size_have_each_row_once_though_times_are_equal(trail):
    """Rows of few distinct times, read with every limit, by filter and without, while others are added: each that was
    there before is seen exactly once, in order."""
    there = {}
    for number in range(60):
        resource, action, scope = KINDS[number % 3]
        # six rows to a time, and times a microsecond apart: a coarser cursor would drop or repeat rows
        at = START + timedelta(microseconds=number // 6)
        there[await trail.add(at=at, resource=resource, action=action, scope=scope)] = resource
    await trail.add(team=uuid4())

    async def more():
        """One at the top, one among the times that are still to be read."""
        await trail.add(action="pause")
        await trail.add(at=START - timedelta(days=1), action="pause")

    for limit in (1, 2, 5, 6, 7, 13, 59, 60, 200):
        for wanted, kinds in (
            (AuditFilter(), set(there.values())),
            (AuditFilter(actions=frozenset({"create"})), set(there.values())),
            (AuditFilter(resource_types=frozenset({"sandbox", "team"})), {"sandbox", "team"}),
        ):
            seen = await trail.all(limit=limit, wanted=wanted, between=more if limit in {7, 59} else None)
            assert [(e.created_at, e.id) for e in seen] == sorted(((e.created_at, e.id) for e in seen), reverse=True)
            old = [entry.id for entry in seen if entry.action != "pause"]
            assert sorted(old) == sorted(one for one, kind in there.items() if kind in kinds)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(KINDS)), max_size=12), limit=st.integers(1, 5))
def test_paging_is_a_partition(postgres_dsn, rows, limit):
    """Any rows at any few times, any limit, any choice of kinds: the pages together are the rows, sorted."""

    async def main():
        async with open_database(postgres_dsn, max_size=1) as db:
            trail = Trail(db)
            made = []
            for offset, (resource, action, scope) in rows:
                at = START + timedelta(microseconds=offset)
                made.append(
                    (at, await trail.add(at=at, resource=resource, action=action, scope=scope), resource, scope)
                )
            for role in ("member", "owner"):
                for wanted in ({"sandbox"}, {"team", "api_key"}, set()):
                    seen = await trail.all(role, limit, AuditFilter(resource_types=frozenset(wanted)))
                    assert [(entry.created_at, entry.id) for entry in seen] == sorted(
                        (
                            (at, one)
                            for at, one, resource, scope in made
                            if (not wanted or resource in wanted) and (role == "owner" or scope == "team")
                        ),
                        reverse=True,
                    )

    trio.run(main)


async def test_members_see_the_teams_rows_and_admins_all(trail):
    """Nobody another team's, nor those of no team."""
    await trail.add()
    await trail.add(resource="member", action="add", scope="admin")
    await trail.add(team=uuid4())
    await trail.sql(
        """insert into audit_logs (actor_type, resource_type, resource_id, action, scope, status)
           values ('user', 'auth', 'x', 'login_failed', 'admin', 'warning')"""
    )
    for role, seen in (("member", ["sandbox"]), ("admin", ["member", "sandbox"]), ("owner", ["member", "sandbox"])):
        assert sorted(entry.resource_type for entry in await trail.all(role)) == seen
    member = AuditFilter(resource_types=frozenset({"member"}))
    assert await trail.all("member", wanted=member) == []
    assert len(await trail.all("admin", wanted=member)) == 1


async def test_filters_are_or_within_and_and_between(trail):
    for resource, action in (("sandbox", "create"), ("sandbox", "destroy"), ("team", "create"), ("team", "rename")):
        await trail.add(resource=resource, action=action)

    async def matching(resource_types=(), actions=()):
        wanted = AuditFilter(resource_types=frozenset(resource_types), actions=frozenset(actions))
        return sorted(f"{entry.resource_type}:{entry.action}" for entry in await trail.all(wanted=wanted))

    assert await matching(actions=["create"]) == ["sandbox:create", "team:create"]
    assert await matching(["team"]) == ["team:create", "team:rename"]
    assert await matching(["team", "sandbox"], ["create", "rename"]) == ["sandbox:create", "team:create", "team:rename"]
    assert await matching(["sandbox"], ["rename"]) == []
    assert await matching(["nothing_yet"]) == []
    assert len(await matching()) == 4


async def test_rows_cannot_be_changed(trail):
    """Whatever the code does: the database refuses."""
    await trail.add()
    for statement in ("update audit_logs set action = 'x'", "delete from audit_logs", "truncate audit_logs"):
        with pytest.raises(ConstraintViolated, match="audit_logs_append_only"):
            await trail.sql(statement)


CASES = {
    "no filter": {},
    "a rare action": {"actions": ["rename"]},
    "a common action": {"actions": ["create"]},
    "an action of none": {"actions": ["never"]},
    "a rare type": {"resource_types": ["host"]},
    "a common type": {"resource_types": ["sandbox"]},
    "a pair that is in no row": {"resource_types": ["host"], "actions": ["create"]},
    "many of both": {"resource_types": ["sandbox", "team", "api_key"], "actions": ["create", "rename", "revoke"]},
}


async def test_every_page_is_a_bounded_walk(trail):
    """40 000 rows, most of one kind: whatever is asked for, from the top or from the deep, under the plans that the
    driver's prepared statements end with too, a page touches blocks by its own size, not by the number of rows."""
    await trail.sql(
        """insert into audit_logs (team_id, actor_type, actor_name, resource_type, resource_id, action, scope, status,
             created_at)
           select $1, 'system', 'monitor',
             case when i % 20000 = 7 then 'host' when i % 10000 = 3 then 'team' when i % 500 = 1 then 'api_key'
                  else 'sandbox' end, 'x',
             case when i % 20000 = 7 then 'marked_down' when i % 10000 = 3 then 'rename' when i % 500 = 1 then 'create'
                  else (array['create', 'pause', 'resume', 'destroy'])[1 + i % 4] end,
             case when i % 20000 = 7 then 'admin' else 'team' end, 'success', $2::timestamptz + i / 3 * interval '1 ms'
           from generate_series(1, 40000) i""",
        trail.team,
        START,
    )
    await trail.sql("analyze audit_logs")
    deep = (START + timedelta(seconds=1), UUID(int=2**127))
    for mode in ("force_custom_plan", "force_generic_plan"):
        for name, wanted in CASES.items():
            for scopes in (["team"], ["team", "admin"]):
                for before in (None, deep):
                    blocks = await trail.db.transaction(_blocks, mode, trail.team, wanted, scopes, before)
                    assert blocks < PAGE_BLOCKS, (name, mode, scopes, before)


async def _blocks(tx, mode, team, wanted, scopes, before):
    """8-KiB blocks of one page, as the server counts them."""
    await tx.execute(f"set local plan_cache_mode = {mode}")
    both = {"resource_types": [], "actions": [], **wanted}
    with pytest.raises(Explained) as found:
        await audit.page(Explaining(tx), team, scopes=scopes, limit=51, before=before, **both)
    return found.value.args[0]


class Explained(Exception):  # noqa: N818
    """Blocks."""


class Explaining:
    """A connection whose `fetch` says what the statement costs, prepared as the driver prepares all."""

    def __init__(self, tx):
        self._tx = tx

    async def fetch(self, statement, *parameters):
        await self._tx.execute(f"prepare page as {statement}")
        values = ", ".join(_literal(value) for value in parameters)
        (row,) = await self._tx.fetch(f"explain (analyze, buffers, format json) execute page({values})")
        await self._tx.execute("deallocate page")
        plan = json.loads(row[0])[0]["Plan"]
        raise Explained(plan["Shared Hit Blocks"] + plan["Shared Read Blocks"])


def _literal(value):
    if value is None:
        return "null"
    return f"'{{{','.join(value)}}}'" if isinstance(value, list) else f"'{value}'"


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("2026-01-31T23:59:59.123456Z", datetime(2026, 1, 31, 23, 59, 59, 123456, tzinfo=UTC)),
        ("2026-01-31t23:59:59.1z", datetime(2026, 1, 31, 23, 59, 59, 100000, tzinfo=UTC)),
        ("2026-02-01T01:59:59+02:00", datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)),
    ],
)
def test_moments_are_rfc_3339(text, moment):
    assert parse_moment(text) == moment


@pytest.mark.parametrize(
    "text",
    [
        "", "2026-01-31", "2026-01-31T23:59:59", "2026-01-31 23:59:59Z", "2026-06-31T00:00:00Z", "0000-01-01T00:00:00Z",
        "2026-01-31T23:59:59.1234567Z", "2026-01-31T23:59:59.Z", "2026-01-31T24:00:00Z", "0001-01-01T00:00:00+01:00",
        "9999-12-31T23:59:59-01:00", "2026-01-31T23:59:60Z", "2026-01-31T23:59:59Z\n", "infinity",
        "٢026-01-31T23:59:59Z",
    ],
)  # fmt: skip
def test_other_texts_are_refused(text):
    with pytest.raises(InvalidRequest):
        parse_moment(text)


@given(st.datetimes(timezones=st.just(UTC)), st.uuids())
def test_a_cursor_is_read_as_it_was_written(moment, row):
    """To the microsecond."""
    text = moment.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    assert parse_before(ListAuditLogsQuery(before=text, before_id=f"log-{row}")) == Position(moment, row)


@pytest.mark.parametrize("half", [{"before": "2026-01-31T23:59:59Z"}, {"before_id": f"log-{UUID(int=1)}"}])
def test_half_a_cursor_is_refused(half):
    with pytest.raises(InvalidRequest, match="together"):
        parse_before(ListAuditLogsQuery(**half))


async def test_a_row_is_told_with_all_it_has(trail):
    """What was appended is what is read."""
    actor = uuid4()
    await trail.db.transaction(
        partial(
            audit.append,
            actor_type="api_key",
            actor_id=actor,
            actor_name="<img src=x onerror=alert(1)>",
            team_id=trail.team,
            resource_type="sandbox",
            resource_id="sb-1",
            action="destroy",
            status="warning",
            metadata={"reason": "</script>"},
        )
    )
    (entry,) = await trail.all("member")
    assert (entry.actor_type, entry.actor_id, entry.actor_name) == ("api_key", actor, "<img src=x onerror=alert(1)>")
    assert (entry.resource_type, entry.resource_id, entry.action) == ("sandbox", "sb-1", "destroy")
    assert (entry.scope, entry.status, dict(entry.metadata)) == ("team", "warning", {"reason": "</script>"})
