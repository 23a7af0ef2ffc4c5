"""Snapshots made for a test, the real daemon in a process of its own, and programs that stand for VMMs."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest
import trio

from agent.pager.client import PagerClient
from agent.pager.process_file import read_process_file
from agent.pager.service import PagedVm
from agent.pager.supervisor import PagerSupervisor, stop_pager
from agent.snapshots.blocks import BuildWriter
from agent.snapshots.header import NIL, PAGE, Header, Run

SECONDS_PER_TEST = 300
CHUNK = 65536


@pytest.fixture(autouse=True)
def _bounded():
    """End a test that hangs, whatever it hangs in."""

    def give_up(_signal, _frame):
        raise TimeoutError(f"the test took more than {SECONDS_PER_TEST} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS_PER_TEST)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def vmm_program():
    """tests/pager/vmm.c, compiled."""
    if os.geteuid() != 0:
        pytest.skip("the pager needs root (pidfd_getfd, other processes' memory files)")
    if not Path("/dev/userfaultfd").exists():
        pytest.skip("this kernel has no userfaultfd device")
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    with tempfile.TemporaryDirectory(prefix="capsule-vmm-") as name:
        program = Path(name) / "vmm"
        Path(name).chmod(0o755)
        command = [compiler, "-O2", "-Wall", "-Wextra", "-Werror", "-o", program, Path(__file__).with_name("vmm.c")]
        subprocess.run([*command, "-lpthread"], check=True)
        yield program


def descriptors(pid="self"):
    """The open descriptors of a process."""
    return [int(entry.name) for entry in Path(f"/proc/{pid}/fd").iterdir()]


@pytest.fixture(name="descriptors")
def _descriptors():
    return descriptors


@pytest.fixture
def open_files():
    """The names of a process's open descriptors, without those that it closes meanwhile."""

    def names(pid):
        found = []
        for number in descriptors(pid):
            with suppress(FileNotFoundError):
                found.append(os.readlink(f"/proc/{pid}/fd/{number}"))  # noqa: PTH115
        return found

    return names


@dataclass
class Snapshot:
    """A memory in several builds, and what it must be."""

    directory: Path
    builds: Path
    memory: bytes
    model: Path
    build_ids: list

    def data(self, index=0):
        """The data file of a build."""
        return self.builds / str(self.build_ids[index]) / "data"


def make_snapshot(root, megabytes=8, *, seed=1, builds=2, zeros=0.2):
    """Memory of random pages, in runs of random length that lie in random builds or in none."""
    rng = random.Random(seed)
    directory, where = root / f"snapshot-{seed}", root / "builds"
    directory.mkdir(parents=True)
    where.mkdir(exist_ok=True)
    memory = bytearray(megabytes << 20)
    ids = [uuid4() for _ in range(builds)]
    writers = [BuildWriter(where / str(each)) for each in ids]
    runs, page, pages = [], 0, len(memory) // PAGE
    while page < pages:
        count = min(rng.choice((1, 2, 3, 7, 16, 40, 200)), pages - page)
        if rng.random() < zeros:
            runs.append(Run(page * PAGE, count * PAGE, NIL, 0))
        else:
            content = rng.randbytes(count * PAGE)
            memory[page * PAGE : (page + count) * PAGE] = content
            number = rng.randrange(builds)
            runs.append(Run(page * PAGE, count * PAGE, ids[number], writers[number].append(content)))
        page += count
    for writer in writers:
        writer.finish()
    header = Header.of(memory_bytes=len(memory), generation=builds, build=ids[-1], runs=runs)
    (directory / "mem.header").write_bytes(header.encode())
    model = directory / "model"
    model.write_bytes(memory)
    return Snapshot(directory, where, bytes(memory), model, ids)


@pytest.fixture
def root():
    """Not tmp_path: other users' processes must reach their sockets in it."""
    with tempfile.TemporaryDirectory(prefix="capsule-pager-") as name:
        Path(name).chmod(0o711)
        yield Path(name)
        # After a test that was ended by its time-out nothing asynchronous can clean up any more.
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if name.encode() in (entry / "cmdline").read_bytes():
                    os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def snapshot(root):
    return make_snapshot(root)


@pytest.fixture
def large_snapshot(root):
    return make_snapshot(root, 80, seed=2)


class Vmm:
    """A program that stands for a VMM (vmm.c): `ask` sends a command and waits for its answer."""

    def __init__(self, process, address):
        self.process = process
        self.address = address
        self.pid = process.pid

    async def ask(self, command):
        await self.process.stdin.send_all(command.encode() + b"\n")
        return await self._line()

    async def send(self, command):
        """Without waiting for the answer, see `answer`."""
        await self.process.stdin.send_all(command.encode() + b"\n")

    async def answer(self):
        return await self._line()

    async def _line(self):
        line = b""
        while not line.endswith(b"\n"):
            more = await self.process.stdout.receive_some(1)
            if not more:
                return f"gone {line.decode()}"
            line += more
        return line.decode().strip()


@dataclass
class World:
    """A pager of a test's own, with what talks to it."""

    root: Path
    directory: Path
    client: PagerClient
    program: Path
    nursery: trio.Nursery
    vmms: list = field(default_factory=list)

    def vm(self, snapshot, vm_id="one", **changes):
        place = self.root / f"vm-{vm_id}"
        place.mkdir(mode=0o711, exist_ok=True)
        defaults = {"snapshot": snapshot.directory, "builds": snapshot.builds, "socket": place / "page.sock", "uid": 0}
        return PagedVm(vm_id=vm_id, **{**defaults, **changes})

    async def start(self, snapshot, vm_id="one", *, regions=1, options="-", model=True, **changes):
        """Listen and start a VMM; returns it with its handshake done."""
        vm = self.vm(snapshot, vm_id, **changes)
        await self.client.listen(vm)
        vmm = await self.spawn(vm, len(snapshot.memory) >> 20, regions, options, *([snapshot.model] if model else []))
        await self.client.wait_connected(vm_id, timeout=30)
        return vmm

    async def spawn(self, vm, *arguments, **options):
        command = [self.program, vm.socket, *arguments]
        return await self.run([str(each) for each in command], **options)

    async def run(self, command, **options):
        open_process = partial(
            trio.lowlevel.open_process, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options
        )
        process = await open_process()
        self.vmms.append(process)
        vmm = Vmm(process, 0)
        words = (await vmm.answer()).split()
        vmm.address = int(words[1]) if words[:1] == ["armed"] else 0
        return vmm

    async def rude(self, vm, mode):
        """A VMM that misbehaves in a way C is too good for; returns when it has."""
        script = Path(__file__).with_name("rude_vmm.py")
        return await self.run([sys.executable, str(script), str(vm.socket), mode])

    async def kill_pager(self):
        """kill -9; returns when it is dead. Its supervisor starts another one."""
        pid = self.pager_pid()
        pidfd = os.pidfd_open(pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await trio.lowlevel.wait_readable(pidfd)
        os.close(pidfd)
        return pid

    def pager_pid(self):
        return read_process_file(self.directory).pid

    def log(self):
        return (self.directory / "pager.log").read_text()


@asynccontextmanager
async def open_world(root, program, *arguments, supervised=True):
    """`supervised` False: `kill_pager` is final until the test starts a supervisor itself."""
    directory = root / "pager"
    supervisor = PagerSupervisor(directory, arguments=["--connect-timeout", "6", *arguments])
    try:
        async with trio.open_nursery() as nursery:
            keeping = trio.CancelScope()

            async def keep(*, task_status):
                with keeping:
                    await supervisor.run(task_status=task_status)

            await nursery.start(keep)
            client = PagerClient(directory, call_timeout=40)
            await nursery.start(client.run)
            world = World(root, directory, client, program, nursery)
            if not supervised:
                keeping.cancel()
            try:
                yield world
            finally:
                print(world.log())  # noqa: T201 - pytest shows it with a failure
                for process in world.vmms:
                    process.kill()
                    with trio.move_on_after(5, shield=True):
                        await process.wait()
                    await process.stdin.aclose()
                    await process.stdout.aclose()
            nursery.cancel_scope.cancel()
    finally:
        with trio.move_on_after(15, shield=True):
            await stop_pager(directory)


@pytest.fixture
async def world(root, vmm_program):
    async with open_world(root, vmm_program) as opened:
        yield opened
