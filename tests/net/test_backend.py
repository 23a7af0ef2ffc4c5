"""What every slot backend promises: run against the fake and against the real one."""

from __future__ import annotations

import os
import threading

import pytest

from agent.net import backend as backend_module
from agent.net.backend import NamespaceSlotBackend
from agent.net.errors import InvalidSlotError, SlotBusyError, SlotCreateError, SlotTimeoutError, TapError
from agent.net.fake import FakeSlotBackend


@pytest.fixture(params=["fake", pytest.param("namespaces", marks=pytest.mark.host)])
def backend(request):
    if request.param == "fake":
        return FakeSlotBackend()
    request.getfixturevalue("clean_host")
    return NamespaceSlotBackend()


async def test_a_slot_comes_and_goes(backend):
    """Created slots are listed and clean, removed ones are neither."""
    assert await backend.existing() == set()
    await backend.create(7)
    await backend.create(8)
    assert await backend.existing() == {7, 8}
    assert await backend.is_clean(7)
    await backend.remove(7)
    assert await backend.existing() == {8}
    assert not await backend.is_clean(7)


async def test_a_slot_is_not_built_over_another(backend):
    """The second creation fails and leaves the first one's slot whole."""
    await backend.create(7)
    with pytest.raises(SlotCreateError):
        await backend.create(7)
    assert await backend.is_clean(7)


async def test_removing_what_is_not_there_is_no_error(backend):
    """Removal is how half-known slots are collected, so it can be repeated."""
    await backend.remove(9)
    await backend.create(9)
    await backend.remove(9)
    await backend.remove(9)


async def test_a_removed_number_can_be_built_again_at_once(backend):
    """Nothing of the first slot lingers under its names."""
    for _ in range(3):
        await backend.create(7)
        await backend.remove(7)
    assert await backend.existing() == set()


async def test_a_tap_has_one_holder(backend):
    """The descriptor is not inherited, a second one is refused, and after closing it can be had again."""
    await backend.create(7)
    tap = await backend.open_tap(7)
    try:
        assert not os.get_inheritable(tap)
        with pytest.raises(TapError):
            await backend.open_tap(7)
    finally:
        os.close(tap)
    os.close(await backend.open_tap(7))


async def test_a_slot_can_be_removed_while_its_tap_is_open(backend):
    """A VM that was not reaped does not keep its number from the next tenant."""
    await backend.create(7)
    tap = await backend.open_tap(7)
    try:
        await backend.remove(7)
        await backend.create(7)
        assert await backend.is_clean(7)
        os.close(await backend.open_tap(7))
    finally:
        os.close(tap)


async def test_there_is_no_tap_without_a_slot(backend):
    """A tap is never made as a side effect of opening one."""
    with pytest.raises(TapError):
        await backend.open_tap(7)
    assert await backend.existing() == set()


async def test_numbers_that_cannot_be_are_refused(backend):
    """A wrong number never becomes a device name."""
    for job in (backend.create, backend.remove, backend.is_clean):
        with pytest.raises(InvalidSlotError):
            await job(0)


async def test_an_overrun_job_keeps_its_number_to_itself(monkeypatch):
    """A removal stuck in the kernel may finish at any time: until then its slot is not touched, others are free."""
    go = threading.Event()
    monkeypatch.setattr(backend_module.slots, "remove_slot", lambda number: number == 7 and go.wait(60))
    backend = NamespaceSlotBackend(seconds=0.02)
    with pytest.raises(SlotTimeoutError) as caught:
        await backend.remove(7)
    backend._seconds = 60  # what is not stuck may take its time
    with pytest.raises(SlotBusyError):
        await backend.create(7)
    await backend.remove(8)
    go.set()
    caught.value.thread.join(60)
    await backend.remove(7)
