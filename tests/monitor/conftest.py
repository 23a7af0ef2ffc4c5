from __future__ import annotations

import pytest
import trio

from capsule.monitor.host import HostFollower


@pytest.fixture
def follow(world, agent, plane, nursery):
    """Starts a follower of the host; its scope, to be cancelled."""

    async def follow(db=None, of=agent):
        scope = trio.CancelScope()

        async def run():
            with scope:
                await HostFollower(of.host, db or world.db, plane.links).run()

        nursery.start_soon(run)
        await trio.sleep(2)
        return scope

    return follow


@pytest.fixture
def status(world):
    """Waits for a status of a row."""

    async def wait(sandbox, wanted, seconds):
        with trio.move_on_after(seconds):
            while (await world.row(sandbox)).status != wanted:
                await trio.sleep(0.05)
        row = await world.row(sandbox)
        assert row.status == wanted
        return row

    return wait
