"""Many generations of a memory become one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from agent.snapshots.blocks import BuildWriter
from agent.snapshots.errors import CompactionStopped
from agent.snapshots.header import NIL, Header, Run
from agent.snapshots.memory import MemoryReader
from agent.snapshots.merge import overlay

CHUNK_BYTES = 1 << 20
"""Read and written at once; between two chunks it can be stopped."""


def rewrite(memory: MemoryReader, writer: BuildWriter, *, should_stop: Callable[[], bool]) -> Header:
    """Copy all of a memory that is not zeros into one build; returns the first generation of that memory.

    Raises CompactionStopped, DataDamaged and what the writer raises.
    """
    runs = _copied(memory, writer, should_stop)
    return overlay(None, runs, memory_bytes=memory.header.memory_bytes, build=writer.build)


def _copied(memory: MemoryReader, writer: BuildWriter, should_stop: Callable[[], bool]) -> Iterator[Run]:
    buffer = memoryview(bytearray(CHUNK_BYTES))
    for offset, length in _chunks(memory.header):
        if should_stop():
            raise CompactionStopped("the compaction of a snapshot was asked to stop")
        part = buffer[:length]
        memory.read_into(offset, part)
        yield Run(offset, length, writer.build, writer.append(part))


def _chunks(header: Header) -> Iterator[tuple[int, int]]:
    """Where the memory is not zeros, in pieces of at most CHUNK_BYTES (offset, length); neighbours go together."""
    begin = end = 0
    for run in header.runs:
        if run.build == NIL:
            continue
        if run.offset > end:
            yield from _pieces(begin, end)
            begin = run.offset
        end = run.offset + run.length
        while end - begin >= CHUNK_BYTES:
            yield begin, CHUNK_BYTES
            begin += CHUNK_BYTES
    yield from _pieces(begin, end)


def _pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    if begin < end:
        yield begin, end - begin
