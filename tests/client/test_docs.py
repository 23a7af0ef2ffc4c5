"""docs/client.md: every block runs, and type-checks. Those marked `stream` talk to fakes that play the guest; the
others to a whole control plane over a real database, with simulated agents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import trio
from mypy import api

DOCUMENT = Path(__file__).parents[2] / "docs" / "client.md"
BLOCKS = re.findall(r"^```python( stream)?\n(.*?)^```$", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)
PLAIN = [code for mark, code in BLOCKS if not mark]
STREAM = [code for mark, code in BLOCKS if mark]


async def run(code, monkeypatch, directory, url, key):
    """As a program of its own would, in a thread."""
    monkeypatch.setenv("CAPSULE_URL", url)
    monkeypatch.setenv("CAPSULE_API_KEY", key)
    monkeypatch.chdir(directory)
    with trio.fail_after(30):
        await trio.to_thread.run_sync(exec, compile(code, "docs/client.md", "exec"), {})


@pytest.mark.parametrize("code", PLAIN)
async def test_against_the_whole_platform(code, people, monkeypatch, tmp_path):
    """With a key of a new user's, and a host."""
    await people.world.add_host()
    key = await people.key(await people.sign_up())
    await run(code, monkeypatch, tmp_path, people.url, key.text)


@pytest.mark.parametrize("code", STREAM)
async def test_against_played_guests(code, platform, monkeypatch, tmp_path):
    """With processes that do what their commands say."""
    (tmp_path / "model.bin").write_bytes(b"weights" * 100_000)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "index.html").write_text("<p>")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_play, platform.streams)
        await run(code, monkeypatch, tmp_path, platform.url, platform.key)
        nursery.cancel_scope.cancel()


async def _play(streams):
    kept = streams.add(pid=43, tag="build", offset=10)
    seen = 0
    async with trio.open_nursery() as nursery:
        while True:
            for process in streams.processes[seen:]:
                seen += 1
                nursery.start_soon(_act, process, process is kept)
            await trio.sleep(0.01)


async def _act(process, kept):
    if kept:
        await process.say(b"linking\n")
        process.finish()
    elif process.call.cmd == "cat":
        while not process.input_ended:
            await trio.sleep(0.01)
        await process.say(bytes(process.received))
        process.finish()
    else:
        await process.say(b"compiling\n" if process.call.detach else b"$ ls\n")


def test_the_examples_type_check(tmp_path, monkeypatch):
    """As a user's own code would, in a directory of its own: mypy --strict; the package says that it is typed."""
    monkeypatch.chdir(tmp_path)
    for number, (_, code) in enumerate(BLOCKS):
        (tmp_path / f"example_{number}.py").write_text(code)
    said, problems, status = api.run(["--strict", "--no-error-summary", str(tmp_path)])
    assert (said, problems, status) == ("", "", 0)
