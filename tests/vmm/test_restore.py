"""QEMU saved and restored: its disk chain, its privileges, and everything that can go wrong half way."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.snapshots import pagemap
from agent.vmm import qemu_control, qemu_launch, qemu_state
from agent.vmm.driver import VmCommandFailed, VmDiskFull, VmStartFailed, VmState, VmStateFailed
from agent.vmm.guest_memory import has_userfaultfd

pytestmark = [pytest.mark.vm, pytest.mark.host]

NOBODY_ELSE = 64399
"""Another sandbox's user."""


@pytest.fixture
async def source(qemu):
    """A VM that counts."""
    vm = await qemu.driver.boot(qemu.counting_spec("source"))
    await qemu.count(vm)
    return vm


def proc_text(process, name):
    """A file of a process' entry in /proc."""
    return Path(f"/proc/{process.pid}/{name}").read_text()


def can(user, *command):
    """Whether a command succeeds for a user who is in no group."""
    return subprocess.run(command, user=user, group=user, extra_groups=[], check=False).returncode == 0


def name_backing(overlay, backing):
    """Write another backing file's name into an overlay, as its VMM could have."""
    subprocess.run(["qemu-img", "rebase", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, overlay], check=True)


def memory_flags(process):
    """The flags of the guest memory's mapping (VmFlags of /proc/PID/smaps)."""
    text = proc_text(process, "smaps")
    mapping = text[text.index("/memfd:memory-backend-memfd") :]
    return mapping[mapping.index("VmFlags:") :].splitlines()[0].split()[1:]


def memory_file(process):
    """The guest's memory as the process has it open."""
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it opens and closes meanwhile
            if str(entry.readlink()).startswith("/memfd:"):
                return entry
    raise AssertionError(f"{process} has no memory")


def links(process):
    """What a process has open, with its access mode. It opens and closes meanwhile: what is gone again is left out."""
    found = {}
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            target, info = entry.readlink(), Path(f"/proc/{process.pid}/fdinfo/{entry.name}").read_text()
            flags = int(dict(line.split(":", 1) for line in info.splitlines())["flags"], 8)
            found.setdefault(str(target), set()).add(flags & os.O_ACCMODE)
    return found


async def test_memory_is_registered_from_the_first_instruction(qemu, source):
    """Write tracking on boot, missing pages too after a restore; the userfaultfd stays open, its device does not."""
    assert "uw" in memory_flags(source.process)
    assert "um" not in memory_flags(source.process)
    clone = await qemu.restore(qemu.counting_spec("clone"), await qemu.save(source))
    assert {"uw", "um"} <= set(memory_flags(clone.process))
    for vm in (source, clone):
        assert has_userfaultfd(vm.process.pid)
        assert "/dev/userfaultfd" not in links(vm.process)


def written_pages(memory):
    """What the kernel says was written: offsets of pages. Nothing that was never there may be among them."""
    mapped, others = pagemap.written(memory.pid, [pagemap.Mapping(memory.address, memory.size)])
    assert others == []
    return {page for offset, length in mapped for page in range(offset, offset + length, 4096)}


def changed_pages(memory, image):
    """What differs from an image of the memory: offsets of pages."""
    before = image.read_bytes()
    return {
        offset
        for offset in range(0, memory.size, 4096)
        if os.pread(memory.fd, 4096, offset) != before[offset : offset + 4096]
    }


async def test_what_a_guest_writes_is_known(qemu, source):
    """From the first instruction, and after a restore: no page that has changed is missed, and few others are told."""
    empty = qemu.root / "empty"
    with empty.open("wb") as file:
        file.truncate(96 << 20)
    saved = await qemu.save(source)
    booted = source.memory()
    changed = changed_pages(booted, empty)
    assert changed
    assert changed <= written_pages(booted)
    os.close(booted.fd)
    clone = await qemu.restore(qemu.counting_spec("clone"), saved)
    restored = clone.memory()
    assert len(written_pages(restored)) < 100  # by QEMU itself
    await clone.resume()
    await qemu.count(clone)
    await clone.pause()
    changed = changed_pages(restored, saved.memory)
    written = written_pages(restored)
    assert 0 < len(changed) <= len(written) < 3000
    assert changed <= written
    os.close(restored.fd)


async def test_the_handshake_is_firecrackers(qemu, source):
    """One region: all of the guest's memory, where it is mapped, in bytes."""
    clone = await qemu.restore(qemu.counting_spec("clone"), await qemu.save(source))
    memory = clone.memory()
    os.close(memory.fd)
    assert qemu.servers[-1].handshake == [
        {
            "base_host_virt_addr": memory.address,
            "size": memory.size,
            "offset": 0,
            "page_size": 4096,
            "page_size_kib": 4096,
        }
    ]


async def test_a_restored_vm_has_no_more_privileges(qemu, source):
    """Its own user, the system call filter, and of all files only its disk to write."""
    spec = qemu.counting_spec("clone")
    clone = await qemu.restore(spec, await qemu.save(source))
    await clone.resume()
    await qemu.count(clone)
    status = proc_text(clone.process, "status")
    assert "\nUid:\t64321\t64321\t64321\t64321\n" in status
    assert "\nSeccomp:\t2\n" in status
    files = {link: modes for link, modes in links(clone.process).items() if link.startswith(str(qemu.root))}
    assert files.pop(str(spec.base)) == {os.O_RDONLY}
    assert set(files) == {str(spec.disk), str(spec.directory / "vmm.log")}
    if qemu.cgroups._parent is not None:
        group = qemu.cgroups._parent / "clone"
        assert (group / "cgroup.procs").read_text().split() == [str(clone.process.pid)]


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("count-poweroff", "the guest powered off"),
        ("count-restart", "the guest restarted or its kernel panicked"),
        ("count-panic", "the guest's kernel panicked: Kernel panic - not syncing: Attempted to kill init!"),
    ],
)
async def test_the_end_of_a_restored_guest_is_noticed_and_explained(qemu, mode, reason):
    """As if it had been booted here."""
    source = await qemu.driver.boot(qemu.counting_spec("source", mode=mode))
    await qemu.count(source)
    saved = await qemu.save(source)
    clone = await qemu.restore(qemu.counting_spec("clone"), saved)
    async with trio.open_nursery() as nursery:
        reasons = []

        async def wait():
            reasons.append(await clone.wait_exit())

        nursery.start_soon(wait)
        await clone.resume()
    assert reasons[0].startswith(reason)
    assert list(qemu.driver.find_orphans(qemu.root)) == [qemu.root / "source"]


async def test_a_checkpoint_freezes_the_disk_while_the_source_goes_on(qemu, source):
    """What was written before the pivot lies in the old file, what comes after in the new one; the clone sees before.

    The old file is the clone's layer, through a descriptor: only root may open it by name.
    """
    frozen = await source.disk_file()
    await source.pause()
    await source.pivot_disk(qemu.overlay(frozen.with_name("second.qcow2")))
    saved = await qemu.save(source)
    await source.resume()
    layer = qemu.root / "layer.qcow2"
    os.link(frozen, layer)
    os.chown(layer, 0, 0)
    layer.chmod(0o400)
    content = layer.read_bytes()
    await qemu.count(source)
    clone = await qemu.restore(qemu.counting_spec("clone", layers=[layer]), saved)
    await clone.resume()
    while await qemu.count(clone) < saved.counted + 2:
        pass
    ticks = (await qemu.ticks(clone))[:2]
    assert ticks == [(saved.counted + 1, saved.counted), (saved.counted + 2, saved.counted + 1)]
    assert await qemu.count(source) > saved.counted
    assert all(disk == tick - 1 for tick, disk in await qemu.ticks(source))
    assert layer.read_bytes() == content
    assert links(clone.process)[str(layer)] == {os.O_RDONLY}


async def test_a_chain_of_layers_is_what_the_spec_says(qemu, source):
    """Three generations deep, lowest first; and what a file names as its backing does not matter."""
    layers = []
    vm = source
    for number in range(3):
        frozen = await vm.disk_file()
        saved = await qemu.save(vm, f"generation-{number}")
        await vm.kill()
        name_backing(frozen, "/etc/passwd")
        layers.append(frozen)
        vm = await qemu.restore(qemu.counting_spec(f"vm-{number}", layers=layers), saved)
        await vm.resume()
        await qemu.count(vm)
        assert (await qemu.ticks(vm))[0] == (saved.counted + 1, saved.counted)
        assert "lost" not in await vm.console_tail()


async def test_nobody_opens_what_belongs_to_another_sandbox(qemu, source):
    """Disk, base and memory: as another VM's user, by name and through /proc. The same commands work for root."""
    for path in (await source.disk_file(), qemu.root / "base.raw", memory_file(source.process)):
        command = ("head", "--bytes=1", path)
        assert can(0, *command)
        assert not can(NOBODY_ELSE, *command)


async def test_without_a_page_server_nothing_starts(qemu, source):
    """The socket is not there, or nobody listens any more: said at once in the library's own words."""
    saved = await qemu.save(source)
    spec = qemu.counting_spec("clone")
    with trio.fail_after(40), pytest.raises(VmStartFailed, match=r"nobody serves the memory.*No such file"):
        await qemu.driver.restore(spec, VmState(saved.state, spec.directory / "absent.sock"))
    pages = qemu.serve_pages(spec, saved)
    qemu.servers.pop().close()
    with trio.fail_after(40), pytest.raises(VmStartFailed, match=r"nobody serves the memory.*Connection refused"):
        await qemu.driver.restore(spec, VmState(saved.state, pages))
    assert list(qemu.driver.find_orphans(qemu.root)) == [qemu.root / "source"]


async def test_a_page_server_that_serves_nothing_is_given_up(qemu, source, monkeypatch):
    """QEMU hangs in its first fault, and answers nothing: VmStartFailed after the bound, no process."""
    monkeypatch.setattr("agent.vmm.qemu.RESTORE_TIMEOUT", 1.0)
    saved = await qemu.save(source)
    spec = qemu.counting_spec("clone")
    pages = qemu.serve_pages(spec, saved, silent=True)
    with trio.fail_after(40), pytest.raises(VmStartFailed, match="brought the memory"):
        await qemu.driver.restore(spec, VmState(saved.state, pages))
    assert list(qemu.driver.find_orphans(qemu.root)) == [qemu.root / "source"]


async def test_a_page_socket_may_have_a_long_name(qemu, source):
    """Longer than the 107 bytes of an address."""
    saved = await qemu.save(source)
    spec = qemu.counting_spec("clone")
    directory = qemu.root / ("d" * 120)
    directory.mkdir()
    pages = qemu.serve_pages(spec, saved).rename(directory / "pages.sock")
    clone = await qemu.driver.restore(spec, VmState(saved.state, pages))
    await clone.resume()
    await qemu.count(clone)


async def test_a_machine_of_another_shape_is_refused(qemu, source):
    """QEMU itself sees that the memory is not this machine's. (Missing vCPUs it would not see.)"""
    saved = await qemu.save(source)
    with pytest.raises(VmStartFailed, match="load of migration failed"):
        await qemu.restore(replace(qemu.counting_spec("clone"), memory_mb=64), saved)


@pytest.fixture
def full_disk(root):
    """A file system without a free block."""
    path = root / "full"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k,mode=711", "capsule-test", path], check=True)
    (path / "filler").write_bytes(bytes(8192))
    yield path
    subprocess.run(["umount", "--lazy", path], check=True)


async def test_a_full_disk_is_said_and_the_vm_runs_on(qemu, source, full_disk):
    """A typed error, no half file, and a guest that has noticed nothing."""
    await source.pause()
    with pytest.raises(VmDiskFull, match="No space left"):
        await source.save_state(full_disk / "state")
    assert not (full_disk / "state").exists()
    await source.resume()
    await qemu.count(source)
    await qemu.save(source)


async def test_a_state_without_end_is_not_kept(qemu, source, monkeypatch):
    """A hostile VMM writes and writes: bounded memory, not a byte on the disk; an honest one can go on."""
    monkeypatch.setattr(qemu_state, "MAX_STATE_BYTES", 10_000)
    await source.pause()
    with pytest.raises(VmStateFailed, match="10000 bytes"):
        await source.save_state(qemu.root / "state")
    assert not (qemu.root / "state").exists()
    await source.resume()
    await qemu.count(source)


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.003, 0.006, 0.01])
async def test_a_cancelled_save_leaves_a_vm_that_can_go_on(qemu, source, delay):
    """At any moment of it; no file is left unless it was whole."""
    await source.pause()
    with trio.move_on_after(delay) as scope:
        await source.save_state(qemu.root / "state")
    if scope.cancelled_caught:
        assert not (qemu.root / "state").exists()
    await source.resume()
    await qemu.count(source)
    await qemu.save(source)


async def test_a_pivot_that_fails_changes_nothing(qemu, source):
    """The overlay is not there, or no qcow2 file: refused, the VM writes where it wrote, and the next pivot works."""
    before = await source.disk_file()
    with pytest.raises(VmCommandFailed, match="No such file"):
        await source.pivot_disk(before.with_name("absent.qcow2"))
    garbage = before.with_name("garbage.qcow2")
    garbage.write_bytes(bytes(1 << 20))
    with pytest.raises(VmCommandFailed, match="qcow2"):
        await source.pivot_disk(garbage)
    assert await source.disk_file() == before
    overlay = qemu.overlay(before.with_name("second.qcow2"))
    await source.pivot_disk(overlay)
    assert await source.disk_file() == overlay
    await qemu.count(source)


async def test_a_hung_qemu_is_a_typed_error_in_time(qemu, source, monkeypatch):
    """Stopped dead it answers nothing: each call ends within its bound, with the error it may raise."""
    overlay = qemu.overlay(qemu.root / "next.qcow2")
    os.kill(source.process.pid, signal.SIGSTOP)
    calls = [source.pause, source.resume, source.paused, source.disk_file, partial(source.pivot_disk, overlay)]
    with trio.fail_after(40), monkeypatch.context() as patched:
        for name in ("QMP_TIMEOUT", "FLUSH_TIMEOUT", "DYING_TIMEOUT"):
            patched.setattr(qemu_control, name, 0.2)
        for call in calls:
            with pytest.raises(VmCommandFailed):
                await call()
        with pytest.raises(VmStateFailed):
            await source.save_state(qemu.root / "state")
    os.kill(source.process.pid, signal.SIGCONT)
    await trio.sleep(0.5)
    await source.resume()
    await qemu.count(source)


async def test_without_userfaultfd_a_vm_boots_and_is_not_restored(qemu, source, monkeypatch):
    """A device that is none: a warning in the log on boot, the end of QEMU on restore; no device: the same."""
    saved = await qemu.save(source)
    monkeypatch.setattr(qemu_launch, "USERFAULTFD", Path("/dev/null"))
    spec = qemu.counting_spec("old")
    await qemu.count(await qemu.driver.boot(spec))
    assert "capsule-pages: userfaultfd: " in (spec.directory / "vmm.log").read_text()
    with pytest.raises(VmStartFailed, match=r"status 70.*capsule-pages: userfaultfd: "):
        await qemu.restore(qemu.counting_spec("clone"), saved)
    monkeypatch.setattr(qemu_launch, "USERFAULTFD", Path("/dev/absent"))
    await qemu.count(await qemu.driver.boot(qemu.counting_spec("older")))
    with pytest.raises(VmStartFailed, match="/dev/absent"):
        await qemu.restore(qemu.counting_spec("another"), saved)


async def test_a_memory_that_was_not_recognised_is_not_run_on(qemu, source, boot_files):
    """Another QEMU may name its memory otherwise; then it would be all zeros, and the restore must fail."""
    saved = await qemu.save(source)
    unknowing = Path("/lib/x86_64-linux-gnu/libm.so.6")
    qemu.driver._launcher = replace(qemu.driver._launcher, shim=unknowing)
    with pytest.raises(VmStartFailed, match="not registered"):
        await qemu.restore(qemu.counting_spec("clone"), saved)
    qemu.driver._launcher = replace(qemu.driver._launcher, shim=None)
    with pytest.raises(VmStartFailed, match="cannot be restored on this machine"):
        await qemu.restore(qemu.counting_spec("another"), saved)
    assert list(qemu.driver.find_orphans(qemu.root)) == [qemu.root / "source"]
