"""A VMM's memory served by the real process: content, figures, what the kernel counts as written."""

from __future__ import annotations

import pytest
import trio

from agent.pager.service import SnapshotUnreadable, SocketRefused
from agent.snapshots.pagemap import Mapping, merge, written

PAGE = 4096


def dirty(vmm, snapshot):
    """What the kernel counts as written: (mapped, others)."""
    return written(vmm.pid, [Mapping(vmm.address, len(snapshot.memory))])


@pytest.mark.parametrize(("regions", "options"), [(1, "-"), (3, "-"), (5, "w"), (2, "r")])
@pytest.mark.parametrize("recorded", [True, False])
async def test_memory_touched_in_random_order_from_several_threads_is_the_snapshot(
    world, snapshot, regions, options, recorded
):
    """Four threads read every page, each in an order of its own, and find the snapshot's content, whatever run, build
    or hole it lies in; in several regions, without write protection, while the first touches are recorded or after."""
    vmm = await world.start(snapshot, regions=regions, options=options)
    if recorded:
        await world.client.record_working_set("one")
    assert await vmm.ask("verify 4 7") == "same"
    figures = (await world.client.statistics())["one"]
    assert figures.connected
    assert figures.fault_bytes + figures.prefetched_bytes == len(snapshot.memory)
    assert figures.faults > 0
    assert sum(figures.latency) == figures.faults


async def test_a_thread_that_reads_in_order_hardly_faults(world, snapshot):
    """It is recognised and its pages are there before it: far fewer faults than chunks."""
    vmm = await world.start(snapshot)
    await world.client.record_working_set("one")
    assert await vmm.ask("verify 1 0") == "same"
    figures = (await world.client.statistics())["one"]
    assert figures.faults + figures.prefetched_bytes // 65536 >= 128
    assert figures.prefetched_bytes > figures.fault_bytes


@pytest.mark.parametrize("recorded", [True, False])
async def test_pages_that_were_brought_count_as_unwritten(world, snapshot, recorded):
    """Dirty tracking is exact: nothing is written after all of the memory was read, then exactly what was written,
    whether the page came by its own fault, as a neighbour, ahead of its time or is brought by the write itself."""
    vmm = await world.start(snapshot, options="r")
    if recorded:
        await world.client.record_working_set("one")
    await vmm.ask(f"write {100 * PAGE} {PAGE} 1")  # the fault is the write
    await vmm.ask(f"peek {200 * PAGE}")
    assert await vmm.ask(f"peek {100 * PAGE}") == "1"
    assert dirty(vmm, snapshot) == ([(100 * PAGE, PAGE)], [])
    assert (await vmm.ask("verify 3 3")).startswith("differs 3 ")
    assert dirty(vmm, snapshot) == ([(100 * PAGE, PAGE)], [])
    places = [(3, 1), (201, 2), (1000, 40)]
    for page, count in places:
        await vmm.ask(f"write {page * PAGE} {count * PAGE} 2")
    expected = merge([(100 * PAGE, PAGE), *((page * PAGE, count * PAGE) for page, count in places)])
    assert dirty(vmm, snapshot) == (expected, [])


@pytest.mark.parametrize("touched", [True, False])
async def test_what_the_vmm_gives_back_is_zeros_from_then_on_and_written(world, snapshot, touched):
    """Removed pages read as zeros, whether they had been brought or not; their neighbours keep the snapshot's content;
    the kernel counts them as written, read again or not: else a snapshot would bring the old content back."""
    vmm = await world.start(snapshot, regions=2, options="r")
    await world.client.record_working_set("one")
    if touched:
        assert await vmm.ask("verify 2 5") == "same"
    page = next(page for page in range(2, 2000) if all(snapshot.memory[(page + i) * PAGE] for i in range(-1, 5)))
    assert await vmm.ask(f"remove {page * PAGE} {4 * PAGE}") == "done"
    with trio.fail_after(20):
        while merge([*dirty(vmm, snapshot)[0], *dirty(vmm, snapshot)[1]]) != [(page * PAGE, 4 * PAGE)]:
            await trio.sleep(0.001)
    assert await vmm.ask(f"peek {(page + 1) * PAGE}") == "0"
    assert await vmm.ask(f"peek {(page - 1) * PAGE}") == str(snapshot.memory[(page - 1) * PAGE])
    assert await vmm.ask(f"peek {(page + 4) * PAGE}") == str(snapshot.memory[(page + 4) * PAGE])
    mapped, others = dirty(vmm, snapshot)
    assert merge([*mapped, *others]) == [(page * PAGE, 4 * PAGE)]
    assert (await vmm.ask("verify 2 6")).startswith("differs")


async def test_many_removals_among_faults_are_all_heard(world, snapshot):
    """The kernel refuses copies (EAGAIN) while memory is being given back: nobody hangs, nothing old comes back."""
    vmm = await world.start(snapshot, options="r")
    await world.client.record_working_set("one")
    for page in range(0, 1600, 32):
        await vmm.send(f"remove {page * PAGE} {8 * PAGE}")
        await vmm.send(f"peek {(page + 16) * PAGE}")
        await vmm.send(f"peek {(page + 3) * PAGE}")
    for page in range(0, 1600, 32):
        assert await vmm.answer() == "done"
        assert await vmm.answer() == str(snapshot.memory[(page + 16) * PAGE])
        assert await vmm.answer() == "0"


async def test_a_hole_punched_without_a_word_is_zeros_too(world, snapshot):
    """The pager believes the page to be there; its fault shows that it is not, and nobody hangs."""
    vmm = await world.start(snapshot)
    assert await vmm.ask("verify 2 5") == "same"
    page = next(page for page in range(2000) if snapshot.memory[page * PAGE])
    await vmm.ask(f"punch {page * PAGE} {PAGE}")
    assert await vmm.ask(f"peek {page * PAGE}") == "0"


async def test_memory_that_the_vmm_unmaps_disturbs_nobody(world, snapshot):
    """Its neighbours in the chunk are brought nevertheless."""
    vmm = await world.start(snapshot)
    await world.client.record_working_set("one")
    await vmm.ask(f"unmap {5 * PAGE} {PAGE}")
    for page in (4, 6):
        assert await vmm.ask(f"peek {page * PAGE}") == str(snapshot.memory[page * PAGE])
    assert (await world.client.failure("one")) is None


async def test_a_descriptor_made_a_blocking_one_stops_nobody(world, snapshot):
    """The VMM shares the descriptor's flags with us. It can make its own serving slow, and no more."""
    other = await world.start(snapshot, "two")
    vmm = await world.start(snapshot)
    await vmm.ask("fallback")
    for page in range(0, 320, 32):
        assert await vmm.ask(f"peek {page * PAGE}") == str(snapshot.memory[page * PAGE])
        assert await other.ask(f"peek {page * PAGE}") == str(snapshot.memory[page * PAGE])
    assert await other.ask("verify 2 2") == "same"


async def test_a_release_ends_the_serving_and_tells_what_it_took(world, snapshot):
    """Also of a VM that waits for a page at that moment, and of one that nobody knows."""
    vmm = await world.start(snapshot)
    await vmm.ask(f"read 0 {64 * PAGE} {PAGE}")
    figures = await world.client.release("one")
    assert figures.faults > 0
    assert await world.client.statistics() == {}
    assert await world.client.release("one") is None
    assert not list((world.directory / "vms").iterdir())
    await vmm.send(f"peek {1500 * PAGE}")  # stands still, as is written in the interface
    await world.start(snapshot, "two")


async def test_a_second_listen_replaces_the_first(world, snapshot):
    """As after an agent that died half-way through a resume."""
    await world.client.listen(world.vm(snapshot))
    vmm = await world.start(snapshot)
    assert await vmm.ask("verify 2 2") == "same"
    again = await world.start(snapshot)
    assert await again.ask("verify 2 2") == "same"
    assert list(await world.client.statistics()) == ["one"]


async def test_a_snapshot_that_cannot_be_read_is_refused_before_anything_listens(world, snapshot):
    """Header or checksums damaged, a build missing: the message names the file; no socket, no record."""
    header = snapshot.directory / "mem.header"
    sums = snapshot.data().with_name("sums")
    for path in (header, sums, snapshot.data(1)):
        path.chmod(0o600)
        good = path.read_bytes()
        path.write_bytes(good[:-1])
        with pytest.raises(SnapshotUnreadable, match=str(path)):
            await world.client.listen(world.vm(snapshot))
        path.unlink()
        with pytest.raises(SnapshotUnreadable, match=str(path)):
            await world.client.listen(world.vm(snapshot))
        path.write_bytes(good)
    assert not world.vm(snapshot).socket.exists()
    assert not list((world.directory / "vms").iterdir())
    with pytest.raises(SocketRefused, match=r"/nonexistent/page\.sock"):
        await world.client.listen(world.vm(snapshot, socket="/nonexistent/page.sock"))
    assert await world.client.statistics() == {}


async def test_a_socket_has_one_owner_and_a_long_name(world, snapshot):
    """Only the VMM's user may connect; a directory deeper than a socket's address is long does no harm."""
    place = world.root / ("d" * 100) / ("e" * 100)
    place.mkdir(parents=True)
    vm = world.vm(snapshot, socket=place / "page.sock", uid=12345)
    await world.client.listen(vm)
    status = vm.socket.stat()
    assert (status.st_uid, status.st_mode & 0o077) == (12345, 0)
    await world.client.release("one")
    assert not vm.socket.exists()
