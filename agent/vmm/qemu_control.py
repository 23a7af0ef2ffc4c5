"""Commands to one running QEMU, over its control socket."""

from __future__ import annotations

import itertools
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.vmm import qemu_state, qmp
from agent.vmm.driver import VmCommandFailed, VmGone, VmStateFailed
from agent.vmm.qemu_command import DISK_NODE, FILE_SUFFIX, overlay_node
from agent.vmm.qmp import QmpClient, QmpError, QmpRefused

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from agent.vmm.process import WatchedProcess

log = structlog.get_logger()

CONTROL_SOCKET = "qmp.sock"

QMP_TIMEOUT = 5.0
"""Seconds for a command that QEMU answers in a millisecond."""

FLUSH_TIMEOUT = 30.0
"""Seconds for a command that ends only when all that the guest has written is on the host's disk."""

DYING_TIMEOUT = 2.0
"""Seconds between a QEMU closing its sockets and its process being gone."""

ENDED = frozenset({"shutdown", "guest-panicked", "internal-error", "io-error", "watchdog"})
"""States of a machine that can neither be saved nor go on."""


class QemuControl:
    """One conversation at a time: QEMU serves one client per socket."""

    def __init__(self, directory: Path, process: WatchedProcess) -> None:
        self._directory = directory
        self._process = process
        self._lock = trio.Lock()

    @asynccontextmanager
    async def connect(self, *, patience: float | None = None) -> AsyncIterator[QmpClient]:
        """Wait for a turn and connect; `patience` in seconds until QEMU executes commands. Raises QmpError."""
        seconds = QMP_TIMEOUT if patience is None else patience
        async with self._lock, qmp.connect(self._directory, CONTROL_SOCKET, timeout=seconds) as client:
            yield client

    async def pause(self) -> None:
        """See Vm."""
        async with self._failures("pause"), self.connect() as client:
            await client.execute("stop", timeout=FLUSH_TIMEOUT)
            await _check_state(client, running=False)

    async def resume(self) -> None:
        """See Vm."""
        async with self._failures("resume"), self.connect() as client:
            refused: QmpRefused | None = None
            try:
                await client.execute("cont", timeout=FLUSH_TIMEOUT)
            except QmpRefused as error:
                refused = error
            await _check_state(client, running=True)  # says more than a refusal
            if refused is not None:
                raise refused

    async def paused(self) -> bool:
        """See Vm."""
        async with self._failures("query"), self.connect() as client:
            return not (await _state(client))["running"]

    async def save_state(self) -> bytes:
        """Return the state of CPUs and devices. Raises VmGone, VmStateFailed."""
        async with self._failures("save", VmStateFailed), self._lock:
            begun = done = False
            try:
                async with qmp.connect(self._directory, CONTROL_SOCKET, timeout=QMP_TIMEOUT) as client:
                    if (await _state(client))["running"]:
                        raise VmStateFailed("the VM must be paused to be saved")
                    begun = True
                    state = await qemu_state.save(client)
                    done = True
            finally:
                if begun and not done:
                    with trio.move_on_after(QMP_TIMEOUT, shield=True):
                        await self._give_up_save()
            return state

    async def pivot_disk(self, overlay: Path) -> None:
        """See Vm."""
        async with self._failures("pivot"), self.connect() as client:
            active = await _active_node(client)
            names = {node["node-name"] for node in await _nodes(client)}
            stem = DISK_NODE.rpartition("-")[0]
            new = next(name for number in itertools.count(1) if (name := f"{stem}-{number}") not in names)
            await client.execute("blockdev-add", timeout=QMP_TIMEOUT, **overlay_node(overlay, new))
            refused: QmpRefused | None = None
            try:
                await client.execute("blockdev-snapshot", timeout=FLUSH_TIMEOUT, node=active, overlay=new)
            except QmpRefused as error:
                refused = error
            if refused is not None:
                await client.execute("blockdev-del", timeout=QMP_TIMEOUT, **{"node-name": new})
                raise refused

    async def disk_file(self) -> Path:
        """See Vm."""
        async with self._failures("query"), self.connect() as client:
            file = await _active_node(client) + FILE_SUFFIX
            for node in await _nodes(client):
                if node["node-name"] == file:
                    return Path(node["file"])
        raise VmCommandFailed("QEMU has no file below its disk")

    async def _give_up_save(self) -> None:
        """On a connection of its own: the other one may have ended in the middle of an answer."""
        with suppress(QmpError):
            async with qmp.connect(self._directory, CONTROL_SOCKET, timeout=QMP_TIMEOUT) as client:
                await qemu_state.cancel(client)

    @asynccontextmanager
    async def _failures(
        self, command: str, kind: type[VmCommandFailed | VmStateFailed] = VmCommandFailed
    ) -> AsyncIterator[None]:
        try:
            yield
        except QmpError as error:
            failure = error
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            # A QEMU that was taken over by its guest may answer anything.
            raise kind(f"{command}: QEMU's answer has an unknown form ({error!r})") from error
        else:
            return
        if not isinstance(failure, QmpRefused):
            with trio.move_on_after(DYING_TIMEOUT):  # of a QEMU that ends its sockets are closed first
                await self._process.wait()
        if self._process.has_exited():
            raise VmGone(f"QEMU {await self._process.wait()}") from failure
        raise kind(f"{command}: {failure}") from failure


async def _state(client: QmpClient) -> dict[str, Any]:
    state: dict[str, Any] = await client.execute("query-status", timeout=QMP_TIMEOUT)
    if state["status"] in ENDED:
        raise VmGone(f"the guest has ended (QEMU's state is {state['status']})")
    return state


async def _check_state(client: QmpClient, *, running: bool) -> None:
    state = await _state(client)
    if state["running"] is not running:
        raise VmCommandFailed(f"QEMU's state is {state['status']} all the same")


async def _active_node(client: QmpClient) -> str:
    (device,) = [block for block in await client.execute("query-block", timeout=QMP_TIMEOUT) if "inserted" in block]
    return str(device["inserted"]["node-name"])


async def _nodes(client: QmpClient) -> list[dict[str, Any]]:
    nodes: list[dict[str, Any]] = await client.execute("query-named-block-nodes", timeout=QMP_TIMEOUT, flat=True)
    return nodes
