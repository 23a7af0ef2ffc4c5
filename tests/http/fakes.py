"""Services that live in memory, for the tests of the HTTP layer. Loaded by conftest.py, never imported.

`failures[method]` makes a method raise; `gates[method]` makes it wait. What was asked is kept in `asked`.
"""

from __future__ import annotations

import hashlib
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import trio

from capsule import errors
from capsule.http.people_ports import PeopleServices
from capsule.model import (
    ExecResult,
    ExecStarted,
    FileContent,
    FileEntry,
    ForkFailure,
    HostCredentials,
    HostView,
    Page,
    Position,
    ProcessView,
    SandboxView,
    TemplateView,
)
from capsule.principals import Principal
from tests.http.process_fakes import FakeProcess

KEY = "cap_" + "0123456789abcdef" * 2 + "01234567"
TEAM = UUID(int=7)
START = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
STEP = timedelta(microseconds=1)


class Faulty:
    def __init__(self):
        self.failures = {}
        self.gates = {}
        self.asked = []
        self.cancelled = []

    async def _enter(self, method, *arguments):
        self.asked.append((method, arguments))
        await trio.lowlevel.checkpoint()
        if method in self.gates:
            try:
                await self.gates[method].wait()
            except trio.Cancelled:
                self.cancelled.append(method)
                raise
        if method in self.failures:
            raise self.failures[method]


def nobody():
    """Services of capsule.people that refuse everything."""
    return PeopleServices(**dict.fromkeys(PeopleServices.__slots__, Nobody()))


class FakeAuthenticator(Faulty):
    async def api_key(self, key):
        await self._enter("api_key", key)
        if key != KEY:
            raise errors.Unauthorized("This API key is unknown or revoked.")
        return Principal(team_id=TEAM, actor_type="api_key", actor_id=UUID(int=8), actor_name="test")

    async def session(self, token):
        await self._enter("session", token)
        raise errors.Unauthorized("The session's token is not valid.")


class Nobody:
    """Stands in for the services of capsule.people, which are tested over a real database."""

    def __getattr__(self, name):
        async def refuse(*_arguments, **_named):
            await trio.lowlevel.checkpoint()
            raise errors.NotFound("There is nobody here.")

        return refuse


class FakeSandboxes(Faulty):
    def __init__(self):
        super().__init__()
        self.sandboxes = {}
        self.files = {}
        self.directories = {"/"}
        self.result = ExecResult(stdout=b"hi\n", stderr=b"", exit_code=0, duration_ms=3)
        self.running = []
        self.chunks = None
        self.announced = ...
        self.received = trio.Event()

    def add(self, status="running", **fields):
        moment = START + STEP * len(self.sandboxes)
        view = SandboxView(
            id=fields.pop("id", None) or uuid4(),
            status=status,
            template="minimal",
            vcpus=1,
            memory_mb=512,
            disk_mb=1024,
            timeout_sec=0,
            created_at=moment,
            last_updated=moment,
            **fields,
        )
        self.sandboxes[view.id] = view
        return view

    def _find(self, sandbox):
        if sandbox not in self.sandboxes:
            raise errors.NotFound("There is no such sandbox.")
        return self.sandboxes[sandbox]

    async def create(self, principal, request, idempotency_key):
        await self._enter("create", principal, request, idempotency_key)
        if request.template != "minimal":
            raise errors.NotFound("There is no such template.")
        return self.add(metadata=request.metadata, started_at=START, host_ip="10.11.0.1", host_id=UUID(int=5))

    async def list(self, principal, statuses, limit, before):
        await self._enter("list", principal, statuses, limit, before)
        rows = sorted(self.sandboxes.values(), key=lambda row: (row.created_at, row.id), reverse=True)
        wanted = [row for row in rows if row.status in (statuses or {"running", "paused"})]
        if before is not None:
            wanted = [row for row in wanted if (row.created_at, row.id) < (before.created_at, before.id)]
        page = wanted[:limit]
        more = len(wanted) > limit
        return Page(tuple(page), Position(page[-1].created_at, page[-1].id) if more else None)

    async def get(self, principal, sandbox):
        await self._enter("get", principal, sandbox)
        return self._find(sandbox)

    async def destroy(self, principal, sandbox):
        await self._enter("destroy", principal, sandbox)
        self._find(sandbox)

    async def pause(self, principal, sandbox):
        await self._enter("pause", principal, sandbox)
        return replace(self._find(sandbox), status="paused", host_ip=None)

    async def resume(self, principal, sandbox):
        await self._enter("resume", principal, sandbox)
        return replace(self._find(sandbox), status="running")

    async def fork(self, principal, sandbox, count, idempotency_key):
        await self._enter("fork", principal, sandbox, count, idempotency_key)
        source = self._find(sandbox)
        children = [replace(source, id=uuid4()) for _ in range(count - 1)]
        return [*children, ForkFailure("no_hosts_available", "The host is full.")]

    async def exec(self, principal, sandbox, call):
        await self._enter("exec", principal, sandbox, call)
        self._find(sandbox)
        if call.background:
            return ExecStarted(42, call.tag or "p42")
        return self.result

    async def ping(self, principal, sandbox):
        await self._enter("ping", principal, sandbox)
        self._find(sandbox)

    def run(self, pid, tag="job"):
        self.running.append(
            ProcessView(
                pid=pid,
                tag=tag,
                cmd="sleep 9",
                args=None,
                user="root",
                cwd="/",
                background=True,
                started_ns=1_700_000_000_123_456_789,
            )
        )

    async def processes(self, principal, sandbox):
        await self._enter("processes", principal, sandbox)
        self._find(sandbox)
        return list(self.running)

    async def signal_process(self, principal, sandbox, process, signal):
        await self._enter("signal_process", principal, sandbox, process, signal)
        self._find(sandbox)
        if process not in {view.pid for view in self.running} | {view.tag for view in self.running}:
            raise errors.NotFound("There is no such process.")

    async def write_file(self, principal, sandbox, path, size, source):
        await self._enter("write_file", principal, sandbox, path, size)
        self._find(sandbox)
        content = b"".join([chunk async for chunk in source])
        assert len(content) == size
        self.files[path] = content

    @asynccontextmanager
    async def read_file(self, principal, sandbox, path):
        await self._enter("read_file", principal, sandbox, path)
        self._find(sandbox)
        if path in self.directories:
            raise errors.IsADirectory(f"{path} is a directory.")
        if self.chunks is None and path not in self.files:
            raise errors.FileNotFound(f"{path} does not exist.")

        async def pieces():
            yield self.files[path]

        source = pieces() if self.chunks is None else self.chunks()
        size = len(self.files[path]) if self.announced is ... else self.announced
        async with trio.open_nursery() as nursery:  # what lives as long as the answer, as the real one has
            nursery.start_soon(trio.sleep_forever)
            try:
                yield size, source
            finally:
                await source.aclose()
                nursery.cancel_scope.cancel()
                self.received.set()

    def _entry(self, path, kind="directory", **fields):
        return FileEntry(
            name=path.rpartition("/")[2],
            path=path,
            type=kind,
            size=4096,
            mode=fields.pop("mode", 0o755),
            owner="root",
            group="root",
            modified_ns=fields.pop("modified_ns", 1_700_000_000_123_456_789),
            **fields,
        )

    async def list_files(self, principal, sandbox, path, depth):
        await self._enter("list_files", principal, sandbox, path, depth)
        self._find(sandbox)
        return [
            self._entry("/a", "file", mode=0o100644),
            self._entry("/b", "symlink", symlink_target="/a", mode=0o777, modified_ns=2**63 - 1),
            self._entry("/c", "other", mode=0o4711, modified_ns=-1),
        ]

    async def mkdir(self, principal, sandbox, path):
        await self._enter("mkdir", principal, sandbox, path)
        self._find(sandbox)
        if path == "/":
            raise errors.Conflict("/ exists.")
        return self._entry(path)

    async def remove_file(self, principal, sandbox, path):
        await self._enter("remove_file", principal, sandbox, path)
        self._find(sandbox)


class FakeStreams(Faulty):
    """`processes`: those that were made, in order; `detached`: what can be attached to, by pid and tag."""

    def __init__(self, sandboxes):
        super().__init__()
        self._sandboxes = sandboxes
        self.processes = []
        self.detached = {}
        self.watched = {}
        self.archives = {}
        self.started = trio.Event()

    @property
    def files(self):
        return self._sandboxes.files

    def add(self, **how):
        """A detached process, to be attached to."""
        process = FakeProcess(**how)
        self.detached[process.pid] = self.detached[process.tag] = process
        return process

    @asynccontextmanager
    async def exec(self, principal, sandbox, call):
        await self._enter("exec", principal, sandbox, call)
        self._sandboxes._find(sandbox)
        process = FakeProcess(call, tag=call.tag or "p42", terminal=call.terminal is not None)
        async with self._attached(process):
            yield process

    @asynccontextmanager
    async def attach(self, principal, sandbox, process, *, offset, observe):
        await self._enter("attach", principal, sandbox, process, offset, observe)
        self._sandboxes._find(sandbox)
        if process not in self.detached:
            raise errors.NotFound("There is no such process.")
        async with self._attached(self.detached[process]):
            yield self.detached[process]

    @asynccontextmanager
    async def _attached(self, process):
        self.processes.append(process)
        self.started.set()
        try:
            yield process
        finally:
            process.left.set()

    @asynccontextmanager
    async def watch(self, principal, sandbox, path, *, recursive):
        """`watched[path]`: what is sent to its sending half comes out, exceptions are raised."""
        await self._enter("watch", principal, sandbox, path, recursive)
        self._sandboxes._find(sandbox)
        if path not in self.files and path not in self._sandboxes.directories:
            raise errors.FileNotFound(f"{path} does not exist.")
        self.watched[path], seen = trio.open_memory_channel(0)

        async def events():
            async for happened in seen:
                if isinstance(happened, Exception):
                    raise happened
                yield happened

        async with aclosing(events()) as found:
            try:
                yield found
            finally:
                seen.close()

    def _content(self, files, path):
        if path in self._sandboxes.directories:
            raise errors.IsADirectory(f"{path} is a directory.")
        if path not in files:
            raise errors.FileNotFound(f"{path} does not exist.")
        return files[path]

    @asynccontextmanager
    async def read_stream(self, principal, sandbox, path, *, offset, length):
        await self._enter("read_stream", principal, sandbox, path, offset, length)
        self._sandboxes._find(sandbox)
        content = self._content(self.files, path)
        wanted = content[offset:] if length is None else content[offset : offset + length]

        async def pieces():
            for start in range(0, len(wanted), 65536):
                await trio.lowlevel.checkpoint()
                yield wanted[start : start + 65536]

        async with aclosing(pieces()) as chunks:
            yield FileContent(size=len(content), version=hashlib.sha256(content).hexdigest()[:16], chunks=chunks)

    async def write_stream(self, principal, sandbox, path, source, *, size):
        await self._enter("write_stream", principal, sandbox, path, size)
        self._sandboxes._find(sandbox)
        content = b"".join([chunk async for chunk in source])
        assert size is None or len(content) == size
        self.files[path] = content

    @asynccontextmanager
    async def read_archive(self, principal, sandbox, path):
        await self._enter("read_archive", principal, sandbox, path)
        self._sandboxes._find(sandbox)
        if path not in self.archives:
            raise errors.FileNotFound(f"{path} does not exist.")

        async def pieces():
            await trio.lowlevel.checkpoint()
            yield self.archives[path]

        async with aclosing(pieces()) as chunks:
            yield chunks

    async def write_archive(self, principal, sandbox, path, source):
        await self._enter("write_archive", principal, sandbox, path)
        self._sandboxes._find(sandbox)
        self.archives[path] = b"".join([chunk async for chunk in source])


class FakeTemplates(Faulty):
    def __init__(self):
        super().__init__()
        self.rows = [
            TemplateView(id=UUID(int=1), name="minimal", type="base", size_bytes=5, platform=True, created_at=START),
            TemplateView(
                id=UUID(int=2),
                name="frozen",
                type="snapshot",
                size_bytes=6,
                platform=False,
                created_at=START + STEP,
                vcpus=2,
                memory_mb=256,
            ),
        ]

    async def create(self, principal, request, idempotency_key):
        await self._enter("create", principal, request, idempotency_key)
        if request.name in {row.name for row in self.rows}:
            raise errors.Conflict("There is one of that name.")
        return replace(self.rows[1], name=request.name or "made-up")

    async def delete(self, principal, name):
        await self._enter("delete", principal, name)
        if name not in {row.name for row in self.rows}:
            raise errors.NotFound("There is no such template.")

    async def list(self, principal, kind, limit, before):
        await self._enter("list", principal, kind, limit, before)
        return Page(tuple(row for row in self.rows if kind in {None, row.type}))


class FakeHosts(Faulty):
    credentials = HostCredentials(
        host=HostView(id=UUID(int=9), type="regular", status="online", created_at=START, address="h:1"),
        token="t",
        refresh_token="r",
        cert_pem="c",
        ca_cert_pem="a",
    )

    async def register(self, request):
        await self._enter("register", request)
        if request.token != "good":
            raise errors.Unauthorized("This registration token is unknown, spent or expired.")
        return self.credentials

    async def refresh(self, refresh_token, csr_pem):
        await self._enter("refresh", refresh_token, csr_pem)
        if refresh_token != "good":
            raise errors.Unauthorized("This refresh token is spent or expired.")
        return self.credentials

    async def heartbeat(self, host, token):
        await self._enter("heartbeat", host, token)
        if token != "good":
            raise errors.Unauthorized("This token is not a host's.")


class FakeReadiness(Faulty):
    answer = True

    async def __call__(self):
        await self._enter("ready")
        return self.answer
