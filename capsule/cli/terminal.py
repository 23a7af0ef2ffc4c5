"""A remote terminal shown in the local one, for as long as it takes: through resizes, lost connections, closed windows.

The output is counted by what the local terminal has taken. After a lost connection the sandbox is asked for what comes
after that, so nothing is shown twice, and what it no longer has is said to be missing.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass, field
from typing import TypeAlias

import trio

from capsule.cli import stdio
from capsule.cli.escapes import Action, Escapes
from capsule.cli.failures import BROKEN_PIPE, OWN_FAILURE
from capsule.cli.local_terminal import LEAVE_MODES, LocalTerminal
from capsule.cli.patience import Patience, is_loss
from capsule.cli.signalling import heeded
from capsule.client import CapsuleError, Terminal, TrioSandbox

Opening: TypeAlias = AbstractAsyncContextManager[Terminal]

INTERRUPT = 0x03
INTERRUPTS_TO_GIVE_UP = 3
HANGUPS = ("SIGHUP", "SIGTERM", "SIGINT")
"""Of us, from outside: Ctrl-C is a key as any other in a raw terminal."""
HANGUP_GRACE = 2.0
"""Seconds that a shell has after SIGHUP; then it is killed."""
LAST_WORDS = 1.0
"""Seconds that the local terminal has to take what we say at the end."""
KEYS_AHEAD = 16
"""Pieces of input that wait while the remote side takes none; our own keys are seen behind them."""
HELP = (
    "Keys at the start of a line:  ~.  leave, the process runs on    ~?  this    ~~  a tilde\r\n"
    "While the connection is lost: Ctrl-C three times gives up."
)


@dataclass(slots=True)
class End:
    """Why a session is over, and the exit code that says so. `hang_up`: the remote process shall not live on."""

    code: int
    message: str = ""
    hang_up: bool = False


@dataclass(slots=True)
class Session:
    """Shows `terminal`s of one remote process. `owned`: it is ended when our own terminal goes; else it is left.

    Owns: the local terminal's mode. Owned by: its command. Dies when: the process ends, the user leaves, our terminal
    goes, the connection is given up.
    """

    sandbox: TrioSandbox
    attach: Callable[[str, int, int, int], Opening]
    """From tag, offset, columns and rows."""
    owned: bool
    local: LocalTerminal = field(default_factory=LocalTerminal)
    escapes: Escapes = field(default_factory=Escapes)
    patience: Patience = field(default_factory=Patience)
    _terminal: Terminal | None = None
    _tag: str = ""
    _shown: int = 0
    _deaf: bool = False
    _end: End | None = None
    _scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    _over: trio.Event = field(default_factory=trio.Event)
    _ending: trio.Event = field(default_factory=trio.Event)
    _resized: trio.Event = field(default_factory=trio.Event)

    async def run(self, opening: Opening) -> End:
        """Until it is over. What is wrong with the first connection is raised, the rest is in the answer."""
        keys, typed = trio.open_memory_channel[bytes](KEYS_AHEAD)
        async with trio.open_nursery() as nursery, opening as terminal:
            self._connected(terminal)
            await nursery.start(self._watch_signals)  # before: a signal must not end us in raw mode
            with ExitStack() as restored:
                restored.enter_context(self.local.raw())
                nursery.start_soon(self._watch_keys, keys)
                nursery.start_soon(self._send_keys, typed)
                nursery.start_soon(self._keep_size)
                nursery.start_soon(self._hang_up_when_asked)
                with self._scope:
                    await self._show_until_over(terminal)
                nursery.cancel_scope.cancel()
                end = self._end or End(OWN_FAILURE, "the terminal ended without a reason")
                await self._last_words(end)
        return end

    # output

    async def _show_until_over(self, terminal: Terminal) -> None:
        try:
            await self._show(terminal)
        except CapsuleError as error:
            lost = error
        else:
            return
        while await self._may_try_again(lost):
            try:
                async with self.attach(self._tag, self._shown, *self.local.size()) as again:
                    self._connected(again)
                    await self._note("connected again" + _missing(again))
                    await self._show(again)
                    return
            except CapsuleError as error:
                lost = error

    async def _show(self, terminal: Terminal) -> None:
        async for data in terminal:
            await self._write(data)
            self._shown += len(data)
        status = await terminal.wait()
        self._finish(End(status.exit_code))

    async def _write(self, data: bytes) -> None:
        """What our terminal no longer takes is dropped: the remote process has to end first."""
        if self._deaf:
            return
        try:
            await stdio.write_all(self.local.output, data)
        except OSError as error:
            self._deaf = True
            gone = isinstance(error, BrokenPipeError)
            self._ask_for_end(End(BROKEN_PIPE if gone else OWN_FAILURE, "" if gone else f"output: {error.strerror}"))

    def _connected(self, terminal: Terminal) -> None:
        self._terminal, self._tag, self._shown = terminal, terminal.tag, terminal.received
        self.patience.restored()

    async def _may_try_again(self, lost: CapsuleError) -> bool:
        first = self._terminal is not None
        self._terminal = None
        if not is_loss(lost):
            self._finish(End(OWN_FAILURE, f"{lost}{self._way_back()}"))
            return False
        if self._ending.is_set():  # our own terminal is going: nobody would look
            await trio.sleep_forever()
        if first:
            await self._note(f"{lost}; trying again (Ctrl-C three times, or ~. gives up; keys are not kept)")
        if await self.patience.wait():
            return True
        self._finish(End(OWN_FAILURE, f"{lost}; given up{self._way_back()}"))
        return False

    # input

    async def _watch_keys(self, keys: trio.MemorySendChannel[bytes]) -> None:
        interrupts = 0
        with contextlib.suppress(OSError):  # EIO: our terminal has gone
            async for typed in stdio.chunks(self.local.input):
                passed, actions = self.escapes.feed(typed)
                connected = self._terminal is not None
                interrupts = 0 if connected else interrupts + typed.count(INTERRUPT)
                if passed and connected:
                    await keys.send(passed)
                for action in actions:
                    await self._act(action)
                if interrupts >= INTERRUPTS_TO_GIVE_UP:
                    self._finish(End(OWN_FAILURE, f"given up{self._way_back()}"))
        self._deaf = True
        self._ask_for_end(End(128 + signal.SIGHUP))

    async def _act(self, action: Action) -> None:
        if action is Action.HELP:
            await self._note(HELP)
        elif self._terminal is None:
            self._finish(End(OWN_FAILURE, f"given up{self._way_back()}"))
        else:
            self._finish(End(0, f"left{self._way_back()}"))

    async def _send_keys(self, typed: trio.MemoryReceiveChannel[bytes]) -> None:
        async for keys in typed:
            if self._terminal is not None:
                with contextlib.suppress(CapsuleError, trio.ClosedResourceError):  # whoever reads the output hears it
                    await self._terminal.send(keys)

    # signals

    async def _watch_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        hangups = heeded(*HANGUPS)
        with trio.open_signal_receiver(signal.SIGWINCH, signal.SIGCONT, *hangups) as signals:
            self._resized.set()  # it may have changed while we connected
            task_status.started()
            async for number in signals:
                if number in hangups:
                    self._deaf = self._deaf or number == signal.SIGHUP
                    self._ask_for_end(End(128 + number))
                    continue
                if number == signal.SIGCONT:
                    self.local.raw_again()
                self._resized.set()

    async def _keep_size(self) -> None:
        """Of many changes the last one counts."""
        while True:
            await self._resized.wait()
            self._resized = trio.Event()
            if self._terminal is not None:
                with contextlib.suppress(CapsuleError, trio.ClosedResourceError):
                    await self._terminal.resize(*self.local.size())

    # ends

    def _finish(self, end: End) -> None:
        self._end = self._end or end
        self._over.set()
        self._scope.cancel()

    def _ask_for_end(self, end: End) -> None:
        """Our side goes; with it the process, if it is ours."""
        if self.owned:
            self._end = self._end or end
            self._ending.set()
        else:
            end.message = end.message or f"left{self._way_back()}"
            self._finish(end)

    async def _hang_up_when_asked(self) -> None:
        """As a terminal that goes does: SIGHUP; and SIGKILL for a process that stays. Not through the stream, which may
        be lost, or stand still because the process reads nothing."""
        await self._ending.wait()
        for name in ("SIGHUP", "SIGKILL"):
            with trio.move_on_after(HANGUP_GRACE), contextlib.suppress(CapsuleError):
                await self.sandbox.processes.signal(self._tag, name)
                await self._over.wait()
        self._finish(End(OWN_FAILURE))

    def _way_back(self) -> str:
        return f"; `capsule attach {self.sandbox.id} {self._tag}` comes back to it"

    async def _note(self, text: str) -> None:
        """A line of ours between the remote ones. A terminal in raw mode needs both characters."""
        with trio.move_on_after(LAST_WORDS), contextlib.suppress(OSError):
            await stdio.write_all(stdio.STDERR, f"\r\ncapsule: {_printable(text)}\r\n".encode())

    async def _last_words(self, end: End) -> None:
        """A full-screen program that was cut off left the terminal in its own modes."""
        cut_off = end.code == OWN_FAILURE or bool(end.message) or self._ending.is_set()
        if cut_off and stdio.is_terminal(self.local.output):
            with trio.move_on_after(LAST_WORDS, shield=True), contextlib.suppress(OSError):
                await stdio.write_all(self.local.output, LEAVE_MODES)


def _missing(terminal: Terminal) -> str:
    return f"; {terminal.skipped} bytes of output were lost" if terminal.skipped else ""


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() or letter in "\r\n" else "\ufffd" for letter in text)
