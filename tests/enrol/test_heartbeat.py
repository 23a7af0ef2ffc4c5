"""The heartbeat against a control plane made of a list of answers, on Trio's fake clock."""

from __future__ import annotations

import msgspec
import pytest
import trio
import trio.testing

from agent.enrol.errors import ControlPlaneRefused, ControlPlaneUnreachable
from agent.enrol.heartbeat import INTERVAL, MISSES_ALLOWED, Heartbeat
from agent.enrol.registration import CALL_TIMEOUT

LOSS = INTERVAL * MISSES_ALLOWED + CALL_TIMEOUT
NO = ControlPlaneRefused(401, "unauthorized", "no")
AWAY = ControlPlaneUnreachable("away")
LIFETIME = 4 * 3600.0


class FakeControlPlane:
    """Answers, refuses, fails or hangs as `mood` says; remembers when it was asked."""

    url = "http://127.0.0.1:8080"

    def __init__(self):
        self.beats = []
        self.refreshes = []
        self.beat_error = None
        self.refresh_error = None
        self.slow = 0.0
        self.good_tokens = None

    async def heartbeat(self, credentials):
        self.beats.append((trio.current_time(), credentials.token))
        await trio.sleep(self.slow)
        if self.beat_error is not None:
            raise self.beat_error
        if self.good_tokens is not None and credentials.token not in self.good_tokens:
            raise NO

    async def refresh(self, old):
        self.refreshes.append((trio.current_time(), old.refresh_token))
        await trio.lowlevel.checkpoint()
        if self.refresh_error is not None:
            raise self.refresh_error
        number = int(old.refresh_token.partition("-")[2]) + 1
        return msgspec.structs.replace(
            old, token=f"token-{number}", refresh_token=f"refresh-{number}", token_received_at=trio.current_time()
        )


class FakeFile:
    """The credentials file without a disk: real ones need threads, which the fake clock does not wait for."""

    path = "/credentials"

    def __init__(self):
        self.stored = None
        self.full = False

    async def load(self):
        await trio.lowlevel.checkpoint()
        return self.stored

    async def save(self, credentials):
        await trio.lowlevel.checkpoint()
        if self.full:
            raise OSError(28, "No space left on device")
        self.stored = credentials


class World:
    def __init__(self, nursery, credentials):
        self.control_plane = FakeControlPlane()
        self.file = FakeFile()
        self.lost = []
        self.renewed = []
        self.credentials = credentials
        self.nursery = nursery

    async def start(self):
        heartbeat = Heartbeat(
            self.control_plane,
            self.file,
            self.credentials,
            on_lost=lambda: self.lost.append(trio.current_time()),
            on_renewed=self.renewed.append,
            wall=trio.current_time,
            jitter=lambda: 1.0,
        )
        await self.nursery.start(heartbeat.run)
        return heartbeat

    def beat_times(self):
        return [when for when, _ in self.control_plane.beats]


@pytest.fixture
async def world(nursery, credentials):
    return World(nursery, msgspec.structs.replace(credentials, token_lifetime=LIFETIME))


async def test_beats_come_every_thirty_seconds(world, autojump_clock):
    """By the clock: the time an answer takes does not push the next beat back."""
    world.control_plane.slow = 7
    heartbeat = await world.start()
    online = await heartbeat.presence.wait_for("online")
    assert online.since == 7
    await trio.sleep_until(100)
    assert world.beat_times() == [0, 30, 60, 90]
    assert world.lost == []


async def test_a_host_starts_without_its_control_plane(world, autojump_clock):
    """`started()` does not wait for an answer, and when one comes the host is online."""
    world.control_plane.beat_error = AWAY
    heartbeat = await world.start()
    assert heartbeat.presence.value.state == "starting"
    await trio.sleep(10)
    world.control_plane.beat_error = None
    await heartbeat.presence.wait_for("online")
    assert world.lost == []


async def test_a_silent_control_plane_is_lost_after_three_beats_and_not_before(world, autojump_clock):
    """Loss is told once; beats go on with pauses that grow to the interval; the way back is told, too."""
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    world.control_plane.beat_error = AWAY
    await trio.sleep_until(LOSS - 0.001)
    assert (heartbeat.presence.value.state, world.lost) == ("online", [])
    await trio.sleep_until(LOSS + 0.001)
    assert (heartbeat.presence.value.state, world.lost) == ("lost", [LOSS])
    await trio.sleep_until(LOSS + 600)
    assert world.lost == [LOSS]
    gaps = [b - a for a, b in zip(world.beat_times()[1:], world.beat_times()[2:], strict=False)]
    assert gaps[:10] == [1, 2, 4, 8, 10, 10, 10, 10, 10, 10]  # eager until it is lost
    assert set(gaps[10:]) == {30}
    assert world.control_plane.refreshes == []

    world.control_plane.beat_error = None
    back = await heartbeat.presence.wait_for("online")
    world.control_plane.beat_error = AWAY
    await heartbeat.presence.wait_for("lost")
    assert len(world.lost) == 2
    assert world.lost[1] >= back.since + LOSS - INTERVAL


async def test_a_control_plane_that_hangs_is_lost_as_punctually(world, autojump_clock):
    """Whoever waits for an answer does not wait with the verdict."""
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    world.control_plane.slow = 10_000
    await heartbeat.presence.wait_for("lost")
    assert world.lost == [LOSS]


async def test_an_answer_to_the_third_beat_counts_however_slow(world, autojump_clock):
    """Two are missed, and the third takes all the time that it may."""
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    world.control_plane.slow = CALL_TIMEOUT - 0.1
    world.control_plane.beat_error = AWAY
    await trio.sleep_until(INTERVAL * MISSES_ALLOWED - 1)
    world.control_plane.beat_error = None
    await trio.sleep_until(LOSS + 1)
    assert (heartbeat.presence.value.state, world.lost) == ("online", [])


@pytest.mark.parametrize("away", [False, True])
async def test_a_process_that_stood_still_asks_before_it_judges(world, autojump_clock, away):
    """Stopped for minutes, or starved: nobody was silent but we. One beat decides, within its time."""
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    world.control_plane.beat_error = AWAY if away else None
    world.control_plane.slow = 5
    await trio.testing.wait_all_tasks_blocked()
    autojump_clock.jump(600)
    await trio.sleep(2 * CALL_TIMEOUT + 1)
    assert heartbeat.presence.value.state == ("lost" if away else "online")
    assert len(world.lost) == away


async def test_credentials_are_renewed_at_half_life(world, autojump_clock):
    """Not before; saved before they are used; every half-life again."""
    heartbeat = await world.start()
    await trio.sleep_until(LIFETIME / 2 - 1)
    assert world.control_plane.refreshes == []
    await trio.sleep_until(LIFETIME / 2 + 1)
    assert world.control_plane.refreshes == [(LIFETIME / 2, "refresh-0")]
    assert world.file.stored == heartbeat.credentials == world.renewed[-1]
    await trio.sleep_until(LIFETIME / 2 + INTERVAL + 1)
    assert world.control_plane.beats[-1][1] == "token-1"
    await trio.sleep_until(LIFETIME + 1)
    assert [token for _, token in world.control_plane.refreshes] == ["refresh-0", "refresh-1"]
    assert world.lost == []


async def test_a_refused_heartbeat_is_answered_with_a_refresh(world, autojump_clock):
    """A token that is no longer good costs one beat: the next comes as soon as there are new credentials."""
    world.control_plane.good_tokens = {"token-1"}
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    assert trio.current_time() == 0
    assert len(world.control_plane.refreshes) == 1
    assert world.lost == []


async def test_refused_and_refresh_refused_is_told_at_once(world, autojump_clock):
    """The control plane is there and does not know us: no three intervals of hope. Trying goes on for ever."""
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    world.control_plane.good_tokens = set()
    world.control_plane.refresh_error = NO
    await heartbeat.presence.wait_for("refused")
    assert world.lost == [30]
    await trio.sleep(3600)
    assert heartbeat.presence.value.state == "refused"
    assert world.lost == [30]
    assert 50 < len(world.control_plane.refreshes) < 80
    world.control_plane.refresh_error = None
    world.control_plane.good_tokens = {"token-1"}
    await heartbeat.presence.wait_for("online")


async def test_a_host_that_was_registered_anew_meanwhile_goes_on_without_a_restart(world, autojump_clock):
    """Somebody put credentials that are good into the file: no restart is needed."""
    heartbeat = await world.start()
    world.control_plane.good_tokens = {"token-9"}
    world.control_plane.refresh_error = NO
    await heartbeat.presence.wait_for("refused")
    world.file.stored = msgspec.structs.replace(world.credentials, token="token-9", refresh_token="refresh-9")
    await heartbeat.presence.wait_for("online")
    assert world.renewed == [world.file.stored]


async def test_a_file_that_cannot_be_used_is_not_adopted(world, autojump_clock):
    """Half a `join`, or credentials of two fleets mixed up: wait for better ones, serve on with the old."""
    heartbeat = await world.start()
    world.control_plane.good_tokens = {"token-9"}
    world.control_plane.refresh_error = NO
    await heartbeat.presence.wait_for("refused")
    world.file.stored = msgspec.structs.replace(
        world.credentials, token="token-9", refresh_token="refresh-9", cert_pem="nonsense"
    )
    await trio.sleep(300)
    assert (heartbeat.presence.value.state, world.renewed) == ("refused", [])


async def test_a_network_error_while_refreshing_is_no_refusal(world, autojump_clock):
    """Tried again with growing pauses until it works; heartbeats go on meanwhile, and nothing is lost."""
    await world.start()
    world.control_plane.refresh_error = AWAY
    await trio.sleep_until(LIFETIME / 2 + 1000)
    tries = [when - LIFETIME / 2 for when, _ in world.control_plane.refreshes]
    assert tries[:7] == pytest.approx([0, 1, 3, 7, 15, 31, 63])
    world.control_plane.refresh_error = None
    await trio.sleep(61)
    assert len(world.renewed) == 1
    assert world.lost == []
    gaps = {b - a for a, b in zip(world.beat_times(), world.beat_times()[1:], strict=False)}
    assert gaps == {30}


async def test_a_refused_refresh_with_a_good_token_alarms_nobody(world, autojump_clock):
    """While heartbeats are answered the host is in its fleet; the log tells the operator, in time."""
    heartbeat = await world.start()
    world.control_plane.refresh_error = NO
    await trio.sleep_until(LIFETIME / 2 + 3600)
    assert heartbeat.presence.value.state == "online"
    assert world.lost == []


async def test_a_full_disk_does_not_stop_the_renewal(world, autojump_clock):
    """New credentials are used from memory; the next renewal writes them."""
    world.file.full = True
    heartbeat = await world.start()
    await trio.sleep_until(LIFETIME / 2 + 1)
    assert heartbeat.credentials.token == "token-1"
    world.file.full = False
    await trio.sleep_until(LIFETIME + 1)
    assert world.file.stored.token == "token-2"


async def test_other_refusals_count_as_misses_and_renew_nothing(world, autojump_clock):
    """HTTP 400 or 409 is a misunderstanding, not a verdict on our credentials."""
    heartbeat = await world.start()
    world.control_plane.beat_error = ControlPlaneRefused(400, "invalid_request", "what?")
    await heartbeat.presence.wait_for("lost")
    assert world.control_plane.refreshes == []


async def test_a_clock_that_is_set_forward_brings_the_renewal_forward(world, autojump_clock):
    """The half-life is looked at every hour: a suspended machine does not sleep through it."""
    shift = [0.0]
    heartbeat = Heartbeat(
        world.control_plane, world.file, world.credentials, wall=lambda: trio.current_time() + shift[0]
    )
    await world.nursery.start(heartbeat.run)
    await trio.sleep(10)
    shift[0] = LIFETIME
    await trio.sleep(3600)
    assert world.control_plane.refreshes


async def test_tokens_that_are_refused_as_soon_as_they_are_given_are_not_asked_for_without_pause(world, autojump_clock):
    """A control plane that is out of its mind gets two refreshes a minute, not all we can send."""
    world.control_plane.good_tokens = set()
    await world.start()
    await trio.sleep(600)
    assert len(world.control_plane.refreshes) <= 21
    assert len(world.control_plane.beats) <= 130


async def test_a_slow_reader_of_presence_sees_the_latest(world, autojump_clock):
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    with trio.fail_after(1):
        assert (await heartbeat.presence.wait_for("online", "lost")).state == "online"
    with pytest.raises(trio.TooSlowError):
        with trio.fail_after(1):
            await heartbeat.presence.wait_for("refused")


async def test_the_first_refusal_after_a_partition_wakes_the_renewal(world, autojump_clock):
    """A renewal that was waiting between two tries over a dead network goes on as soon as the token is refused."""
    heartbeat = await world.start()
    await trio.sleep_until(LIFETIME / 2 - 40)
    world.control_plane.refresh_error = world.control_plane.beat_error = AWAY
    await trio.sleep_until(LIFETIME / 2 + 1000)
    last = world.control_plane.refreshes[-1][0]
    await trio.sleep_until(last + 61)  # just tried, and not due for another minute
    world.control_plane.refresh_error = world.control_plane.beat_error = None
    world.control_plane.good_tokens = {"token-1"}
    back = trio.current_time()
    await heartbeat.presence.wait_for("online")
    assert trio.current_time() <= back + INTERVAL


@pytest.mark.parametrize("code", ["unknown", "blocked"])
@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_refusal_that_is_not_the_control_planes_own(world, autojump_clock, status, code):
    """A proxy that has lost its control plane, a firewall's page: three intervals, as for silence, and no refresh."""
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    world.control_plane.beat_error = ControlPlaneRefused(status, code, "no reason given")
    lost = await heartbeat.presence.wait_for("lost", "refused")
    assert (lost.state, lost.since) == ("lost", LOSS)
    assert world.control_plane.refreshes == []


@pytest.mark.parametrize("status", [401, 403])
async def test_a_firewall_before_the_renewal_is_no_verdict(world, autojump_clock, status):
    """The token is refused by the control plane, its renewal by somebody else: nothing is settled by that."""
    heartbeat = await world.start()
    await heartbeat.presence.wait_for("online")
    world.control_plane.good_tokens = {"token-1"}
    world.control_plane.refresh_error = ControlPlaneRefused(status, "unknown", "no reason given")
    await trio.sleep_until(LOSS - 1)
    assert (heartbeat.presence.value.state, world.lost) == ("online", [])
    assert world.control_plane.refreshes
    world.control_plane.refresh_error = None
    await trio.sleep(2 * 60 + INTERVAL)
    assert heartbeat.presence.value.state == "online"
