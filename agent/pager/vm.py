"""One VM of the pager, from its socket to its end.

Owns: the listening socket, then the VMM's userfaultfd and pidfd, the open builds and the memory file; all are closed
when `run` returns. Owned by: the daemon, which runs `run` in its nursery.
Takes: `stop`, `wait_settled`, `record_working_set`. Emits: its record on disk. Dies when: it is stopped, its VMM ends,
refuses to talk or never comes, or a fault cannot be answered: then the reason is written down and the VMM killed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import structlog
import trio

from agent.pager.figures import Figures
from agent.pager.filling import FaultUnserved
from agent.pager.guest_look import look_at_memory
from agent.pager.handshake import Client, accept_client, adopt_client
from agent.pager.process import ProcessIdentity, has_ended, kill, open_process, wait_ended
from agent.pager.recording import Recorder, read_working_set, write_working_set
from agent.pager.records import Served, VmRecord, VmRecords
from agent.pager.regions import HandshakeRefused, RegionMap
from agent.pager.service import PagedVm, PagerStatistics, SnapshotNotOpened, SnapshotUnreadable
from agent.pager.serving import FaultServer, Memory, Shared
from agent.pager.snapshot import OpenSnapshot, UnreadableMemory, open_snapshot
from agent.pager.sockets import remove_socket
from agent.snapshots.errors import SnapshotDamaged, StoreFailed

if TYPE_CHECKING:
    import socket

    from agent.pager.guest_file import GuestFile


log = structlog.get_logger()

END_TIMEOUT = 10.0
"""Seconds for writing down why a VM is ended; its VMM is killed in any case."""
CLOSE_TIMEOUT = 30.0
OPEN_ATTEMPTS = 40
"""To open the snapshot of a VM that runs already, while the host is short of something."""
OPEN_PAUSE = 0.5
SETTLE_TIMEOUT = 5.0
"""Seconds a stop waits for a VM's task, which may have a disk read under way."""

ENDED = "the VMM has ended"


@dataclass(frozen=True)
class Means:
    """What the daemon lends to each VM."""

    records: VmRecords
    shared: Shared
    working_sets: trio.Lock
    """Two VMs of one snapshot must not combine at once."""


class VmPaging:
    """See the module."""

    def __init__(
        self, vm: PagedVm, means: Means, *, connect_timeout: float, snapshot: OpenSnapshot | None = None
    ) -> None:
        """`reader` becomes ours; None: open the snapshot when it is needed."""
        self.vm = vm
        self.failure: str | None = None
        self.damaged = False
        """The failure is the snapshot's, and would be every other run's."""
        self.over: str | None = None
        """Why it is not served any more, also when nothing has failed."""
        self.settled = trio.Event()
        """Served with its working set in place, or over."""
        self._snapshot = snapshot
        self._means = means
        self._connect_timeout = connect_timeout
        self._scope = trio.CancelScope()
        self._ended = trio.Event()
        self._figures = Figures()
        self._recorder: Recorder | None = None
        self._file: GuestFile | None = None

    def statistics(self) -> PagerStatistics:
        """See Pager.statistics."""
        return self._figures.snapshot(connected=self.settled.is_set() and self.over is None)

    async def run(self, origin: socket.socket | Served) -> None:
        """Serve a VMM to its end: the one that comes to this socket, which becomes ours, or one that another pager
        served before."""
        with structlog.contextvars.bound_contextvars(vm_id=self.vm.vm_id):
            try:
                with self._scope:
                    await self._live(origin)
                self.over = self.over or "the pager was told to release the VM"
            finally:
                self.over = self.over or "the pager stops"
                if self._snapshot is not None:
                    self._snapshot.memory.close()
                self.settled.set()
                self._ended.set()

    def bury(self, failure: str, *, damaged: bool = False) -> None:
        """Instead of `run`: it is over already, for this reason."""
        self.damaged = damaged
        self.failure = self.over = failure
        self.settled.set()
        self._ended.set()

    async def stop(self) -> None:
        """Serve no more; return when everything is closed, or is about to be, once a disk has answered."""
        self._scope.cancel()
        with trio.move_on_after(SETTLE_TIMEOUT, shield=True):
            await self._ended.wait()

    async def record_working_set(self) -> None:
        """See Pager.record_working_set."""
        recorder = self._recorder
        if recorder is None or recorder.taken:
            return
        recorder.taken = True
        touched = await recorder.finish()
        await self._close_file()
        if touched is not None:
            async with self._means.working_sets:
                await trio.to_thread.run_sync(write_working_set, self.vm.snapshot, touched)
            log.info("working_set_recorded", vm_id=self.vm.vm_id, bytes=sum(length for _, length in touched))

    # --- the task ----------------------------------------------------------------------------------------------

    async def _live(self, origin: socket.socket | Served) -> None:
        try:
            snapshot = self._snapshot = self._snapshot or await self._open(origin)
            client = adopt_client(origin) if isinstance(origin, Served) else await self._meet(origin, snapshot)
        except (HandshakeRefused, SnapshotUnreadable, SnapshotNotOpened) as err:
            return await self._end(str(err), _pidfd_of(origin), damaged=isinstance(err, SnapshotUnreadable))
        if client is None:
            return await self._gone()
        try:
            await self._serve_until_gone(client, snapshot, origin if isinstance(origin, Served) else None)
        finally:
            client.close()

    async def _open(self, origin: socket.socket | Served) -> OpenSnapshot:
        """Raises SnapshotUnreadable and SnapshotNotOpened only for a VM that does not run yet."""
        if not isinstance(origin, Served):
            return await trio.to_thread.run_sync(open_snapshot, self.vm)
        memory_bytes = max(region.offset + region.size for region in origin.regions)
        for attempt in range(1, OPEN_ATTEMPTS + 1):
            try:
                return await trio.to_thread.run_sync(open_snapshot, self.vm)
            except SnapshotUnreadable as err:
                log.warning("snapshot_unreadable", error=str(err))
                return OpenSnapshot(UnreadableMemory(str(err), damaged=True), memory_bytes)
            except SnapshotNotOpened as err:  # a guest waits, and would lose everything for a shortage that may pass
                reason = str(err)
                log.warning("snapshot_not_opened", attempt=attempt, error=reason)
            await trio.sleep(OPEN_PAUSE)
        return OpenSnapshot(UnreadableMemory(reason, damaged=False), memory_bytes)

    async def _meet(self, listener: socket.socket, snapshot: OpenSnapshot) -> Client:
        """Raises HandshakeRefused."""
        with trio.socket.from_stdlib_socket(listener) as sock:
            try:
                with trio.move_on_after(self._connect_timeout):
                    return await accept_client(sock, self.vm, memory_bytes=snapshot.memory_bytes)
            finally:
                remove_socket(self.vm.socket)
        raise HandshakeRefused(f"the VMM has not connected to {self.vm.socket} in {self._connect_timeout:g} s")

    async def _serve_until_gone(self, client: Client, snapshot: OpenSnapshot, served: Served | None) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, client, nursery.cancel_scope)
            try:
                await self._serve(client, snapshot, served)
            except (FaultUnserved, SnapshotDamaged, StoreFailed) as err:
                await self._end(str(err), os.dup(client.pidfd), damaged=isinstance(err, SnapshotDamaged))
            except Exception:
                await self._end("the pager failed; its log has the details", os.dup(client.pidfd))
                log.exception("paging_failed")
            nursery.cancel_scope.cancel()
        if has_ended(client.pidfd) and self.failure is None:
            await self._gone()

    async def _watch(self, client: Client, scope: trio.CancelScope) -> None:
        await wait_ended(client.pidfd)
        scope.cancel()

    async def _serve(self, client: Client, snapshot: OpenSnapshot, served: Served | None) -> None:
        """Raises FaultUnserved, SnapshotDamaged, StoreFailed."""
        look = partial(look_at_memory, client, self.vm.uid, snapshot.memory_bytes, served)
        seen = await trio.to_thread.run_sync(look)
        self._file = seen.file
        try:
            recorder = Recorder(client.identity.pid, client.regions, by_page_table=seen.file is not None)
            memory = Memory(RegionMap(client.regions), snapshot.memory, seen.pages, seen.file)
            server = FaultServer(client.userfault, memory, self._means.shared, recorder)
            self._figures = server.figures
            if served is None:
                await self._record(client.served(tracked=seen.tracked))
                self._recorder = recorder
                await self._prefetch(server)
            else:
                recorder.drop()  # what was touched before we came is mixed with what was brought
                server.wake_all()
                await self._close_file()
            self.settled.set()
            log.info("vm_served", pid=client.identity.pid, adopted=served is not None, by_file=seen.file is not None)
            await server.serve()
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                await self._close_file()

    async def _record(self, served: Served) -> None:
        """Before the first fault is answered. Raises FaultUnserved: nobody could serve on after us."""
        try:
            await trio.to_thread.run_sync(self._means.records.save, VmRecord(self.vm, served))
        except OSError as err:
            raise FaultUnserved(f"the pager cannot write its record of the VM: {err}") from err

    async def _close_file(self) -> None:
        """It is needed for the beginning only. Not ours to hold the memory of a VM that has ended: freeing it takes a
        while, which is the VMM's to spend, or else a thread's."""
        file, self._file = self._file, None
        if file is not None:
            await trio.to_thread.run_sync(file.close, abandon_on_cancel=True)

    async def _prefetch(self, server: FaultServer) -> None:
        if self.vm.prefetch:
            ranges = await trio.to_thread.run_sync(read_working_set, self.vm.snapshot)
            await server.prefetch(ranges)

    async def _gone(self) -> None:
        """The VMM has ended by itself, or others have ended it."""
        self.over = ENDED
        await trio.to_thread.run_sync(self._means.records.forget, self.vm.vm_id)
        log.info("vm_gone", faults=self._figures.faults)

    async def _end(self, reason: str, pidfd: int | None, *, damaged: bool = False) -> None:
        """Write down why, then kill the VMM: it would wait for a page for ever. `pidfd` becomes ours."""
        self.damaged = damaged
        self.failure = self.over = reason
        unwritten: OSError | None = None
        try:
            with trio.move_on_after(END_TIMEOUT, shield=True):
                record = VmRecord(self.vm, failure=reason, damaged=damaged)
                await trio.to_thread.run_sync(self._means.records.save, record, abandon_on_cancel=True)
        except OSError as err:
            unwritten = err
        finally:
            if pidfd is not None:
                kill(pidfd)
                os.close(pidfd)
        log.error("vm_ended_by_pager", reason=reason, unwritten=unwritten and str(unwritten))


def _pidfd_of(origin: socket.socket | Served) -> int | None:
    """Whom to kill when there is no client. A VMM that was never served is the agent's to end."""
    if isinstance(origin, Served):
        return open_process(ProcessIdentity(origin.pid, origin.start_time))
    return None
