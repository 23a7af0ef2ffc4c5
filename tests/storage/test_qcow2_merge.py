"""Merged layers against a byte array: whatever guests wrote, zeroed and discarded, in any part of the chain."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent.storage import qcow2, qcow2_merge, qcow2_writer
from agent.storage.overlay import OverlayDamaged, StorageTimeout
from agent.storage.qcow2 import Qcow2Overlays, chain
from agent.storage.qcow2_header import CLUSTER_BYTES, TABLE_SPAN

MIB = 1 << 20
SIZE_MB = 513
SPAN = 1 * MIB
"""What the guests of the model touch: so much at the start of the disk and on both sides of the next table's start."""

WINDOWS = (0, TABLE_SPAN - SPAN // 2)
BASE_BYTES = 300 * 1024 + 512
"""No multiple of a cluster, as the size of a base image need not be one."""

place = st.builds(lambda window, at: WINDOWS[window] + at * 512, st.integers(0, 1), st.integers(0, SPAN // 512 - 1))
clusters = st.tuples(st.integers(0, 1), st.integers(0, SPAN // CLUSTER_BYTES - 1), st.integers(1, 4))
operations = st.one_of(
    st.tuples(st.just("write"), place, st.integers(1, 300), st.integers(1, 255)),
    st.tuples(st.sampled_from(["write -z", "write -z -u"]), place, st.integers(1, 300), st.just(0)),
    clusters.map(lambda c: ("discard", WINDOWS[c[0]] + c[1] * CLUSTER_BYTES, c[2] * CLUSTER_BYTES // 512, 0)),
)
histories = st.lists(st.lists(operations, max_size=6), min_size=3, max_size=5)


class Model:
    """The disk as bytes: the windows only, for the rest is what the base has."""

    def __init__(self, base):
        self._content = {start: bytearray(SPAN) for start in WINDOWS}
        self._content[0][: len(base)] = base

    def apply(self, operation):
        """Do it here; return it for qemu-io."""
        verb, offset, sectors, value = operation
        start = next(start for start in WINDOWS if start <= offset < start + SPAN)
        length = min(sectors * 512, start + SPAN - offset)
        self._content[start][offset - start : offset - start + length] = bytes([value]) * length
        pattern = f"-P {value} " if verb == "write" else ""
        return f"{verb} {pattern}{offset} {length}"

    def holds(self, raw):
        with raw.open("rb") as file:
            for start, content in self._content.items():
                file.seek(start)
                if file.read(SPAN) != content:
                    return False
        return True


def digests(paths):
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def allocation(base, overlays):
    """(start, length, depth): which file of the chain has what, and zeros count as had."""
    output = subprocess.run(
        ["qemu-img", "map", "--output=json", chain(base, overlays)], capture_output=True, check=True
    )
    return [part for part in json.loads(output.stdout) if part["depth"] < len(overlays) and part["present"]]


async def make_layers(directory, base, history, write):
    """Layers as their VMs would leave them, and the model of the whole."""
    model, overlays, layers = Model(base.read_bytes()), Qcow2Overlays(), []
    for number, operations_ in enumerate(history):
        layer = directory / f"layer-{number}"
        await overlays.create(base, layer, SIZE_MB, layers=layers)
        layers.append(layer)
        if operations_:
            await write(base, layers, *(model.apply(operation) for operation in operations_))
        await overlays.freeze(layer, SIZE_MB)
    return model, layers


async def check_merge(directory, history, cut, write):
    base, merged, overlays = directory / "base.raw", directory / "merged", Qcow2Overlays()
    base.write_bytes(bytes(range(1, 251)) * (BASE_BYTES // 250) + b"z" * (BASE_BYTES % 250))
    model, layers = await make_layers(directory, base, history, write)
    before = digests(layers)
    low, high = sorted((cut[0] % len(layers), cut[1] % len(layers)))
    await overlays.merge(base, layers[low : high + 1], merged)
    await overlays.freeze(merged, SIZE_MB)
    shorter = [*layers[:low], merged, *layers[high + 1 :]]
    for number, whole in enumerate((layers, shorter)):
        raw = directory / f"raw-{number}"
        await overlays.flatten(base, whole[-1], raw, layers=whole[:-1])
        assert model.holds(raw)
    compare = ["qemu-img", "compare", chain(base, layers), chain(base, shorter)]
    await trio.run_process(compare, capture_stdout=True)
    check = await trio.run_process(["qemu-img", "check", str(merged)], capture_stdout=True)
    assert b"No errors were found" in check.stdout
    parts = layers[low : high + 1]
    covered = {part["start"] // CLUSTER_BYTES + n for part in allocation(base, parts) for n in _clusters(part)}
    assert covered == {
        part["start"] // CLUSTER_BYTES + n for part in allocation(base, [merged]) for n in _clusters(part)
    }
    assert overlays.usage(merged) <= sum(overlays.usage(layer) for layer in parts)
    assert digests(layers) == before


def _clusters(part):
    return range(part["length"] // CLUSTER_BYTES)


@settings(max_examples=15, deadline=None)
@given(history=histories, cut=st.tuples(st.integers(0, 4), st.integers(0, 4)))
@example(history=[[], [], []], cut=(0, 2))
def test_merged_layers_equal_the_model(history, cut):
    """Any run of layers out of 3-5, merged: chain, shorter chain and model are the same disk.

    The merged layer has exactly the clusters that any of them had, zeros among them, costs no more than they did, has
    no error, and no layer changed.
    """
    with TemporaryDirectory() as directory:
        trio.run(check_merge, Path(directory), history, cut, _write)


async def _write(base, overlays, *commands):
    # Hypothesis and function-scoped fixtures do not go together: see the fixture `write`.
    top = chain(base, overlays).replace('"driver":"qcow2"', '"driver":"qcow2","discard":"unmap"', 1)
    arguments = [argument for command in commands for argument in ("-c", command)]
    await trio.run_process(["qemu-io", "-d", "unmap", *arguments, top], capture_stdout=True)


async def test_a_zeroed_cluster_does_not_reveal_the_base(base, write, tmp_path):
    """Written, zeroed and discarded above data of the base and of a lower layer: zero, and without taking room."""
    below, above, merged = (tmp_path / name for name in ("below", "above", "merged"))
    overlays = Qcow2Overlays()
    base.write_bytes(b"B" * (4 * MIB))
    await overlays.create(base, below, 64)
    await write(base, [below], "write -P 1 0 1M")
    await overlays.create(base, above, 64, layers=[below])
    await write(base, [below, above], "discard 0 256k", "write -z 256k 256k", "write -z -u 512k 256k", "discard 2M 1M")
    await overlays.merge(base, [below, above], merged)
    await overlays.flatten(base, merged, tmp_path / "flat")
    content = (tmp_path / "flat").read_bytes()
    assert content[: 4 * MIB] == bytes(768 << 10) + b"\1" * (256 << 10) + b"B" * MIB + bytes(MIB) + b"B" * MIB
    assert overlays.usage(merged) < 400 << 10


async def test_twelve_layers(base, write, tmp_path):
    """A chain as long as it gets before compaction: written through, read through, merged."""
    overlays, layers = Qcow2Overlays(), []
    for number in range(13):
        layer = tmp_path / f"layer-{number}"
        await overlays.create(base, layer, 64, layers=layers)
        layers.append(layer)
        await write(base, layers, f"write -P {number + 1} {number * 100}k 150k")
    *frozen, active = layers
    before = digests(frozen)
    await overlays.merge(base, frozen, tmp_path / "merged")
    await overlays.flatten(base, active, tmp_path / "long", layers=frozen)
    await overlays.flatten(base, active, tmp_path / "short", layers=[tmp_path / "merged"])
    content = (tmp_path / "long").read_bytes()
    assert content == (tmp_path / "short").read_bytes()
    assert [content[number * 100 * 1024] for number in range(13)] == list(range(1, 14))
    assert digests(frozen) == before


async def test_layers_of_growing_disks(base, write, tmp_path):
    """A disk that was enlarged: beyond the end of the lower layer there is nothing but what the upper one has."""
    below, above, merged = (tmp_path / name for name in ("below", "above", "merged"))
    overlays = Qcow2Overlays()
    await overlays.create(base, below, 64)
    await overlays.create(base, above, 1024, layers=[below])
    await write(base, [below, above], "write -P 9 1000M 64k")
    await overlays.merge(base, [below, above], merged)
    await overlays.freeze(merged, 1024)
    await write(base, [merged], "read -P 9 1000M 64k", "read -P 0 100M 64k")
    with pytest.raises(OverlayDamaged, match="smaller disk"):
        await overlays.merge(base, [above, below], tmp_path / "wrong")


ENTRIES = {
    "compressed": (1 << 62) | (5 * CLUSTER_BYTES),
    "beyond the end": (1 << 63) | (1 << 50),
    "amid a cluster": (1 << 63) | (5 * CLUSTER_BYTES + 512),
    "reserved bits": (1 << 63) | (5 * CLUSTER_BYTES) | 4,
}


@pytest.mark.parametrize("what", ENTRIES)
async def test_a_table_that_no_vmm_of_ours_wrote_is_refused(base, write, tmp_path, what):
    """Entries of the second-level table: typed, naming the layer, and nothing is left."""
    layer = tmp_path / "layer"
    overlays = Qcow2Overlays()
    await overlays.create(base, layer, 64)
    await write(base, [layer], "write -P 1 0 1M")
    patch_table(layer, 3, ENTRIES[what])
    with pytest.raises(OverlayDamaged, match=str(layer)):
        await overlays.merge(base, [layer], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "layer"]


async def test_a_small_file_does_not_become_a_large_one(base, write, tmp_path):
    """A whole table of entries that all point to one cluster would cost the host 512 MiB: refused long before."""
    layer = tmp_path / "layer"
    overlays = Qcow2Overlays()
    await overlays.create(base, layer, 512)
    await write(base, [layer], "write -P 1 0 1M")
    for index in range(1, 8192):
        patch_table(layer, index, None)
    with pytest.raises(OverlayDamaged, match="more clusters than"):
        await overlays.merge(base, [layer], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "layer"]


def patch_table(layer, index, entry):
    """Set an entry of the first second-level table; None: the same as its first."""
    with layer.open("r+b") as file:
        file.seek(40)
        (l1_offset,) = struct.unpack(">Q", file.read(8))
        file.seek(l1_offset)
        table = struct.unpack(">Q", file.read(8))[0] & ((1 << 56) - 1)
        file.seek(table)
        first = file.read(8)
        file.seek(table + index * 8)
        file.write(first if entry is None else struct.pack(">Q", entry))


class Gate:
    """`os` for the writer: its first copy waits until the test has done something about it."""

    def __init__(self):
        self.reached = threading.Event()
        self.passed = threading.Event()
        self.copies = 0

    def __getattr__(self, name):
        return getattr(qcow2.os, name)

    def sendfile(self, *arguments):
        self.copies += 1
        self.reached.set()
        assert self.passed.wait(20)
        return qcow2.os.sendfile(*arguments)


async def test_a_merge_is_cancelled_half_way(base, write, tmp_path, monkeypatch):
    """The caller gives up: it ends within one piece of work, and no file is left."""
    gate = Gate()
    monkeypatch.setattr(qcow2_writer, "os", gate)
    monkeypatch.setattr(qcow2_writer, "COPY_BYTES", CLUSTER_BYTES)
    layer = tmp_path / "layer"
    overlays = Qcow2Overlays()
    await overlays.create(base, layer, 64)
    await write(base, [layer], "write -P 1 0 1M")
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(overlays.merge, base, [layer], tmp_path / "merged")
            await trio.to_thread.run_sync(gate.reached.wait)
            names = [path.name for path in tmp_path.iterdir()]
            nursery.cancel_scope.cancel()
            gate.passed.set()
    assert ".merged.unfinished" in names
    assert gate.copies == 1  # of 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "layer"]


async def test_a_merge_that_takes_too_long_is_ended(base, write, tmp_path, monkeypatch):
    """Out of time: StorageTimeout, and no file is left."""
    layer = tmp_path / "layer"
    overlays = Qcow2Overlays()
    await overlays.create(base, layer, 64)
    await write(base, [layer], "write -P 1 0 1M")
    monkeypatch.setattr(qcow2, "BULK_TIMEOUT", 0.0)
    with pytest.raises(StorageTimeout, match="merged"):
        await overlays.merge(base, [layer], tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.raw", "layer"]


async def test_what_an_earlier_attempt_left_is_no_obstacle(base, tmp_path):
    """The process died half way through a merge: its unfinished file is replaced, and the target is whole."""
    layer, left = tmp_path / "layer", tmp_path / ".merged.unfinished"
    overlays = Qcow2Overlays()
    await overlays.create(base, layer, 64)
    left.write_bytes(b"half" * MIB)
    await overlays.merge(base, [layer], tmp_path / "merged")
    assert not left.exists()
    assert overlays.usage(tmp_path / "merged") < MIB


def test_long_runs_of_clusters_are_copied_at_once():
    """Neighbours on the disk and in one file make one copy; another file, a gap or a zero starts the next."""
    cluster = CLUSTER_BYTES
    merged = {n: (3, (10 + n) * cluster) for n in range(5)} | {5: (4, 15 * cluster), 6: (4, qcow2_merge.ZERO)}
    merged |= {8191: (4, 17 * cluster), 8190: (4, 16 * cluster)}
    assert list(qcow2_merge._runs(merged)) == [
        (0, 5, 3, 10 * cluster),
        (5, 1, 4, 15 * cluster),
        (6, 1, 4, qcow2_merge.ZERO),
        (8190, 2, 4, 16 * cluster),
    ]
