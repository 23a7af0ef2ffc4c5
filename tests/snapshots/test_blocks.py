"""Builds: what is written comes back, what was harmed does not, and nothing takes much memory."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import threading
import tracemalloc
from array import array
from contextlib import suppress
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.snapshots import sums
from agent.snapshots.blocks import BUFFER_BYTES, BuildReader, BuildWriter
from agent.snapshots.errors import DataDamaged, HostDiskFull, StoreFailed, WouldBlock
from agent.snapshots.header import NIL, PAGE, Header, Run
from agent.snapshots.memory import MemoryReader
from agent.snapshots.sums import CHECKSUM_BLOCK
from tests.snapshots.disk import Disk, flip

in_directory = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
CONTENT = os.urandom(3 * CHECKSUM_BLOCK + 5 * PAGE)


@pytest.fixture
def build(tmp_path):
    """Writes a build and returns its directory."""

    def make(content=CONTENT, step=PAGE * 7):
        writer = BuildWriter(tmp_path / str(uuid4()))
        for begin in range(0, len(content), step):
            assert writer.append(memoryview(content)[begin : begin + step]) == begin
        writer.finish()
        return writer.directory

    return make


def read(directory, offset, length, **options):
    buffer = memoryview(bytearray(length))
    with BuildReader(directory) as reader:
        reader.read_into(offset, buffer, **options)
    return bytes(buffer)


def _read(reader, offset, buffer, *, wait):
    """What the page cache lost is read in a second attempt, as its users do."""
    try:
        reader.read_into(offset, buffer, wait=wait)
    except WouldBlock:
        reader.read_into(offset, buffer)


@in_directory
@given(st.lists(st.integers(0, 40), max_size=12), st.data())
def test_what_was_appended_is_read(tmp_path, lengths, data):
    """Appends of any length, reads of any part in any order by one reader, with and without waiting."""
    content = os.urandom(sum(lengths) * PAGE)
    with Disk(), patch("agent.snapshots.blocks.BUFFER_BYTES", 2 * CHECKSUM_BLOCK):
        writer = BuildWriter(tmp_path / str(uuid4()))
        position = 0
        for length in lengths:
            assert writer.append(memoryview(content)[position : position + length * PAGE]) == position
            position += length * PAGE
        assert writer.size == position
        writer.finish()
    with BuildReader(writer.directory) as reader:
        assert reader.size == len(content)
        for _ in range(6):
            offset = data.draw(st.integers(0, len(content)))
            length = data.draw(st.integers(0, len(content) - offset))
            buffer = memoryview(bytearray(length))
            _read(reader, offset, buffer, wait=data.draw(st.booleans()))
            assert buffer == content[offset : offset + length]


def test_only_whole_pages_are_appended(tmp_path):
    """Anything else would put later pages where no header can say."""
    writer = BuildWriter(tmp_path / str(uuid4()))
    with pytest.raises(ValueError, match="whole pages"):
        writer.append(b"abc")
    writer.finish()
    writer.finish()
    assert read(writer.directory, 0, 0) == b""


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(bit=st.integers(0, 8 * len(CONTENT) - 1), data=st.data())
def test_a_flipped_bit_of_the_data_is_found(build, bit, data):
    """Whoever reads its block, whichever part of it, gets an error that names file and place; other blocks are read."""
    with Disk():
        directory = build()
    flip(directory / "data", bit)
    block = bit // 8 // CHECKSUM_BLOCK
    low, high = block * CHECKSUM_BLOCK, min((block + 1) * CHECKSUM_BLOCK, len(CONTENT))
    offset = data.draw(st.integers(low, high - 1))
    length = data.draw(st.integers(1, len(CONTENT) - offset))
    wait = data.draw(st.booleans())
    with BuildReader(directory) as reader:
        for _ in range(2):
            with pytest.raises(DataDamaged, match=f"{directory}/data is damaged between bytes {low} and {high}"):
                _read(reader, offset, memoryview(bytearray(length)), wait=wait)
        for begin in range(0, len(CONTENT), CHECKSUM_BLOCK):
            if begin != low:
                buffer = memoryview(bytearray(min(CHECKSUM_BLOCK, len(CONTENT) - begin)))
                reader.read_into(begin, buffer)
                assert buffer == CONTENT[begin : begin + len(buffer)]


def test_data_of_another_length_is_refused(build):
    """Cut or lengthened, before the reader is opened or after."""
    for change in (-1, -PAGE, 1, CHECKSUM_BLOCK):
        directory = build()
        (directory / "data").chmod(0o600)
        with BuildReader(directory) as reader:
            os.truncate(directory / "data", len(CONTENT) + change)
            with pytest.raises(DataDamaged, match=f"{directory}/"):
                BuildReader(directory)
            if change < 0:
                with pytest.raises(DataDamaged, match=f"{directory}/data ends at byte"):
                    reader.read_into(len(CONTENT) - 3 * PAGE, memoryview(bytearray(3 * PAGE)))
                with pytest.raises((DataDamaged, WouldBlock)):
                    reader.read_into(len(CONTENT) - 3 * PAGE, memoryview(bytearray(3 * PAGE)), wait=False)


def test_reads_outside_of_the_data_are_refused(build):
    """A header that points behind the end of a build."""
    directory = build()
    for offset, length in ((-PAGE, PAGE), (len(CONTENT), 1), (0, len(CONTENT) + 1), (1 << 60, 1)):
        with pytest.raises(DataDamaged, match=f"{directory}/data has no bytes"):
            read(directory, offset, length)


def test_a_build_that_is_not_there(tmp_path, build):
    """Missing files are named."""
    with pytest.raises(DataDamaged, match="nowhere/data"):
        BuildReader(tmp_path / "nowhere")
    directory = build()
    (directory / "sums").unlink()
    with pytest.raises(DataDamaged, match="sums"):
        BuildReader(directory)


def test_a_block_is_hashed_once(build):
    """The second read of a block is a plain one."""
    with BuildReader(build()) as reader, patch.object(reader, "_verify", wraps=reader._verify) as verify:
        for _ in range(3):
            reader.read_into(PAGE, memoryview(bytearray(PAGE)))
            reader.read_into(PAGE, memoryview(bytearray(CHECKSUM_BLOCK)))
        assert [call.args[0] for call in verify.call_args_list] == [0, 1]


def test_reads_that_would_wait_say_so(build):
    """Not in the page cache, only half in it, or a file system that cannot tell: nothing waits, nothing is wrong."""
    directory = build()
    preadv = os.preadv
    short = [PAGE]

    def cold(descriptor, buffers, offset, flags=0):
        if flags == os.RWF_NOWAIT:
            if short:
                return preadv(descriptor, [buffers[0][: short.pop()]], offset)
            raise OSError(code, os.strerror(code))
        return preadv(descriptor, buffers, offset, flags)

    with BuildReader(directory) as reader, patch("os.preadv", cold):
        for code in (errno.EAGAIN, errno.EAGAIN, errno.EOPNOTSUPP):  # noqa: B007 - `cold` uses it
            buffer = memoryview(bytearray(2 * PAGE))
            with pytest.raises(WouldBlock):
                reader.read_into(PAGE, buffer, wait=False)
            reader.read_into(PAGE, buffer)
            assert buffer == CONTENT[PAGE : 3 * PAGE]


def test_short_reads_are_continued_and_failing_ones_typed(build):
    """The kernel may give less than asked for; a broken disk gives EIO."""
    preadv = os.preadv

    def stingy(descriptor, buffers, offset, flags=0):
        first = next(each for each in buffers if len(each))
        return preadv(descriptor, [first[:1000]], offset, flags) if broken is None else _raise(OSError(broken, "x"))

    for broken in (None, errno.EIO):
        with BuildReader(build()) as reader, patch("os.preadv", stingy):
            buffer = memoryview(bytearray(CHECKSUM_BLOCK))
            if broken is None:
                reader.read_into(3 * PAGE, buffer)
                assert buffer == CONTENT[3 * PAGE : 3 * PAGE + CHECKSUM_BLOCK]
            else:
                with pytest.raises(DataDamaged, match="data cannot be read"):
                    reader.read_into(3 * PAGE, buffer)


def _raise(err):
    raise err


def _id(directory):
    return UUID(directory.name)


def test_many_threads_read_through_one_reader(build):
    """They do not get each other's bytes."""
    wrong = []

    def run(seed):
        buffer = memoryview(bytearray(5 * PAGE))
        for each in range(60):
            offset = (seed * 7919 + each * 3 * PAGE + seed) % (len(CONTENT) - len(buffer))
            reader.read_into(offset, buffer)
            if buffer != CONTENT[offset : offset + len(buffer)]:
                wrong.append(offset)

    with BuildReader(build()) as reader:
        threads = [threading.Thread(target=run, args=(each,)) for each in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_large_build_takes_little_memory(tmp_path):
    """64 MiB are written and read back through a few MiB."""
    chunk = os.urandom(1 << 20)
    tracemalloc.start()
    try:
        with Disk():
            writer = BuildWriter(tmp_path / str(uuid4()))
            for _ in range(64):
                writer.append(memoryview(chunk))
            writer.finish()
        buffer = memoryview(bytearray(CHECKSUM_BLOCK))
        with BuildReader(writer.directory) as reader:
            for offset in range(PAGE, (63 << 20), CHECKSUM_BLOCK):
                reader.read_into(offset, buffer)
        assert tracemalloc.get_traced_memory()[1] < 2 * BUFFER_BYTES + (1 << 20)
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, HostDiskFull), (errno.EDQUOT, HostDiskFull), (errno.EIO, StoreFailed)]
)
def test_a_full_disk_is_a_typed_error(tmp_path, code, kind):
    """In any operation of a build, half a write done."""
    with Disk() as disk:
        for number in range(1, 9):
            disk.fail_at(number, code)
            writer = None
            with pytest.raises(kind):
                writer = _written(tmp_path)
            assert writer is None
        disk.fail_at(40)
        assert read(_written(tmp_path).directory, 0, len(CONTENT)) == CONTENT


def _written(tmp_path):
    writer = BuildWriter(tmp_path / str(uuid4()))
    try:
        writer.append(memoryview(CONTENT))
        writer.finish()
    finally:
        writer.close()
    return writer


def test_memory_is_read_through_its_header(build, tmp_path):
    """Zeros, two builds, and both sides of every seam; the buffer's old content does not show through."""
    first, second = build(), build(CONTENT[::-1])
    header = Header.of(
        memory_bytes=64 * PAGE,
        generation=1,
        build=uuid4(),
        runs=[
            Run(0, 2 * PAGE, NIL, 0),
            Run(2 * PAGE, 30 * PAGE, _id(first), 3 * PAGE),
            Run(32 * PAGE, 1 * PAGE, _id(second), 0),
            Run(33 * PAGE, 31 * PAGE, NIL, 0),
        ],
    )
    model = bytes(2 * PAGE) + CONTENT[3 * PAGE : 33 * PAGE] + CONTENT[::-1][:PAGE] + bytes(31 * PAGE)
    with MemoryReader(header, tmp_path) as memory:
        assert memory.read(0, 64 * PAGE) == model
        for offset, length in ((0, 1), (PAGE, 2 * PAGE), (31 * PAGE + 5, 3 * PAGE), (63 * PAGE, PAGE), (9, 0)):
            buffer = memoryview(bytearray(b"\xff" * length))
            _read(memory, offset, buffer, wait=False)
            assert buffer == model[offset : offset + length]
    flip(second / "data", 5)
    with MemoryReader(header, tmp_path) as memory:
        assert memory.read(0, 32 * PAGE) == model[: 32 * PAGE]
        with pytest.raises(DataDamaged, match=str(second)):
            memory.read(31 * PAGE, 2 * PAGE)
    (second / "sums").unlink()
    with pytest.raises(DataDamaged, match=str(second)):
        MemoryReader(header, tmp_path)


valid_sums = st.integers(0, 5 * CHECKSUM_BLOCK).map(
    lambda size: sums.encode(array("Q", range(-(-size // CHECKSUM_BLOCK))), size)
)


@given(valid_sums, st.data())
def test_a_flipped_bit_of_the_checksums_is_refused(content, data):
    """Any bit, any cut, anything behind: a typed error that names the file."""
    harmed = bytearray(content)
    bit = data.draw(st.integers(0, len(content) * 8 - 1))
    harmed[bit // 8] ^= 1 << bit % 8
    for each in (bytes(harmed), content[: bit // 8], content + b"\0"):
        with pytest.raises(DataDamaged, match="some/sums"):
            sums.decode(each, name="some/sums")
    assert sums.encode(*sums.decode(content, name="x")) == content


@given(st.one_of(st.binary(max_size=120), valid_sums), st.integers(0, 31), st.integers(0, (1 << 64) - 1))
def test_checksums_that_lie_are_refused_without_memory(content, position, word):
    """Any bytes with a right checksum: refused, or exactly what was written."""
    harmed = bytearray(content[:-32])
    harmed[position : position + 8] = struct.pack("<Q", word)
    signed = bytes(harmed) + hashlib.sha256(harmed).digest()
    with suppress(DataDamaged):
        assert sums.encode(*sums.decode(signed, name="some/sums")) == signed
