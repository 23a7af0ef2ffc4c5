"""Members of a team: who joins, who leaves, who may what. Each function runs inside a transaction and may be run again.

Removing and leaving are the same but for who does it: the membership goes, and with it every key that its holder made
for the team. The owner has neither: a team has one as long as it lives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast
from uuid import UUID

from capsule import errors
from capsule.db.queries import idempotency, memberships, users
from capsule.people.acting import Acting, act_on
from capsule.people.views import MemberView
from capsule.principals import GivenRole, Role, User
from capsule.sandboxes.admission import fingerprint, same_request

if TYPE_CHECKING:
    from capsule.db.connection import Connection
    from capsule.db.queries.memberships import MemberRow


@dataclass(frozen=True, slots=True, kw_only=True)
class Invitation:
    """Whom to make a member of which team; the same for the same request."""

    team: UUID
    email: str


ENDPOINT = "POST /v1/teams/members"


async def add(tx: Connection, user: User, invitation: Invitation, idempotency_key: str | None) -> MemberView:
    """Make them a member. NotFound for an unknown address, Conflict for a member, QuotaExceeded."""
    acting = await act_on(tx, "addMember", user, invitation.team)
    invited = await users.by_email(tx, invitation.email)
    if invited is None:
        raise errors.NotFound("there is no account with this e-mail address; they have to sign up first")
    used = idempotency_key is not None and await _used(tx, user, invitation, idempotency_key, invited.id)
    member = await memberships.get(tx, acting.team.id, invited.id)
    if used:
        if member is None:
            raise errors.Conflict("they are no member any more; use a new Idempotency-Key")
        return view(member)
    if member is not None:
        raise errors.Conflict("they are a member of the team already")
    limit = acting.team.max_members
    if await memberships.count(tx, acting.team.id) >= limit:
        raise errors.QuotaExceeded(f"max_members of the team is {limit}; remove one first", limit="max_members")
    await memberships.insert(tx, acting.team.id, invited.id, "member")
    metadata = {"email": invited.email, "role": "member"}
    await acting.record("member", f"usr-{invited.id}", "add", status="success", metadata=metadata)
    return view(await _member(acting, invited.id))


async def _used(tx: Connection, user: User, invitation: Invitation, key: str, invited: UUID) -> bool:
    """Whether an earlier request with this key did it."""
    wanted = (ENDPOINT, str(invitation.team), str(invited))
    taken = await idempotency.claim(tx, user.id, key, fingerprint(wanted), invited, endpoint=ENDPOINT)
    return taken is not None and same_request(taken, wanted) == invited


async def change_role(tx: Connection, user: User, team_id: UUID, member_id: UUID, role: GivenRole) -> None:
    """Forbidden for the owner's; nothing to do for a role that they have."""
    acting = await act_on(tx, "changeRole", user, team_id)
    member = await _member(acting, member_id)
    if member.role == "owner":
        raise errors.Forbidden("the owner's role cannot be changed")
    if member.role == role:
        return
    await memberships.set_role(tx, team_id, member_id, role)
    await acting.record("member", f"usr-{member_id}", "role_update", status="info", metadata={"new_role": role})


async def remove(tx: Connection, user: User, team_id: UUID, member_id: UUID) -> None:
    """Forbidden for the owner."""
    acting = await act_on(tx, "removeMember", user, team_id)
    member = await _member(acting, member_id)
    if member.role == "owner":
        raise errors.Forbidden("the owner cannot be removed")
    await acting.record("member", f"usr-{member_id}", "remove", status="warning")
    await _end(acting, member_id, "member removed")


async def leave(tx: Connection, user: User, team_id: UUID) -> None:
    """Forbidden for the owner."""
    acting = await act_on(tx, "leaveTeam", user, team_id)
    member = await _member(acting, user.id)
    if member.role == "owner":
        raise errors.Forbidden("the owner cannot leave; delete the team instead")
    await acting.record("member", f"usr-{user.id}", "leave", status="info")
    await _end(acting, user.id, "member left")


async def _end(acting: Acting, member_id: UUID, reason: str) -> None:
    for key in await memberships.delete(acting.tx, acting.team.id, member_id):
        metadata = {"name": key.name, "reason": reason}
        await acting.record("api_key", f"key-{key.id}", "revoke", scope="team", status="warning", metadata=metadata)


async def _member(acting: Acting, user_id: UUID) -> MemberRow:
    member = await memberships.get(acting.tx, acting.team.id, user_id)
    if member is None:
        raise errors.NotFound("the team has no such member")
    return member


def view(row: MemberRow) -> MemberView:
    """A row as the team sees it."""
    return MemberView(
        user_id=row.user_id, name=row.name, email=row.email, role=cast("Role", row.role), joined_at=row.joined_at
    )
