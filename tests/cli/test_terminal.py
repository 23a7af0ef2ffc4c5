"""`capsule exec -t` in a real terminal, with real programs behind it: as over ssh."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.cli.platform import SANDBOX, Refused

SB = SANDBOX[:9]
NOTE = re.compile(rb"\r\ncapsule: [^\r\n]*\r\n")
"""A line of ours among the remote ones."""
SHELL = ("bash", "--norc", "--noprofile")


async def test_a_shell_its_size_its_kind_and_its_end(screen):
    """What is typed arrives, the size and TERM are ours, the exit code is the shell's, the terminal is given back."""
    it = screen("exec", "-t", SB, "--", *SHELL, size=(101, 33))
    it.type(b"stty size; echo $TERM\r")
    await it.expect(b"33 101\r\n")
    await it.expect(b"xterm-256color\r\n")
    assert it.mode != it.before
    it.type(b"exit 5\r")
    assert await it.ended() == 5
    assert it.mode == it.before


async def test_without_a_command_it_is_a_login_shell(screen, platform):
    it = screen("exec", "-t", SB)
    it.type(b"echo $((6*7)); exit\r")
    await it.expect(b"42\r\n")
    assert await it.ended() == 0


async def test_ctrl_c_is_the_remote_programs(screen):
    """It interrupts what runs there, not us."""
    it = screen("exec", "-t", SB, "--", *SHELL)
    it.type(b"sh -c \"echo a''b; exec sleep 100\"\r")  # what says so is in the foreground
    await it.expect(b"ab\r\n")
    it.type(b"\x03")
    it.type(b"echo c''d $?; exit\r")
    await it.expect(b"cd 130\r\n")
    assert await it.ended() == 0


async def test_resizes_arrive_and_the_last_one_counts(screen, platform, until):
    """A storm of them ends with the size that the window has."""
    it = screen("exec", "-t", SB, "--", *SHELL)
    it.type(b"echo a''b\r")
    await it.expect(b"ab\r\n")
    [job] = platform.jobs
    for cols in range(20, 120):
        it.resize(cols, 50)
    await until(lambda: job.sizes[-1] == (119, 50))
    it.type(b"stty size; exit\r")
    await it.expect(b"50 119\r\n")
    assert await it.ended() == 0


@pytest.mark.skipif(shutil.which("vim") is None, reason="vim is not installed")
async def test_a_full_screen_program(screen, platform):
    """vim: a file is written with keys."""
    it = screen("exec", "-t", "-w", str(platform.root), SB, "--", "vim", "-u", "NONE", "-n", "f")
    await it.expect(b"~")
    it.type(b"ihello\x1b:wq\r")
    assert await it.ended() == 0
    assert (platform.root / "f").read_text() == "hello\n"


async def test_much_output_to_a_terminal_that_is_slow(screen, platform, level):
    """Ten megabytes, after a stop: the process waits, nothing is lost, nothing is held here."""
    it = screen("exec", "-t", SB, "--", "sh", "-c", "stty -opost; echo ready; seq 1 1400000; echo done")
    await it.expect(b"ready\n")
    [job] = platform.jobs
    assert await level(lambda: job.end) < 8_000_000
    assert job.status is None
    assert _resident(it.process.pid) < 120_000_000
    text = await it.expect(b"done\n")
    assert text.count(b"\n") == 1_400_001
    assert text.startswith(b"1\n2\n3\n")
    assert await it.ended() == 0


async def test_a_lost_connection_comes_back_without_losing_or_repeating_a_byte(screen, proxy):
    """Cut in the middle of bursts, again and again."""
    script = "stty -echo -opost; echo ready; while read n; do seq $n $((n+4000)); echo end; done"
    it = screen("exec", "-t", SB, "--", "bash", "-c", script, url=proxy.url)
    await it.expect(b"ready\n")
    for first in (10_000, 20_000, 30_000, 40_000):
        cuts = proxy.cuts
        proxy.budget = 1000 + first // 3
        it.type(b"%d\r" % first)
        burst = b"".join(b"%d\n" % number for number in range(first, first + 4001)) + b"end\n"
        assert NOTE.sub(b"", await it.expect(b"end\n")) == burst
        assert proxy.cuts == cuts + 1
    it.type(b"\x04")
    assert await it.ended() == 0
    assert it.mode == it.before


async def test_what_the_sandbox_no_longer_has_is_said_to_be_missing(screen, proxy, platform, until):
    """Output while nobody was there: its last 64 KiB come, and the rest is counted."""
    script = "stty -echo -opost; echo ready; read x; seq 1 50000; touch done; read x"
    it = screen("exec", "-t", "-w", str(platform.root), SB, "--", "bash", "-c", script, url=proxy.url)
    await it.expect(b"ready\n")
    it.type(b"\r")
    proxy.cut(closed=True)
    await it.expect(b"trying again")
    os.write(platform.jobs[0].stdin, b"\r")  # the key may have been lost
    await until((platform.root / "done").exists)
    proxy.closed = False
    await it.expect(b"bytes of output were lost")
    assert (await it.expect(b"50000\n")).count(b"\n") > 10_000
    it.type(b"\r")
    assert await it.ended() == 0


@pytest.mark.parametrize("keys", [b"\x03\x03\x03", b"\r~."])
async def test_a_lost_connection_can_be_given_up(screen, proxy, platform, keys):
    """Ctrl-C three times, or the escape; the way back is said, the remote shell lives on."""
    it = screen("exec", "-t", SB, "--", *SHELL, url=proxy.url)
    it.type(b"echo a''b\r")
    await it.expect(b"ab\r\n")
    proxy.cut(closed=True)
    await it.expect(b"trying again")
    it.type(keys)
    await it.expect(f"capsule attach {SANDBOX} {platform.jobs[0].tag}".encode())
    assert await it.ended() == 125
    assert it.mode == it.before
    assert platform.jobs[0].status is None


async def test_leaving_and_coming_back(screen, platform, until):
    """`~.` leaves, `~~` is a tilde, `~?` says what there is; `attach` shows what was there, with the shell's state."""
    it = screen("exec", "-t", SB, "--", *SHELL)
    it.type(b"A=kept; echo a''b\r")
    await it.expect(b"ab\r\n")
    it.type(b"~?")
    await it.expect(b"leave, the process runs on")
    it.type(b"~~echo~.\r")
    await it.expect(b"~echo~.: ")
    it.type(b"\r~.")
    await it.expect(f"capsule attach {SANDBOX} {platform.jobs[0].tag}".encode())
    assert (await it.ended(), it.mode == it.before) == (0, True)
    back = screen("attach", SB, platform.jobs[0].tag, size=(90, 20))
    await back.expect(b"ab\r\n")
    back.type(b"echo $A; stty size; exit 3\r")
    await back.expect(b"kept\r\n20 90\r\n")
    assert (await back.ended(), back.mode == back.before) == (3, True)


async def test_a_window_that_is_closed_ends_the_shell(screen, platform, until):
    """Nobody can come back to a shell whose name was never told: SIGHUP, as ssh's server does it."""
    script = "trap 'touch hung-up; exit' HUP; echo ready; while :; do sleep 0.05; done"
    it = screen("exec", "-t", "-w", str(platform.root), SB, "--", "bash", "-c", script)
    await it.expect(b"ready")
    it.hang_up()
    await until(lambda: it.process.poll() is not None)
    await until(lambda: platform.jobs[0].status is not None)
    assert it.process.returncode == 129
    assert (platform.root / "hung-up").exists()


async def test_a_shell_that_ignores_the_hangup_is_killed(screen, platform, until):
    """SIGTERM for us: the terminal is given back, the remote process does not live on."""
    it = screen("exec", "-t", SB, "--", "bash", "-c", "trap '' HUP; echo ready; while :; do sleep 0.1; done")
    await it.expect(b"ready\r\n")
    it.process.terminate()
    assert await it.ended() == 143
    assert it.mode == it.before
    await until(lambda: platform.jobs[0].status == {"exit_code": 137, "signal": 9})


async def test_one_that_was_attached_to_is_left(screen, capsule, platform, until):
    """Closing the window of `attach` is leaving."""
    code, tag, _ = await capsule("exec", "-t", "-d", SB, "--", *SHELL)
    assert code == 0
    it = screen("attach", SB, tag.decode().strip())
    it.type(b"echo a''b\r")
    await it.expect(b"ab\r\n")
    it.hang_up()
    await until(lambda: it.process.poll() is not None)
    assert it.process.returncode == 129
    assert platform.jobs[0].status is None


async def test_a_refusal_leaves_the_terminal_as_it_was(screen, platform):
    """Said in a line; raw mode had not begun."""
    platform.refusals[f"/v1/sandboxes/{SANDBOX}/pty"] = Refused(409, "invalid_state", "It is paused.")
    it = screen("exec", "-t", SB)
    await it.expect(b"capsule: It is paused. (invalid_state)\r\n")
    assert (await it.ended(), it.mode == it.before) == (125, True)


async def test_ctrl_c_while_it_connects(screen, platform, until):
    """Nothing has begun: it ends at once, without a word."""
    platform.silent = True
    it = screen("exec", "-t", SB)
    await until(lambda: platform.asked)
    it.type(b"\x03")
    assert await it.ended() == 130
    assert it.seen in (b"", b"^C")


async def test_in_tmux(environ, platform, until, tmp_path):
    """A terminal that answers questions, with a shell in it: attach, resize, end."""
    tmux = [*("tmux", "-S", str(tmp_path / "tmux"), "-f", "/dev/null")]
    words = f"{sys.executable} -m capsule exec -t {SB} -- {' '.join(SHELL)}"
    size = ("-x", "70", "-y", "20")
    subprocess.run([*tmux, "new-session", "-d", *size, words], env=environ, check=True)  # noqa: ASYNC221
    try:
        await until(lambda: platform.jobs)
        [job] = platform.jobs
        assert job.sizes[0] == (70, 20)
        subprocess.run([*tmux, "resize-window", "-x", "60", "-y", "15"], check=True)  # noqa: ASYNC221
        await until(lambda: job.sizes[-1] == (60, 15))
        subprocess.run([*tmux, "send-keys", "exit 0", "Enter"], check=True)  # noqa: ASYNC221
        await until(lambda: job.status is not None)
        await until(lambda: subprocess.run([*tmux, "ls"], capture_output=True, check=False).returncode)
    finally:
        subprocess.run([*tmux, "kill-server"], capture_output=True, check=False)  # noqa: ASYNC221


def _resident(pid):
    with open(f"/proc/{pid}/statm") as file:  # noqa: PTH123
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
