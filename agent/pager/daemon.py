"""The pager's process: answers the agent on its socket and serves every VM in a task of its own.

serve
├─ control socket              → peer per agent → handler per call
├─ VM xN                       socket, handshake, faults; adopted first
└─ signals                     SIGTERM: end; the VMs stand still at their next fault until a pager runs again

Owns: everything below its directory. Dies when: SIGTERM comes, or a bug of ours escapes; the agent starts it again.
"""

from __future__ import annotations

import fcntl
import os
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
import trio

from agent.actor.server import ServedStream, ServerPeer
from agent.pager.control import SOCKET, as_fault
from agent.pager.filling import Staging
from agent.pager.process_file import write_process_file
from agent.pager.records import VM_ID, VmRecord, VmRecords, decode_path
from agent.pager.service import (
    CONNECT_TIMEOUT,
    ConnectTimeout,
    NotPaged,
    PagedVm,
    PagerError,
    PagerStatistics,
    PagingDamaged,
    PagingFailed,
    SocketRefused,
)
from agent.pager.serving import Shared
from agent.pager.snapshot import OpenSnapshot, open_snapshot
from agent.pager.sockets import listen_unix, peer_credentials, remove_socket
from agent.pager.vm import Means, VmPaging
from agent.wire.faults import Fault, FaultCode

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

log = structlog.get_logger()

LOCK = "pager.lock"
READS_AT_ONCE = 8
"""Threads that wait for the disk on behalf of a fault."""


class AnotherPager(Exception):  # noqa: N818 - says what is so
    """Another pager serves from this directory."""


def take_directory(directory: Path) -> int:
    """Take the lock that makes us the only pager here; held until the process ends. Raises AnotherPager."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as err:
        os.close(fd)
        raise AnotherPager(f"another pager serves from {directory}") from err
    write_process_file(directory)
    return fd


async def serve(directory: Path, *, connect_timeout: float = CONNECT_TIMEOUT, ready: int | None = None) -> None:
    """Serve until SIGTERM. `ready`: a descriptor that gets a byte when the socket listens, and is closed."""
    async with trio.open_nursery() as nursery:
        daemon = Daemon(directory, nursery, connect_timeout=connect_timeout)
        await daemon.adopt()
        listener = trio.socket.from_stdlib_socket(listen_unix(directory / SOCKET, uid=0))
        nursery.start_soon(daemon.accept, trio.SocketListener(listener))
        log.info("pager_serving", directory=str(directory), adopted=len(daemon.vms))
        if ready is not None:
            os.write(ready, b"1")
            os.close(ready)
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for number in signals:
                log.info("stop_requested", signal=signal.Signals(number).name)
                break
        nursery.cancel_scope.cancel()


class Daemon:
    """The VMs and the agent's calls."""

    def __init__(self, directory: Path, nursery: trio.Nursery, *, connect_timeout: float) -> None:
        self.vms: dict[str, VmPaging] = {}
        self._nursery = nursery
        self._connect_timeout = connect_timeout
        self._records = VmRecords(directory)
        shared = Shared(Staging(), Staging(), trio.CapacityLimiter(READS_AT_ONCE))
        self._means = Means(self._records, shared, trio.Lock())
        self._locks: dict[str, trio.Lock] = {}

    async def adopt(self) -> None:
        """Take over what an earlier pager served and waited for."""
        await trio.to_thread.run_sync(self._records.prepare)
        for record in await trio.to_thread.run_sync(self._records.load):
            self._adopt(record)

    def _adopt(self, record: VmRecord) -> None:
        vm = VmPaging(record.vm, self._means, connect_timeout=self._connect_timeout)
        self.vms[record.vm.vm_id] = vm
        if record.failure is not None:
            return vm.bury(record.failure, damaged=record.damaged)
        try:
            origin = record.served or listen_unix(record.vm.socket, uid=record.vm.uid)
        except OSError as err:
            return vm.bury(f"the socket {record.vm.socket} cannot be made again: {err}")
        return self._nursery.start_soon(vm.run, origin)

    async def accept(self, listener: trio.SocketListener) -> None:
        """Serve every agent that connects; for `nursery.start_soon`."""
        await trio.serve_listeners(self._serve_agent, [listener])

    async def _serve_agent(self, stream: trio.SocketStream) -> None:
        credentials = peer_credentials(stream.socket)
        if credentials.uid != 0:
            log.warning("peer_refused", uid=credentials.uid, pid=credentials.pid)
            await trio.aclose_forcefully(stream)
            return
        await ServerPeer(stream, self.handle).run()

    async def handle(self, method: str, body: dict[str, Any], _stream: ServedStream) -> dict[str, Any]:
        """Answer one call. Raises Fault."""
        try:
            return await self._call(method, body)
        except PagerError as err:
            raise as_fault(err) from err
        except (msgspec.ValidationError, KeyError) as err:
            raise Fault(FaultCode.INVALID_ARGUMENT, str(err)) from err

    async def _call(self, method: str, body: dict[str, Any]) -> dict[str, Any]:
        match method:
            case "listen":
                await self._listen(msgspec.convert(body, PagedVm, dec_hook=decode_path))
            case "wait_connected":
                await self._wait_connected(str(body["vm_id"]), float(body["timeout"]))
            case "record_working_set":
                await self._vm(str(body["vm_id"])).record_working_set()
            case "release":
                async with self._alone(str(body["vm_id"])):
                    figures = await self._release(str(body["vm_id"]))
                return {"statistics": None if figures is None else msgspec.to_builtins(figures)}
            case "failure":
                vm = self.vms.get(str(body["vm_id"]))
                return {"failure": vm and vm.failure, "damaged": vm is not None and vm.damaged}
            case "statistics":
                return {"vms": {vm_id: msgspec.to_builtins(vm.statistics()) for vm_id, vm in self.vms.items()}}
            case _:
                raise Fault(FaultCode.UNKNOWN_METHOD, f"the pager does not know {method}")
        return {}

    async def _listen(self, vm: PagedVm) -> None:
        if not VM_ID.fullmatch(vm.vm_id):
            raise Fault(FaultCode.INVALID_ARGUMENT, f"not an id: {vm.vm_id!r}")
        snapshot = await trio.to_thread.run_sync(open_snapshot, vm)
        try:
            async with self._alone(vm.vm_id):
                await self._release(vm.vm_id)
                await self._begin(vm, snapshot)
        except BaseException:
            snapshot.memory.close()
            raise

    async def _begin(self, vm: PagedVm, snapshot: OpenSnapshot) -> None:
        try:
            listener = listen_unix(vm.socket, uid=vm.uid)
        except OSError as err:
            raise SocketRefused(f"the socket {vm.socket} cannot be made: {err}") from err
        try:
            await trio.to_thread.run_sync(self._records.save, VmRecord(vm))
        except OSError as err:
            listener.close()
            raise SocketRefused(f"the pager cannot write its record: {err}") from err
        except BaseException:
            listener.close()
            raise
        paging = VmPaging(vm, self._means, connect_timeout=self._connect_timeout, snapshot=snapshot)
        self.vms[vm.vm_id] = paging
        self._nursery.start_soon(paging.run, listener)

    @asynccontextmanager
    async def _alone(self, vm_id: str) -> AsyncIterator[None]:
        """A release must not remove the record that a later listen writes."""
        lock = self._locks.setdefault(vm_id, trio.Lock())
        try:
            async with lock:
                yield
        finally:
            if not lock.locked():
                self._locks.pop(vm_id, None)

    async def _wait_connected(self, vm_id: str, timeout: float) -> None:  # noqa: ASYNC109 - the caller's
        vm = self._vm(vm_id)
        with trio.move_on_after(timeout):
            await vm.settled.wait()
        if self.vms.get(vm_id) is not vm:
            raise NotPaged(f"the pager has no VM {vm_id}")
        if vm.over is not None:
            raise (PagingDamaged if vm.damaged else PagingFailed)(vm.over)
        if not vm.settled.is_set():
            raise ConnectTimeout(f"the VMM of {vm_id} has not connected in {timeout:g} s")

    async def _release(self, vm_id: str) -> PagerStatistics | None:
        vm = self.vms.pop(vm_id, None)
        if vm is None:
            return None
        figures = vm.statistics()
        await vm.stop()
        await trio.to_thread.run_sync(self._records.forget, vm_id)
        remove_socket(vm.vm.socket)
        return figures

    def _vm(self, vm_id: str) -> VmPaging:
        vm = self.vms.get(vm_id)
        if vm is None:
            raise NotPaged(f"the pager has no VM {vm_id}")
        return vm
