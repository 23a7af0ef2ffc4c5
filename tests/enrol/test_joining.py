"""Spending a one-time token: what is refused before, and what is said when something comes in between."""

from __future__ import annotations

import msgspec
import pytest
import trio

from agent.enrol.credentials import CredentialsFile
from agent.enrol.errors import (
    AlreadyRegistered,
    AnotherHost,
    ControlPlaneRefused,
    ControlPlaneUnreachable,
    CredentialsInvalid,
    CredentialsNotStored,
    RegistrationInDoubt,
    TokenInvalid,
)
from agent.enrol.joining import check_token, check_unregistered, register
from agent.enrol.registration import Capacity

CAPACITY = Capacity(arch="x86_64", cpu_cores=1, memory_mb=1, disk_gb=1)
TOKEN = "htok-" + "0" * 64
ADDRESS = "192.0.2.7:7443"


class FakeControlPlane:
    def __init__(self, credentials, error=None):
        self.credentials = credentials
        self.error = error
        self.spent = []
        self.asked = trio.Event()
        self.answer = trio.Event()
        self.answer.set()

    async def register(self, token, address, capacity):
        self.spent.append((token, address))
        self.asked.set()
        await self.answer.wait()
        if self.error is not None:
            raise self.error
        return self.credentials


@pytest.fixture
def file(tmp_path):
    return CredentialsFile(tmp_path / "credentials.json")


@pytest.mark.parametrize(
    "token", ["", "htok-", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), TOKEN + "\n", "hrt-" + "0" * 64]
)
def test_what_is_no_token_is_not_sent(token):
    with pytest.raises(TokenInvalid, match="copied whole"):
        check_token(token)


async def test_registered_and_stored(file, credentials):
    """With the address, which a later start listens on; one that the settings say is not written down."""
    got = await register(FakeControlPlane(credentials), file, TOKEN, ADDRESS, CAPACITY, remember_address=True)
    assert got == await file.load() == msgspec.structs.replace(credentials, address=ADDRESS)
    await register(FakeControlPlane(credentials), file, TOKEN, ADDRESS, CAPACITY)
    assert (await file.load()).address == ""


async def test_a_machine_that_is_a_host_is_left_alone(file, credentials):
    """It says which host this is; damaged credentials are somebody's, too. With force, neither is in the way."""
    assert await check_unregistered(file, force=False) is None
    await file.save(credentials)
    with pytest.raises(AlreadyRegistered, match=credentials.host_id):
        await check_unregistered(file, force=False)
    assert await check_unregistered(file, force=True) == credentials
    file.path.write_text("{")
    with pytest.raises(CredentialsInvalid, match="damaged"):
        await check_unregistered(file, force=False)
    assert await check_unregistered(file, force=True) is None


async def test_a_token_of_another_host_does_not_take_its_sandboxes(file, credentials):
    """A fleet ends what it does not know: the credentials that were there stay."""
    await file.save(credentials)
    other = msgspec.structs.replace(credentials, host_id="host-00000000-0000-0000-0000-000000000002")
    with pytest.raises(AnotherHost, match=r"fresh token of that host.*is spent: host-\S*2, .*join again"):
        await register(FakeControlPlane(other), file, TOKEN, ADDRESS, CAPACITY, only_as=credentials.host_id)
    assert await file.load() == credentials
    await register(FakeControlPlane(credentials), file, TOKEN, ADDRESS, CAPACITY, only_as=credentials.host_id)


async def test_no_answer_leaves_doubt_and_a_no_does_not(file, credentials):
    """The control plane's own words for a spent token; after silence: how to find out."""
    with pytest.raises(RegistrationInDoubt, match="try again, and if the token is then refused"):
        await register(FakeControlPlane(credentials, ControlPlaneUnreachable("x")), file, TOKEN, ADDRESS, CAPACITY)
    refusal = ControlPlaneRefused(401, "unauthorized", "make a new one")
    with pytest.raises(ControlPlaneRefused, match="make a new one"):
        await register(FakeControlPlane(credentials, refusal), file, TOKEN, ADDRESS, CAPACITY)
    assert await file.load() is None


async def test_a_disk_that_does_not_take_them(file, credentials, monkeypatch):
    """Token and credentials are lost; the old ones are not, and it is said what to do."""
    await file.save(credentials)

    async def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(file, "save", fail)
    with pytest.raises(CredentialsNotStored, match=r"No space left.*the token is spent.*another token"):
        await register(FakeControlPlane(credentials), file, TOKEN, ADDRESS, CAPACITY)
    assert await file.load() == credentials


async def test_a_stop_in_between_waits_for_the_file(file, credentials):
    """Ctrl-C after the request went out: the answer is still written down."""
    control_plane = FakeControlPlane(credentials)
    control_plane.answer = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(register, control_plane, file, TOKEN, ADDRESS, CAPACITY)
        await control_plane.asked.wait()
        nursery.cancel_scope.cancel()
        control_plane.answer.set()
    assert await file.load() == credentials


async def test_a_stop_does_not_wait_for_ever(file, credentials, autojump_clock):
    control_plane = FakeControlPlane(credentials)
    control_plane.answer = trio.Event()
    with pytest.raises(CredentialsNotStored, match="in 15 s"):
        await register(control_plane, file, TOKEN, ADDRESS, CAPACITY)
    assert trio.current_time() == 15
