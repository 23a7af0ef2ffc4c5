"""Random faults, round after round: afterwards every promise holds.

CAPSULE_FLEET_ROUNDS, CAPSULE_FLEET_HOSTS, CAPSULE_FLEET_SANDBOXES (of each host) and CAPSULE_FLEET_SEED set how much;
1000 rounds of 20 hosts with 50 sandboxes are an hour's work.
"""

from __future__ import annotations

import itertools
import os
import random
import sys
import time

import msgspec
import pytest
import trio

from tests.fixtures.daemons import wait_for
from tests.fixtures.fleet_faults import Faults
from tests.fixtures.fleet_truth import Truth
from tests.fixtures.fleet_users import Users

ROUNDS = int(os.environ.get("CAPSULE_FLEET_ROUNDS", "6"))
HOSTS = int(os.environ.get("CAPSULE_FLEET_HOSTS", "20"))
SANDBOXES = int(os.environ.get("CAPSULE_FLEET_SANDBOXES", "5"))
SEED = int(os.environ.get("CAPSULE_FLEET_SEED", "1"))
EVERY = 20
"""Rounds from one look at all keys to the next."""
REQUESTS = 30
"""Of users, in each round."""
BACK = 100.0
"""Seconds in which every host is online again, and has been listed: a dial and a heartbeat may be due only after their
back-off, and the silence of a host counts only after three beats."""


class Game:
    """One fleet, and rounds on it."""

    def __init__(self, fleet, seed, superuser):
        self.random = random.Random(seed)
        self.fleet = fleet
        self.truth = Truth(fleet)
        self.users = Users(fleet, self.truth, self.random)
        self.faults = Faults(fleet, self.truth, self.random, superuser)
        self.slowest = 0.0
        self.online_after = 0.0

    async def begin(self):
        await self.fleet.add_hosts(HOSTS)
        for _ in range(2):
            await self.fleet.add_plane()
        await self.fleet.wait_online(60)
        places = trio.CapacityLimiter(100)

        async def create(number):
            async with places:
                await self.users.ask("create", self.users._create(f"first-{number}"))

        async with trio.open_nursery() as nursery:
            for number in range(HOSTS * SANDBOXES):
                nursery.start_soon(create, number)
        await self.truth.wait_until_true()

    async def play(self):
        """One round."""
        await self.users.look()
        async with trio.open_nursery() as nursery:
            for _ in range(REQUESTS):
                nursery.start_soon(self.users.ask, *self.users.request(HOSTS * SANDBOXES))
            await trio.sleep(self.random.uniform(0, 2))
            for _ in range(self.random.choice([1, 1, 1, 2])):
                await self.faults.strike()
            await self.faults.heal()
        await self.fleet.wait_quiet(100)
        self.online_after = max(self.online_after, await self.fleet.wait_online(BACK))
        await self._listed()
        self.slowest = max(self.slowest, await self.truth.wait_until_true())
        assert not self.users.surprises, self.users.surprises

    async def _listed(self):
        """The leader has looked at every host since the faults were over."""
        since = trio.current_time()

        def listed():
            leaders = [plane for plane in self.fleet.planes if plane.monitor.leading]
            followers = leaders[0].monitor._followers.values() if leaders else ()
            return len(followers) == HOSTS and all(follower.listed_at > since for _, follower in followers)

        assert await wait_for(listed, 60), "not every host was listed within a minute"


@pytest.fixture
def real_seconds():
    """For all rounds, on a machine that others use, too."""
    return 120.0 + 30.0 * ROUNDS


async def test_every_promise_holds_after_every_round(virtual_clock, fleet, postgres_server, capsys):
    """One host per sandbox, no snapshot lost, no ghost, no two owners, rows as their hosts within two rounds of the
    monitor, nothing made twice for one key, and for every request an answer."""

    def say(text):
        with capsys.disabled():
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()

    fleet.settings = msgspec.structs.replace(
        fleet.settings, create_timeout=20, pause_timeout=20, resume_timeout=20, call_timeout=10
    )
    game = Game(fleet, SEED, postgres_server.superuser)
    began = time.monotonic()
    await game.begin()
    started = time.monotonic() - began
    for number in itertools.count(1):
        try:
            await game.play()
            if number % EVERY == 0 or number == ROUNDS:
                await game.truth.check_keys(game.users.answers)
        except Exception as err:  # noqa: BLE001 - whatever it is, the faults are what matters
            last = "\n".join(game.faults.told[-8:])
            pytest.fail(f"seed {SEED}, round {number}: {err!r}\n{err}\nthe last faults:\n{last}")
        if number % EVERY == 0:
            seconds = time.monotonic() - began - started
            say(f"round {number}: {seconds / number:.2f} s each, {trio.current_time():.0f} of the virtual clock")
        if number == ROUNDS:
            break
    say(f"{ROUNDS} rounds, start {started:.0f} s, rows true after {game.slowest:.0f} s at most")
    say(f"hosts online after {game.online_after:.0f} s at most; {dict(game.users.outcomes)}")
