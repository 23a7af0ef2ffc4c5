"""The client for plain code: the Trio client behind methods that wait. What they do, raise and take is written
there."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from capsule.client.answers import Chunk, ExitStatus, FileEvent, ForkFailure, SandboxInfo
from capsule.client.blocking import Facade, Iterable, Portal, as_it_is, entering, iterating, waiting, waiting_as
from capsule.client.files import TrioFiles
from capsule.client.listing import TrioProcesses
from capsule.client.processes import LiveProcess
from capsule.client.sandboxes import TrioSandbox, TrioSandboxes
from capsule.client.templates import TrioApiKeys, TrioTemplates
from capsule.client.terminals import Terminal
from capsule.client.trio_client import TrioClient
from capsule.client.watches import Watch


class BlockingProcess(Iterable[LiveProcess, Chunk]):
    """A process that you are attached to: `for chunk in process`, `send`, `wait`; any thread may send and signal."""

    send = waiting(LiveProcess.send)
    end = waiting(LiveProcess.end)
    signal = waiting(LiveProcess.signal)
    stop = waiting(LiveProcess.stop)
    resize = waiting(LiveProcess.resize)
    wait = waiting(LiveProcess.wait)

    @property
    def pid(self) -> int:
        """In the sandbox."""
        return self._inner.pid

    @property
    def tag(self) -> str | None:
        """Yours, or a made-up one."""
        return self._inner.tag

    @property
    def received(self) -> int:
        """Bytes of output, from its beginning, that you have had; give it to `attach` as `offset`."""
        return self._inner.received

    @property
    def skipped(self) -> int:
        """Bytes of output that you asked for and that are kept no more."""
        return self._inner.skipped

    @property
    def replay(self) -> int:
        """Bytes of output that had been written before you attached."""
        return self._inner.replay

    @property
    def ended(self) -> bool:
        """It had ended when you attached."""
        return self._inner.ended

    @property
    def exit(self) -> ExitStatus | None:
        """How it ended, when the output has been read to its end."""
        return self._inner.exit


class BlockingTerminal(Iterable[Terminal, bytes]):
    """A terminal that you are attached to: `for data in terminal`, `send`, `resize`, `wait`; any thread may send."""

    send = waiting(Terminal.send)
    resize = waiting(Terminal.resize)
    kill = waiting(Terminal.kill)
    wait = waiting(Terminal.wait)

    @property
    def pid(self) -> int:
        """In the sandbox."""
        return self._inner.pid

    @property
    def tag(self) -> str:
        """For `terminal_attach`."""
        return self._inner.tag

    @property
    def received(self) -> int:
        """Bytes of output, from its beginning, that you have had; give it to `terminal_attach` as `offset`."""
        return self._inner.received

    @property
    def skipped(self) -> int:
        """Bytes of output that you asked for and that are kept no more."""
        return self._inner.skipped

    @property
    def exit(self) -> ExitStatus | None:
        """How it ended, when the output has been read to its end."""
        return self._inner.exit


class BlockingWatch(Iterable[Watch, FileEvent]):
    """What happens to a file or directory: `for event in watch`."""


class Files(Facade[TrioFiles]):
    """The files of a sandbox. Callbacks of progress are called in the client's thread: they must be quick."""

    read = waiting(TrioFiles.read)
    write = waiting(TrioFiles.write)
    upload = waiting(TrioFiles.upload)
    download = waiting(TrioFiles.download)
    upload_dir = waiting(TrioFiles.upload_dir)
    download_dir = waiting(TrioFiles.download_dir)
    list = waiting(TrioFiles.list)
    mkdir = waiting(TrioFiles.mkdir)
    remove = waiting(TrioFiles.remove)
    watch = entering(TrioFiles.watch, BlockingWatch)


class Processes(Facade[TrioProcesses]):
    """What exec and streams have started in a sandbox and still runs."""

    list = waiting(TrioProcesses.list)
    signal = waiting(TrioProcesses.signal)


def _children(portal: Portal, made: list[TrioSandbox | ForkFailure]) -> list[Sandbox | ForkFailure]:
    return [child if isinstance(child, ForkFailure) else Sandbox(portal, child) for child in made]


class Sandbox(Facade[TrioSandbox]):
    """A sandbox. `info` is as of the last call that brought news of it; `refresh` asks again."""

    def __init__(self, portal: Portal, inner: TrioSandbox) -> None:
        super().__init__(portal, inner)
        self.files = Files(portal, inner.files)
        self.processes = Processes(portal, inner.processes)

    @property
    def id(self) -> str:
        """`sb-` and a UUID."""
        return self._inner.id

    @property
    def status(self) -> str:
        """As of `info`."""
        return self._inner.status

    @property
    def info(self) -> SandboxInfo:
        """Its description."""
        return self._inner.info

    refresh = waiting(TrioSandbox.refresh)
    pause = waiting(TrioSandbox.pause)
    resume = waiting(TrioSandbox.resume)
    fork = waiting_as(TrioSandbox.fork, _children)
    snapshot = waiting(TrioSandbox.snapshot)
    delete = waiting(TrioSandbox.delete)
    ping = waiting(TrioSandbox.ping)
    exec = waiting(TrioSandbox.exec)
    start = waiting(TrioSandbox.start)
    stream = entering(TrioSandbox.stream, BlockingProcess)
    attach = entering(TrioSandbox.attach, BlockingProcess)
    terminal = entering(TrioSandbox.terminal, BlockingTerminal)
    terminal_attach = entering(TrioSandbox.terminal_attach, BlockingTerminal)


class Sandboxes(Facade[TrioSandboxes]):
    """The team's sandboxes."""

    create = waiting_as(TrioSandboxes.create, Sandbox)
    get = waiting_as(TrioSandboxes.get, Sandbox)
    list = iterating(TrioSandboxes.list, Sandbox)


class Templates(Facade[TrioTemplates]):
    """What sandboxes start from: the platform's, and your team's snapshots."""

    create = waiting(TrioTemplates.create)
    list = iterating(TrioTemplates.list, as_it_is)
    delete = waiting(TrioTemplates.delete)


class ApiKeys(Facade[TrioApiKeys]):
    """The team's API keys. For a user's session (`Client(token=…)`): keys make no keys."""

    create = waiting(TrioApiKeys.create)
    list = iterating(TrioApiKeys.list, as_it_is)
    delete = waiting(TrioApiKeys.delete)


class Client(Facade[TrioClient]):
    """A server, and who asks it, for programs without async/await; from any number of threads. Close it, or use it as a
    context manager: it has a thread of its own, which ends with it.

    `url`, and `api_key` or `token` (of a user's session): what is None comes from CAPSULE_URL and CAPSULE_API_KEY, then
    from the file that `capsule login` writes. ConfigurationError when no URL is found; when there is no credential, at
    the first call that needs one.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, token: str | None = None) -> None:
        inner = TrioClient(url, api_key, token)
        super().__init__(Portal(), inner)
        self.sandboxes = Sandboxes(self._portal, inner.sandboxes)
        self.templates = Templates(self._portal, inner.templates)
        self.api_keys = ApiKeys(self._portal, inner.api_keys)

    @property
    def url(self) -> str:
        """The server's."""
        return self._inner.url

    login = waiting(TrioClient.login)

    def close(self) -> None:
        """End what is under way, its connections and its thread. Once more: nothing."""
        self._portal.close(self._inner.aclose)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, failure: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
