"""What the database refuses, whatever the code does."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from datetime import datetime
from itertools import product
from uuid import UUID, uuid4

import pytest

from agent.wire.lifecycle import FINAL, TRANSITIONAL, TRANSITIONS, Status
from capsule.db.connection import Connection
from capsule.db.errors import ConstraintViolated
from capsule.db.pool import Database
from capsule.db.queries import hosts, sandboxes, teams, users
from capsule.db.queries.sandboxes import SandboxRow
from capsule.db.queries.teams import PLATFORM, TeamRow

MakeSandbox = Callable[[], Awaitable[SandboxRow]]


async def _refused(db: Database, sql: str, *args: object) -> str:
    """The name of the rule that refuses `sql`."""
    with pytest.raises(ConstraintViolated) as caught:
        await db.transaction(lambda tx: tx.execute(sql, *args))
    return caught.value.name


def _path(target: str) -> list[str]:
    """A shortest life that leads to `target`."""
    waiting = deque([["pending"]])
    while waiting:
        path = waiting.popleft()
        if path[-1] == target:
            return path[1:]
        waiting += [[*path, after] for before, after in sorted(TRANSITIONS) if before == path[-1] and after not in path]
    raise AssertionError(target)


async def _move(tx: Connection, row: SandboxRow, status: str, host: UUID, deadline: datetime) -> SandboxRow:
    moved = await sandboxes.change_status(
        tx,
        row.id,
        from_status=row.status,
        generation=row.generation,
        to_status=status,
        host_id=host,
        transition_deadline=deadline if status in TRANSITIONAL else None,
    )
    assert moved is not None
    return moved


async def test_the_table_of_transitions_is_the_products(db: Database):
    """SQL and agent.wire.lifecycle allow the same steps."""
    assert await db.run(sandboxes.transitions) == TRANSITIONS


async def test_every_other_transition_is_refused(db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime):
    """All hundred pairs: those in the table pass, the rest are refused by `sandboxes_transition` (or, for a status that
    stays, by `sandboxes_generation`)."""
    for before, after in product(Status, Status):
        row = await sandbox()

        async def live(tx: Connection, row: SandboxRow = row, before: str = before) -> SandboxRow:
            for status in _path(before):
                row = await _move(tx, row, status, host, soon)
            return row

        row = await db.transaction(live)
        try:
            await db.transaction(_move, row, after.value, host, soon)
            refusal = None
        except ConstraintViolated as err:
            refusal = err.name
        if before == after:
            assert refusal == "sandboxes_generation"
        else:
            assert refusal == (None if (before, after) in TRANSITIONS else "sandboxes_transition"), (before, after)
    assert {"stopped", "error"} == FINAL


async def test_generation_grows_by_one_with_each_change(db: Database, sandbox: MakeSandbox, host: UUID):
    """Neither a status without its generation nor a generation without its status can be written."""
    row = await sandbox()
    step = "update sandboxes set status = 'starting', host_id = $2, generation = generation + $3 where id = $1"
    for growth in (0, 2, -1):
        assert await _refused(db, step, row.id, host, growth) == "sandboxes_generation"
    assert await _refused(db, "update sandboxes set generation = 9 where id = $1", row.id) == "sandboxes_generation"


async def test_a_sandbox_begins_pending_in_a_team_that_lives(db: Database, team: TeamRow, sandbox: MakeSandbox):
    """No row starts half-way, and none is made for a deleted team."""
    row = await sandbox()
    copy = """insert into sandboxes (id, team_id, template, vcpus, memory_mb, disk_mb, status, generation,
              transition_deadline) select $2, team_id, template, 1, 1, 1, $3, $4, now() from sandboxes where id = $1"""
    assert await _refused(db, copy, row.id, uuid4(), "starting", 1) == "sandboxes_begin_pending"
    assert await _refused(db, copy, row.id, uuid4(), "pending", 2) == "sandboxes_begin_pending"
    await db.transaction(lambda tx: tx.execute("update teams set deleted_at = now() where id = $1", team.id))
    with pytest.raises(ConstraintViolated, match="sandboxes_team_alive"):
        await sandbox()


async def test_host_deadline_and_address_fit_the_status(db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime):
    """A host from starting on, a deadline exactly while on the way, an address only with a slot, a fixed identity."""
    row = await sandbox()
    start = (
        "update sandboxes set generation = 2, status = 'starting', host_id = $2, transition_deadline = $3 where id = $1"
    )
    assert await _refused(db, start, row.id, None, soon) == "sandboxes_has_host"
    assert await _refused(db, start, row.id, host, None) == "sandboxes_deadline_while_on_its_way"
    assert await _refused(db, start, row.id, uuid4(), soon) == "sandboxes_host"
    ip = "update sandboxes set host_ip = '10.11.0.1' where id = $1"
    assert await _refused(db, ip, row.id) == "sandboxes_no_slot_at_rest"
    await db.transaction(lambda tx: tx.execute(start, row.id, host, soon))
    assert await _refused(db, "update sandboxes set host_id = null where id = $1", row.id) == "sandboxes_identity"
    assert (
        await _refused(db, "update sandboxes set team_id = $2 where id = $1", row.id, PLATFORM) == "sandboxes_identity"
    )
    assert await _refused(db, "update sandboxes set metadata = '[]'") == "sandboxes_metadata_object"


async def test_only_a_sandbox_that_starts_goes_to_another_host(
    db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime
):
    """With a generation of its own, by compare-and-set; asked once more it is done already. Later its host is fixed."""
    other = await db.transaction(lambda tx: tx.fetchval("insert into hosts (type) values ('regular') returning id"))
    row = await db.transaction(_move, await sandbox(), "starting", host, soon)
    quiet = "update sandboxes set host_id = $2 where id = $1"
    assert await _refused(db, quiet, row.id, other) == "sandboxes_identity"
    assert await db.transaction(sandboxes.move, row.id, row.generation - 1, other) is None
    moved = await db.transaction(sandboxes.move, row.id, row.generation, other)
    assert moved is not None
    assert (moved.host_id, moved.generation, moved.status) == (other, row.generation + 1, "starting")
    assert moved.transition_deadline == row.transition_deadline
    assert await db.transaction(sandboxes.move, row.id, row.generation, other) == moved
    assert await db.transaction(sandboxes.move, row.id, row.generation, host) is None
    same = "update sandboxes set generation = generation + 1 where id = $1"
    assert await _refused(db, same, row.id) == "sandboxes_generation"
    running = await db.transaction(_move, moved, "running", other, soon)
    assert await db.transaction(sandboxes.move, row.id, running.generation, host) is None
    with_it = "update sandboxes set host_id = $2, generation = generation + 1 where id = $1"
    assert await _refused(db, with_it, row.id, host) == "sandboxes_generation"
    stopping = (
        "update sandboxes set host_id = $2, generation = generation + 1, status = 'stopping', transition_deadline = $3 "
        "where id = $1"
    )
    assert await _refused(db, stopping, row.id, host, soon) == "sandboxes_identity"


async def test_a_host_with_sandboxes_cannot_be_deleted(db: Database, sandbox: MakeSandbox, host: UUID, soon: datetime):
    """Not while one lives or rests there; afterwards yes, and the finished rows keep its name. None is started on a
    deleted host."""
    row, late = await sandbox(), await sandbox()
    delete = "update hosts set deleted_at = now() where id = $1"
    row = await db.transaction(_move, row, "starting", host, soon)
    assert await _refused(db, delete, host) == "sandboxes_live_host"
    row = await db.transaction(_move, row, "error", host, soon)
    await db.transaction(lambda tx: tx.execute(delete, host))
    assert row.host_id == host
    with pytest.raises(ConstraintViolated, match="sandboxes_live_host"):
        await db.transaction(_move, late, "starting", host, soon)


async def test_exactly_one_owner(db: Database, team: TeamRow):
    """No second owner, no team without one, not even for the length of a commit; handing over works."""
    other = await db.transaction(lambda tx: users.insert(tx, email="b@example.com", name="B"))
    add = "insert into memberships (team_id, user_id, role) values ($1, $2, $3)"
    assert await _refused(db, add, team.id, other.id, "owner") == "memberships_one_owner"
    assert await _refused(db, add, team.id, other.id, "king") == "memberships_role"
    assert await _refused(db, "delete from memberships where team_id = $1", team.id) == "teams_have_owner"
    assert await _refused(db, "update memberships set role = 'admin' where team_id = $1", team.id) == "teams_have_owner"
    assert await _refused(db, "insert into teams (name, slug) values ('x', 'aaaaaa-aaaaaa')") == "teams_have_owner"

    async def hand_over(tx: Connection) -> None:
        await tx.execute("update memberships set role = 'admin' where team_id = $1", team.id)
        await tx.execute(add, team.id, other.id, "owner")

    await db.transaction(hand_over)
    await db.transaction(lambda tx: tx.execute("update teams set deleted_at = now() where id = $1", team.id))
    await db.transaction(lambda tx: tx.execute("delete from memberships where team_id = $1", team.id))


async def test_at_most_one_default_team(db: Database):
    """A second default membership of the same user is refused."""
    user = await db.transaction(lambda tx: users.insert(tx, email="b@example.com", name="B"))
    await db.transaction(lambda tx: teams.insert(tx, name="one", owner_id=user.id, is_default=True))
    with pytest.raises(ConstraintViolated, match="memberships_one_default"):
        await db.transaction(lambda tx: teams.insert(tx, name="two", owner_id=user.id, is_default=True))


async def test_a_slug_is_for_ever(db: Database, team: TeamRow):
    """It cannot be changed, and not be used again after the team is gone."""
    assert await _refused(db, "update teams set slug = 'cccccc-cccccc' where id = $1", team.id) == "teams_slug_fixed"
    await db.transaction(lambda tx: tx.execute("update teams set deleted_at = now() where id = $1", team.id))
    assert await _refused(db, "insert into teams (name, slug) values ('x', $1)", team.slug) == "teams_slug_key"


async def test_the_platform_team(db: Database, team: TeamRow):
    """It is there from the start, lives for ever and has no members; only it has base templates."""
    platform = await db.run(teams.get, PLATFORM)
    assert platform is not None
    assert platform.deleted_at is None
    delete = "update teams set deleted_at = now() where id = $1"
    assert await _refused(db, delete, PLATFORM) == "teams_platform_lives"
    join = "insert into memberships select $1, user_id, 'member', false from memberships"
    assert await _refused(db, join, PLATFORM) == "memberships_not_platform"
    base = "insert into templates (team_id, name, type) values ($1, 'x', $2)"
    assert await _refused(db, base, team.id, "base") == "templates_base_is_platform"
    assert await _refused(db, base, team.id, "snapshot") == "templates_snapshot_fixes_size"


async def test_names_and_addresses_are_checked(db: Database, team: TeamRow):
    """What reaches a page or a file name keeps to its form."""
    user = "insert into users (email, name) values ($1, $2)"
    await db.transaction(lambda tx: tx.execute(user, "Ada@Example.com", "Ada"))
    assert await _refused(db, user, "aDA@eXAMPLE.COM", "Ada") == "users_email_key"
    assert await _refused(db, user, "no at sign", "Ada") == "users_email_form"
    assert await _refused(db, user, "a@b", "") == "users_name_length"
    assert await _refused(db, "update teams set name = '<script>' where id = $1", team.id) == "teams_name_form"
    name = "insert into templates (team_id, name, type, vcpus, memory_mb) values ($1, $2, 'snapshot', 1, 1)"
    for bad in ("../x", "", ".x", "x" * 65, "x\n"):
        assert await _refused(db, name, team.id, bad) == "templates_name_form"


async def test_no_host_takes_anothers_address(db: Database, host: UUID):
    """Unique among living hosts that are proven to be there, whatever the case. A claim takes and holds nothing; a
    deleted host's address is free."""
    taken = await db.run(hosts.get, host)
    assert taken is not None
    assert taken.address is not None
    other = await db.transaction(lambda tx: hosts.insert(tx, type="regular"))
    steal = "update hosts set address = $2 where id = $1"
    assert await _refused(db, steal, other.id, taken.address.upper()) == "hosts_address_key"
    fingerprint = "update hosts set cert_fingerprint = $2 where id = $1"
    assert await _refused(db, fingerprint, other.id, taken.cert_fingerprint) == "hosts_cert_fingerprint_key"
    claim = "update hosts set address = $2, credential_epoch = 1 where id = $1"
    await db.transaction(lambda tx: tx.execute(claim, other.id, taken.address.upper()))
    proof = "update hosts set proven_epoch = 1 where id = $1"
    assert await _refused(db, proof, other.id) == "hosts_address_key"
    await db.transaction(lambda tx: tx.execute("update hosts set deleted_at = now() where id = $1", host))
    await db.transaction(lambda tx: tx.execute(proof, other.id))


async def test_only_a_proven_host_is_online(db: Database, host: UUID):
    """Neither one that registered anew nor one whose credentials ended is, whoever says so; none is proven before."""
    for change in (
        "update hosts set credential_epoch = 2 where id = $1",
        "update hosts set credentials_revoked_at = now() where id = $1",
    ):
        assert await _refused(db, change, host) == "hosts_online_is_proven"
    other = await db.transaction(lambda tx: hosts.insert(tx, type="regular"))
    assert await _refused(db, "update hosts set proven_epoch = 1 where id = $1", other.id) == "hosts_proven_epoch"


async def test_a_host_is_what_its_type_and_status_say(db: Database, team: TeamRow):
    """byoc has a team and regular has none; online has registered; generation goes with status."""
    make = "insert into hosts (type, team_id) values ($1, $2)"
    assert await _refused(db, make, "byoc", None) == "hosts_byoc_has_team"
    assert await _refused(db, make, "regular", team.id) == "hosts_byoc_has_team"
    await db.transaction(lambda tx: hosts.insert(tx, type="byoc", team_id=team.id))
    online = "update hosts set status = 'online', generation = 2"
    assert await _refused(db, online) == "hosts_registered"
    assert await _refused(db, "update hosts set status = 'online'") == "hosts_generation"
    assert await _refused(db, "update hosts set generation = 2") == "hosts_generation"


@pytest.mark.parametrize(
    "statement",
    ["update audit_logs set actor_name = 'x'", "delete from audit_logs", "truncate audit_logs"],
)
async def test_audit_is_append_only(db: Database, statement: str):
    """Neither changed nor removed nor emptied, with rows in it or without."""
    assert await _refused(db, statement) == "audit_logs_append_only"


async def test_there_is_one_certificate_authority(db: Database):
    """A second row has no place."""
    put = "insert into certificate_authority (id, cert_pem, key_pem) values ($1, 'c', 'k')"
    await db.transaction(lambda tx: tx.execute(put, 1))
    assert await _refused(db, put, 1) == "certificate_authority_pkey"
    assert await _refused(db, put, 2) == "certificate_authority_single_row"
