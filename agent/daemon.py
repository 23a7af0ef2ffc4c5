"""The agent daemon: its nursery tree in one screen.

serve
├─ signals                     SIGTERM, SIGINT: drain, then cancel; VMs live on
├─ heartbeat                   nothing may delay it, nor the rest of our start
├─ pager                       process supervisor, connection; it outlives us
├─ slot pool                   (service)
├─ manager                     → sandbox life xN → guest link, VM watch, compaction
├─ reaper                      asks idle sandboxes to pause
├─ loss                        pauses everything while the control plane is lost
├─ golden snapshots            → scratch VM
└─ wire listener               → peer per control plane → handler per stream
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from agent.actor.server import ServerPeer
from agent.actor.settings import SettingsError
from agent.actor.supervise import RestartPolicy, supervise
from agent.actor.tls import TlsStream, serve_tls
from agent.actor.watchdog import LoopWatchdog
from agent.config import PREFIX
from agent.enrol.address import choose_address, join_address, listen_at
from agent.enrol.credentials import Credentials, CredentialsFile
from agent.enrol.heartbeat import Heartbeat
from agent.enrol.host_id import HostIdFile
from agent.enrol.identity import install_certificate, is_control_plane, server_ssl_context
from agent.enrol.joining import Joining, check_unregistered, register
from agent.enrol.registration import Capacity, ControlPlane
from agent.guest.client import GuestLink
from agent.images.store import ImageStore
from agent.net.backend import NamespaceSlotBackend
from agent.net.host_network import ensure_host_network, lock_host_network
from agent.net.pool import SlotPool
from agent.net.threads import run_in_slot_thread
from agent.pager.client import PagerClient
from agent.pager.service import PagerError
from agent.pager.supervisor import PagerSupervisor
from agent.sandboxes.adoption import adopt_all, lock_state_directory
from agent.sandboxes.description import describe
from agent.sandboxes.golden import GoldenSnapshots, no_golden, parse_shapes
from agent.sandboxes.handlers import Handlers
from agent.sandboxes.loss import Loss
from agent.sandboxes.manager import Manager
from agent.sandboxes.outbox import Outbox
from agent.sandboxes.parts import HostParts
from agent.sandboxes.reaper import reap
from agent.sandboxes.records import StateDirectory
from agent.snapshots.store import SnapshotStore
from agent.storage.qcow2 import Qcow2Overlays
from agent.vmm.qemu import detect_qemu

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from ssl import SSLContext

    from agent.config import Settings

log = structlog.get_logger()

HOST_NETWORK_FILE = "host-network.json"
CREDENTIALS_FILE = "credentials.json"
HOST_ID_FILE = "host-id"
PAGER_DIRECTORY = "pager"
HARD_DEADLINE = 20
"""Seconds from the stop request to the end of the process, whatever hangs: the kernel's alarm sees to it."""
BACKGROUND = RestartPolicy(max_delay=60)
"""What nobody waits for is no reason to end."""
PAGER_SECONDS = 20
"""For the pager to answer before we go on without it: sandboxes can be created and destroyed all the same."""
UNREGISTERED = "this host is not registered: capsule-agent join, or set CAPSULE_AGENT_URL and CAPSULE_AGENT_TOKEN"


class NotRegistered(Exception):  # noqa: N818 - reads as what is wrong
    """There are no credentials and no token to get some."""


class CannotListen(Exception):  # noqa: N818
    """The address that the control plane dials is not to be had."""


def run(settings: Settings, joining: Joining | None = None) -> None:
    """Serve until SIGTERM or SIGINT; `joining`: after having registered."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a VM costs five descriptors
    trio.run(serve, settings, joining, instruments=[LoopWatchdog()])


async def serve(settings: Settings, joining: Joining | None = None) -> None:
    """The daemon. Ends by a signal; raises what kept it from starting."""
    state = StateDirectory(settings.state_directory())
    root = state.root
    await trio.to_thread.run_sync(state.prepare)
    lock_state_directory(root)
    stop, serving = trio.Event(), trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(_watch_signals, stop)
        nursery.start_soon(_stop_early, stop, serving, nursery.cancel_scope)
        url = settings.url or await _stored_url(root)
        async with await trio.to_thread.run_sync(ControlPlane, url) as control_plane:  # reads the CAs of this machine
            if joining is None:
                credentials = await _credentials(settings, state, control_plane)
            else:
                credentials = await _join(settings, state, control_plane, joining)
            if joining is None or joining.serve:
                lock_host_network()
                await run_in_slot_thread(partial(ensure_host_network, root / HOST_NETWORK_FILE))
                await _serve_host(settings, state, control_plane, credentials, stop, serving)
        nursery.cancel_scope.cancel()
    log.info("agent_stopped")


async def _serve_host(
    settings: Settings,
    state: StateDirectory,
    control_plane: ControlPlane,
    credentials: Credentials,
    stop: trio.Event,
    serving: trio.Event,
) -> None:
    await HostIdFile(state.root / HOST_ID_FILE).keep(credentials.host_id)
    parts = await make_parts(settings, state)
    golden = make_golden(settings, parts)
    manager = Manager(parts, memory_mb=settings.memory_for_guests(), golden=golden.find if golden else no_golden)
    handlers = Handlers(manager, parts.outbox, partial(describe, parts, manager.admission))
    tls = server_ssl_context(credentials)
    heartbeat = Heartbeat(
        control_plane,
        CredentialsFile(state.root / CREDENTIALS_FILE),
        credentials,
        on_renewed=partial(install_certificate, tls),
        interval=settings.heartbeat_interval,
    )
    peers: set[ServerPeer] = set()
    host, port = listen_at(settings.bind_host, settings.bind_port, credentials.address)
    async with trio.open_nursery() as nursery:
        await nursery.start(heartbeat.run)
        await start_pager(nursery, parts, state.root / PAGER_DIRECTORY)
        found = await adopt_all(parts)
        await nursery.start(parts.slots.run)
        await nursery.start(manager.run, found)
        nursery.start_soon(supervise, "reaper", partial(reap, manager), BACKGROUND)
        if settings.pause_on_loss:
            nursery.start_soon(supervise, "loss", Loss(manager, heartbeat.presence).run, BACKGROUND)
        if golden is not None:
            make = partial(golden.run, found.golden, manager.admission)
            nursery.start_soon(supervise, "golden_snapshots", make, BACKGROUND)
        port = await _listen(nursery, partial(_serve_peer, handlers, peers), host, port, tls)
        log.info("agent_serving", host_id=credentials.host_id, port=port, driver=parts.vms.name)
        serving.set()
        await stop.wait()
        manager.drain()
        await _drain(peers, settings.drain_seconds)
        nursery.cancel_scope.cancel()


async def start_pager(nursery: trio.Nursery, parts: HostParts, directory: Path) -> None:
    """Have the pager's process and our connection to it kept; returns when it answers, or takes too long."""
    if not isinstance(parts.pager, PagerClient):
        return  # one that needs no process
    nursery.start_soon(PagerSupervisor(directory).run)
    nursery.start_soon(parts.pager.run)
    try:
        with trio.move_on_after(PAGER_SECONDS):
            await parts.pager.statistics()
            return
        log.error("pager_not_ready")
    except PagerError as err:
        log.error("pager_not_ready", error=str(err))  # noqa: TRY400 - the error says it


async def make_parts(settings: Settings, state: StateDirectory) -> HostParts:
    """The drivers of this machine. Raises when one of them cannot work here; `capsule-agent doctor` says why."""
    outbox = Outbox(state.root / "outbox.json")
    await trio.to_thread.run_sync(outbox.load)
    backend = NamespaceSlotBackend()
    return HostParts(
        state=state,
        outbox=outbox,
        images=ImageStore(Path(settings.images)),
        slots=SlotPool(backend, first=settings.slot_first, count=settings.slot_count, ahead=settings.slots_ahead),
        slot_backend=backend,
        overlays=Qcow2Overlays(),
        vms=await detect_qemu(shims=state.root / "vmm"),
        snapshots=SnapshotStore(state.snapshots),
        pager=PagerClient(state.root / PAGER_DIRECTORY),
        connect_guest=GuestLink,
        prefetch=settings.prefetch,
        compact_generations=settings.compact_generations,
        restores=trio.CapacityLimiter(settings.restores_at_once),
        captures=trio.CapacityLimiter(settings.captures_at_once),
        boots=trio.CapacityLimiter(settings.boots_at_once),
        uid_base=settings.uid_base,
        guest_dns=tuple(part.strip() for part in settings.guest_dns.split(",") if part.strip()),
        guest_timeout=settings.guest_timeout,
    )


def make_golden(settings: Settings, parts: HostParts) -> GoldenSnapshots | None:
    """The maker of golden snapshots, if there shall be any. Raises SettingsError."""
    if not settings.golden:
        return None
    try:
        shapes = parse_shapes(settings.golden_shapes)
    except ValueError as err:
        raise SettingsError(f"{PREFIX}GOLDEN_SHAPES: {err}") from err
    return GoldenSnapshots(parts, shapes=shapes, limit=settings.golden_limit)


async def _stored_url(root: Path) -> str:
    stored = await CredentialsFile(root / CREDENTIALS_FILE).load()
    if stored is None:
        raise NotRegistered(UNREGISTERED)
    return stored.url


async def _credentials(settings: Settings, state: StateDirectory, control_plane: ControlPlane) -> Credentials:
    """Those on disk; else register with the one-time token."""
    file = CredentialsFile(state.root / CREDENTIALS_FILE)
    stored = await file.load()
    if stored is not None:
        return stored
    if not settings.token:
        raise NotRegistered(UNREGISTERED)
    address = settings.address or f"{settings.bind_host}:{settings.bind_port}"
    capacity, only_as = await _capacity(settings, state), await _only_as(state, None)
    return await register(control_plane, file, settings.token, address, capacity, only_as=only_as)


async def _join(
    settings: Settings, state: StateDirectory, control_plane: ControlPlane, joining: Joining
) -> Credentials:
    """Register, whatever was before; VMs are not touched."""
    file = CredentialsFile(state.root / CREDENTIALS_FILE)
    before = await check_unregistered(file, force=joining.force)
    only_as = await _only_as(state, before)
    choose = partial(choose_address, settings.url, settings.address, settings.bind_host, settings.bind_port)
    address = await trio.to_thread.run_sync(choose, abandon_on_cancel=True)
    credentials = await register(
        control_plane,
        file,
        settings.token,
        address,
        await _capacity(settings, state),
        only_as=only_as,
        remember_address=True,
    )
    joining.tell(credentials)
    return credentials


async def _only_as(state: StateDirectory, before: Credentials | None) -> str:
    """The one host that this machine can be; "" for any, when nothing lives or rests here. HostForgotten."""
    if not await trio.to_thread.run_sync(state.load):
        return ""
    return await HostIdFile(state.root / HOST_ID_FILE).load() if before is None else before.host_id


async def _capacity(settings: Settings, state: StateDirectory) -> Capacity:
    disk = await trio.to_thread.run_sync(shutil.disk_usage, state.root)
    return Capacity(
        arch=platform.machine(),
        cpu_cores=os.cpu_count() or 1,
        memory_mb=settings.memory_for_guests(),
        disk_gb=max(1, disk.total // 2**30),
    )


async def _listen(
    nursery: trio.Nursery, serve_peer: Callable[[TlsStream], Awaitable[None]], host: str, port: int, tls: SSLContext
) -> int:
    """The port that is listened on. Raises CannotListen."""
    try:
        bound: int = await nursery.start(partial(serve_tls, serve_peer, host=host, port=port, context=tls))
    except OSError as err:
        raise CannotListen(
            f"cannot listen on {join_address(host, port)} ({err.strerror}); if this machine's address has changed, "
            "make a new token for this host and join again with --force"
        ) from err
    return bound


async def _serve_peer(handlers: Handlers, peers: set[ServerPeer], stream: TlsStream) -> None:
    """One control plane's connection. Our CA signed its certificate (TLS saw to that); its role must fit, too."""
    if not is_control_plane(stream.peer_certificate()):
        log.warning("peer_refused", reason="not a control plane's certificate")
        await trio.aclose_forcefully(stream)
        return
    peer = ServerPeer(stream, handlers)
    peers.add(peer)
    log.info("control_plane_connected", connections=len(peers))
    try:
        await peer.run()
    finally:
        peers.discard(peer)
        log.info("control_plane_disconnected", reason=peer.reason)


async def _drain(peers: set[ServerPeer], seconds: float) -> None:
    """Let what is under way finish, for a while."""
    with trio.move_on_after(seconds):
        async with trio.open_nursery() as nursery:
            for peer in list(peers):
                nursery.start_soon(peer.drain, "the agent stops")


async def _stop_early(stop: trio.Event, serving: trio.Event, scope: trio.CancelScope) -> None:
    """Before it serves, a stop may end the daemon at any point: the next one collects what was begun."""
    await stop.wait()
    if not serving.is_set():
        scope.cancel()


async def _watch_signals(stop: trio.Event, *, task_status: trio.TaskStatus[None]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("stop_requested", signal=signal.Signals(number).name)
            if not stop.is_set():  # a second request must not put the end off
                signal.alarm(HARD_DEADLINE)
            stop.set()
