"""The first touches of a run are recorded to the page, and brought in before the next one asks."""

from __future__ import annotations

import random

from agent.pager.recording import MAX_PREFETCH_BYTES, RECORDED_FAULTS, read_working_set, write_working_set
from agent.snapshots import working_set

PAGE = 4096


def recorded(snapshot):
    found = working_set.read(snapshot.directory / "working-set")
    return None if found is None else {at // PAGE + i for at, n in found.ranges() for i in range(n // PAGE)}


async def touch(vmm, pages):
    for page in pages:
        await vmm.ask(f"peek {page * PAGE}")


async def test_exactly_the_touched_pages_are_recorded_and_the_next_run_does_not_fault_on_them(world, snapshot):
    """Not their neighbours, though these were brought along; read in or written to. The next run finds all of them in
    its memory before it begins, and faults on the others alone."""
    pages = random.Random(4).sample(range(2048), 60)
    vmm = await world.start(snapshot)
    await touch(vmm, pages[:50])
    for page in pages[50:]:
        await vmm.ask(f"write {page * PAGE} 8 5")
    await world.client.record_working_set("one")
    assert recorded(snapshot) == set(pages)
    await touch(vmm, [1, 2, 3])
    await world.client.record_working_set("one")
    assert recorded(snapshot) == set(pages), "later calls must change nothing"
    await world.client.release("one")

    vmm = await world.start(snapshot, "two")
    assert (await world.client.statistics())["two"].prefetched_bytes == len(pages) * PAGE
    for page in pages:
        assert await vmm.ask(f"peek {page * PAGE}") == str(snapshot.memory[page * PAGE])
    assert (await world.client.statistics())["two"].faults == 0
    assert await vmm.ask("verify 3 9") == "same"


async def test_the_pager_does_not_hold_the_memory_of_a_vm_for_long(world, snapshot, open_files):
    """Its hold of the memory file ends with the recording: else the memory of a VM that has ended would wait for us to
    let go, and freeing gigabytes would hold up everybody's faults."""
    vmm = await world.start(snapshot)
    await touch(vmm, [1])
    assert any("memfd:guest" in name for name in open_files(world.pager_pid()))
    await world.client.record_working_set("one")
    assert not any("memfd:guest" in name for name in open_files(world.pager_pid()))
    assert await vmm.ask("verify 2 2") == "same"


async def test_it_shrinks_to_what_runs_have_in_common(world, snapshot):
    """What was brought ahead and not touched is seen not to be: after two runs only what both touched remains."""
    for number, pages in enumerate([range(0, 600, 2), range(0, 300, 2), range(0, 300, 2)]):
        vmm = await world.start(snapshot, f"run-{number}")
        await touch(vmm, pages)
        await world.client.record_working_set(f"run-{number}")
        await world.client.release(f"run-{number}")
    assert recorded(snapshot) == set(range(0, 300, 2))


async def test_without_prefetch_nothing_is_brought_ahead(world, snapshot):
    vmm = await world.start(snapshot)
    await touch(vmm, [5, 700])
    await world.client.record_working_set("one")
    await world.start(snapshot, "two", prefetch=False)
    assert (await world.client.statistics())["two"].prefetched_bytes == 0


async def test_a_damaged_one_is_none_and_a_vanished_snapshot_harms_nobody(world, snapshot):
    """Advice only: the run goes on without it."""
    (snapshot.directory / "working-set").write_bytes(b"rubbish")
    vmm = await world.start(snapshot)
    await touch(vmm, [5])
    snapshot.directory.rename(snapshot.directory.with_name("elsewhere"))
    await world.client.record_working_set("one")
    assert await vmm.ask(f"peek {9 * PAGE}") == str(snapshot.memory[9 * PAGE])


async def test_a_guest_that_works_ends_the_recording_by_itself(world, large_snapshot):
    """After so many faults what was touched until then stands, to the page, and everything later does not count."""
    vmm = await world.start(large_snapshot)
    chunks = list(range(RECORDED_FAULTS + 100))
    random.Random(5).shuffle(chunks)
    await touch(vmm, [chunk * 16 + 3 for chunk in chunks])
    await touch(vmm, [chunk * 16 + 7 for chunk in chunks])
    await world.client.record_working_set("one")
    faults = (await world.client.statistics())["one"].faults
    assert faults > RECORDED_FAULTS
    found = recorded(large_snapshot)
    assert RECORDED_FAULTS <= len(found) <= RECORDED_FAULTS + 100
    assert found <= {chunk * 16 + 3 for chunk in chunks}


def test_a_large_working_set_is_cut(tmp_path):
    """What guests touched is theirs to choose, how much is brought in before a VM runs is not."""
    half = MAX_PREFETCH_BYTES // 2
    write_working_set(tmp_path, [(0, PAGE), (4 * PAGE, half), (half * 2, half), (half * 4, half)])
    assert read_working_set(tmp_path) == ((0, PAGE), (4 * PAGE, half), (half * 2, half - PAGE))
