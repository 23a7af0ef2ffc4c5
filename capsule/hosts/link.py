"""The link to one agent: dialled when someone needs it, one connection, shared by all who do.

Owns: the connection (`OpenerPeer`) and its tasks. Owned by: the nursery of `HostLinks`.
Takes: `use` (a connected peer, for the length of a block), `retire`.
Emits: nothing; whoever waits in `use` gets the peer or a Fault.
Dies when: the connection is lost, nobody used it for `idle_timeout`, it was retired and its last user left, or the
host is gone. Failed dials do not end it: they set the time of the next one. `HostLinks` makes a new one when needed.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import structlog
import trio

from agent.actor.peer import OpenerPeer
from agent.actor.supervise import RestartPolicy
from agent.wire.faults import Fault, FaultCode
from agent.wire.link import LinkState
from capsule.db.errors import DatabaseUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable
    from uuid import UUID

    from capsule.hosts.directory import Endpoint

log = structlog.get_logger()

DIAL_BACKOFF = RestartPolicy(first_delay=0.1, max_delay=15.0)
"""After a failed dial. An agent that restarts is back in a second or two; a host that is gone costs a dial per 15 s."""


UNREACHABLE_MESSAGE = "the sandbox's host cannot be reached; try again"
"""For the end user. The reason is in the log: it has addresses that are no tenant's business."""


class Unreachable(Exception):  # noqa: N818 - reads as what happened
    """A dial failed; the text says why, for the log."""


class HostGone(Unreachable):
    """There is no such host any more: no use in dialling again."""


class Dial(Protocol):
    """How a link gets its stream: TLS in the daemon, memory in tests."""

    async def __call__(self, endpoint: Endpoint) -> trio.abc.Stream:
        """A stream to exactly the agent that `endpoint` describes. Unreachable when there is none."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkStatistics:
    """One link, for /metrics."""

    connected: bool
    users: int
    failed_dials: int


class HostLink:
    """See the module's docstring."""

    def __init__(
        self,
        host: UUID,
        find: Callable[[UUID], Awaitable[Endpoint | None]],
        dial: Dial,
        *,
        connect_timeout: float,
        idle_timeout: float,
    ) -> None:
        self.host = host
        self.endpoint: Endpoint | None = None
        """What was dialled, or is being dialled."""
        self._find = find
        self._dial = dial
        self._connect_timeout = connect_timeout
        self._idle_timeout = idle_timeout
        self._peer: OpenerPeer | None = None
        self._users = 0
        self._used_at = trio.current_time()
        self._retired = False
        self._ended = False
        self._failures = 0
        self._next_dial = -math.inf
        self._changed = trio.Event()

    @property
    def usable(self) -> bool:
        """Whether a new user may be let in: not retired, not ended, and not told by the agent to go away."""
        going = self._peer is not None and self._peer.link.state is not LinkState.READY
        return not (self._retired or self._ended or going)

    def statistics(self) -> LinkStatistics:
        """Figures of this moment."""
        connected = self._peer is not None and not self._peer.closed.is_set()
        return LinkStatistics(connected=connected, users=self._users, failed_dials=self._failures)

    def retire(self, *, now: bool = False) -> None:
        """Let nobody else in and end with the last user; `now`: drop the connection under those who are there."""
        self._retired = True
        if now and self._peer is not None:
            self._peer.close("the host's credentials changed")
        self._announce()

    @asynccontextmanager
    async def use(self, deadline: float = math.inf) -> AsyncIterator[OpenerPeer]:
        """The connected peer. Fault `unavailable` when the agent is not reached by `deadline` (Trio time) or within the
        connect time-out, and at once when the next dial is not due by then."""
        self._users += 1
        self._announce()
        try:
            yield await self._connected(min(deadline, trio.current_time() + self._connect_timeout))
        finally:
            self._users -= 1
            self._used_at = trio.current_time()
            self._announce()

    async def _connected(self, deadline: float) -> OpenerPeer:
        while True:
            if self._peer is not None and self._peer.link.state is LinkState.READY:
                return self._peer
            if self._ended or self._next_dial > deadline or trio.current_time() >= deadline:
                raise Fault(FaultCode.UNAVAILABLE, UNREACHABLE_MESSAGE, retryable=True)
            with trio.move_on_at(deadline):
                await self._changed.wait()

    async def run(self) -> None:
        """Dial while someone waits, hold the connection while someone needs it."""
        try:
            while await self._wanted():
                try:
                    return await self._connect_and_hold()
                except HostGone as err:
                    log.warning("host_gone", host_id=str(self.host), reason=str(err))
                    return None
                except Unreachable as err:
                    self._failed(str(err))
        finally:
            self._ended = True
            self._announce()

    async def _wanted(self) -> bool:
        """Wait until someone waits and a dial is due; False when nobody is left, or nobody came for `idle_timeout`."""
        while self._users or not self._retired:
            now = trio.current_time()
            idle_at = self._used_at + self._idle_timeout
            if self._users and now >= self._next_dial:
                return True
            if not self._users and now >= idle_at:
                return False
            with trio.move_on_at(self._next_dial if self._users else idle_at):
                await self._changed.wait()
        return False

    async def _connect_and_hold(self) -> None:
        self.endpoint = await self._look_up()
        stream: trio.abc.Stream | None = None
        with trio.move_on_after(self._connect_timeout):
            stream = await self._dial(self.endpoint)
        if stream is None:
            raise Unreachable(f"{self.endpoint.address} did not answer in {self._connect_timeout:g} s")
        peer = OpenerPeer(stream)
        async with trio.open_nursery() as nursery:
            greeted = await self._greet(nursery, peer)
            if greeted:
                nursery.start_soon(self._announce_end, peer)
                await self._hold(peer)
                self._ended = True  # before the connection closes: from here on a newcomer gets a new link
                peer.close()
        if not greeted:
            raise Unreachable(peer.reason)
        log.info("host_disconnected", host_id=str(self.host), reason=peer.reason)

    async def _look_up(self) -> Endpoint:
        try:
            endpoint = await self._find(self.host)
        except DatabaseUnavailable as err:
            raise Unreachable("the database does not answer") from err
        if endpoint is None:
            raise HostGone("it is deleted, or was never registered")
        return endpoint

    async def _greet(self, nursery: trio.Nursery, peer: OpenerPeer) -> bool:
        """Run the peer; whether both sides have said HELLO. No exception: it would leave the nursery in a group."""
        with trio.move_on_after(self._connect_timeout):
            try:
                await nursery.start(peer.run)
            except RuntimeError:  # Trio's word for a child that returned without `started()`
                if not peer.closed.is_set():
                    raise
                return False
            return True
        peer.reason = peer.reason or "no HELLO in time"
        return False

    async def _hold(self, peer: OpenerPeer) -> None:
        """Return when the connection is lost or nobody needs it any more."""
        self._failures = 0
        self._peer = peer
        self._announce()
        log.info("host_connected", host_id=str(self.host))
        while not peer.closed.is_set():
            idle_at = self._used_at + self._idle_timeout
            if not self._users and (self._retired or trio.current_time() >= idle_at):
                return
            with trio.move_on_at(math.inf if self._users else idle_at):
                await self._changed.wait()

    async def _announce_end(self, peer: OpenerPeer) -> None:
        await peer.closed.wait()
        self._announce()

    def _failed(self, reason: str) -> None:
        self._failures += 1
        self._next_dial = trio.current_time() + DIAL_BACKOFF.delay(self._failures)
        log.warning("host_not_reached", host_id=str(self.host), reason=reason, failures=self._failures)
        self._announce()

    def _announce(self) -> None:
        self._changed.set()
        self._changed = trio.Event()
