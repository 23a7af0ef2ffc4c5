"""All links of this process: which host has one, and when one is not to be trusted any more.

Owns: a `HostLink` per host in use. Owned by: the control plane's main nursery.
Takes: `call` and `open_stream` for one host, `forget`.
Emits: answers and Faults. A connection that is lost or cannot be made is Fault `unavailable`, retryable.
Dies when: cancelled, with all links; what is under way then fails with `unavailable`.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.actor.tls import connect_tls
from agent.wire.faults import Fault, FaultCode
from capsule.config import split_address
from capsule.db.errors import DatabaseUnavailable
from capsule.hosts.link import UNREACHABLE_MESSAGE, HostLink, Unreachable
from capsule.hosts.tls import PinMismatch, check_pin

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from uuid import UUID

    from agent.actor.peer import OpenedStream
    from capsule.config import Settings
    from capsule.hosts.directory import Directory, Endpoint
    from capsule.hosts.link import Dial, LinkStatistics
    from capsule.hosts.tls import ClientContexts

log = structlog.get_logger()

CHECK_INTERVAL = 5.0
"""Seconds between looks at the host rows of open links: how long a re-registered or deleted host keeps an old one."""


class HostLinks:
    """See the module's docstring. `dial` is TLS in the daemon."""

    def __init__(self, directory: Directory, dial: Dial, settings: Settings) -> None:
        self._directory = directory
        self._dial = dial
        self._settings = settings
        self._links: dict[UUID, HostLink] = {}
        self._retired: dict[UUID, set[HostLink]] = {}
        """Those that let nobody else in and have users left."""
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled; `started()` when calls can be made."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await self._check_endpoints()
            finally:
                self._nursery = None  # before it closes: whoever still calls gets a Fault

    async def call(
        self,
        host: UUID,
        method: str,
        body: dict[str, Any],
        *,
        timeout: float,  # noqa: ASYNC109 - travels to the agent
    ) -> dict[str, Any]:
        """Ask the agent of `host` and wait for the answer; `timeout` seconds, connecting included. Raises Fault."""
        deadline = trio.current_time() + timeout
        async with self._link(host).use(deadline) as peer:
            return await peer.call(method, body, timeout=_left(deadline, method))

    async def reach(
        self,
        host: UUID,
        *,
        timeout: float,  # noqa: ASYNC109 - of one connection, which others may wait for, too
    ) -> Endpoint:
        """Where the agent of `host` is connected, which showed the pinned certificate there; `timeout` seconds. Raises
        Fault. It may have registered anew since: compare with the row."""
        link = self._link(host)
        async with link.use(trio.current_time() + timeout):
            assert link.endpoint is not None  # noqa: S101 - nothing is connected that was not looked up
            return link.endpoint

    @asynccontextmanager
    async def open_stream(
        self,
        host: UUID,
        method: str,
        body: dict[str, Any],
        *,
        timeout: float = math.inf,  # noqa: ASYNC109 - travels to the agent
    ) -> AsyncIterator[OpenedStream]:
        """A stream to the agent of `host` for the length of the block; see OpenerPeer.open_stream. Raises Fault."""
        deadline = trio.current_time() + timeout
        async with (
            self._link(host).use(deadline) as peer,
            peer.open_stream(method, body, timeout=_left(deadline, method)) as stream,
        ):
            yield stream

    def forget(self, host: UUID) -> None:
        """Drop its connections now: the host was deleted, or registered anew."""
        if host in self._links:
            self._retire(self._links.pop(host))
        for link in self._retired.get(host, ()):
            link.retire(now=True)

    def statistics(self) -> Mapping[UUID, LinkStatistics]:
        """Every link that there is."""
        return {host: link.statistics() for host, link in self._links.items()}

    def _link(self, host: UUID) -> HostLink:
        link = self._links.get(host)
        if link is not None and link.usable:
            return link
        if self._nursery is None:
            raise Fault(FaultCode.UNAVAILABLE, UNREACHABLE_MESSAGE, retryable=True)
        if link is not None:
            self._retire(link)
        link = self._links[host] = HostLink(
            host,
            self._directory.find,
            self._dial,
            connect_timeout=self._settings.connect_timeout,
            idle_timeout=self._settings.link_idle_timeout,
        )
        self._nursery.start_soon(self._run_link, link)
        return link

    def _retire(self, link: HostLink) -> None:
        """It stays known until it ends: whoever forgets the host means it, too."""
        self._retired.setdefault(link.host, set()).add(link)
        link.retire()

    async def _run_link(self, link: HostLink) -> None:
        try:
            await link.run()
        finally:
            if self._links.get(link.host) is link:
                del self._links[link.host]
            retired = self._retired.get(link.host, set())
            retired.discard(link)
            if not retired:
                self._retired.pop(link.host, None)

    async def _check_endpoints(self) -> None:
        """End links to what the host rows do not say any more. Rows are read, never assumed: another control plane may
        have changed them."""
        while True:
            await trio.sleep(CHECK_INTERVAL)
            open_links = [*self._links.values(), *(link for some in self._retired.values() for link in some)]
            dialled = [(link, link.endpoint) for link in open_links if link.endpoint is not None]
            if not dialled:
                continue
            try:
                current = await self._directory.find_all({link.host for link, _ in dialled})
            except DatabaseUnavailable as err:
                log.warning("host_rows_not_read", reason=str(err))
                continue
            for link, endpoint in dialled:
                self._compare(link, endpoint, current.get(link.host))

    def _compare(self, link: HostLink, dialled: Endpoint, current: Endpoint | None) -> None:
        if link.endpoint is not dialled or dialled == current:
            return
        if current is None or current.epoch != dialled.epoch:
            if self._links.get(link.host) is link:
                self._retire(self._links.pop(link.host))
            link.retire(now=True)
        elif link.usable:
            self._retire(link)  # a renewed certificate: the agent is the same, what is under way may finish


def tls_dial(contexts: ClientContexts) -> Dial:
    """Mutual TLS, pinned to the certificates on the host's row."""
    return partial(_dial_tls, contexts)


async def _dial_tls(contexts: ClientContexts, endpoint: Endpoint) -> trio.abc.Stream:
    try:
        name, port = split_address(endpoint.address)
        stream = await connect_tls(name, port, contexts.current())
    except (trio.BrokenResourceError, OSError, ValueError) as err:
        raise Unreachable(f"{endpoint.address}: {err}") from err
    try:
        check_pin(stream.peer_certificate(), *endpoint.pinned)
    except PinMismatch as err:
        await trio.aclose_forcefully(stream)
        raise Unreachable(f"{endpoint.address} is another machine: {err}") from err
    return stream


def _left(deadline: float, method: str) -> float:
    left = deadline - trio.current_time()
    if left <= 0:
        raise Fault(FaultCode.DEADLINE_EXCEEDED, f"{method} got no connection in time", retryable=True)
    return left
