"""Registrations, refreshes and tokens of one host, while others of it commit."""

from __future__ import annotations

from functools import partial

import pytest

from agent.enrol.identity import certificate_request, new_key
from capsule.config import Settings
from capsule.db.pool import open_database
from capsule.errors import Unauthorized
from capsule.hosts.authority import load_authority
from capsule.hosts.registration import HostEnrolment
from capsule.model import HostRegistration

SETTINGS = Settings(database_url="x", secret_key="s" * 32)


@pytest.fixture
async def db(postgres_dsn):
    async with open_database(postgres_dsn) as database:
        yield database


@pytest.fixture
async def enrolment(db):
    return HostEnrolment(db, await load_authority(db, SETTINGS), SETTINGS)


def asking(token):
    return HostRegistration(
        token=token,
        address="192.0.2.7:7443",
        arch="x86_64",
        cpu_cores=4,
        memory_mb=8192,
        disk_gb=100,
        csr_pem=certificate_request(new_key()),
    )


@pytest.fixture
async def old(enrolment):
    """A host that has joined."""
    made = await enrolment.create_host()
    return await enrolment.register(asking(made.registration_token))


async def test_a_registration_while_the_old_credentials_are_refreshed(db, enrolment, old, overtake, queued):
    """What the refresh makes ends with the registration that it goes on beside: nobody has two ways in."""
    token = await enrolment.new_token(old.host.id)
    overtaking = overtake(
        partial(queued, db, partial(enrolment.register, asking(token))), before="insert into host_refresh_tokens"
    )
    refreshed = await enrolment.refresh(old.refresh_token, None)
    await queued.done()
    assert overtaking.done
    with pytest.raises(Unauthorized):
        await enrolment.refresh(refreshed.refresh_token, None)


async def test_a_theft_that_shows_while_the_family_goes_on(db, enrolment, old, overtake, queued):
    """The newest of the family ends, too, although it was not there yet when the others did."""
    second = await enrolment.refresh(old.refresh_token, None)

    async def steal():
        with pytest.raises(Unauthorized):
            await enrolment.refresh(old.refresh_token, None)

    overtaking = overtake(partial(queued, db, steal), before="insert into host_refresh_tokens")
    third = await enrolment.refresh(second.refresh_token, None)
    await queued.done()
    assert overtaking.done
    with pytest.raises(Unauthorized):
        await enrolment.refresh(third.refresh_token, None)


async def test_of_two_tokens_made_at_once_one_is_good(db, enrolment, old, overtake, queued):
    """The later one voids the other, as it does when it comes after it."""
    tokens = []

    async def make():
        tokens.append(await enrolment.new_token(old.host.id))

    overtaking = overtake(partial(queued, db, make), before="insert into host_registration_tokens")
    await make()
    await queued.done()
    assert overtaking.done
    good = []
    for token in tokens:
        try:
            good.append(await enrolment.register(asking(token)))
        except Unauthorized:
            continue
    assert len(good) == 1
