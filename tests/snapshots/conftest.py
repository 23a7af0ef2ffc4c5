"""Memory of another process, armed as a VMM's is, on this machine's kernel."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from agent.snapshots import pagemap
from agent.snapshots.blocks import BuildWriter
from agent.snapshots.capture import CaptureResult, capture
from agent.snapshots.memory import MemoryReader
from agent.snapshots.memory_file import data_within

PROGRAM = Path(__file__).with_name("process_with_memory.py")
PAGE = 4096

UFFDIO_COPY = 0xC028AA03
UFFDIO_WAKE = 0x8010AA02
UFFDIO_COPY_MODE_WP = 2
UFFD_MESSAGE = struct.Struct("<B7xQQ8x")
"""struct uffd_msg: the event; of a page fault flags and address, of a removal start and end."""
UFFD_EVENT_PAGEFAULT = 0x12
UFFD_EVENT_REMOVE = 0x15
MISSING, WP = 1, 2
FEATURES_MISSING = 1 << 5 | 1 << 3
"""UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_EVENT_REMOVE."""
FEATURES_WP = 1 << 15 | 1 << 13 | 1 << 12
"""UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_UNPOPULATED, UFFD_FEATURE_WP_HUGETLBFS_SHMEM."""

CHUNK = 16 * PAGE

SECONDS_TO_ANSWER = 20


@dataclass(frozen=True)
class Memory:
    """What agent.vmm.driver calls GuestMemory."""

    pid: int
    address: int
    size: int
    fd: int


@dataclass
class MemoryProcess:
    """A process with memory, this test's model of what it must have, and the pager that serves it from `parent`."""

    size: int
    parent: bytes | None = None
    modes: int = 0
    whole: bool = True
    served: list[int] = field(default_factory=list)
    _undo: ExitStack = field(default_factory=ExitStack)
    _noted: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    removed: list[tuple[int, int]] = field(default_factory=list)

    def start(self) -> None:
        """Start the process; `stop` it in any case."""
        undo = self._undo
        descriptor = os.memfd_create("guest")
        undo.callback(os.close, descriptor)
        os.ftruncate(descriptor, self.size)
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        undo.callback(here.close)
        features = (FEATURES_WP if self.modes & WP else 0) | (FEATURES_MISSING if self.modes & MISSING else 0)
        numbers = (descriptor, there.fileno(), self.modes, features, int(self.whole and bool(self.modes & WP)))
        with there:
            command = [sys.executable, "-I", "-S", str(PROGRAM), *map(str, numbers)]
            process = subprocess.Popen(command, pass_fds=numbers[:2])
        undo.callback(process.wait, SECONDS_TO_ANSWER)
        undo.callback(process.kill)
        here.settimeout(SECONDS_TO_ANSWER)
        self._link = here
        answer, files, _, _ = socket.recv_fds(here, 4096, 1)
        reading = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
        undo.callback(os.close, reading)
        self.memory = Memory(process.pid, json.loads(answer), self.size, reading)
        self.writable = descriptor
        self.model = bytearray(self.parent or bytes(self.size))
        self._source = ctypes.create_string_buffer(self.parent or bytes(self.size), self.size)
        self._blank = ctypes.create_string_buffer(PAGE)
        self._zeros = ctypes.addressof(self._blank)
        if files and self.modes & MISSING:
            self._serve_until_stopped(files[0])
        elif files:
            undo.callback(os.close, files[0])

    def stop(self) -> None:
        """End everything."""
        self._undo.close()

    def do(self, operation: str, offset: int, length: int, byte: int = 0) -> list[int] | None:
        """Let the process do it, and keep the model. A wrong or hanging answer of the memory fails the test."""
        part = slice(offset, offset + length)
        if operation in {"remove", "forget"}:
            self._forget(operation, part)
        answer: list[int] | None = self.ask(operation, offset, length, byte)
        if operation in {"remove", "forget"} and self.modes & MISSING:
            assert self._noted.acquire(timeout=SECONDS_TO_ANSWER)
        if operation == "read":
            assert answer == list(self.model[part][::PAGE])
        elif operation not in {"remove", "forget"}:
            self.model[part] = bytes([byte]) * length
        return answer

    def ask(self, *order: object) -> Any:
        """Send an order and wait for its answer."""
        self._link.send(json.dumps(order).encode())
        return json.loads(self._link.recv(1 << 20))

    @contextmanager
    def storm(self, turns: int = 200) -> Iterator[None]:
        """Let the process write every page again and again meanwhile, `turns` times at least; no model follows."""
        over = threading.Event()

        def write() -> None:
            self.ask("storm", 0, self.size, turns)
            while not over.is_set():
                self.ask("storm", 0, self.size, turns)

        thread = threading.Thread(target=write)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _forget(self, operation: str, part: slice) -> None:
        """Removed pages are zeros. Forgotten ones stay if there are any, else nobody can tell the two apart."""
        there = {
            page
            for offset, length in data_within(self.memory.fd, [(0, self.size)])
            for page in range(offset, offset + length, PAGE)
        }
        for page in range(part.start, part.stop, PAGE):
            if operation == "remove" or (page not in there and self.modes & MISSING):
                self.model[page : page + PAGE] = bytes(PAGE)

    def blocks(self) -> int:
        """512-byte blocks the memory takes."""
        return os.fstat(self.memory.fd).st_blocks

    def changed(self, parent: bytes) -> set[int]:
        """Pages of the model that differ from `parent`'s."""
        return {at for at in range(0, self.size, PAGE) if self.model[at : at + PAGE] != parent[at : at + PAGE]}

    def _serve_until_stopped(self, uffd: int) -> None:
        stop, stopped = os.pipe()
        thread = threading.Thread(target=self._serve, args=(uffd, stop), daemon=True)
        thread.start()
        self._undo.callback(lambda: (os.close(stopped), thread.join(SECONDS_TO_ANSWER), os.close(stop), os.close(uffd)))

    def _serve(self, uffd: int, stop: int) -> None:
        while True:
            ready, _, _ = select.select([uffd, stop], [], [])
            if stop in ready:
                return
            event, first, second = UFFD_MESSAGE.unpack(os.read(uffd, UFFD_MESSAGE.size))
            if event == UFFD_EVENT_PAGEFAULT:
                self._fault(uffd, second - self.memory.address)
            elif event == UFFD_EVENT_REMOVE:
                self.removed.append((first - self.memory.address, second - first))
                self._noted.release()

    def _fault(self, uffd: int, offset: int) -> None:
        """Bring the page's neighbours, then the page, write-protected; zeros for what was removed."""
        first, wanted = offset // CHUNK * CHUNK, offset // PAGE * PAGE
        for page in sorted(range(first, min(first + CHUNK, self.size), PAGE), key=wanted.__eq__):
            gone = any(start <= page < start + length for start, length in self.removed)
            source = self._zeros if gone else ctypes.addressof(self._source) + page
            order = struct.pack("<QQQQq", self.memory.address + page, source, PAGE, UFFDIO_COPY_MODE_WP, 0)
            try:
                fcntl.ioctl(uffd, UFFDIO_COPY, bytearray(order))
                self.served.append(page)
            except FileExistsError:
                continue
        wake = struct.pack("<QQ", self.memory.address + wanted, PAGE)
        fcntl.ioctl(uffd, UFFDIO_WAKE, bytearray(wake))


@pytest.fixture
def run_with_memory() -> Iterator[Callable[..., MemoryProcess]]:
    """Starts processes with memory, demand-paged from `parent` if there is one."""
    with ExitStack() as undo:

        def run(size: int = 0, parent: bytes | None = None, **more) -> MemoryProcess:
            if parent is not None and not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
                pytest.skip("/dev/userfaultfd is not there or not ours to use")
            modes = (MISSING if parent is not None else 0) | (WP if can_track() else 0)
            process = MemoryProcess(size or len(parent or b""), parent, **{"modes": modes} | more)
            undo.callback(process.stop)
            process.start()
            return process

        yield run


@functools.cache
def why_not_tracked() -> str:
    """Why this kernel cannot tell written pages; empty if it can."""
    if not os.access("/dev/userfaultfd", os.R_OK | os.W_OK):
        return "/dev/userfaultfd is not there or not ours to use"
    process = MemoryProcess(PAGE, modes=WP)
    try:
        process.start()
        pagemap.written(process.memory.pid, [pagemap.Mapping(process.memory.address, PAGE)])
    except pagemap.ScanUnsupported as error:
        return str(error)
    except ValueError:
        return "the kernel has no asynchronous write protection"
    finally:
        process.stop()
    return ""


def can_track() -> bool:
    return not why_not_tracked()


@pytest.fixture
def tracking() -> None:
    """Skips where the kernel cannot tell written pages."""
    if reason := why_not_tracked():
        pytest.skip(reason)


@pytest.fixture
def no_scan(monkeypatch) -> None:
    """A kernel before 6.7: files of pagemap have no ioctl."""
    real = fcntl.ioctl

    def ioctl(descriptor: int, request: int, *arguments: Any) -> int:
        if request == pagemap._PAGEMAP_SCAN:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        return real(descriptor, request, *arguments)

    monkeypatch.setattr(fcntl, "ioctl", ioctl)


@dataclass
class Generations:
    """Makes generations of a memory in a directory of builds, and reads them back."""

    builds: Path
    undo: ExitStack
    reader: MemoryReader | None = None

    def first(self, content: bytes) -> MemoryReader:
        """The generation that a restored VM starts from."""
        self.reader = None
        source = os.memfd_create("image")
        try:
            os.write(source, content)
            self.take(source, [(0, len(content))], len(content))
        finally:
            os.close(source)
        assert self.reader is not None
        return self.reader

    def take(self, source: int, ranges: list[tuple[int, int]], size: int, *, compare: bool = True) -> CaptureResult:
        """Capture a generation over the last one, which it follows."""
        result = self.attempt(source, ranges, size, compare=compare)
        self.follow(result)
        return result

    def attempt(self, source: int, ranges: list[tuple[int, int]], size: int, *, compare: bool = True) -> CaptureResult:
        """Capture a generation over the last one."""
        parent = self.reader
        writer = BuildWriter(self.builds / str(uuid4()))
        self.undo.callback(writer.close)
        header = parent.header if parent else None
        result = capture(source, ranges, parent if compare else None, header, writer, size)
        writer.finish()
        return result

    def follow(self, result: CaptureResult) -> None:
        """Let the next generation come after this one."""
        self.reader = MemoryReader(result.header, self.builds)
        self.undo.callback(self.reader.close)

    def content(self, result: CaptureResult) -> bytes:
        """The whole memory of a generation."""
        with MemoryReader(result.header, self.builds) as reader:
            return reader.read(0, result.header.memory_bytes)


@pytest.fixture
def generations(tmp_path) -> Iterator[Generations]:
    """None yet."""
    with ExitStack() as undo:
        yield Generations(tmp_path, undo)
