"""Real local processes behind the platform's stream protocol: what a sandbox does, as a command line sees it.

As docs/protocol.md has it: 64 KiB of output are kept per process, an attached reader holds the process up, and nobody
does not.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import termios
from collections import deque
from contextlib import suppress

import trio

KEPT = 64 * 1024
PIECE = 4096


class Job:
    """A process with pipes or a terminal."""

    def __init__(self, words, *, size=None, envs=None, cwd=None, detach=False, tag=None):
        self.pty, self.detach = size is not None, detach or size is not None
        self.words = words
        self.kept = deque()  # (offset, channel, data)
        self.end = 0
        self.taken = None  # offset up to which whoever is attached has read; None: nobody is
        self.news = trio.Event()
        self.status = None
        self.sizes = []
        self.holders = 0
        env = {"PATH": os.environ["PATH"], **(envs or {})}
        if self.pty:
            self.stdin, slave = pty.openpty()
            self.resize(*size)
            self.process = subprocess.Popen(
                words,
                stdin=slave,
                stdout=slave,
                stderr=slave,
                env=env,
                cwd=cwd,
                preexec_fn=_own_terminal,  # noqa: PLW1509 - no other thread holds what it needs
            )
            os.close(slave)
            self._sources = {self.stdin: 1}
        else:
            self.process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, cwd=cwd,
                start_new_session=True, bufsize=0,
            )  # fmt: skip
            self.stdin = self.process.stdin.fileno()
            self._sources = {self.process.stdout.fileno(): 1, self.process.stderr.fileno(): 2}
        self.pid = self.process.pid
        self.tag = tag or f"p{self.pid}"

    async def run(self):
        """Its output, then its end."""
        async with trio.open_nursery() as nursery:
            for fd, channel in self._sources.items():
                nursery.start_soon(self._read, fd, channel)
        code = await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)
        self.status = {"exit_code": code} if code >= 0 else {"exit_code": 128 - code, "signal": -code}
        self._tell()

    async def _read(self, fd, channel):
        while True:
            while self.taken is not None and self.end - self.taken > KEPT - PIECE:
                await self.news.wait()
            await trio.lowlevel.wait_readable(fd)
            try:
                data = os.read(fd, PIECE)
            except OSError:  # EIO: the last one has closed the terminal
                return
            if not data:
                return
            self.kept.append((self.end, channel, data))
            self.end += len(data)
            while self.kept[0][0] + len(self.kept[0][2]) <= self.end - KEPT:
                self.kept.popleft()
            self._tell()

    def _tell(self):
        self.news.set()
        self.news = trio.Event()

    def begin(self, offset):
        """Where a replay begins, and how much of it is lost."""
        first = self.kept[0][0] if self.kept else self.end
        if offset is None:
            return first, 0
        return max(first, offset), max(0, first - offset)

    async def output(self, offset, *, observe=False):
        """(channel, bytes) from there on."""
        while True:
            for start, channel, data in list(self.kept):
                if start + len(data) > offset:
                    piece = data[max(0, offset - start) :]
                    offset = start + len(data)
                    if not observe:
                        self.taken = offset
                        self._tell()
                    yield channel, piece
            if offset >= self.end:
                if self.status is not None:
                    return
                await self.news.wait()

    async def write(self, data):
        view = memoryview(data)
        while view:
            await trio.lowlevel.wait_writable(self.stdin)
            try:
                view = view[os.write(self.stdin, view[:PIECE]) :]
            except OSError:
                return

    def close_stdin(self):
        if not self.pty and not self.process.stdin.closed:
            self.process.stdin.close()

    def signal(self, number):
        if self.process.poll() is None:
            with suppress(ProcessLookupError):  # it is just being waited for
                os.killpg(self.pid, number)

    def resize(self, cols, rows):
        self.sizes.append((cols, rows))
        fcntl.ioctl(self.stdin, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def destroy(self):
        self.signal(signal.SIGKILL)
        self.process.wait()
        if self.pty:
            os.close(self.stdin)
        else:
            for file in (self.process.stdin, self.process.stdout, self.process.stderr):
                file.close()


def _own_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
