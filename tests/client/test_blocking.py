"""The client for plain code: the same, from threads, and it leaves none behind."""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import trio

from capsule.client import ApiError, BlockingTerminal, Client, NotFound, Sandbox, StreamClosed, TrioSandbox
from capsule.client.blocking import iterating
from capsule.client.client import Files, Processes, Sandboxes
from capsule.client.files import TrioFiles
from capsule.client.listing import TrioProcesses
from capsule.client.sandboxes import TrioSandboxes
from capsule.client.terminals import Terminal


def threads():
    return {one for one in threading.enumerate() if one.name == "capsule-client"}


async def in_thread(function, *arguments):
    with trio.fail_after(30):
        return await trio.to_thread.run_sync(function, *arguments)


@pytest.mark.parametrize(
    ("plain", "other"),
    [
        (Sandbox, TrioSandbox),
        (Files, TrioFiles),
        (Processes, TrioProcesses),
        (Sandboxes, TrioSandboxes),
        (BlockingTerminal, Terminal),
    ],
)
def test_nothing_is_missing(plain, other):
    """Every public method is there, with the same signature and docstring."""
    for name, method in inspect.getmembers(other, inspect.isfunction):
        if not name.startswith("_") and name != "run":
            here = getattr(plain, name)
            assert inspect.signature(here) == inspect.signature(method)
            assert here.__doc__ == method.__doc__


async def test_it_does_the_same(platform, tmp_path):
    """Requests, lists, forks, files and errors."""

    def use():
        with Client(platform.url, platform.key) as client:
            sandbox = client.sandboxes.create()
            assert sandbox.exec("x").text == "hi\n"
            assert sandbox.id in [one.id for one in client.sandboxes.list()]
            assert [type(child).__name__ for child in sandbox.fork(2)] == ["Sandbox", "ForkFailure"]
            (tmp_path / "a").write_bytes(b"x" * 100_000)
            sandbox.files.upload(tmp_path / "a", "/a")
            sandbox.files.download("/a", tmp_path / "b")
            assert (tmp_path / "b").read_bytes() == b"x" * 100_000
            assert client.templates.create(sandbox, "golden").name == "golden"
            with pytest.raises(NotFound):
                client.sandboxes.get("sb-00000000-0000-0000-0000-000000000001")
            assert platform.key not in repr(vars(client))

    await in_thread(use)
    assert not threads()


async def test_streams_are_plain(platform, until):
    """A process and a terminal, with input from another thread."""

    def use():
        with Client(platform.url, platform.key) as client:
            sandbox = client.sandboxes.get(platform.sandbox.id)
            with sandbox.stream("cat") as process:
                sender = threading.Thread(target=process.send, args=(b"typed",))
                sender.start()
                seen = [(chunk.stream, chunk.data) for chunk in process]
                sender.join()
                assert process.wait().exit_code == 0
            with sandbox.terminal() as terminal:
                terminal.send(b"x")
                terminal.kill()
                assert terminal.wait().exit_code == 137
                with pytest.raises(StreamClosed):
                    terminal.send(b"x")
            with pytest.raises(KeyError), sandbox.stream("x"):
                raise KeyError
            with pytest.raises(ApiError), sandbox.attach("nobody"):
                pass
            return seen

    async def play():
        await until(lambda: platform.streams.processes)
        fake = platform.streams.processes[0]
        await until(lambda: bytes(fake.received) == b"typed")
        await fake.say(b"typed")
        fake.finish()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(play)
        assert await in_thread(use) == [("stdout", b"typed")]
    await until(lambda: all(fake.left.is_set() for fake in platform.streams.processes))
    assert not threads()


async def test_many_threads_share_one(platform):
    """Thread-safe: calls go on at the same time."""
    gate = platform.sandboxes.gates["exec"] = trio.Event()
    client = await in_thread(Client, platform.url, platform.key)
    sandbox = await in_thread(client.sandboxes.get, platform.sandbox.id)
    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(in_thread, sandbox.exec, "x")
        with trio.fail_after(30):
            while len([name for name, _ in platform.sandboxes.asked if name == "exec"]) < 10:
                await trio.sleep(0.01)
        gate.set()
    await in_thread(client.close)


async def test_closing_ends_what_is_under_way(platform, until):
    """A call in another thread, and a stream that is open."""
    platform.sandboxes.gates["exec"] = trio.Event()
    client = await in_thread(Client, platform.url, platform.key)
    sandbox = await in_thread(client.sandboxes.get, platform.sandbox.id)

    def call():
        with pytest.raises(RuntimeError, match="closed"):
            sandbox.exec("x")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, call)
        await until(lambda: platform.sandboxes.asked[-1][0] == "exec")
        await in_thread(client.close)
    await in_thread(client.close)
    assert not threads()
    with pytest.raises(RuntimeError):
        await in_thread(sandbox.exec, "x")


async def test_a_forgotten_client_takes_its_thread_along(platform):
    """Without close: the end of the object is the end of the thread, wherever the garbage collector runs."""
    client = await in_thread(Client, platform.url, platform.key)
    with pytest.raises(RuntimeError, match="TrioClient"):
        Client(platform.url, platform.key)
    del client
    await in_thread(int)  # a worker thread remembers its last result
    gc.collect()
    assert not threads()


async def test_a_list_that_is_left_ends(platform, monkeypatch):
    """`break` in a loop: nothing stays for the garbage collector to complain about."""
    left = trio.Event()

    async def pages(_self, **_how):
        try:
            for number in range(3):
                yield SimpleNamespace(id=number, files=None, processes=None)
        finally:
            left.set()

    def use():
        with Client(platform.url, platform.key) as client:
            listed = iterating(pages, lambda _, item: item.id).__get__(client.sandboxes)()
            assert next(listed) == 0
            listed.close()
            assert left.is_set()
            assert [one.id for one in client.sandboxes.list()]

    await in_thread(use)


FORKED = """
import os, sys, warnings
from capsule.client import Client
warnings.simplefilter("ignore")
client = Client("http://127.0.0.1:9", "cap_" + "0" * 40)
child = os.fork()
if not child:
    try:
        client.sandboxes.get("sb-1")
    except RuntimeError as error:
        assert "forked" in str(error)
    else:
        os._exit(1)
    client.close()
    del client
    sys.exit(7)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status))
client.close()
"""


def test_a_forked_child_does_not_hang():
    """The thread stays behind: calls say so, and neither close() nor the child's end waits for it."""
    ran = subprocess.run(
        [sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=60, check=False, env={"HOME": "/none"}
    )
    assert (ran.returncode, ran.stdout) == (0, "7\n"), ran.stderr


def test_an_interrupt_cancels_and_leaves_nothing():
    """Ctrl-C in a call that waits, and in one that opens a stream: KeyboardInterrupt now, and no thread after."""
    listener = _silent_server()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    waiting = threading.get_ident()

    def interrupt():
        with listener.accept()[0] as asked:
            asked.recv(1)  # the question is there
            while sys._current_frames()[waiting].f_code.co_name != "wait":  # and whoever asked it waits
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)
            with contextlib.suppress(ConnectionError):
                while asked.recv(65536):
                    pass  # until it is given up

    with listener:
        for wanted in ("get", "stream"):
            interrupting = threading.Thread(target=interrupt)
            interrupting.start()
            began = time.monotonic()
            with pytest.raises(KeyboardInterrupt):
                _wait_for_ever(url, wanted)
            assert time.monotonic() - began < 20  # a question that nobody answers is given up after more than that
            interrupting.join()
            assert not threads()


def _wait_for_ever(url, wanted):
    with Client(url, "cap_" + "0" * 40) as client:
        if wanted == "get":
            client.sandboxes.get("sb-1")
        else:
            inner = TrioSandbox(client._inner._transport, _Named())
            with Sandbox(client._portal, inner).stream("x"):
                pass


class _Named:
    id = "sb-1"


def _silent_server():
    listener = socket.create_server(("127.0.0.1", 0))
    listener.listen(10)
    listener.settimeout(60)
    return listener
