"""Counters of attempts, shared by all control planes: one row per bucket and window, by the server's clock.

The sliding window of two counters: the window before this one counts with the share of it that a window ending now
still covers.
"""

from __future__ import annotations

import msgspec

from capsule.db.connection import Connection
from capsule.db.queries.rows import only


class HitRow(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an attempt. `hits` and `before` count this window and the last one, `elapsed` is the share of this
    window that has passed. `hits` of a refused attempt may be a moment old."""

    allowed: bool
    hits: int
    before: int
    elapsed: float


async def hit(connection: Connection, bucket: str, *, limit: int, seconds: int) -> HitRow:
    """Count an attempt, unless it is one more than `limit` in the last `seconds`.

    One statement: of two attempts at once, in whichever processes, the second waits for the first one's count.
    """
    record = await connection.fetchrow(
        """
        with clock as (select extract(epoch from clock_timestamp())::float8 / $3::float8 as windows),
        at as (
          select to_timestamp(floor(windows) * $3) as start, to_timestamp((floor(windows) - 1) * $3) as last,
            windows - floor(windows) as elapsed
          from clock),
        known as (
          select at.*, coalesce(this.hits, 0) as hits, coalesce(that.hits, 0) as before
          from at
            left join rate_limits this on this.bucket = $1 and this.window_start = at.start
            left join rate_limits that on that.bucket = $1 and that.window_start = at.last),
        counted as (
          insert into rate_limits as r (bucket, window_start, hits)
          select $1, start, 1 from known where before * (1 - elapsed) + 1 <= $2
          on conflict (bucket, window_start) do update set hits = r.hits + 1
          where (select before * (1 - elapsed) from known) + r.hits + 1 <= $2
          returning hits)
        select counted.hits is not null as allowed, coalesce(counted.hits, known.hits) as hits, before, elapsed
        from known left join counted on true
        """,
        bucket,
        limit,
        seconds,
    )
    return only(HitRow, record)


async def prune(tx: Connection) -> None:
    """Forget windows that count no more, whatever their rule; a thousand at a time."""
    await tx.execute(
        """
        delete from rate_limits where (bucket, window_start) in (
          select bucket, window_start from rate_limits where window_start < now() - interval '2 days'
          order by window_start limit 1000)
        """
    )
