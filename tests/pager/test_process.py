"""The process: one per directory, for root alone, kept running, outliving who started it."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import trio

from agent.pager import supervisor as supervision
from agent.pager.client import PagerClient
from agent.pager.process_file import NAME, read_process_file
from agent.pager.service import PagerUnavailable
from agent.pager.supervisor import PagerSupervisor, answers, stop_pager


def oom_score(pid):
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


def may_lower_oom_score(pid):
    try:
        Path(f"/proc/{pid}/oom_score_adj").write_text("-900")
    except PermissionError:  # a container
        return False
    return True


async def test_the_process_is_prepared_for_what_it_is(world):
    """Its own session, all descriptors it may have, first at the processor, last to be killed for memory, nothing open
    to others."""
    pid = world.pager_pid()
    assert os.getsid(pid) == pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    assert soft == hard >= resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert os.sched_getscheduler(pid) == os.SCHED_RR or os.getpriority(os.PRIO_PROCESS, pid) < 0
    assert oom_score(pid) < -500 or not may_lower_oom_score(pid)
    assert (world.directory / "pager.sock").stat().st_mode & 0o077 == 0
    assert world.directory.stat().st_mode & 0o077 == 0


async def test_only_one_serves_a_directory(world):
    """A second process says so and leaves, without touching the first one's socket."""
    command = [sys.executable, "-m", "agent.pager", "--directory", str(world.directory)]
    done = await trio.run_process(command, check=False, capture_stderr=True, env={**os.environ})
    assert done.returncode == 3
    assert b"another pager serves" in done.stderr
    assert await world.client.statistics() == {}


async def test_another_user_is_refused(world):
    """Even if the socket's mode would let it in."""
    for place in (world.directory, world.directory / "pager.sock"):
        place.chmod(0o777)
    script = (
        "import os, socket, sys; os.setuid(12345); s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "s.settimeout(5); print(s.recv(100))"
    )
    done = await trio.run_process(
        ["/usr/bin/python3", "-c", script, str(world.directory / "pager.sock")], capture_stdout=True, check=False
    )
    assert done.stdout.strip() in {b"b''", b""}
    with trio.fail_after(20):
        while "peer_refused" not in world.log():
            await trio.sleep(0.01)


async def test_rubbish_on_the_control_socket_costs_its_own_connection(world):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(world.directory / "pager.sock"))
        with suppress(BrokenPipeError, ConnectionResetError):  # it may hang up before it has all
            sock.sendall(os.urandom(100_000))
    assert await world.client.statistics() == {}


async def test_a_killed_pager_is_started_again_and_calls_go_through(world):
    """A call that was under way, or is made while there is none, is answered by the next one."""
    before = await world.kill_pager()
    assert await world.client.statistics() == {}
    assert world.pager_pid() != before


async def test_a_hanging_pager_is_replaced(root, vmm_program, monkeypatch):
    """It does not answer any more: killed, and its successor answers."""
    monkeypatch.setattr(supervision, "CHECK_INTERVAL", 0.2)
    monkeypatch.setattr(supervision, "CHECK_TIMEOUT", 2)
    directory = root / "pager"
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(PagerSupervisor(directory).run)
            client = PagerClient(directory)
            await nursery.start(client.run)
            before = read_process_file(directory).pid
            os.kill(before, signal.SIGSTOP)
            with trio.fail_after(50):
                assert await client.statistics() == {}
            assert read_process_file(directory).pid != before
            nursery.cancel_scope.cancel()
    finally:
        await stop_pager(directory)


async def test_the_next_agent_finds_the_pager_that_runs(root, vmm_program):
    """Nobody watches it meanwhile, and it is the same process; one of another version is replaced."""
    directory = root / "pager"
    pids = []
    try:
        for round_ in range(3):
            async with trio.open_nursery() as nursery:
                await nursery.start(PagerSupervisor(directory).run)
                pids.append(read_process_file(directory).pid)
                nursery.cancel_scope.cancel()
            assert await answers(directory)
            if round_ == 1:
                file = read_process_file(directory)
                (directory / NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(file, version="0.0.0")))
        assert pids[0] == pids[1] != pids[2]
    finally:
        await stop_pager(directory)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[2], 0)
    assert not (directory / "pager.sock").exists()
    await stop_pager(directory)  # harmless when there is none


async def test_a_pager_outlives_the_agent_that_started_it(root, vmm_program):
    """An agent that is killed, in another process: its pager answers, and is nobody's child any more."""
    directory = root / "pager"
    script = (
        "import sys, trio, pathlib\n"
        "from agent.pager.supervisor import PagerSupervisor\n"
        "async def main():\n"
        "    async with trio.open_nursery() as nursery:\n"
        "        await nursery.start(PagerSupervisor(pathlib.Path(sys.argv[1])).run)\n"
        "        print('up', flush=True)\n"
        "        await trio.sleep_forever()\n"
        "trio.run(main)\n"
    )
    agent = await trio.lowlevel.open_process(
        [sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        said = b""
        while b"pager_started" not in said:
            more = await agent.stdout.receive_some(1000)
            assert more, said
            said += more
        with trio.fail_after(50):
            while not await answers(directory):
                await trio.sleep(0.05)
        agent.kill()
        await agent.wait()
        assert await answers(directory)
    finally:
        await agent.stdout.aclose()
        await stop_pager(directory)


async def test_without_a_pager_a_call_ends_with_a_typed_error(root):
    client = PagerClient(root / "nowhere", call_timeout=0.3)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        with pytest.raises(PagerUnavailable, match="nobody serves"):
            await client.statistics()
        nursery.cancel_scope.cancel()
