"""The host of the tests; see conftest.py, which loads this as `sandbox_world`."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from types import SimpleNamespace
from uuid import UUID

import msgspec
import trio
import trio.testing

from agent.actor.peer import OpenerPeer
from agent.actor.server import ServerPeer
from agent.images.store import ImageStore
from agent.net.pool import SlotPool
from agent.sandboxes import admission, records
from agent.sandboxes.adoption import adopt_all
from agent.sandboxes.handlers import Handlers
from agent.sandboxes.manager import Manager
from agent.sandboxes.outbox import Outbox
from agent.sandboxes.parts import HostParts
from agent.sandboxes.reaper import reap
from agent.sandboxes.records import StateDirectory
from agent.snapshots import files as snapshot_files
from agent.snapshots.memory import MemoryReader
from agent.snapshots.store import SnapshotStore
from agent.wire.calls import CreateSandbox, CreateSnapshot, HostDescription, body_of
from agent.wire.faults import Fault
from tests.fixtures.drivers import (
    STORE_OPERATIONS,
    STORE_STEPS,
    Crash,
    GuestOfHost,
    Overlays,
    Pager,
    Slots,
    StepwiseOs,
    StepwiseShutil,
    TrackedDirty,
    Vms,
    provide_image,
)

MEMORY_MB = 4096


class Host:
    """One machine. `crash_at`: the number of the step at which the next agent is killed (1 is the first)."""

    def __init__(self, root, monkeypatch, *, slots=6):
        root.mkdir()
        self.root = root
        self.state = StateDirectory(root / "state")
        self.state.prepare()
        self.images = ImageStore(root / "images")
        self.add_image("minimal")
        self.vms = Vms(self)
        self.slots = Slots(self)
        self.overlays = Overlays(self)
        self.pager = Pager(self)
        self.frozen_guests = set()
        self.resets = {}
        self.slot_count = slots
        self.slots_ahead = 1
        self.guests = {}
        self.guest_options = {}
        self.dead = False
        self.steps = []
        self.crash_at = None
        self.stop_at = None
        self.life = None
        self.on_step = lambda name: None
        monkeypatch.setattr(records, "os", StepwiseOs(self))
        monkeypatch.setattr(records, "shutil", StepwiseShutil(self))
        self.disk_free_mb = 10_000
        monkeypatch.setattr(admission, "shutil", SimpleNamespace(disk_usage=self._disk_usage))
        self._watch_snapshot_files(monkeypatch)

    def step(self, name):
        """A point between two effects."""
        if self.dead:
            raise Crash(name)
        self.steps.append(name)
        self.on_step(name)
        if len(self.steps) == self.crash_at:
            self.dead = True
            raise Crash(name)
        if len(self.steps) == self.stop_at:
            self.life.nursery.cancel_scope.cancel()

    def _watch_snapshot_files(self, monkeypatch):
        """What changes the store's files: some operations are steps, none has an effect after the agent's death."""
        for name, operation in STORE_OPERATIONS.items():
            monkeypatch.setattr(snapshot_files, name, self._watched(name, operation))

    def _watched(self, name, operation):
        def watched(*arguments):
            if self.dead:
                raise Crash(name)
            if name in STORE_STEPS:
                self.step(f"store_{name}")
            else:
                self.on_step(f"store_{name}")
            return operation(*arguments)

        return watched

    def add_image(self, name, digest="a" * 64):
        provide_image(self.images, name, digest)

    @asynccontextmanager
    async def agent(self, *, memory_mb=MEMORY_MB, **options):
        """One life of an agent, from adoption to the end of the block: stopped as by SIGTERM, or killed before."""
        self.dead = False
        self.steps.clear()
        life = self.new_agent(memory_mb, **options)
        try:
            async with trio.open_nursery() as life.nursery:
                await life.start(life.nursery)
                yield life
                life.nursery.cancel_scope.cancel()
        except* Crash:
            life.killed = True
        finally:
            self.dead = True  # whatever is left of this agent must not touch the host any more

    async def live(self, work, *, crash_at=None, stop_at=None, **options):
        """One life that does `work(agent)`, killed or stopped at that step of it; returns the agent, for its fate."""
        self.dead = False
        self.steps.clear()
        self.crash_at, self.stop_at = crash_at, stop_at
        life = self.new_agent(**options)
        try:
            async with trio.open_nursery() as life.nursery:
                await life.start(life.nursery)
                await work(life)
                life.finished = True
                life.nursery.cancel_scope.cancel()
        except* Crash:
            life.killed = True
        except* Fault:
            assert life.killed or life.nursery.cancel_scope.cancel_called
        finally:
            self.dead = True
            self.crash_at = self.stop_at = None
        return life

    def new_agent(self, memory_mb=MEMORY_MB, **options):
        """An agent's parts over what the host has on disk."""
        self.life = Agent(self, memory_mb, options)
        return self.life

    def change_record(self, name, **changes):
        """Between two lives."""
        file = self.state.directory(name) / "record.json"
        file.write_bytes(msgspec.json.encode({**msgspec.json.decode(file.read_bytes()), **changes}))

    def connect_guest(self, address):
        guest = self.guests[address] = GuestOfHost(self, address, **self.guest_options)
        return guest

    def _disk_usage(self, _path):
        return SimpleNamespace(free=self.disk_free_mb << 20)

    def running(self):
        """Sandbox ids of the VMs that run."""
        return {m.spec.sandbox_id for m in self.vms.machines.values() if not m.ended.is_set()}

    def store(self):
        """The snapshots, as somebody sees them who is no agent."""
        return SnapshotStore(self.state.snapshots)

    def memory(self, snapshot_id, offset=0, length=8):
        """What a snapshot has in memory there."""
        store = self.store()
        with MemoryReader(store.load(UUID(snapshot_id)).header, store.builds) as reader:
            return reader.read(offset, length)

    def directories(self):
        return {path.name for path in self.state.sandboxes.iterdir()}


class Agent:
    """One life."""

    def __init__(self, host, memory_mb, options):
        golden = options.pop("golden", None)
        self.host = host
        self.killed = False
        self.finished = False
        self.servers = []
        self.outbox = Outbox(host.state.root / "outbox.json")
        self.outbox.load()
        self.slots = SlotPool(host.slots, count=host.slot_count, ahead=host.slots_ahead)
        self.parts = HostParts(
            state=host.state,
            outbox=self.outbox,
            images=host.images,
            slots=self.slots,
            slot_backend=host.slots,
            overlays=host.overlays,
            vms=host.vms,
            connect_guest=host.connect_guest,
            snapshots=SnapshotStore(host.state.snapshots),
            pager=host.pager,
            tracking=lambda _: partial(TrackedDirty, host),
            **{"guest_timeout": 60.0, **options},
        )
        self.golden = golden and golden(self.parts)
        find = {"golden": self.golden.find} if golden else {}
        self.manager = Manager(self.parts, memory_mb=memory_mb, **find)
        self.handlers = Handlers(self.manager, self.outbox, self._describe)

    async def start(self, nursery):
        self.found = await adopt_all(self.parts)
        await nursery.start(self.slots.run)
        await nursery.start(self.manager.run, self.found)
        nursery.start_soon(reap, self.manager)
        if self.golden:
            nursery.start_soon(self.golden.run, self.found.golden, self.manager.admission)

    def kill(self):
        """kill -9, now."""
        self.host.dead = True
        self.killed = True
        self.nursery.cancel_scope.cancel()

    async def create(self, sandbox_id, **changes):
        """Create and wait until it runs; returns the state that is answered."""
        sandbox = await self.manager.create(request(sandbox_id, **changes))
        return await sandbox.started.wait()

    async def destroy(self, sandbox_id):
        await self.manager.destroy(sandbox_id, deadline=float("inf"))

    async def pause(self, sandbox_id):
        return await self.manager.find(sandbox_id).pause().wait()

    async def resume(self, sandbox_id):
        return await (await self.manager.resume(sandbox_id)).wait()

    async def snapshot(self, snapshot_id, of):
        request = CreateSnapshot(snapshot_id=snapshot_id, sandbox_id=of)
        return await self.manager.snapshot(request, deadline=float("inf"))

    def statuses(self):
        return {sandbox.id: str(sandbox.status) for sandbox in self.manager.all()}

    def told(self):
        return [(entry.sandbox_id, entry.event) for entry in self.outbox.entries()]

    @asynccontextmanager
    async def connection(self):
        """The control plane's end of a connection to this agent."""
        near, far = trio.testing.memory_stream_pair()
        opener, server = OpenerPeer(near), ServerPeer(far, self.handlers)
        self.servers.append(server)
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as starting:
                starting.start_soon(partial(nursery.start, opener.run))
                starting.start_soon(partial(nursery.start, server.run))
            yield opener
            nursery.cancel_scope.cancel()

    async def check(self):
        """Disk, process table, slots and table of sandboxes tell the same story. Call when nothing is under way."""
        await trio.testing.wait_all_tasks_blocked()
        host, statuses = self.host, self.statuses()
        assert set(statuses.values()) <= {"running", "paused"}
        running = {name for name, status in statuses.items() if status == "running"}
        listing = self.manager.listing()
        assert {one.sandbox_id for one in listing.sandboxes} == running
        assert set(listing.paused) == statuses.keys() - running
        assert host.directories() == statuses.keys()
        assert host.running() == running
        assert not any(host.vms.machine(name).paused for name in running), "it stands still"
        assert not host.frozen_guests & running, "its processes stand still"
        assert set(host.pager.vms) <= running
        known = host.state.load()
        for name in statuses:
            self._check_directory(known[name], running)
        self._check_store([known[name] for name in statuses])
        statistics = self.slots.statistics()
        assert statistics.in_use == len(running)
        assert len(await host.slots.existing()) == statistics.in_use + statistics.ready
        numbers = [known[name].slot for name in running]
        assert len(set(numbers)) == len(numbers)

    def _check_directory(self, record, running):
        files = {path.name for path in self.host.state.directory(record.sandbox_id).iterdir()}
        if record.sandbox_id not in running:
            assert record.phase == "paused"
            assert files - {"record.json.new"} == {"record.json"}
            return
        assert record.phase == "running"
        machine = self.host.vms.machine(record.sandbox_id)
        disks = {record.disk, *record.frozen}
        if record.next_disk:  # the VM knows
            assert machine.disk.name in {record.disk, record.next_disk}
            disks |= {record.next_disk} & files
        else:
            assert machine.disk.name == record.disk
        assert {"record.json", *disks} <= files
        assert files - {"record.json.new"} <= {"record.json", *disks}, (files, record)

    def _check_store(self, known):
        """Every snapshot has an owner who knows it, every part a snapshot, and nothing is half-made."""
        store, root = self.host.store(), self.host.state.snapshots
        wanted = set().union(*(record.snapshots() for record in known)) | set(self.manager.named.ids())
        golden = {str(one.id) for one in store.list() if one.manifest.kind == "golden"}
        assert {str(one.id) for one in store.list()} == wanted | golden
        manifests = [store.load(one.id).manifest for one in store.list()]
        names = {str(build) for one in manifests for build in one.builds}
        assert {path.name for path in (root / "builds").iterdir()} == names
        names = {f"{layer}.qcow2" for one in manifests for layer in one.layers}
        assert {path.name for path in (root / "layers").iterdir()} == names
        assert not [path for path in (root / "snapshots").iterdir() if path.name.startswith(".")]

    async def _describe(self):
        return HostDescription(version="0", driver="fake", cpu_cores=1, memory_mb=1, disk_mb=1, disk_free_mb=1)


def sandbox_id(number):
    return f"00000000-0000-0000-0000-{number:012x}"


def request(name, **changes):
    fields = {"template": "minimal", "vcpus": 1, "memory_mb": 128, "hostname": "sb", **changes}
    return CreateSandbox(sandbox_id=name, **fields)


def create_body(name, **changes):
    return body_of(request(name, **changes))
