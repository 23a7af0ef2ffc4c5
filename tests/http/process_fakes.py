"""A process in memory, for the tests of the streams over HTTP."""

from __future__ import annotations

import trio

from capsule.model import ProcessExit


class FakeProcess:
    """A process that a test plays: `say` makes it print, `finish` ends it. `reads` unset: it does not read.
    `control_delay`: seconds until a signal is delivered; `asked`: one is under way."""

    def __init__(self, call=None, *, pid=42, tag="p42", terminal=False, offset=0, skipped=0, replay=0):
        self.call = call
        self.pid, self.tag, self.terminal, self.offset, self.skipped = pid, tag, terminal, offset, skipped
        self.replay, self.ended = replay, False
        self.received = bytearray()
        self.input_ended = False
        self.signals = []
        self.asked = False
        self.control_delay = 0.0
        self.sizes = []
        self.left = trio.Event()
        self.reads = trio.Event()
        self.reads.set()
        self.result = ProcessExit(exit_code=0, duration_ms=3)
        self._say, self._said = trio.open_memory_channel(0)

    async def say(self, data, channel=1):
        """Print; waits until it was taken."""
        await self._say.send((channel, data))

    def fail(self, error):
        """The stream breaks."""
        self._say.send_nowait(error)

    def finish(self, **how):
        self.result = ProcessExit(**{"exit_code": 0, "duration_ms": 3, **how})
        self._say.close()

    async def send(self, data):
        await self.reads.wait()
        await trio.lowlevel.checkpoint()
        self.received += data

    async def end(self):
        await self.reads.wait()
        self.input_ended = True

    def __aiter__(self):
        return self

    async def __anext__(self):
        said = await self._said.__anext__()
        if isinstance(said, Exception):
            raise said
        return said

    async def exit(self):
        await trio.lowlevel.checkpoint()
        return self.result

    async def signal(self, number):
        self.asked = True
        await trio.sleep(self.control_delay)
        self.signals.append(number)
        if number == 9:
            self.finish(exit_code=137, signal=9)

    async def resize(self, size):
        await trio.lowlevel.checkpoint()
        self.sizes.append((size.cols, size.rows))
