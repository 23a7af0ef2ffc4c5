"""The spool's room: what all hold together, and what one team may hold of it."""

from __future__ import annotations

import gc
from types import SimpleNamespace
from uuid import UUID

import pytest
import trio

from capsule import errors
from capsule.http.spool_shares import PLACE_TIMEOUT, Budget, Places

ONE, TWO, THREE = UUID(int=1), UUID(int=2), UUID(int=3)


class Disk:
    """So many bytes free beside what `budget` holds."""

    free = 200_000
    budget = None

    def statvfs(self, _path):
        return SimpleNamespace(f_bavail=self.free - self.budget.held, f_frsize=1)


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """Room for 100 000 bytes of all teams, 50 000 of one."""
    disk = Disk()
    disk.budget = Budget(tmp_path, trio.CapacityLimiter(1))
    monkeypatch.setattr("os.statvfs", disk.statvfs)
    return disk


@pytest.fixture
def budget(disk):
    return disk.budget


async def test_a_team_takes_half_of_the_places(autojump_clock):
    """The rest is for others, at once; its own next one waits, then is told to come again."""
    places = Places(4)
    one, two = places.of(ONE), places.of(TWO)
    for team in (one, one, two, two):
        with trio.fail_after(1):
            await team.acquire()
    began = trio.current_time()
    for team in (one, places.of(THREE)):
        with pytest.raises(errors.Busy):
            await team.acquire()
    assert trio.current_time() - began == 2 * PLACE_TIMEOUT
    two.release()
    with pytest.raises(errors.Busy):
        await one.acquire()
    with trio.fail_after(1):
        await places.of(THREE).acquire()
    one.release()
    one.release()
    with trio.fail_after(1):
        await two.acquire()
        await one.acquire()


async def test_who_gives_up_waiting_holds_nothing(autojump_clock):
    """Neither by its own time-out nor by being cancelled."""
    places = Places(2)
    one, two, three = (places.of(team) for team in (ONE, TWO, THREE))
    await one.acquire()
    await two.acquire()
    with trio.move_on_after(1):
        await three.acquire()
    with pytest.raises(errors.Busy):
        await three.acquire()
    one.release()
    with trio.fail_after(1):
        await three.acquire()


async def test_what_one_team_holds_leaves_room_for_others(budget):
    """413 for what would never fit into a share, 503 for what does not fit now."""
    one, two, three = (budget.of(team) for team in (ONE, TWO, THREE))
    with pytest.raises(errors.TooLarge):
        await one.take(60_000, 60_000)
    await one.take(40_000, 40_000)
    with pytest.raises(errors.Busy):
        await one.take(20_000, 20_000)
    await two.take(50_000, 50_000)
    with pytest.raises(errors.Busy):
        await three.take(20_000, 20_000)
    await three.take(10_000, 10_000)
    assert (one.held, two.held, three.held, budget.held) == (40_000, 50_000, 10_000, 100_000)
    one.give_back(40_000)
    await one.take(40_000, 40_000)


async def test_the_disk_is_shared(disk):
    """Never more than half of what is free, for all together."""
    team = disk.budget.of(ONE)
    await team.take(20_000, 20_000)
    disk.free = 80_000
    with pytest.raises(errors.TooLarge):
        await team.check(20_001)
    with pytest.raises(errors.Busy):
        await team.take(1, 20_000)
    await disk.budget.of(TWO).take(20_000, 20_000)
    with pytest.raises(errors.Busy):
        await disk.budget.of(THREE).take(1, 1)


def test_a_share_is_one_object_while_it_is_held_and_none_later(budget):
    """Two uploads of a team count together; a thousand teams that came once are forgotten."""
    places = Places(4)
    held = places.of(ONE), budget.of(ONE)
    assert held == (places.of(ONE), budget.of(ONE))
    del held
    gc.collect()
    assert not places._teams
    assert not budget._teams
