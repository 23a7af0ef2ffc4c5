"""Watches, and the command line's copies and logs, against a real VM."""

from __future__ import annotations

import hashlib
import os
import subprocess

MIB = 1024 * 1024


async def test_a_watch_tells_what_happens_to_files(create, run, connect):
    """Create, write, rename, chmod, remove, in the directory and (recursive) in one made while it is watched."""
    sandbox = create()
    run(sandbox, "mkdir -p /root/seen")
    async with connect(sandbox, "files/watch") as console:
        await console.say("start", path="/root/seen", recursive=True)
        await console.first("started")
        steps = [
            ("echo 1 > a", ("create", "a")),
            ("echo 2 >> a", ("write", "a")),
            ("chmod 700 a", ("chmod", "a")),
            ("mkdir below", ("create", "below")),
            ("sleep 0.5; echo 3 > below/b", ("create", "below/b")),
            ("mv a c", ("rename", "a")),
            ("rm c", ("remove", "c")),
        ]
        for command, (event, name) in steps:
            run(sandbox, command, cwd="/root/seen")
            await _until_told(console, event, f"/root/seen/{name}")
        renamed = next(note for note in console.notes if note["event"] == "rename")
        assert renamed["to"] == "/root/seen/c"
        run(sandbox, "rm -r /root/seen")
        await console.rest(20)
    assert console.notes[-1] == {"type": "end", "reason": "removed"}
    assert console.closed[0] == 1000


async def _until_told(console, event, path):
    while not any((note.get("event"), note.get("path")) == (event, path) for note in console.notes):
        console.notes.append(await console.first("event"))


def test_files_come_and_go_with_their_hash(create, run, capsule, tmp_path):
    """`capsule cp` both ways, through paths and through pipes."""
    sandbox, content = create(), os.urandom(20 * MIB + 17)
    local = tmp_path / "there and back"
    local.write_bytes(content)
    there = f"{sandbox['id']}:/data/new/file"
    _well(capsule("cp", local, there))
    digest = hashlib.sha256(content).hexdigest()
    assert run(sandbox, "sha256sum < /data/new/file")["stdout"].split()[0] == digest
    _well(capsule("cp", there, tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == content
    assert _well(capsule("cp", there, "-")).stdout == content
    _well(capsule("cp", "-", f"{sandbox['id']}:/data/piped", input=content))
    assert run(sandbox, "cmp /data/piped /data/new/file && echo same")["stdout"] == "same\n"


def test_directories_come_and_go_whole(create, run, capsule, tmp_path):
    """`capsule cp -r` both ways: files, modes, links and empty directories."""
    sandbox = create()
    tree = tmp_path / "tree"
    (tree / "empty").mkdir(parents=True)
    (tree / "sub/deep").mkdir(parents=True)
    (tree / "sub/deep/blob").write_bytes(os.urandom(3 * MIB))
    (tree / "script").write_text("#!/bin/sh\necho it runs\n")
    (tree / "script").chmod(0o750)
    (tree / "link").symlink_to("sub/deep/blob")
    _well(capsule("cp", "-r", tree, f"{sandbox['id']}:/data/tree"))
    assert run(sandbox, "/data/tree/script; readlink /data/tree/link")["stdout"] == "it runs\nsub/deep/blob\n"
    assert run(sandbox, "ls -A /data")["stdout"] == "tree\n"
    _well(capsule("cp", "-r", f"{sandbox['id']}:/data/tree", tmp_path / "back"))
    same = subprocess.run(["diff", "-r", "--no-dereference", tree, tmp_path / "back"], capture_output=True, check=False)
    assert (same.returncode, same.stdout) == (0, b"")
    assert (tmp_path / "back/script").stat().st_mode & 0o777 == 0o750
    refused = capsule("cp", f"{sandbox['id']}:/data/tree", tmp_path / "again")
    assert refused.returncode == 125
    assert b"-r" in refused.stderr


def test_a_pipe_through_a_sandbox(create, capsule):
    """`capsule exec`: input, output, errors and exit code are the process's, of 4 MiB of bytes."""
    sandbox, content = create(), os.urandom(4 * MIB)
    done = capsule("exec", sandbox["id"], "--", "sh", "-c", "cat; echo done >&2; exit 42", input=content)
    assert (done.returncode, done.stderr, done.stdout == content) == (42, b"done\n", True)
    missing = capsule("exec", sandbox["id"], "--", "no-such-program", stdin=subprocess.DEVNULL)
    assert missing.returncode == 127


def test_logs_follow_a_detached_process(create, capsule, run):
    """`exec -d`, `ps`, `logs -f` to its end, `kill`."""
    sandbox = create()
    line = "for i in $(seq 30); do echo line $i; sleep 0.1; done"
    tag = _well(capsule("exec", "-d", "--tag", "job", sandbox["id"], "--", "sh", "-c", line)).stdout.decode().strip()
    assert tag == "job"
    assert b"job" in _well(capsule("ps", sandbox["id"])).stdout
    followed = _well(capsule("logs", "-f", sandbox["id"], "job")).stdout.decode()
    assert followed == "".join(f"line {number}\n" for number in range(1, 31))
    assert capsule("logs", sandbox["id"], "job").stdout.decode() == followed
    _well(capsule("exec", "-d", "--tag", "long", sandbox["id"], "--", "sleep", "1000"))
    _well(capsule("kill", sandbox["id"], "long"))
    ended = capsule("attach", sandbox["id"], "long", stdin=subprocess.DEVNULL)
    assert ended.returncode == 128 + 15, ended.stderr
    assert run(sandbox, "pgrep -c sleep || true")["stdout"] == "0\n"


def _well(done):
    assert done.returncode == 0, done.stderr.decode()
    return done
