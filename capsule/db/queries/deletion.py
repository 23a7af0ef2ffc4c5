"""What goes with a team. The caller holds the lock on the team's row, so that nothing new comes."""

from __future__ import annotations

from uuid import UUID

from capsule.db.connection import Connection


async def end_sandboxes(tx: Connection, team_id: UUID, *, actor_id: UUID, actor_name: str) -> int:
    """Everything of the team that lives or rests becomes `stopping`, due at once, with an audit row each: whoever
    follows the hosts ends it. How many.

    Locked in the order in which the monitor takes several rows of a host; a row that somebody changed meanwhile is
    taken as it is by then.
    """
    await tx.execute(
        """
        select from sandboxes where team_id = $1 and status not in ('stopping', 'stopped', 'error')
        order by created_at, id for no key update
        """,
        team_id,
    )
    tag = await tx.execute(
        """
        with ended as (
          update sandboxes set
            status = 'stopping', generation = generation + 1, transition_deadline = clock_timestamp(),
            reason = 'its team was deleted', last_updated = clock_timestamp()
          where team_id = $1 and status not in ('stopping', 'stopped', 'error')
          returning id)
        insert into audit_logs (team_id, actor_type, actor_id, actor_name, resource_type, resource_id, action, scope,
                                status)
        select $1, 'user', $2, $3, 'sandbox', 'sb-' || id, 'destroy', 'team', 'warning' from ended
        """,
        team_id,
        actor_id,
        actor_name,
    )
    return int(tag.rpartition(" ")[2])


async def delete_templates(tx: Connection, team_id: UUID, *, actor_id: UUID, actor_name: str) -> None:
    """The team's templates are none any more, with an audit row each; whoever follows the hosts removes the copies."""
    await tx.execute(
        """
        with gone as (
          update templates set deleted_at = clock_timestamp() where team_id = $1 and deleted_at is null
          returning id, name)
        insert into audit_logs (team_id, actor_type, actor_id, actor_name, resource_type, resource_id, action, scope,
                                status, metadata)
        select $1, 'user', $2, $3, 'snapshot', 'tpl-' || id, 'delete', 'team', 'warning',
               jsonb_build_object('name', name) from gone
        """,
        team_id,
        actor_id,
        actor_name,
    )
