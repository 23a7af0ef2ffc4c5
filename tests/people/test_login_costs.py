"""What a failed login costs tells nobody whether there is an account: the operator may change the cost of passwords."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import trio

from capsule import control, errors
from capsule.auth.decoys import REMEMBERED, Decoys
from tests.fixtures.people import PASSWORD, quick_settings
from tests.people.together import at_once

OLD, NEW = "$argon2id$v=19$m=8,t=1,p=1", "$argon2id$v=19$m=16,t=1,p=1"


def restarted(people):
    """A control plane with another cost than `people`."""
    return control._people(quick_settings(argon2_memory_kib=16), people.world.db).accounts


async def test_strangers_cost_what_accounts_cost(people, verifications):
    """What is in use, be it yesterday's cost alone; and of two that are in use an address always has the same one,
    beside which accounts without a password do not stand out."""
    ada, bob, eve = [await people.sign_up(name) for name in ("Ada", "Bob", "Eve")]
    await people.sql("update users set password_hash = null where id = $1", eve.id)
    await people.sql("insert into users (email, name, password_hash) values ('x@example.com', 'X', 'rubbish')")
    strangers = [*(f"{number}@example.com" for number in range(14)), eve.email, "x@example.com", "no address"]

    async def cost(accounts, email):
        """Of a login with the password of Ada and Bob."""
        verifications.clear()
        with suppress(errors.Unauthorized):
            await accounts.log_in(email=email, password=PASSWORD, address="")
        *_, stored = verifications  # beside one that is damaged
        return stored.rsplit("$", 2)[0]

    async def all_costs():
        accounts = restarted(people)
        return {email: await cost(accounts, email) for email in strangers}

    assert set((await all_costs()).values()) == {OLD}
    assert await cost(restarted(people), ada.email) == OLD
    both = await all_costs()
    assert set(both.values()) == {OLD, NEW}
    assert await all_costs() == both
    await cost(restarted(people), bob.email)
    assert set((await all_costs()).values()) == {NEW}


async def test_the_costs_in_use_are_asked_for_now_and_then(autojump_clock):
    """Not at each login; by one of those who need them."""

    class Rows:
        asked = 0

        async def run(self, _):
            self.asked += 1
            await trio.sleep(1)
            return [OLD + "$"]

    rows = Rows()
    decoys = Decoys(rows, quick_settings())
    assert len(set(await at_once(partial(decoys.of, f"{number}@example.com") for number in range(5)))) == 1
    assert rows.asked == 1
    await trio.sleep(REMEMBERED - 5)
    await decoys.of("a@example.com")
    assert rows.asked == 1
    await trio.sleep(10)
    await decoys.of("a@example.com")
    assert rows.asked == 2


async def test_without_any_password_the_cost_is_todays(people, verifications):
    """The first login of all."""
    with suppress(errors.Unauthorized):
        await restarted(people).log_in(email="ada@example.com", password=PASSWORD, address="")
    assert verifications[0].startswith(f"{NEW}$")
