"""The data directory of `capsule dev`: nothing half-written, nobody else's process ended, secrets kept."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from capsule.dev import files

PAUSE = [sys.executable, "-S", "-c", "import signal; print(flush=True); signal.pause()"]
DEAF = [
    sys.executable,
    "-S",
    "-c",
    "import signal; signal.signal(15, signal.SIG_IGN); print(flush=True); [signal.pause() for _ in iter(int, 1)]",
]


@pytest.fixture
def child():
    """Starts processes of ours, up and running; ends what is left of them."""
    children = []

    def start(command):
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        children.append(process)
        process.stdout.readline()
        return process

    yield start
    for process in children:
        process.kill()
        process.wait()
        process.stdout.close()


def test_two_do_not_share_a_directory(tmp_path):
    """The second is told where the first one is; a lock ends with its holder, however that ends."""
    data = tmp_path / "deep" / "data"
    fd = files.lock(data)
    with pytest.raises(files.DataDirectoryInUse, match=str(data)):
        files.lock(data)
    os.close(fd)
    os.close(files.lock(data))


def test_the_lock_of_a_killed_one_is_free(tmp_path):
    """No stale lock file to be removed by hand."""
    code = "from capsule.dev import files; import pathlib, sys; "
    code += "files.lock(pathlib.Path(sys.argv[1])); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(files.DataDirectoryInUse):
            files.lock(tmp_path)
        other.kill()
    os.close(files.lock(tmp_path))


def test_secrets_are_made_once_and_kept(tmp_path):
    """64 hex digits, for their owner's eyes only; other values stay."""
    first = files.read_secrets(tmp_path)
    assert len(bytes.fromhex(first["CAPSULE_SECRET_KEY"])) == 32
    files.write_secrets(tmp_path, {**first, "CAPSULE_API_KEY": "cap_x"})
    assert files.read_secrets(tmp_path) == {**first, "CAPSULE_API_KEY": "cap_x"}
    assert stat.S_IMODE((tmp_path / "secrets.env").stat().st_mode) == 0o600


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed at any step: the old content or the new, and the rest of an earlier try is no obstacle."""
    path = tmp_path / "file"
    files.replace(path, b"old")
    steps = ["write", "fsync", "rename", "directory"]

    class Killed(BaseException):
        pass

    for step in steps:
        synced = []

        def fsync(fd, step=step, synced=synced):
            synced.append(fd)
            if (step == "fsync" and len(synced) == 1) or (step == "directory" and len(synced) == 2):
                raise Killed

        def rename(self, target, step=step):
            if step == "rename":
                raise Killed
            os.replace(self, target)  # noqa: PTH105 - the method is what is being replaced

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            patch.setattr(Path, "replace", rename)
            if step == "write":
                patch.setattr(os, "fdopen", lambda *_: (_ for _ in ()).throw(Killed()))
            with pytest.raises(Killed):
                files.replace(path, b"new")
        assert path.read_bytes() == (b"new" if step == "directory" else b"old")
    (tmp_path / ".file.new").write_bytes(b"left by a crash")
    (tmp_path / ".file.new").chmod(0o644)
    files.replace(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_remembered_programs_are_ended(tmp_path, child):
    """SIGTERM for all; how many there were."""
    programs = [child(PAUSE), child(PAUSE)]
    files.remember_programs(tmp_path, [program.pid for program in programs])
    assert files.end_remembered_programs(tmp_path) == 2
    assert [program.wait(10) for program in programs] == [-signal.SIGTERM] * 2
    assert files.end_remembered_programs(tmp_path) == 0


def test_a_deaf_one_is_killed(tmp_path, child, monkeypatch):
    """After the patience; one that hears does not wait for it."""
    monkeypatch.setattr(files, "END_PATIENCE", 0.2)
    deaf, hears = child(DEAF), child(PAUSE)
    files.remember_programs(tmp_path, [deaf.pid, hears.pid])
    began = time.monotonic()
    assert files.end_remembered_programs(tmp_path) == 2
    assert time.monotonic() - began >= 0.2
    assert (deaf.wait(10), hears.wait(10)) == (-signal.SIGKILL, -signal.SIGTERM)


def test_somebody_elses_process_with_the_same_pid_is_left_alone(tmp_path, child):
    """The pid was given out again: the start time tells."""
    stranger = child(PAUSE)
    records = [{"pid": stranger.pid, "start_time": files.start_time(stranger.pid) - 1}]
    (tmp_path / "programs.json").write_bytes(msgspec.json.encode(records))
    assert files.end_remembered_programs(tmp_path) == 0
    assert stranger.poll() is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"[1]",
        b'[{"pid": "x"}]',
        b'[{"pid": -1, "start_time": 5}]',
        b'[{"pid": 99999999999, "start_time": 1}]',
    ],
)
def test_a_damaged_record_ends_nobody(tmp_path, content):
    (tmp_path / "programs.json").write_bytes(content)
    assert files.end_remembered_programs(tmp_path) == 0


def test_start_times(child):
    """Of a process that lives; a zombie is none, nor is nobody."""
    process = child(PAUSE)
    assert files.start_time(process.pid) == files.start_time(process.pid) > 0
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert files.start_time(process.pid) is None
    process.wait()
    assert files.start_time(process.pid) is None


def test_a_name_with_a_bracket_does_not_confuse(child):
    """The second field of the stat file may hold anything."""
    named = "open('/proc/self/comm', 'w').write('a) S 1 2 (b'); import signal; print(flush=True); signal.pause()"
    plain, named = child(PAUSE), child([sys.executable, "-S", "-c", named])
    assert "a) S 1 2 (b" in Path(f"/proc/{named.pid}/stat").read_text()
    assert 0 <= files.start_time(named.pid) - files.start_time(plain.pid) < 100 * os.sysconf("SC_CLK_TCK")
