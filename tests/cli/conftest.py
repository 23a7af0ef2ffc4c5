"""The command line as a process: in pipes, and in a terminal of its own."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path

import pytest
import trio

from tests.cli.platform import KEY, open_platform
from tests.cli.proxy import Proxy

BOUND = 90
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def platform(tmp_path):
    root = tmp_path / "sandbox"
    root.mkdir()
    async with trio.open_nursery() as nursery:
        platform = await open_platform(nursery, root)
        yield platform
        platform.destroy()
        nursery.cancel_scope.cancel()


@pytest.fixture
async def proxy(platform):
    async with trio.open_nursery() as nursery:
        proxy = Proxy(int(platform.url.rpartition(":")[2]))
        await nursery.start(proxy.serve)
        yield proxy
        nursery.cancel_scope.cancel()


@pytest.fixture
def environment(tmp_path):
    """Where nobody has logged in."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("CAPSULE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "TERM": "xterm-256color"}


@pytest.fixture
def environ(environment, platform):
    """With a server and a key."""
    return {**environment, "CAPSULE_URL": platform.url, "CAPSULE_API_KEY": KEY}


@pytest.fixture
def capsule(environ, capsule_without_key):
    """Run `capsule …` to its end: (exit code, stdout, stderr). With `url`: through there."""

    async def run(*arguments, stdin=b"", url=None, env=None):
        return await capsule_without_key(*arguments, stdin=stdin, url=url, env=env or environ)

    return run


@pytest.fixture
def capsule_without_key(environment, tmp_path):
    """The same without a server or a key."""

    async def run(*arguments, stdin=b"", url=None, env=None):
        with trio.fail_after(BOUND):
            ran = await trio.run_process(
                [sys.executable, "-m", "capsule", *arguments],
                env={**(env or environment), **({"CAPSULE_URL": url} if url else {})},
                cwd=tmp_path,
                stdin=stdin,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        assert b"Traceback" not in ran.stderr, ran.stderr.decode()
        return ran.returncode, ran.stdout, ran.stderr.decode()

    return run


class Screen:
    """A terminal with `capsule …` in it: what somebody in front of it sees and types."""

    def __init__(self, arguments, env, cwd, size=(80, 24), program=(sys.executable, "-m", "capsule")):
        self.master, self.slave = pty.openpty()
        self.resize(*size, tell=False)
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [*program, *arguments],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env=env, cwd=cwd,
            preexec_fn=_own_terminal,  # noqa: PLW1509 - no other thread holds what it needs
        )  # fmt: skip
        self.seen = bytearray()
        self.mark = 0

    async def expect(self, text, limit=BOUND):
        """Look at it until `text` appears after what was found last; everything from there to its end."""
        begin = self.mark
        with trio.move_on_after(limit):
            while (at := self.seen.find(text, begin)) < 0:
                begin = max(self.mark, len(self.seen) - len(text))
                await self._look()
            before, self.mark = self.mark, at + len(text)
            return bytes(self.seen[before : self.mark])
        raise AssertionError(f"{text!r} did not come; since the last: {self.seen[self.mark :]!r}")

    async def _look(self):
        await trio.lowlevel.wait_readable(self.master)
        self.seen += os.read(self.master, 65536)

    def type(self, keys):
        os.write(self.master, keys)

    def resize(self, cols, rows, *, tell=True):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
        if tell:
            self.process.send_signal(signal.SIGWINCH)

    async def ended(self):
        """Its exit code; what it has written meanwhile is looked at."""
        with trio.fail_after(BOUND):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_looking)
                code = await trio.to_thread.run_sync(self.process.wait, abandon_on_cancel=True)
                nursery.cancel_scope.cancel()
        with suppress(BlockingIOError):
            os.set_blocking(self.master, False)
            while data := os.read(self.master, 65536):
                self.seen += data
        assert b"Traceback" not in self.seen, self.seen.decode(errors="replace")
        assert b"a bug of ours" not in self.seen, self.seen.decode(errors="replace")
        return code

    async def _keep_looking(self):
        while True:
            await self._look()

    @property
    def mode(self):
        """The terminal's, as termios has it."""
        return termios.tcgetattr(self.slave)

    def hang_up(self):
        """The window is closed."""
        os.close(self.slave)
        os.close(self.master)
        self.slave = self.master = None

    def close(self):
        self.process.kill()
        self.process.wait()
        for fd in (self.master, self.slave):
            if fd is not None:
                os.close(fd)


@pytest.fixture
def screen(environ, tmp_path):
    """Start `capsule …` in a terminal."""
    opened = []

    def start(*arguments, url=None, **how):
        env = {**environ, **({"CAPSULE_URL": url} if url else {})}
        opened.append(Screen(arguments, env, tmp_path, **how))
        return opened[-1]

    yield start
    for one in opened:
        one.close()


def _own_terminal():
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def started(environ, tmp_path):
    """Start `capsule …` with pipes; ended at the end of the test."""
    processes = []

    def start(*arguments, url=None, **pipes):
        env = {**environ, **({"CAPSULE_URL": url} if url else {})}
        words = [sys.executable, "-m", "capsule", *arguments]
        processes.append(subprocess.Popen(words, env=env, cwd=tmp_path, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()


@pytest.fixture
def complete(environment, tmp_path):
    """What the shell offers for a line, as click's protocol has it."""

    async def run(line, url):
        words = line.split(" ")
        asked = {"_CAPSULE_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        with trio.fail_after(BOUND):
            ran = await trio.run_process(
                [sys.executable, "-m", "capsule"],
                env={**environment, **asked, "CAPSULE_URL": url},
                cwd=tmp_path,
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )
        assert ran.stderr == b""
        return ran.stdout.decode()

    return run


@pytest.fixture
def level():
    """Waits until a count stands still for `still` seconds, bounded; the count."""

    async def wait(count, limit=BOUND, still=0.5):
        with trio.fail_after(limit):
            seen, since = count(), trio.current_time()
            while trio.current_time() - since < still:
                await trio.sleep(0.01)
                if seen != (seen := count()):
                    since = trio.current_time()
            return seen

    return wait


@pytest.fixture
def until():
    """Waits for a level, bounded."""

    async def wait(condition, limit=BOUND):
        with trio.fail_after(limit):
            while not condition():
                await trio.sleep(0.01)

    return wait
