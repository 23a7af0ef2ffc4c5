"""One running QEMU: its end noticed and explained, its console read, its process killed, its state saved."""

from __future__ import annotations

import base64
import math
import os
from functools import partial
from typing import TYPE_CHECKING, Any

import structlog
import trio

from agent.vmm import qemu_state, qmp
from agent.vmm.driver import (
    MAX_CONSOLE_BYTES,
    GuestMemory,
    Vm,
    VmCommandFailed,
    VmGone,
    VmmError,
    VmProcess,
    VmStartFailed,
    VmStatistics,
    VmWillNotDie,
)
from agent.vmm.guest_memory import find_memory, has_userfaultfd
from agent.vmm.ownership import give
from agent.vmm.qemu_command import CONSOLE
from agent.vmm.qemu_control import DYING_TIMEOUT, QMP_TIMEOUT, QemuControl
from agent.vmm.qmp import QmpClient, QmpError, QmpUnreachable
from agent.vmm.state_file import write_state
from agent.vmm.text import last_lines, printable

if TYPE_CHECKING:
    from pathlib import Path

    from agent.vmm.cgroup import CgroupTree
    from agent.vmm.driver import VmSpec
    from agent.vmm.process import ProcessExit, WatchedProcess
    from agent.vmm.vmm_log import VmmLog

log = structlog.get_logger()

EVENTS_SOCKET = "qmp-events.sock"
"""QEMU serves one client per socket: the second one is for who waits for the guest's end."""

KILL_TIMEOUT = 10.0
"""Seconds for a killed QEMU to give its memory back; 0.1 s is usual."""

LOG_INTERVAL = 10.0
"""Seconds between looks at the size of QEMU's log."""

WATCH_RETRY = 5.0
"""Seconds before QEMU is asked again about its guest."""

PANIC = "Kernel panic - not syncing"
"""A panic restarts the machine, which is all that QEMU sees; the console has the reason."""

GUEST_ENDED = "the guest shut down"
KILLED = "the VM was ended by the agent"
ENDINGS = {
    "guest-shutdown": "the guest powered off",
    "guest-reset": "the guest restarted or its kernel panicked",
    "guest-panic": "the guest's kernel panicked",
}


class QemuVm(Vm):
    """A running VM (see Vm). Its state is the process; this object holds descriptors and can be dropped any time."""

    def __init__(self, spec: VmSpec, watched: WatchedProcess, cgroups: CgroupTree, output: VmmLog | None) -> None:
        self._spec = spec
        self._process = watched
        self._cgroups = cgroups
        self._output = output
        self._console = b""
        self._control = QemuControl(spec.directory, watched)
        self._watch = trio.Lock()
        self._ending: str | None = None

    @property
    def process(self) -> VmProcess:
        """Who to record, and to adopt later."""
        return self._process.identity

    async def wait_ready(self, state: int | None = None) -> None:
        """Wait until QEMU has built the machine, and loaded the state behind a descriptor if there is one.

        Raises VmStartFailed if it does not.
        """
        answered = False
        failure: VmmError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_on_exit, nursery.cancel_scope)
            try:
                async with self._control.connect(patience=math.inf) as client:
                    await client.execute("query-status", timeout=QMP_TIMEOUT)
                    if state is not None:
                        await self._load_state(client, state)
                answered = True
                nursery.cancel_scope.cancel()
            except QmpUnreachable as error:
                failure = error
                nursery.cancel_scope.deadline = trio.current_time() + DYING_TIMEOUT  # its exit says more
            except (QmpError, VmStartFailed) as error:
                failure = error
                nursery.cancel_scope.cancel()
        if answered:
            return
        if self._process.has_exited():
            reason = f"QEMU {await self._process.wait()} at start"
        else:
            reason = f"QEMU did not start: {failure}"
        raise VmStartFailed(reason + self.last_words()) from failure

    async def wait_exit(self) -> str:
        """See Vm. Does not rely on QEMU answering: that only adds the guest's own reasons."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_guest)
            nursery.start_soon(self._limit_log)
            ended = await self._process.wait()
            nursery.cancel_scope.cancel()
        return self._explain(ended)

    async def kill(self) -> None:
        """See Vm."""
        if not self._process.has_exited():
            self._ending = self._ending or KILLED
        await end(self._process, self._cgroups, self._spec.sandbox_id)

    async def console_tail(self) -> str:
        """See Vm."""
        if self._process.has_exited():
            return printable(self._console)
        try:
            async with self._control.connect(patience=QMP_TIMEOUT) as client:
                await self._drain_console(client)
        except QmpError as error:
            log.debug("console_unavailable", sandbox_id=self._spec.sandbox_id, error=str(error))
        return printable(self._console)

    def statistics(self) -> VmStatistics | None:
        """See Vm."""
        return self._process.statistics()

    async def pause(self) -> None:
        """See Vm."""
        await self._control.pause()

    async def resume(self) -> None:
        """See Vm."""
        await self._control.resume()

    async def paused(self) -> bool:
        """See Vm."""
        return await self._control.paused()

    async def save_state(self, target: Path, *, sync: bool = True) -> None:
        """See Vm."""
        state = await self._control.save_state()
        await trio.to_thread.run_sync(partial(write_state, target, state, sync=sync))

    async def pivot_disk(self, overlay: Path) -> None:
        """See Vm."""
        try:
            await trio.to_thread.run_sync(give, overlay, self._spec.uid, self._spec.gid)
        except OSError as error:
            raise VmCommandFailed(f"the disk cannot be pivoted: {error}") from error
        await self._control.pivot_disk(overlay)

    async def disk_file(self) -> Path:
        """See Vm."""
        return await self._control.disk_file()

    def memory(self) -> GuestMemory:
        """See Vm."""
        memory = find_memory(self.process.pid, self._spec.memory_mb << 20)
        if self._process.has_exited():  # and its pid may be another's by now
            os.close(memory.fd)
            raise VmGone("QEMU has ended")
        return memory

    async def tracks_writes(self) -> bool:
        """Tell whether the guest's memory is registered with userfaultfd."""
        return await trio.to_thread.run_sync(has_userfaultfd, self.process.pid)

    def last_words(self) -> str:
        """What QEMU itself said last, ready to be appended to a sentence."""
        tail = "" if self._output is None else last_lines(self._output.tail(), lines=5, characters=1000)
        return f"; it said: {tail}" if tail else ""

    async def _load_state(self, client: QmpClient, state: int) -> None:
        if not await self.tracks_writes():
            raise VmStartFailed("QEMU's memory is not registered with userfaultfd: it would be empty")
        await qemu_state.load(client, state)

    async def _cancel_on_exit(self, scope: trio.CancelScope) -> None:
        await self._process.wait()
        scope.cancel()

    async def _watch_guest(self) -> None:
        """End QEMU when its guest has ended. Tried for as long as QEMU lives: it may be too busy to answer."""
        async with self._watch:  # of many waiters one; the next takes over if it gives up
            while True:
                try:
                    await self._wait_guest_end()
                except QmpError as error:
                    log.debug("guest_watch_failed", sandbox_id=self._spec.sandbox_id, error=str(error))
                await trio.sleep(WATCH_RETRY)

    async def _wait_guest_end(self) -> None:
        async with qmp.connect(self._spec.directory, EVENTS_SOCKET, timeout=QMP_TIMEOUT) as client:
            # It may have stopped before we looked, even before this agent started.
            status = (await client.execute("query-status", timeout=QMP_TIMEOUT))["status"]
            ending = GUEST_ENDED if status == "shutdown" else _ending(await client.wait_event("SHUTDOWN"))
            if ending is None:
                return  # QEMU was told to quit, and does
            try:
                await self._drain_console(client)
            finally:
                self._ending = self._ending or ending
                self._process.kill()

    async def _drain_console(self, client: QmpClient) -> None:
        """Take what the guest has written since the last time: reading empties QEMU's buffer."""
        encoded = await client.execute(
            "ringbuf-read", timeout=QMP_TIMEOUT, device=CONSOLE, size=MAX_CONSOLE_BYTES, format="base64"
        )
        self._console = (self._console + base64.b64decode(encoded))[-MAX_CONSOLE_BYTES:]

    async def _limit_log(self) -> None:
        while self._output is not None:
            await trio.sleep(LOG_INTERVAL)
            await trio.to_thread.run_sync(self._output.limit)

    def _explain(self, ended: ProcessExit) -> str:
        if self._ending is None:
            memory = ", out of memory" if self._cgroups.was_out_of_memory(self._spec.sandbox_id) else ""
            return f"QEMU {ended}{memory}{self.last_words()}"
        if self._ending == KILLED:
            return self._ending
        text = printable(self._console)
        if (panic := text.rfind(PANIC)) >= 0:
            return f"{ENDINGS['guest-panic']}: {text[panic : panic + 300].splitlines()[0]}"
        console = last_lines(text, lines=3, characters=300)
        return f"{self._ending}; its console ends: {console}" if console else self._ending


async def end(process: WatchedProcess, cgroups: CgroupTree, group: str | None) -> None:
    """Kill a QEMU and remove its control group, if it has one; see Vm.kill. Raises VmWillNotDie."""
    with trio.move_on_after(KILL_TIMEOUT, shield=True):
        process.kill()
        await process.wait()
    if not process.has_exited():
        pid = process.identity.pid
        raise VmWillNotDie(f"QEMU (pid {pid}) is still there {KILL_TIMEOUT:g} s after SIGKILL")
    if group is not None:
        with trio.move_on_after(KILL_TIMEOUT, shield=True):
            await trio.to_thread.run_sync(cgroups.remove, group)


def _ending(event: dict[str, Any]) -> str | None:
    """Say why the guest ended; None if it was QEMU that was told to."""
    return ENDINGS.get(event.get("reason", ""), GUEST_ENDED) if event.get("guest") else None
