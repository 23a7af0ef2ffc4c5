"""Pages of an audit trail of a million rows, beside the same pages of ten thousand."""

from __future__ import annotations

import statistics
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

from stage import show

from capsule.config import Settings
from capsule.db.pool import Database
from capsule.model import Position
from capsule.people.audit import AuditTrail
from capsule.people.views import AuditFilter
from capsule.principals import Principal

FEW, MANY = 10_000, 1_000_000
AT_ONCE = 100_000
READS = 60
START = datetime(2026, 1, 1, tzinfo=UTC)
DEEP = Position(START + timedelta(seconds=5), UUID(int=1 << 127))
"""Some two thousand rows from the end."""

FILL = """
insert into audit_logs (team_id, actor_type, actor_id, actor_name, resource_type, resource_id, action, scope, status,
                        metadata, created_at)
select $1, 'user', gen_random_uuid(), 'ada@example.com',
  case when i % 5000 = 7 then 'host' when i % 5000 = 9 then 'team' when i % 100 = 3 then 'member'
       when i % 50 = 1 then 'api_key' else 'sandbox' end,
  'sb-' || gen_random_uuid(),
  case when i % 5000 = 7 then 'marked_down' when i % 5000 = 9 then 'rename' when i % 100 = 3 then 'add'
       else (array['create', 'pause', 'resume', 'destroy'])[1 + i % 4] end,
  case when i % 5000 = 7 or i % 100 = 3 then 'admin' else 'team' end, 'success', '{"template": "minimal"}',
  $2::timestamptz + i / 3 * interval '7 ms'
from generate_series($3::int, $4::int) i
"""

PAGES = {
    "all": ("owner", AuditFilter(), 50, None),
    "all a member may see": ("member", AuditFilter(), 50, None),
    "all a member may see, 200": ("member", AuditFilter(), 200, None),
    "a rare action": ("owner", AuditFilter(actions=frozenset({"rename"})), 50, None),
    "a rare type, as a member": ("member", AuditFilter(resource_types=frozenset({"team"})), 50, None),
    "a common action": ("owner", AuditFilter(actions=frozenset({"create"})), 50, None),
    "a rare pair": (
        "owner",
        AuditFilter(resource_types=frozenset({"team", "host"}), actions=frozenset({"create", "rename"})),
        50,
        None,
    ),
    "all, deep": ("owner", AuditFilter(), 50, DEEP),
    "a common type, deep, 200": ("owner", AuditFilter(resource_types=frozenset({"sandbox"})), 200, DEEP),
    "a rare action, deep": ("member", AuditFilter(actions=frozenset({"rename"})), 50, DEEP),
}


async def measure_pages(db: Database, settings: Settings) -> None:
    """Milliseconds, from the use-case's call to its answer."""
    trail = AuditTrail(db, settings)
    few, many = [await filled(db, rows) for rows in (FEW, MANY)]
    await db.run(lambda connection: connection.execute("vacuum analyze audit_logs"), timeout=300)
    for name, page in PAGES.items():
        base = await timed(trail, few, page)
        show(f"audit, {FEW} rows: {name}", base, "ms")
        show(f"audit, {MANY} rows: {name}", await timed(trail, many, page), "ms", base, "few rows")


async def filled(db: Database, rows: int) -> UUID:
    """A team with so many rows."""
    team = uuid4()
    for first in range(1, rows + 1, AT_ONCE):
        last = min(first + AT_ONCE - 1, rows)
        await db.run(lambda connection, *span: connection.execute(FILL, team, START, *span), first, last, timeout=300)
    return team


async def timed(trail: AuditTrail, team: UUID, page: tuple) -> float:
    """The median."""
    role, wanted, limit, before = page
    who = Principal(team_id=team, actor_type="user", actor_id=uuid4(), actor_name="ada@example.com", role=role)
    seconds = []
    for _ in range(READS):
        began = time.perf_counter()
        await trail.list(who, wanted, limit, before)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds) * 1000
