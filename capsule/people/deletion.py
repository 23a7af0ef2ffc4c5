"""Deleting a team: one transaction, after which nothing depends on this process.

The team is gone with its commit: nobody is a member of one that does not live, its keys are dead, and the schema
refuses it new sandboxes. What runs or rests is `stopping` and due, so the followers of the hosts end it, now or when
its host is back; they also remove the copies of the templates. A sandbox that is being made meanwhile comes first,
and is ended, or finds the team gone: both take the lock on the team's row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from uuid import UUID

from capsule.db.queries import deletion, teams
from capsule.people.acting import act_on
from capsule.principals import User

if TYPE_CHECKING:
    from capsule.db.connection import Connection


async def delete(tx: Connection, user: User, team_id: UUID) -> int:
    """Runs inside a transaction and may be run again. How many sandboxes are being ended. NotFound, Forbidden."""
    acting = await act_on(tx, "deleteTeam", user, team_id)
    await teams.mark_deleted(tx, team_id)
    await acting.record("team", f"team-{team_id}", "delete", status="warning")
    ended = await deletion.end_sandboxes(tx, team_id, actor_id=user.id, actor_name=user.email)
    await deletion.delete_templates(tx, team_id, actor_id=user.id, actor_name=user.email)
    return ended
