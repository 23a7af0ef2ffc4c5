"""One sandbox behind the HTTP API and its WebSockets, on a port of loopback.

Its processes and files are this machine's. Only what the command line asks for, as the API's contract has it.
"""

from __future__ import annotations

import hashlib
import re
import signal
import socket
from base64 import b64encode
from contextlib import aclosing, suppress
from functools import partial
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import msgspec
import trio
from trio_websocket import ConnectionClosed, wrap_server_stream

from tests.cli.machine import Job

KEY = "cap_" + "0123456789abcdef" * 2 + "01234567"
HEX = "0123456789abcdef0123456789abcdef"
SANDBOX = "sb-01234567-89ab-cdef-0123-456789abcdef"
MOMENT = "2026-01-02T03:04:05.000006Z"
INFO = {
    "id": SANDBOX, "status": "running", "template": "minimal", "vcpus": 1, "memory_mb": 512, "disk_mb": 1024,
    "timeout_sec": 0, "created_at": MOMENT, "last_updated": MOMENT,
}  # fmt: skip


class Refused(Exception):  # noqa: N818 - it is an answer
    def __init__(self, status, code, message="Refused."):
        super().__init__(message)
        self.status, self.code = status, code


class Platform:
    """`jobs`: everything that was started. `root`: the sandbox's files. `asked`: requests, as (method, path)."""

    def __init__(self, nursery, root):
        self.nursery = nursery
        self.root = root
        self.jobs = []
        self.asked = []
        self.others = []
        self.refusals = {}
        self.cut_download_at = None
        self.silent = False
        self.damage = False
        self.stall_download = False
        self.beginning = False

    # connections

    async def serve(self, *, task_status):
        [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
        listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # little is lost when it is cut
        self.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        await trio.serve_listeners(self._connection, [listener], task_status=task_status)

    async def _connection(self, stream):
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ConnectionClosed):
            head, rest = await _head(stream)
            if not head:
                return
            line, *lines = head.split("\r\n")
            method, target, _ = line.split(" ")
            headers = {name.lower(): text for name, text in (one.split(": ", 1) for one in lines)}
            if headers.get("upgrade") == "websocket":
                await self._websocket(Replayed(stream, head.encode() + b"\r\n\r\n" + rest), urlsplit(target))
            else:
                await self._request(stream, method, target, headers, rest)
        with trio.move_on_after(1):
            await stream.aclose()

    async def _request(self, stream, method, target, headers, rest):
        url = urlsplit(target)
        self.beginning = self.beginning or "stream/write" in url.path
        body = await _body(stream, headers, rest)
        self.asked.append((method, url.path))
        if self.silent:
            await trio.sleep_forever()
        try:
            self._admit(headers, url.path)
            status, extra, answer = self._answer(method, url, headers, body)
        except Refused as error:
            refusal = {"error": {"code": error.code, "message": str(error), "request_id": "r"}}
            status, extra, answer = error.status, {}, msgspec.json.encode(refusal)
        extra = {"Content-Length": str(len(answer)), "Connection": "close", **extra}
        lines = [f"HTTP/1.1 {status} .", *(f"{name}: {text}" for name, text in extra.items()), "", ""]
        await stream.send_all("\r\n".join(lines).encode())
        if self.cut_download_at is not None and "stream/read" in url.path:
            answer, self.cut_download_at = answer[: self.cut_download_at], None
        if self.stall_download and "stream/read" in url.path:
            await stream.send_all(answer[:1000])
            await trio.sleep_forever()
        await stream.send_all(answer)
        await stream.aclose()

    def _admit(self, headers, path):
        if headers.get("x-api-key") != KEY:
            raise Refused(401, "unauthorized", "This API key is unknown or revoked.")
        if path in self.refusals:
            raise self.refusals[path]

    # what there is

    def _answer(self, method, url, headers, body):
        sandbox = f"/v1/sandboxes/({SANDBOX}|{HEX})"
        if url.path == "/v1/sandboxes":
            return 200, {}, msgspec.json.encode([INFO, *self.others])
        if re.fullmatch(sandbox, url.path):
            return 200, {}, msgspec.json.encode(INFO)
        if re.fullmatch(f"{sandbox}/processes", url.path):
            return 200, {}, msgspec.json.encode({"items": [_shown(job) for job in self.jobs if job.status is None]})
        if found := re.fullmatch(f"{sandbox}/processes/(.+)", url.path):
            self._find(found[2]).signal(_number(parse_qs(url.query)["signal"][0]))
            return 204, {}, b""
        if found := re.fullmatch(f"{sandbox}/files/(.+)", url.path):
            return getattr(self, "_" + found[2].replace("/", "_"))(headers, body)
        raise Refused(404, "not_found", "There is no such sandbox.")

    def _find(self, name):
        for job in self.jobs:
            if name in (str(job.pid), job.tag) and job.status is None:
                return job
        raise Refused(404, "not_found", "There is no such process.")

    def _local(self, path):
        return self.root / path.lstrip("/")

    def _list(self, headers, body):
        path = self._local(msgspec.json.decode(body)["path"])
        if not path.exists():
            raise Refused(404, "file_not_found", f"{path} does not exist.")
        if not path.is_dir():
            raise Refused(400, "not_a_directory", f"{path} is no directory.")
        return 200, {}, b'{"entries": []}'

    def _stream_write(self, headers, body):
        boundary = b"--" + headers["content-type"].partition("boundary=")[2].encode()
        parts = {}
        for part in body.split(boundary)[1:-1]:
            head, _, content = part.partition(b"\r\n\r\n")
            parts[re.search(rb'name="(\w+)"', head)[1]] = content[:-2]
        path = self._local(parts[b"path"].decode())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(parts[b"file"])
        digest = hashlib.sha256(b"" if self.damage else parts[b"file"]).digest()
        return 204, {"Repr-Digest": f"sha-256=:{b64encode(digest).decode()}:"}, b""

    def _stream_read(self, headers, body):
        content = self._local(msgspec.json.decode(body)["path"]).read_bytes()
        version = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept-Ranges": "bytes"}
        if "range" in headers and headers.get("if-range") == version["ETag"]:
            start = int(headers["range"].removeprefix("bytes=").rstrip("-"))
            span = f"bytes {start}-{len(content) - 1}/{len(content)}"
            return 206, {**version, "Content-Range": span}, content[start:]
        return 200, version, content

    # streams

    async def _websocket(self, stream, url):
        self.asked.append(("WS", url.path))
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, stream)
            if url.path in self.refusals:
                error = self.refusals[url.path]
                refusal = {"error": {"code": error.code, "message": str(error), "request_id": "r"}}
                await request.reject(error.status, body=msgspec.json.encode(refusal))
                return
            socket = await request.accept()
            query = parse_qs(url.query)
            try:
                if url.path.endswith("/exec/stream"):
                    await self._exec(socket)
                elif url.path.endswith("/pty"):
                    await self._terminal(socket)
                else:
                    await self._attach(socket, url.path.split("/")[-2], query)
            except Refused as error:
                with suppress(ConnectionClosed):
                    await socket.aclose(4000 + error.status, f"{error.code}: {error}")
            nursery.cancel_scope.cancel()

    async def _exec(self, socket):
        start = msgspec.json.decode(await socket.get_message())
        assert start["framing"] == "binary"
        job = self._start(start)
        try:
            await _say(socket, {"type": "start", "pid": job.pid, "tag": job.tag})
            await self._together(socket, job, 0, framed=True)
        finally:
            if not job.detach:
                job.signal(signal.SIGKILL)

    async def _terminal(self, socket):
        first = msgspec.json.decode(await socket.get_message())
        if first["type"] == "start":
            job = self._start(first, (first["cols"], first["rows"]))
            begin, skipped = 0, 0
        else:
            job = self._detached(first["tag"])
            begin, skipped = job.begin(first.get("offset"))
            if "cols" in first:
                job.resize(first["cols"], first["rows"])
        started = {"type": "started", "pid": job.pid, "tag": job.tag, "offset": begin, "skipped": skipped}
        await _say(socket, started)
        await self._together(socket, job, begin, framed=False)

    async def _attach(self, socket, name, query):
        job = self._detached(name)
        observe = query.get("observe") == ["true"]
        begin, skipped = job.begin(int(query["offset"][0]) if "offset" in query else None)
        start = {"type": "start", "pid": job.pid, "tag": job.tag, "pty": job.pty, "offset": begin, "skipped": skipped}
        start |= {"replay": job.end - begin, "ended": job.status is not None}
        await _say(socket, start)
        await self._together(socket, job, begin, framed=True, observe=observe)

    def _start(self, start, size=None):
        words = [start.get("cmd") or "/bin/sh", *start.get("args", [])]
        options = {name: start.get(name) for name in ("envs", "cwd", "detach", "tag")}
        try:
            job = Job(words, size=size, **options)
        except FileNotFoundError:
            job = Job(["/bin/sh", "-c", f"echo {words[0]}: not found >&2; exit 127"], size=size)
        self.jobs.append(job)
        self.nursery.start_soon(job.run)
        return job

    def _detached(self, name):
        for job in self.jobs:
            if name in (str(job.pid), job.tag) and job.detach:
                return job
        raise Refused(404, "not_found", "There is no such process.")

    async def _together(self, socket, job, begin, *, framed, observe=False):
        """Until the process or the connection has ended."""
        if not observe:
            job.taken, job.holders = begin, job.holders + 1
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._listen, socket, job, nursery.cancel_scope)
                async with aclosing(job.output(begin, observe=observe)) as pieces:
                    async for channel, data in pieces:
                        await socket.send_message((bytes([channel]) if framed else b"") + data)
                await _say(socket, {"type": "exit", **job.status, "duration_ms": 1})
                await socket.aclose(1000)
                nursery.cancel_scope.cancel()
        except* ConnectionClosed:
            pass
        finally:
            if not observe:
                job.holders -= 1
                if not job.holders:
                    job.taken = None
                job._tell()

    async def _listen(self, socket, job, scope):
        with suppress(ConnectionClosed):
            while True:
                message = await socket.get_message()
                if isinstance(message, bytes):
                    await job.write(message if job.pty else message[1:])
                    continue
                asked = msgspec.json.decode(message)
                match asked["type"]:
                    case "close_stdin":
                        job.close_stdin()
                    case "signal":
                        job.signal(_number(asked["signal"]))
                    case "stop" | "kill":
                        job.signal(signal.SIGKILL)
                    case "resize":
                        job.resize(asked["cols"], asked["rows"])
        scope.cancel()

    def destroy(self):
        for job in self.jobs:
            job.destroy()


class Replayed(trio.abc.Stream):
    """A stream some of whose bytes were read already."""

    def __init__(self, stream, first):
        self._stream, self._first = stream, first

    async def receive_some(self, max_bytes=None):
        if self._first:
            first, self._first = self._first, b""
            await trio.lowlevel.checkpoint()
            return first
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data):
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self):
        await self._stream.wait_send_all_might_not_block()

    async def aclose(self):
        await self._stream.aclose()


async def _say(socket, message):
    await socket.send_message(msgspec.json.encode(message).decode())


async def _head(stream):
    data = b""
    while b"\r\n\r\n" not in data:
        piece = await stream.receive_some()
        if not piece:
            return "", b""
        data += piece
    head, _, rest = data.partition(b"\r\n\r\n")
    return head.decode(), rest


async def _body(stream, headers, rest):
    data = bytearray(rest)

    async def more():
        piece = await stream.receive_some()
        if not piece:
            raise trio.BrokenResourceError
        data.extend(piece)

    if headers.get("transfer-encoding") == "chunked":
        while not data.endswith(b"0\r\n\r\n"):
            await more()
        whole, rest = b"", bytes(data)
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            whole, rest = whole + rest[: int(size, 16)], rest[int(size, 16) + 2 :]
        return whole
    while len(data) < int(headers.get("content-length", 0)):
        await more()
    return bytes(data)


def _shown(job):
    cmd, *args = job.words
    return {
        "pid": job.pid, "tag": job.tag, "cmd": cmd, "args": args, "user": "root", "cwd": "/", "background": False,
        "started_at": MOMENT,
    }  # fmt: skip


def _number(name):
    return int(name) if name.isdigit() else signal.Signals[name]


async def open_platform(nursery, root: Path):
    """Running."""
    platform = Platform(nursery, root)
    await nursery.start(partial(platform.serve))
    return platform
