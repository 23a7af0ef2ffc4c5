"""Streams into real VMs: a terminal's echo beside ssh to a local sshd, alone and beside a flood; output, upload and
download beside raw TCP into the same guest. Everything goes through the Python client, as a user's program would. The
flood is read by a program of its own, as another window or another user would: what a program's own loop makes its own
terminal wait for, while it reads a flood beside it, is not measured.

    streams.py [terminals] [throughput]
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import asynccontextmanager
from pathlib import Path

import trio
from raw_tcp import raw_tcp, sink, wait_for_sink
from stage import platform, show, user

from capsule.client import TrioClient

ECHOES = 1000
STREAMS = 200
SIZE_MB = 128
TRIES = 3
SSH_PORT = 2222
RAW = "stty raw -echo; exec cat"
"""A terminal whose every byte comes back through a process."""
FLOOD = "--flood"
"""Argument of the program that reads one."""


def percentiles(name: str, seconds: list[float], base: tuple[float, float] | None = None, what: str = "", goal=None):
    """Print p50 and p99 in ms, and their ratios; (p50, p99)."""
    ordered = sorted(seconds)
    p50, p99 = statistics.median(ordered) * 1000, ordered[int(len(ordered) * 0.99) - 1] * 1000
    show(f"{name} p50", p50, "ms", base and base[0], what)
    show(f"{name} p99", p99, "ms", base and base[1], what, goal=goal)
    return p50, p99


async def echoes(send, receive, count: int = ECHOES) -> list[float]:
    """Seconds from a byte to its echo, one after the other."""
    seconds = []
    for number in range(count):
        byte = bytes([ord("a") + number % 26])
        began = time.perf_counter()
        await send(byte)
        answer = b""
        while byte not in answer:
            answer += await receive()
        seconds.append(time.perf_counter() - began)
    return seconds[count // 10 :]


@asynccontextmanager
async def sshd(directory: Path):
    """An sshd on loopback with keys of its own, and the command that reaches it."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)], check=True)
    shutil.copy(directory / "user.pub", directory / "authorized")
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    options = {
        "Port": SSH_PORT,
        "ListenAddress": "127.0.0.1",
        "HostKey": directory / "host",
        "AuthorizedKeysFile": directory / "authorized",
        "PidFile": "none",
        "StrictModes": "no",
        "UsePAM": "no",
        "PermitRootLogin": "yes",
    }
    command = ["/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null"]
    for name, value in options.items():
        command += ["-o", f"{name}={value}"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    client = ["ssh", "-tt", "-p", str(SSH_PORT), "-i", str(directory / "user"), "-o", "StrictHostKeyChecking=no"]
    client += ["-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@127.0.0.1"]
    try:
        while subprocess.run([*client, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode:
            await trio.sleep(0.1)
        yield client
    finally:
        server.terminate()
        server.wait()


async def ssh_echo() -> tuple[float, float] | None:
    """The baseline; None without an sshd."""
    if not Path("/usr/sbin/sshd").exists():
        print("no sshd here (apt-get install openssh-server): the echo has no baseline", flush=True)
        return None
    with tempfile.TemporaryDirectory(prefix="capsule-ssh-") as name:
        async with sshd(Path(name)) as client:
            process = await trio.lowlevel.open_process(
                [*client, f"echo ready; {RAW}"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            answer = b""
            while b"ready" not in answer:
                answer += await process.stdout.receive_some()
            await trio.sleep(0.5)
            seconds = await echoes(process.stdin.send_all, process.stdout.receive_some)
            process.kill()
            await process.wait()
    return percentiles("terminal echo: ssh to a local sshd", seconds)


async def ready(terminal) -> None:
    """Past everything a terminal says before it echoes."""
    answer = b""
    while b"\x04ready" not in answer:
        answer += await anext(terminal)


def echoing(sandbox, **size):
    """A terminal that echoes every byte."""
    return sandbox.terminal("/bin/sh", ["-c", f"stty raw -echo; printf '\\004ready'; {RAW}"], **size)


async def terminals(told: dict, sandbox, ssh: tuple[float, float] | None) -> None:
    """One quiet terminal: alone, beside a flood that is read, beside one that is not, beside many."""
    async with echoing(sandbox) as terminal:
        await ready(terminal)

        async def receive():
            return await anext(terminal)

        quiet = percentiles("terminal echo: through everything", await echoes(terminal.send, receive), ssh, "ssh")
        async with flood(told, sandbox):
            beside = await echoes(terminal.send, receive)
        percentiles("  beside a flood that is read", beside, quiet, "quiet", goal=3)
        async with sandbox.stream("cat /dev/zero"):
            await trio.sleep(1)
            percentiles("  beside one that nobody reads", await echoes(terminal.send, receive), quiet, "quiet", goal=3)
        async with trio.open_nursery() as nursery:
            began = time.perf_counter()
            async with trio.open_nursery() as opening:
                for _ in range(STREAMS - 1):
                    opening.start_soon(nursery.start, attached, sandbox)
            show(f"{STREAMS} streams: to open the others", time.perf_counter() - began, "s")
            percentiles("  beside the others", await echoes(terminal.send, receive), quiet, "quiet", goal=3)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def flood(told: dict, sandbox):
    """A program that reads a process's output as fast as it comes; at the end, how fast that was."""
    environment = {**os.environ, "CAPSULE_URL": told["url"], "CAPSULE_API_KEY": told["api_key"]}
    command = [sys.executable, __file__, FLOOD, sandbox.id]
    program = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, env=environment)
    try:
        await program.stdout.receive_some(1)
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        show("    the flood meanwhile", len(await program.stdout.receive_some(65536)) * 1.048576 / seconds, "MB/s")
    finally:
        program.kill()
        await program.wait()


async def read_flood(sandbox_id: str) -> None:
    """The program: a byte to its own output for each MiB."""
    async with TrioClient() as capsule:
        sandbox = await capsule.sandboxes.get(sandbox_id)
        async with sandbox.stream("cat /dev/zero") as process:
            count = 0
            async for chunk in process:
                count += len(chunk.data)
                if count >= 1 << 20:
                    os.write(1, bytes(count >> 20))
                    count &= (1 << 20) - 1


async def attached(sandbox, *, task_status) -> None:
    """A process that does nothing any more, with somebody attached."""
    async with sandbox.stream("echo; exec cat") as process:
        await anext(process)  # while it starts it is busy: hundreds of them for seconds
        task_status.started()
        await trio.sleep_forever()


async def output(sandbox) -> float:
    """MB/s of a process that prints in blocks of a MiB, as raw TCP's program does: of `head`, which writes 8 KiB at a
    time, the pipe alone costs an emulated guest three times as much."""
    began, count = time.perf_counter(), 0
    async with sandbox.stream(f"exec dd if=/dev/zero bs=1M count={SIZE_MB} 2>/dev/null") as process:
        async for chunk in process:
            count += len(chunk.data)
    if count != SIZE_MB << 20:
        raise RuntimeError(f"{count} bytes of {SIZE_MB << 20}")
    return count / 1e6 / (time.perf_counter() - began)


async def throughput(sandbox, address: str) -> None:
    """In turns, so that a busy machine is busy for all of them."""
    await sandbox.start("python3", ["-c", sink(SIZE_MB)])
    await wait_for_sink(address, SIZE_MB)
    into, out, printed, up, down = [], [], [], [], []
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        local, back = Path(name) / "local", Path(name) / "back"
        local.write_bytes(os.urandom(1 << 20) * SIZE_MB)
        for _ in range(TRIES):
            into.append(await raw_tcp(address, b"s", SIZE_MB))
            out.append(await raw_tcp(address, b"r", SIZE_MB))
            printed.append(await output(sandbox))
            began = time.perf_counter()
            await sandbox.files.upload(local, "/root/blob")
            up.append(SIZE_MB * 1.048576 / (time.perf_counter() - began))
            began = time.perf_counter()
            await sandbox.files.download("/root/blob", back)
            down.append(SIZE_MB * 1.048576 / (time.perf_counter() - began))
    show("raw TCP into the guest", statistics.median(into), "MB/s")
    show("raw TCP out of the guest", statistics.median(out), "MB/s")
    show("output of a process", statistics.median(printed), "MB/s", statistics.median(out), "raw TCP (goal >= 0.5)")
    show("upload of a file", statistics.median(up), "MB/s", statistics.median(into), "raw TCP (goal >= 0.5)")
    show("download of a file", statistics.median(down), "MB/s", statistics.median(out), "raw TCP (goal >= 0.5)")


async def main(parts: set[str]) -> None:
    """All of it, or these parts, in order."""
    with platform() as (_, told):
        with user(told) as api:
            made = api.post("/sandboxes", json={}).raise_for_status().json()
        async with TrioClient(url=told["url"], api_key=told["api_key"]) as capsule:
            sandbox = await capsule.sandboxes.get(made["id"])
            if "terminals" in parts:
                await terminals(told, sandbox, await ssh_echo())
            if "throughput" in parts:
                await throughput(sandbox, made["host_ip"])


if __name__ == "__main__":
    if FLOOD in sys.argv:
        trio.run(read_flood, sys.argv[-1])
        sys.exit()
    trio.run(main, set(sys.argv[1:]) or {"terminals", "throughput"})
