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

import resource
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from agent import enrolment
from agent.actor.server import ServerPeer
from agent.actor.settings import SettingsError
from agent.actor.supervise import RestartPolicy, supervise
from agent.actor.tls import TlsStream, serve_tls
from agent.actor.watchdog import LoopWatchdog
from agent.config import PREFIX
from agent.enrol.address import join_address, listen_at
from agent.enrol.credentials import CredentialsFile
from agent.enrol.heartbeat import Heartbeat
from agent.enrol.host_id import HostIdFile
from agent.enrol.identity import install_certificate, is_control_plane, server_ssl_context
from agent.enrol.registration import ControlPlane
from agent.enrolment import CREDENTIALS_FILE, HOST_ID_FILE
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
    from agent.enrol.credentials import Credentials
    from agent.enrol.joining import Joining

log = structlog.get_logger()

HOST_NETWORK_FILE = "host-network.json"
PAGER_DIRECTORY = "pager"
HARD_DEADLINE = 20
"""Seconds from the stop request to the end of the process, whatever hangs: the kernel's alarm sees to it."""
BACKGROUND = RestartPolicy(max_delay=60)
"""What nobody waits for is no reason to end."""
PAGER_SECONDS = 20
"""For the pager to answer before we go on without it: sandboxes can be created and destroyed all the same."""


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
        url = settings.url or await enrolment.stored_url(root)
        async with await trio.to_thread.run_sync(ControlPlane, url) as control_plane:  # reads the CAs of this machine
            if joining is None:
                credentials = await enrolment.stored_or_registered(settings, state, control_plane)
            else:
                credentials = await enrolment.join(settings, state, control_plane, joining)
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
