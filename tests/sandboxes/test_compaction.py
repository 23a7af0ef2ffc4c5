"""When a paused sandbox's snapshots are made one; that it may be stopped and killed is for test_pause_crash_points."""

from __future__ import annotations

from unittest import mock
from uuid import UUID

import pytest
from sandbox_world import sandbox_id
from trio.testing import wait_all_tasks_blocked

from agent import daemon
from agent.actor.settings import SettingsError, load_settings
from agent.config import PREFIX, Settings
from agent.sandboxes.records import StateDirectory

ONE = sandbox_id(1)


async def pause_again(agent, number):
    """The memory's generation after a pause, with all that follows it."""
    machine = agent.host.vms.machine(ONE)
    machine.write(4096 * number, b"%8d" % number)
    await agent.pause(ONE)
    await wait_all_tasks_blocked()
    host = agent.host
    base = agent.manager.find(ONE).made.record.base
    for each in range(1, number + 1):
        assert host.memory(base, 4096 * each) == b"%8d" % each
    return host.store().load(UUID(base)).header.generation


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"compact_generations": 3}, [1, 2, 1, 2, 1]),
        ({"compact_generations": 2}, [1, 1, 1]),
        ({}, [1, 2, 3, 4, 5, 6, 7, 1, 2]),
    ],
    ids=["three", "two", "default"],
)
async def test_so_many_generations_become_one(host, autojump_clock, options, expected):
    """The pause that reaches the setting is followed by a compaction, none before; then it counts anew."""
    async with host.agent(**options) as agent:
        await agent.create(ONE)
        found = []
        for number in range(1, len(expected) + 1):
            found.append(await pause_again(agent, number))
            await agent.check()
            await agent.resume(ONE)
        assert found == expected


async def test_the_setting_reaches_the_sandboxes(tmp_path, monkeypatch):
    """From the environment to what they are made from; one generation cannot be made fewer."""
    monkeypatch.setattr(daemon, "detect_qemu", mock.AsyncMock())
    settings = load_settings(Settings, {f"{PREFIX}COMPACT_GENERATIONS": "3"}, prefix=PREFIX)
    state = StateDirectory(tmp_path / "state")
    state.prepare()
    assert (await daemon.make_parts(settings, state)).compact_generations == 3
    with pytest.raises(SettingsError, match=f"^{PREFIX}COMPACT_GENERATIONS: "):
        load_settings(Settings, {f"{PREFIX}COMPACT_GENERATIONS": "1"}, prefix=PREFIX)
