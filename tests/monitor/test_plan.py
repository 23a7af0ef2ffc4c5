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
from capsule.monitor.reconcile import Change, DestroyAgain, only_copy, plan, settled, strangers

NOW = datetime(2026, 1, 1, tzinfo=UTC)
HOST = UUID(int=1)
VM_STATUSES = ("starting", "running", "pausing", "resuming", "stopping", "something new")
SEEN = (None, "paused", *VM_STATUSES)
"""What a host can say of a sandbox: nothing, that it rests, or how it lives."""
TOLD = (None, "died", "destroyed", "auto_paused", "pause_failed")


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
            "host_ip": None if status in {Status.PAUSED, Status.RESUMING} else "10.11.0.1",
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


def entry(one, reason="it died", sequence=1, event="died"):
    return OutboxEntry(sequence=sequence, sandbox_id=str(one.id), event=event, reason=reason, at=0.0)


def listing_of(one, seen, told=None):
    """What the host says of one sandbox."""
    return HostListing(
        sandboxes=[vm(one, seen)] if seen in VM_STATUSES else [],
        paused=[str(one.id)] if seen == "paused" else [],
        outbox=[] if told is None else [entry(one, event=told)],
    )


def situations():
    """Every row, with and without everything a host can say of it."""
    for status, seen, told, overdue in product(Status, SEEN, TOLD, (False, True)):
        one = row(status, overdue=overdue)
        yield one, seen, told, overdue


def carry_out(steps, rows, listing):
    """Rows and listing as they are afterwards, by the rules of the database."""
    after = {one.id: one for one in rows}
    gone = set()
    for step in steps:
        match step:
            case Change(row=one, to_status=to_status, via=via):
                for status in (via, to_status):
                    if status is not None:
                        assert (Status(after[one.id].status), status) in TRANSITIONS
                        after[one.id] = msgspec.structs.replace(
                            after[one.id],
                            status=str(status),
                            generation=after[one.id].generation + 1,
                            transition_deadline=None,
                            host_ip=None if status == Status.PAUSED else step.host_ip or after[one.id].host_ip,
                        )
            case DestroyAgain(row=one):
                gone.add(str(one.id))
    return list(after.values()), msgspec.structs.replace(
        listing,
        sandboxes=[state for state in listing.sandboxes if state.sandbox_id not in gone],
        paused=[one for one in listing.paused if one not in gone],
    )


@pytest.mark.parametrize("together", [False, True])
def test_every_step_is_legal_and_the_work_gets_done(together):
    """In every situation, alone and all on one host: each step is one of the table, and after a few rounds there is
    nothing left to do."""
    all_of_them = [(one, listing_of(one, seen, told)) for one, seen, told, _ in situations()]
    cases = (
        [
            (
                [one for one, _ in all_of_them],
                HostListing(
                    sandboxes=[state for _, listing in all_of_them for state in listing.sandboxes],
                    paused=[paused for _, listing in all_of_them for paused in listing.paused],
                    outbox=[told for _, listing in all_of_them for told in listing.outbox],
                ),
            )
        ]
        if together
        else [([one], listing) for one, listing in all_of_them]
    )
    for rows, listing in cases:
        for _ in range(3):
            rows, listing = carry_out(plan(rows, listing, NOW), rows, listing)  # noqa: PLW2901 - that is the point
        assert plan(rows, listing, NOW) == []


def expected(status, seen, told, overdue):  # noqa: C901 - the table, as a reader would have it
    """What becomes of a row; None: it is left alone."""
    ended = told in {"died", "destroyed"} and seen != "paused"
    match status, seen:
        case (("pending" | "stopped" | "error"), _):
            return None
        case "stopping", None:
            return "stopped"
        case "stopping", _:
            return "destroy" if overdue and seen != "stopping" else None
        case _ if ended:
            return "error"
        case "starting", ("running" | "paused"):
            return "running"
        case "starting", None:
            return "error" if overdue else None
        case (("pausing" | "resuming"), _) if not overdue:
            return None
        case (("running" | "missing"), None):
            return "paused" if told == "auto_paused" else "error"
        case (("pausing" | "resuming" | "paused"), None):
            return "missing"
        case (("running" | "missing" | "pausing" | "resuming"), "paused"):
            return "paused"
        case (("missing" | "pausing" | "resuming" | "paused"), "running"):
            return "running"
    return None


def test_what_is_decided():
    """Status, what the host has, what it tells, overdue, and what becomes of it; with words for people, and with the
    address of one that runs."""
    for one, seen, told, overdue in situations():
        steps = plan([one], listing_of(one, seen, told), NOW)
        want = expected(one.status, seen, told, overdue)
        if want is None:
            assert steps == [], (one.status, seen, told, overdue)
            continue
        (step,) = steps
        if want == "destroy":
            assert step == DestroyAgain(one)
            continue
        assert (step.row, step.to_status) == (one, want), (one.status, seen, told, overdue)
        assert (step.host_ip == "10.11.0.1") == (want == "running" and seen == "running")
        assert bool(step.reason) == (
            want in {"error", "paused", "missing"} or (want == "running" and one.status == "pausing")
        )


def test_a_pause_has_the_reason_that_the_host_told():
    """The latest entry of its kind; without one it is said that the host did it. A resume that nobody finished keeps
    its own."""
    running, resuming = row(Status.RUNNING), row(Status.RESUMING, overdue=True)
    pausing = row(Status.PAUSING, overdue=True)
    entries = [
        entry(running, "idle again", sequence=7, event="auto_paused"),
        entry(running, "cannot", sequence=8, event="pause_failed"),
        entry(running, "idle", sequence=3, event="auto_paused"),
        entry(resuming, "idle", sequence=4, event="auto_paused"),
    ]
    paused = [str(running.id), str(resuming.id)]
    first, second = plan([running, resuming], HostListing(paused=paused, outbox=entries), NOW)
    assert (first.reason, first.via, second.via) == ("idle again", Status.PAUSING, None)
    assert second.reason == "it was not resumed in time"
    (unfinished,) = plan([pausing], HostListing(paused=[str(pausing.id)]), NOW)
    assert unfinished.reason == "requested; its control plane went away"
    (untold,) = plan([running], HostListing(paused=paused), NOW)
    assert untold.reason == "its host paused it"


def test_what_rested_is_not_lost_by_being_absent_for_a_while():
    """`missing` until it is listed again, which says so; `error` after a day."""
    rested = row(Status.MISSING, host_ip=None)
    assert plan([rested], HostListing(), NOW + timedelta(hours=23)) == []
    (back,) = plan([rested], HostListing(paused=[str(rested.id)]), NOW + timedelta(hours=23))
    assert (back.to_status, back.reason) == (Status.PAUSED, "its host has its snapshot again")
    (lost,) = plan([rested], HostListing(), NOW + timedelta(hours=25))
    assert lost.to_status == Status.ERROR


def test_only_what_a_user_ended_may_go():
    """What rests stays for a row that failed once it had run, and for none."""
    assert only_copy(None)
    for status in Status:
        assert only_copy(row(status, started_at=NOW)) == (status not in {Status.STOPPING, Status.STOPPED})
    assert not only_copy(row(Status.ERROR))


def test_final_rows_stay_as_they_are():
    for one, seen, told, _ in situations():
        if one.status in FINAL:
            assert plan([one], listing_of(one, seen, told), NOW) == []


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
    known, unknown, resting = [row(Status.RUNNING) for _ in range(3)]
    listing = HostListing(sandboxes=[vm(known), vm(unknown)], paused=[str(resting.id)])
    assert strangers([known], listing) == {unknown.id, resting.id}


def test_when_an_entry_may_go():
    """When its row does not need it any more: it is over, on its way out, at rest, of another host, or not there."""

    def needing(event, *, rests):
        one = row(Status.RUNNING)
        told = entry(one, event=event)
        return {status for status in Status if not settled(told, row(status), HOST, rests=rests)}

    lives_or_rests = set(Status) - FINAL - {Status.PENDING, Status.STOPPING}
    for event in ("died", "destroyed"):
        assert needing(event, rests=False) == lives_or_rests
        assert needing(event, rests=True) == set()
    assert needing("auto_paused", rests=True) == {Status.STARTING, Status.RUNNING, Status.MISSING}
    assert needing("auto_paused", rests=False) == set()
    assert needing("pause_failed", rests=False) == needing("pause_failed", rests=True) == set()
    assert settled(entry(row(Status.RUNNING)), None, HOST, rests=False)
    assert settled(entry(row(Status.RUNNING)), row(Status.RUNNING, host_id=UUID(int=9)), HOST, rests=False)


def test_whatever_an_entry_is_needed_for_is_done():
    """No entry stays for ever: what its row needs it for is a step of the plan, or two."""
    for one, seen, told, _ in situations():
        if told is None or settled(entry(one, event=told), one, HOST, rests=seen == "paused"):
            continue
        rows, listing = [one], listing_of(one, seen, told)
        for _ in range(2):
            rows, listing = carry_out(plan(rows, listing, NOW), rows, listing)
        assert settled(entry(one, event=told), rows[0], HOST, rests=seen == "paused")


async def test_the_database_has_the_same_table(virtual_clock, world):
    """Every step that we may propose is one that it lets through, and the other way round."""
    assert await world.db.run(sandboxes.transitions) == {(str(a), str(b)) for a, b in TRANSITIONS}
