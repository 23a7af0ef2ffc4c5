"""`capsule cp`: both ways, in the manner of scp."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess

import pytest
import trio

from tests.cli.platform import SANDBOX, Refused

SB = SANDBOX[:9]
CONTENT = bytes(range(256)) * 4000


async def test_there_and_back(capsule, platform, tmp_path):
    """Every byte, under the target's name, and under the source's in a directory."""
    (tmp_path / "a b").write_bytes(CONTENT)
    (platform.root / "dir").mkdir()
    for target, at in (("/new/x", "new/x"), ("/dir", "dir/a b"), ("/made/", "made/a b")):
        code, out, err = await capsule("cp", "a b", f"{SB}:{target}")
        assert (code, out, err) == (0, b"", "")
        assert (platform.root / at).read_bytes() == CONTENT
    (tmp_path / "here").mkdir()
    for target, at in (("y", "y"), ("here", "here/x"), ("here/", "here/x"), ("y", "y")):
        assert await capsule("cp", f"{SB}:/new/x", target) == (0, b"", "")
        assert (tmp_path / at).read_bytes() == CONTENT


async def test_several_files_into_a_directory(capsule, platform, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    assert (await capsule("cp", "one", "two", f"{SB}:/dir/"))[0] == 0
    (tmp_path / "back").mkdir()
    assert (await capsule("cp", f"{SB}:/dir/one", f"{SB}:/dir/two", "back"))[0] == 0
    assert sorted(path.read_text() for path in (tmp_path / "back").iterdir()) == ["one", "two"]


async def test_input_and_output(capsule, platform):
    """`-`: through pipes, both ways."""
    assert await capsule("cp", "-", f"{SB}:/x", stdin=CONTENT) == (0, b"", "")
    assert (platform.root / "x").read_bytes() == CONTENT
    assert await capsule("cp", f"{SB}:/x", "-") == (0, CONTENT, "")


async def test_a_download_goes_on_where_it_was_cut(capsule, platform, tmp_path):
    """Nothing of the first half is sent again, and nobody sees a file that is not whole."""
    (platform.root / "x").write_bytes(CONTENT)
    platform.cut_download_at = 300_000
    assert (await capsule("cp", f"{SB}:/x", "x"))[0] == 0
    assert (tmp_path / "x").read_bytes() == CONTENT
    assert [path for _, path in platform.asked].count(f"/v1/sandboxes/{SANDBOX}/files/stream/read") == 2
    platform.cut_download_at = 300_000
    assert (await capsule("cp", f"{SB}:/x", "-"))[:2] == (0, CONTENT)


async def test_an_upload_that_is_cut_is_said(started, platform, proxy, until):
    """It is not sent again, for the sandbox may have it; the old file stays."""
    (platform.root / "x").write_text("old")
    process = started("cp", "-", f"{SB}:/x", url=proxy.url, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdin.write(b"new")
    process.stdin.flush()
    await until(lambda: platform.beginning)
    proxy.cut()
    with trio.fail_after(60):
        _, told = await trio.to_thread.run_sync(process.communicate, b"more" * 1_000_000, abandon_on_cancel=True)
    code, err = process.returncode, told.decode()
    assert (code, err.startswith("capsule: the connection was lost")) == (125, True)
    assert (platform.root / "x").read_text() == "old"


async def test_damage_is_found(capsule, platform, tmp_path):
    """What the server says it has written is compared with what was sent."""
    (tmp_path / "x").write_bytes(CONTENT)
    platform.damage = True
    code, _, err = await capsule("cp", "x", f"{SB}:/x")
    assert (code, "not what was sent" in err) == (125, True)


async def test_json_names_what_was_copied(capsule, platform, tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    _, out, _ = await capsule("cp", "--json", "x", f"{SB}:/x")
    said = json.loads(out)
    assert (said["bytes"], said["sha256"]) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("file", "other"), 2, "one side is SANDBOX:/path"),
        ((f"{SB}:/a", f"{SB}:/b"), 2, "one side is SANDBOX:/path"),
        (("file", f"{SB}:relative"), 2, "are absolute"),
        (("file", f"{SB}:/a/../b"), 2, "have no .."),
        (("-", "file", f"{SB}:/a/"), 2, "for one file alone"),
        (("file", "dir", f"{SB}:/a"), 2, "go into a directory"),
        ((f"{SB}:/file", f"{SB}:/dir/", "file"), 125, "is not a directory"),
        (("nothing", f"{SB}:/a"), 125, "there is no such file"),
        ((f"{SB}:/nothing", "a"), 125, "there is no such file"),
        (("dir", f"{SB}:/a"), 125, "is a directory; `capsule cp -r`"),
        ((f"{SB}:/dir", "a"), 125, "is a directory; `capsule cp -r`"),
        (("-r", "dir", f"{SB}:/file"), 125, "is a file, which a directory does not replace"),
        (("-r", f"{SB}:/dir", "file"), 125, "is a file, which a directory does not replace"),
        (("-", f"{SB}:/dir"), 125, "is a directory: name the file"),
        ((f"{SB}:/clash", "."), 125, "is a directory, which a file does not replace"),
        (("clash", f"{SB}:/"), 125, "is a directory, which a file does not replace"),
        ((f"{SB}:/file", "nowhere/"), 125, "there is no such directory"),
        ((f"{SB}:/file", "file/"), 125, "there is no such directory"),
        (("-r", f"{SB}:/dir", "-"), 125, "cannot be written to our output"),
    ],
)
async def test_what_would_be_a_mess_is_refused(capsule, platform, tmp_path, arguments, code, words):
    """Before anything is sent."""
    for place in (tmp_path, platform.root):
        (place / "file").write_text("kept")
        (place / "dir").mkdir()
    (tmp_path / "clash").mkdir() if arguments[0].startswith(SB) else (tmp_path / "clash").write_text("")
    (platform.root / "clash").write_text("") if arguments[0].startswith(SB) else (platform.root / "clash").mkdir()
    found, out, err = await capsule("cp", *arguments)
    assert (found, out, words in err) == (code, b"", True), err
    assert not any("/files/stream/" in path for _, path in platform.asked)


async def test_devices_and_links_stay_what_they_are(capsule, platform, tmp_path):
    """A download to /dev/null does not replace it; one to a link replaces what it leads to."""
    (platform.root / "x").write_bytes(CONTENT)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    assert (await capsule("cp", f"{SB}:/x", "link"))[0] == 0
    assert ((tmp_path / "link").is_symlink(), (tmp_path / "real").read_bytes()) == (True, CONTENT)
    held = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)  # a reader waits for no writer that never comes
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(capsule, "cp", f"{SB}:/x", "pipe")
                assert await _read(held, len(CONTENT)) == CONTENT
    finally:
        os.close(held)
    assert (tmp_path / "pipe").is_fifo()


async def _read(fd, size):
    data = b""
    while len(data) < size:
        await trio.lowlevel.wait_readable(fd)
        data += os.read(fd, 65536)
    return data


async def test_progress_is_for_terminals(screen, platform, tmp_path):
    """A line with the share, the size and the rate; errors begin on a line of their own."""
    (tmp_path / "x").write_bytes(CONTENT)
    it = screen("cp", "x", f"{SB}:/x")
    await it.expect(b"x  [########################] 100%  1000.0 KiB")
    await it.expect(b"\r\n")
    assert await it.ended() == 0
    quiet = screen("cp", "-q", "x", f"{SB}:/x")
    assert (await quiet.ended(), bytes(quiet.seen)) == (0, b"")


async def test_a_terminal_as_input_can_be_interrupted(screen, platform, until):
    it = screen("cp", "-", f"{SB}:/x")
    await until(lambda: platform.beginning)
    it.type(b"\x03")
    assert await it.ended() == -signal.SIGINT


async def test_a_download_that_is_ended_leaves_nothing(started, platform, tmp_path, until):
    """SIGTERM: the half file goes, too."""
    (platform.root / "x").write_bytes(CONTENT)
    (tmp_path / "into").mkdir()
    platform.stall_download = True
    process = started("cp", f"{SB}:/x", "into/x")
    await until(lambda: list((tmp_path / "into").iterdir()))
    process.terminate()
    await until(lambda: process.poll() is not None)
    assert (process.returncode, list((tmp_path / "into").iterdir())) == (143, [])


async def test_a_refusal_by_the_sandbox_is_said(capsule, platform, tmp_path):
    platform.refusals[f"/v1/sandboxes/{SANDBOX}/files/stream/write"] = Refused(409, "disk_full", "The disk is full.")
    code, _, err = await capsule("cp", "-", f"{SB}:/x", stdin=b"x")
    assert (code, err) == (125, "capsule: The disk is full. (disk_full)\n")
