"""Sandboxes: making them, finding them, and what can be done with one."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

from msgspec import Struct

from capsule.client import processes, terminals
from capsule.client.answers import (
    ExecResult,
    ForkFailure,
    Reconnection,
    SandboxInfo,
    StartedProcess,
    Template,
)
from capsule.client.errors import CommandFailed, output_bytes
from capsule.client.files import TrioFiles
from capsule.client.listing import TrioProcesses, pages
from capsule.client.processes import LiveProcess
from capsule.client.sockets import converted
from capsule.client.terminals import Terminal
from capsule.client.transport import LONG_TIMEOUT, Transport, given, segment

SANDBOXES = "/v1/sandboxes"
EXEC_MARGIN = 60.0
"""Seconds on top of a command's own time-out, for the way there and back."""


class TrioSandboxes:
    """The team's sandboxes."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport

    async def create(
        self,
        template: str = "minimal",
        *,
        vcpus: int | None = None,
        memory_mb: int | None = None,
        timeout_sec: int = 0,
        metadata: Mapping[str, str] | None = None,
        envs: Mapping[str, str] | None = None,
        idempotency_key: str | None = None,
    ) -> TrioSandbox:
        """Make a sandbox; it runs when this returns. `timeout_sec`: idle seconds before it is paused, 0 = never.

        Sent again when the connection is lost, always with one Idempotency-Key (yours, or one of its own): there is one
        sandbox at the end. NotFound (template), Forbidden (a quota), Unavailable (no host has room).
        """
        body = given(
            template=template,
            vcpus=vcpus,
            memory_mb=memory_mb,
            timeout_sec=timeout_sec,
            metadata=dict(metadata or {}),
            envs=dict(envs or {}),
        )
        return TrioSandbox(self._transport, await self._transport.create(SandboxInfo, SANDBOXES, body, idempotency_key))

    async def get(self, sandbox_id: str) -> TrioSandbox:
        """The sandbox with this id (`sb-…`), whatever its status. NotFound."""
        path = f"{SANDBOXES}/{segment(sandbox_id)}"
        return TrioSandbox(self._transport, await self._transport.call(SandboxInfo, "GET", path, again=True))

    async def list(self, *, status: str | Sequence[str] | None = None) -> AsyncIterator[TrioSandbox]:
        """All of them, newest first, fetched page by page; without `status` all but stopped and error."""
        wanted = None if status is None else status if isinstance(status, str) else ",".join(status)
        async for info in pages(self._transport, SandboxInfo, SANDBOXES, given(status=wanted)):
            yield TrioSandbox(self._transport, info)


class TrioSandbox:
    """A sandbox. `info` is as of the last call that brought news of it; `refresh` asks again.

    `files` and `processes`: what is in it. Calls raise InvalidState when its status does not allow them, NotFound
    when it is gone, Unavailable when its host is out of reach.
    """

    def __init__(self, transport: Transport, info: SandboxInfo) -> None:
        self._transport = transport
        self._path = f"{SANDBOXES}/{segment(info.id)}"
        self.info = info
        self.files = TrioFiles(transport, self._path)
        self.processes = TrioProcesses(transport, self._path)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.id} {self.status}>"

    @property
    def id(self) -> str:
        """`sb-` and a UUID."""
        return self.info.id

    @property
    def status(self) -> str:
        """As of `info`."""
        return self.info.status

    async def refresh(self) -> SandboxInfo:
        """Ask for its description again; it is `info`, too."""
        self.info = await self._transport.call(SandboxInfo, "GET", self._path, again=True)
        return self.info

    async def pause(self) -> None:
        """Put it to rest on its host's disk; it is paused when this returns. One that is paused already stays so."""
        await self._turn("pause")

    async def resume(self) -> None:
        """It runs when this returns, with every process where it was."""
        await self._turn("resume")

    async def fork(self, count: int = 1, *, idempotency_key: str | None = None) -> list[TrioSandbox | ForkFailure]:
        """Children that start from its state of this moment, a ForkFailure in the place of each that could not be made;
        it runs on."""
        path = f"{self._path}/fork"
        made = await self._transport.create(_Forked, path, {"count": count}, idempotency_key)
        return [_child(self._transport, item) for item in made.items]

    async def snapshot(
        self, name: str | None = None, *, pause: bool = False, idempotency_key: str | None = None
    ) -> Template:
        """Make a template of its state of this moment (`name` None: one is made up). It runs on unless `pause`."""
        body = given(sandbox_id=self.id, name=name, pause=pause)
        return await self._transport.create(Template, "/v1/snapshots", body, idempotency_key)

    async def delete(self) -> None:
        """Destroy it; nothing if it is gone already."""
        await self._transport.send("DELETE", self._path, again=True, read_timeout=LONG_TIMEOUT)

    async def ping(self) -> None:
        """It is in use: its idle clock starts anew."""
        await self._transport.send("POST", f"{self._path}/ping", again=True)

    async def exec(
        self,
        cmd: str,
        args: Sequence[str] | None = None,
        *,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        timeout_sec: int = 30,
        check: bool = False,
    ) -> ExecResult:
        """Run a command to its end. Without `args`: a line for /bin/sh; with them (even empty): a program.

        Never sent twice: after ConnectionLost it may have run. ExecTimeout and OutputTooLarge come with what was
        printed; CommandFailed for an exit code other than 0, with `check`. `stdin` that is not text, or larger than 1
        MiB, and output of any size: `stream`.
        """
        text = _text(stdin)
        body = given(
            cmd=cmd, args=_list(args), envs=_dict(envs), cwd=cwd, user=user, stdin=text, timeout_sec=timeout_sec
        )
        path, patience = f"{self._path}/exec", timeout_sec + EXEC_MARGIN
        said = await self._transport.call(_Execution, "POST", path, body=body, read_timeout=patience)
        result = ExecResult(
            stdout=output_bytes(said.stdout, said.encoding),
            stderr=output_bytes(said.stderr, said.encoding),
            exit_code=said.exit_code,
            duration_ms=said.duration_ms,
        )
        if check and result.exit_code:
            raise CommandFailed(cmd, result)
        return result

    async def start(
        self,
        cmd: str,
        args: Sequence[str] | None = None,
        *,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        stdin: str | bytes | None = None,
        timeout_sec: int | None = None,
        tag: str | None = None,
    ) -> StartedProcess:
        """Start a command in the background, where nobody sees its output. `tag`: your own name for it.

        To come back to its output, start it with `stream(…, detach=True)` instead."""
        body = given(
            cmd=cmd,
            args=_list(args),
            envs=_dict(envs),
            cwd=cwd,
            user=user,
            stdin=_text(stdin),
            timeout_sec=timeout_sec,
            tag=tag,
        )
        return await self._transport.call(
            StartedProcess, "POST", f"{self._path}/exec", body={**body, "background": True}
        )

    def stream(
        self,
        cmd: str,
        args: Sequence[str] | None = None,
        *,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        timeout_sec: int | None = None,
        detach: bool = False,
        tag: str | None = None,
    ) -> AbstractAsyncContextManager[LiveProcess]:
        """Run a command with its input and output live. Leaving the context kills it; with `detach` it runs on, and
        `attach` comes back to it. `timeout_sec` None: no time-out."""
        start = given(cmd=cmd, args=_list(args), envs=_dict(envs), cwd=cwd, user=user, timeout_sec=timeout_sec, tag=tag)
        return processes.started(self._transport, self._path, {**start, "detach": True} if detach else start)

    def attach(
        self, process: int | str, *, offset: int | None = None, observe: bool = False
    ) -> AbstractAsyncContextManager[LiveProcess]:
        """Come back to a process that was started with `detach`, or to a terminal, by pid or tag; also to one that has
        ended within the last minutes. Leaving detaches. NotFound, InvalidRequest (it was not started so).

        `offset`: how many bytes of its output you have had (`LiveProcess.received`); None: replay what is kept, at most
        64 KiB. `observe`: look on without taking it over from whoever is attached.
        """
        return processes.attached(self._transport, self._path, process, offset=offset, observe=observe)

    def terminal(
        self,
        cmd: str | None = None,
        args: Sequence[str] | None = None,
        *,
        cols: int = 80,
        rows: int = 24,
        envs: Mapping[str, str] | None = None,
        cwd: str | None = None,
        user: str | None = None,
        tag: str | None = None,
        reconnect: bool = False,
        on_reconnect: Callable[[Reconnection], None] | None = None,
    ) -> AbstractAsyncContextManager[Terminal]:
        """A terminal with a command in it; the user's login shell without `cmd`. It lives on when the context is left:
        `kill` ends it, `terminal_attach` comes back.

        `reconnect`: come back by itself when the connection is lost, within about a minute, without losing output (but
        for what the sandbox could not keep); `on_reconnect` hears of it.
        """
        start = given(cmd=cmd, args=_list(args), envs=_dict(envs), cwd=cwd, user=user, cols=cols, rows=rows, tag=tag)
        first = {"type": "start", **start}
        return terminals.opened(self._transport, self._path, first, reconnect=reconnect, on_reconnect=on_reconnect)

    def terminal_attach(
        self,
        tag: str,
        *,
        offset: int | None = None,
        cols: int | None = None,
        rows: int | None = None,
        reconnect: bool = False,
        on_reconnect: Callable[[Reconnection], None] | None = None,
    ) -> AbstractAsyncContextManager[Terminal]:
        """Come back to a terminal. `offset`: output bytes that you have had (`Terminal.received`); None: replay what is
        kept. NotFound when it has ended long ago."""
        first = {"type": "connect", **given(tag=tag, offset=offset, cols=cols, rows=rows)}
        return terminals.opened(self._transport, self._path, first, reconnect=reconnect, on_reconnect=on_reconnect)

    async def _turn(self, action: Literal["pause", "resume"]) -> None:
        path = f"{self._path}/{action}"
        self.info = await self._transport.call(SandboxInfo, "POST", path, again=True, read_timeout=LONG_TIMEOUT)


class _Execution(Struct):
    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    encoding: str


class _Forked(Struct):
    items: list[dict[str, Any]]


def _child(transport: Transport, item: dict[str, Any]) -> TrioSandbox | ForkFailure:
    if "error" in item:
        return converted(item["error"], ForkFailure)
    return TrioSandbox(transport, converted(item, SandboxInfo))


def _text(stdin: str | bytes | None) -> str | None:
    """What exec can carry. ValueError for bytes that are not UTF-8, or have NULs."""
    try:
        text = stdin.decode() if isinstance(stdin, bytes) else stdin
    except UnicodeDecodeError:
        text = "\0"
    if text is not None and "\0" in text:
        raise ValueError("stdin: exec takes text without NULs; use stream() and send() for bytes")
    return text


def _list(args: Sequence[str] | None) -> list[str] | None:
    return None if args is None else list(args)


def _dict(envs: Mapping[str, str] | None) -> dict[str, str] | None:
    return dict(envs) if envs else None
