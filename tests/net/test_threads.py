"""Throw-away threads."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio

from agent.net.errors import SlotTimeoutError, WrongThreadError
from agent.net.namespace import create_namespace, delete_namespace, enter_namespace
from agent.net.slots import create_slot, remove_slot
from agent.net.threads import SlotThread, call_in_slot_thread, run_in_slot_thread


def own_namespace():
    return Path("/proc/thread-self/ns/net").readlink()


async def test_every_job_has_a_thread_of_its_own():
    """A pooled thread would carry one job's namespace into the next; idents may repeat, thread objects do not."""
    threads = [await run_in_slot_thread(threading.current_thread) for _ in range(3)]
    assert len({id(thread) for thread in threads}) == 3
    assert all(isinstance(thread, SlotThread) for thread in threads)


async def test_errors_reach_the_caller():
    """What the job raises is raised, as itself."""

    def job():
        raise OSError(5, "no")

    with pytest.raises(OSError, match="no"):
        await run_in_slot_thread(job)


async def test_waiting_cannot_be_cancelled():
    """A cancelled caller still gets the result, so nothing that the job made is lost."""
    go = threading.Event()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:

            async def let_go():
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                go.set()

            nursery.start_soon(let_go)
            assert await run_in_slot_thread(lambda: go.wait(30)) is True


async def test_an_overrun_is_reported_and_its_result_discarded():
    """The caller is not held for ever, learns which thread goes on, and a late descriptor does not leak."""
    go, discarded = threading.Event(), threading.Event()
    values = []

    def discard(value):
        values.append(value)
        discarded.set()

    with pytest.raises(SlotTimeoutError) as caught:
        await run_in_slot_thread(lambda: go.wait(60) and "late", seconds=0.01, discard=discard)
    assert caught.value.thread.is_alive()
    go.set()
    caught.value.thread.join(60)
    assert discarded.is_set()
    assert values == ["late"]


def test_namespaces_are_refused_outside_a_slot_thread():
    """In the main thread each of these would move the whole daemon, or leave it in the wrong namespace."""
    here = own_namespace()
    for work in (create_namespace, enter_namespace):
        with pytest.raises(WrongThreadError):
            work("nowhere")
    for work in (create_slot, remove_slot):
        with pytest.raises(WrongThreadError):
            work(1)
    assert own_namespace() == here


@pytest.mark.host
def test_a_namespace_stays_in_its_thread():
    """The thread that made a namespace has moved, its caller has not."""
    here = own_namespace()

    def job():
        create_namespace("elsewhere")
        return own_namespace()

    try:
        assert call_in_slot_thread(job) != here
        assert own_namespace() == here
    finally:
        delete_namespace("elsewhere")
