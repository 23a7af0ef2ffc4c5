"""What the monitor decides: pure, total over every situation, legal in every step, and done when it is done."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import product
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.wire.calls import HostListing, OutboxEntry, SandboxState
from agent.wire.lifecycle import FINAL, TRANSITIONAL, TRANSITIONS, Status
from capsule.db.queries import sandboxes
from capsule.db.queries.sandboxes import SandboxRow
from capsule.monitor.reconcile import Change, DestroyAgain, plan, settled, strangers

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOST = UUID(int=1)
VM_STATUSES = ("starting", "running", "stopping", "something new")


def row(status, *, overdue=False, **fields):
    deadline = NOW + timedelta(seconds=-1 if overdue else 1)
    return SandboxRow(
        **{
            "id": uuid4(),
            "team_id": UUID(int=2),
            "host_id": HOST,
            "template": "minimal",
            "template_id": None,
            "vcpus": 1,
            "memory_mb": 1,
            "disk_mb": 1,
            "timeout_sec": 0,
            "status": str(status),
            "generation": 3,
            "host_ip": None,
            "metadata": {},
            "reason": None,
            "created_at": NOW,
            "started_at": None,
            "last_active_at": None,
            "last_updated": NOW,
            "transition_deadline": deadline if status in TRANSITIONAL else None,
            **fields,
        }
    )


def vm(one, status="running", host_ip="10.11.0.1"):
    return SandboxState(sandbox_id=str(one.id), status=status, vcpus=1, memory_mb=1, disk_mb=1, host_ip=host_ip)


def entry(one, reason="it died", sequence=1):
    return OutboxEntry(sequence=sequence, sandbox_id=str(one.id), event="died", reason=reason, at=0.0)


def situations():
    """Every row, with and without everything a host can say of it."""
    for status, vm_status, told, overdue in product(Status, (None, *VM_STATUSES), (False, True), (False, True)):
        one = row(status, overdue=overdue)
        listing = HostListing(
            sandboxes=[] if vm_status is None else [vm(one, vm_status)], outbox=[entry(one)] if told else []
        )
        yield one, listing


def carry_out(steps, rows, listing):
    """Rows and listing as they are afterwards, by the rules of the database."""
    after = {one.id: one for one in rows}
    vms = {state.sandbox_id: state for state in listing.sandboxes}
    for step in steps:
        match step:
            case Change(row=one, to_status=status):
                assert (Status(one.status), status) in TRANSITIONS
                after[one.id] = msgspec.structs.replace(
                    one, status=str(status), generation=one.generation + 1, transition_deadline=None
                )
            case DestroyAgain(row=one):
                vms.pop(str(one.id), None)
    return list(after.values()), msgspec.structs.replace(listing, sandboxes=list(vms.values()))


@pytest.mark.parametrize("together", [False, True])
def test_every_step_is_legal_and_the_work_gets_done(together):
    """In every situation, alone and all on one host: each step is one of the table, and after a few rounds there is
    nothing left to do."""
    all_of_them = list(situations())
    cases = (
        [
            (
                [one for one, _ in all_of_them],
                HostListing(
                    sandboxes=[state for _, listing in all_of_them for state in listing.sandboxes],
                    outbox=[told for _, listing in all_of_them for told in listing.outbox],
                ),
            )
        ]
        if together
        else [([one], listing) for one, listing in all_of_them]
    )
    for rows, listing in cases:
        for _ in range(3):
            steps = plan(rows, listing, NOW)
            again = any(isinstance(step, DestroyAgain) for step in steps)
            rows, listing = carry_out(steps, rows, listing)  # noqa: PLW2901 - that is the point
            if not again:
                break
        assert plan(rows, listing, NOW) == []


def test_what_is_decided():
    """The table, as a reader would have it: status, VM, outbox, overdue, and what becomes of it."""
    expected = {
        ("starting", "running", False): Status.RUNNING,
        ("missing", "running", False): Status.RUNNING,
        ("running", None, False): Status.ERROR,
        ("missing", None, False): Status.ERROR,
        ("stopping", None, False): Status.STOPPED,
        ("stopping", None, True): Status.STOPPED,
    }
    for told_status in ("starting", "running", "missing"):
        for vm_status in (None, *VM_STATUSES):
            expected[told_status, vm_status, True] = Status.ERROR
    for one, listing in situations():
        vm_status = listing.sandboxes[0].status if listing.sandboxes else None
        overdue = one.transition_deadline is not None and one.transition_deadline < NOW
        told = bool(listing.outbox)
        steps = plan([one], listing, NOW)
        want = expected.get((one.status, vm_status, told))
        if one.status == "starting" and vm_status is None and overdue:
            want = Status.ERROR
        if one.status == "stopping" and overdue and vm_status not in {None, "stopping"}:
            assert steps == [DestroyAgain(one)]
        elif want is None:
            assert steps == []
        else:
            (step,) = steps
            assert (step.row, step.to_status) == (one, want)
            assert (step.host_ip == "10.11.0.1") == (want == Status.RUNNING)
            assert (step.reason is None) == (want in {Status.RUNNING, Status.STOPPED})


def test_final_rows_stay_as_they_are():
    for one, listing in situations():
        if one.status in FINAL:
            assert plan([one], listing, NOW) == []


@given(st.text())
def test_a_hosts_words_are_fit_to_be_stored(text):
    """No NUL, one line, not for ever; an address is one or is not kept."""
    running, starting = row(Status.RUNNING), row(Status.STARTING)
    listing = HostListing(sandboxes=[vm(starting, host_ip=text)], outbox=[entry(running, text * 200)])
    told, made = plan([running, starting], listing, NOW)
    assert told.reason
    assert told.reason.isprintable()
    assert len(told.reason) <= 1000
    assert made.host_ip is None or made.host_ip == text


def test_strangers():
    """Everything the host has that no row read speaks of."""
    known, unknown = row(Status.RUNNING), row(Status.RUNNING)
    assert strangers([known], HostListing(sandboxes=[vm(known), vm(unknown)])) == {unknown.id}


def test_when_an_entry_may_go():
    """When its row does not need it any more: it is over, on its way out, at rest, of another host, or not there."""
    needing = {status for status in Status if not settled(row(status), HOST)}
    assert needing == {Status.STARTING, Status.RUNNING, Status.MISSING}
    assert settled(None, HOST)
    assert settled(row(Status.RUNNING, host_id=UUID(int=9)), HOST)
    for one, listing in situations():  # whatever is needed is used
        if listing.outbox and not settled(one, HOST):
            (step,) = plan([one], listing, NOW)
            assert settled(msgspec.structs.replace(one, status=str(step.to_status)), HOST)


async def test_the_database_has_the_same_table(virtual_clock, world):
    """Every step that we may propose is one that it lets through, and the other way round."""
    assert await world.db.run(sandboxes.transitions) == {(str(a), str(b)) for a, b in TRANSITIONS}
