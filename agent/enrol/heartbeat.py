"""The heartbeat of this host, and the renewal of its credentials.

Owns: the credentials in use, the presence cell, the tasks `beat`, `renew` and `watch`.
Owned by: the daemon's nursery, beside everything else, so that no sandbox can delay it.
Takes: nothing. The control plane's answers and the clock are its only input.
Emits: `presence` (latest value); `on_renewed` with each new set of credentials; `on_lost` once per loss.
Dies when: the daemon does. Refusals and network errors never end it: it keeps trying for ever.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.supervise import RestartPolicy
from agent.enrol.errors import ControlPlaneRefused, ControlPlaneUnreachable, CredentialsInvalid
from agent.enrol.identity import check_identity
from agent.enrol.presence import GONE, Presence, PresenceCell
from agent.enrol.registration import CALL_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent.enrol.credentials import Credentials, CredentialsFile
    from agent.enrol.presence import State
    from agent.enrol.registration import ControlPlane

log = structlog.get_logger()

INTERVAL = 30.0
"""Seconds between heartbeats that are answered."""

MISSES_ALLOWED = 3
"""Heartbeats without an answer, each given its time, after which the control plane counts as lost."""

LATE = 1.0
"""Seconds past its hour at which the watch knows that this process stood still: silence was ours then."""

BEAT_BACKOFF = RestartPolicy(first_delay=1.0, max_delay=INTERVAL)
"""Before the loss a third of the interval at most: a control plane that is back in time should be noticed in time."""
RENEW_BACKOFF = RestartPolicy(first_delay=1.0, max_delay=60.0)

RENEW_PAUSE = 30.0
"""Seconds between a renewal and the next, whatever clocks and answers say: a control plane that gives out tokens which
it then refuses, or a clock that is set, must not make us hammer it."""

CLOCK_CHECK = 3600.0
"""Longest sleep towards the half-life: the wall clock may be set, the machine suspended."""


class Heartbeat:
    """See the module's docstring. `on_lost` and `on_renewed` are called from its tasks: they must not block."""

    def __init__(
        self,
        control_plane: ControlPlane,
        file: CredentialsFile,
        credentials: Credentials,
        *,
        on_lost: Callable[[], None] = lambda: None,
        on_renewed: Callable[[Credentials], None] = lambda _: None,
        interval: float = INTERVAL,
        wall: Callable[[], float] = time.time,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.presence = PresenceCell(Presence("starting", trio.current_time()))
        self._control_plane = control_plane
        self._file = file
        self._credentials = credentials
        self._on_lost = on_lost
        self._on_renewed = on_renewed
        self._interval = interval
        self._patience = min(CALL_TIMEOUT, interval)
        self._wall = wall
        self._jitter = jitter
        self._answered_at = trio.current_time()
        self._answered = trio.Event()
        self._renewal_wanted = trio.Event()
        self._adopted = trio.Event()

    @property
    def credentials(self) -> Credentials:
        """Those in use."""
        return self._credentials

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. `started()` at once: a control plane that is away must not keep a host from starting."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            nursery.start_soon(self._renew)
            nursery.start_soon(self._watch)
            task_status.started()

    async def _beat(self) -> None:
        failures = 0
        while True:
            begun = trio.current_time()
            if await self._beat_once():
                failures = 0
                await trio.sleep_until(begun + self._interval)
            else:
                failures += 1
                longest = self._interval if self.presence.value.state in GONE else self._interval / 3
                with trio.move_on_after(min(longest, self._spread(BEAT_BACKOFF.delay(failures)))):
                    await self._adopted.wait()

    async def _beat_once(self) -> bool:
        used = self._credentials
        try:
            await self._control_plane.heartbeat(used)
        except ControlPlaneUnreachable as err:
            log.warning("heartbeat_unanswered", reason=str(err))
            return False
        except ControlPlaneRefused as err:
            log.warning("heartbeat_refused", status=err.status, code=err.code)
            if err.is_about_credentials() and used is self._credentials:
                self._renewal_wanted.set()
            return False
        self._answered_at = trio.current_time()
        self._answered.set()
        self._answered = trio.Event()
        if self._renewal_wanted.is_set():
            self._renewal_wanted = trio.Event()
        self._become("online")
        return True

    async def _watch(self) -> None:
        """Declare the loss on time, also while a heartbeat hangs; not before the last one had its time."""
        while True:
            due = self._answered_at + MISSES_ALLOWED * self._interval + self._patience
            if trio.current_time() < due:
                await trio.sleep_until(due)
                if trio.current_time() > due + LATE:
                    with trio.move_on_after(2 * self._patience):  # a pause between two beats, and a beat
                        await self._answered.wait()
                continue
            if self.presence.value.state != "refused":
                self._become("lost", f"no answer to {MISSES_ALLOWED} heartbeats")
            await self._answered.wait()

    async def _renew(self) -> None:
        while True:
            await self._renewal_due()
            failures = 0
            while not await self._renew_once():
                failures += 1
                await self._wait_before_renewing(self._spread(RENEW_BACKOFF.delay(failures)))
            await trio.sleep(RENEW_PAUSE)

    async def _renewal_due(self) -> None:
        """Wait for the half-life of the token, or for its refusal."""
        while not self._renewal_wanted.is_set():
            left = self._credentials.refresh_due_at - self._wall()
            if left <= 0:
                return
            with trio.move_on_after(min(left, CLOCK_CHECK)):
                await self._renewal_wanted.wait()

    async def _wait_before_renewing(self, seconds: float) -> None:
        """Cut short by the first refusal of the token: then there is a control plane again that could be asked."""
        if self._renewal_wanted.is_set():
            await trio.sleep(seconds)
            return
        with trio.move_on_after(seconds):
            await self._renewal_wanted.wait()

    async def _renew_once(self) -> bool:
        used = self._credentials
        try:
            fresh = await self._control_plane.refresh(used)
        except ControlPlaneUnreachable as err:
            log.warning("credentials_not_renewed", reason=str(err))
            return False
        except ControlPlaneRefused as err:
            log.error("credentials_refused", status=err.status, code=err.code)  # noqa: TRY400 - no bug of ours
            if err.is_about_credentials() and self._renewal_wanted.is_set():
                self._become("refused", str(err))  # token and refresh token both; a token that still works is enough
            return await self._adopt_from_file()
        await self._save(fresh)
        self._adopt(fresh)
        return True

    async def _save(self, fresh: Credentials) -> None:
        """Durable before use. On a full disk go on from memory: after a crash the control plane takes the old token,
        coming from this same key, for an answer that was lost."""
        try:
            await self._file.save(fresh)
        except OSError as err:
            log.error("credentials_not_saved", path=str(self._file.path), reason=err.strerror)  # noqa: TRY400

    async def _adopt_from_file(self) -> bool:
        """The operator may have registered this host afresh meanwhile."""
        try:
            stored = await self._file.load()
            if stored is None or stored.refresh_token == self._credentials.refresh_token:
                return False
            check_identity(stored)
        except CredentialsInvalid as err:
            log.warning("credentials_unreadable", reason=str(err))
            return False
        self._adopt(stored)
        return True

    def _adopt(self, fresh: Credentials) -> None:
        self._credentials = fresh
        self._renewal_wanted = trio.Event()
        self._adopted.set()
        self._adopted = trio.Event()
        self._on_renewed(fresh)
        log.info("credentials_renewed", host_id=fresh.host_id)

    def _become(self, state: State, reason: str = "") -> None:
        before = self.presence.value.state
        if state == before:
            return
        self.presence.publish(Presence(state, trio.current_time(), reason))
        if state == "online":
            log.info("control_plane_online", url=self._control_plane.url)
            return
        log.error("control_plane_gone", state=state, reason=reason)
        if before not in GONE:
            self._on_lost()

    def _spread(self, delay: float) -> float:
        """Between half of `delay` and all of it, so that a fleet does not come back in step."""
        return delay * (0.5 + self._jitter() / 2)
