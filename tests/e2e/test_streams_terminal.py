"""`capsule exec -t` on a real VM is what ssh is: a shell, full-screen programs, keys, sizes, lost connections."""

from __future__ import annotations

import hashlib
import os
import re
import signal

import pytest

MIB = 1024 * 1024
BLOB = 10 * MIB
LINES = 2000
COUNT = f"""
import sys, time
for number in range({LINES}):
    sys.stdout.write("%07d %s\\n" % (number, "x" * 42))
    sys.stdout.flush()
    time.sleep(0.004)
"""
"""13 KB a second: what the sandbox keeps of it lasts five seconds without a connection."""
TICKER = "import time\nfor number in range(10**6):\n    print('tick', number, flush=True)\n    time.sleep(0.05)\n"


@pytest.fixture
def put(api):
    """`put(sandbox, path, bytes)`."""

    def write(sandbox, path, content):
        form = {"path": (None, path), "file": ("file", content)}
        answer = api.post(f"/sandboxes/{sandbox['id']}/files/write", files=form)
        assert answer.status_code == 204, answer.text

    return write


def test_a_shell_an_editor_and_top_in_a_window(create, run, tmux, poll):
    """Prompt, vim (with a window that grows under it), top, Ctrl-C, exit code: as a person sees them."""
    sandbox = create()
    tmux.type(f"capsule exec -t -e PS1='remote> ' {sandbox['id']} -- bash --norc")
    tmux.expect("remote> ")
    tmux.type("stty size")
    tmux.expect("24 80")

    tmux.type("vi /root/note")
    tmux.expect(lambda screen: screen.count("~\n") >= 20)
    tmux.type("ihello from vim", "Enter")
    tmux.type("zweite Zeile: äöü €")
    tmux.type("", "Escape")
    tmux.resize(100, 40)
    tmux.expect(lambda screen: len(screen.splitlines()) == 40 and screen.count("~\n") >= 35)
    tmux.type(":wq")
    tmux.expect(lambda screen: "~\n" not in screen.split("remote>")[-1] and screen.rstrip().endswith("remote>"))
    assert run(sandbox, "cat /root/note")["stdout"] == "hello from vim\nzweite Zeile: äöü €\n\n"
    tmux.type("clear; stty size")
    tmux.expect("40 100")

    tmux.type("top")
    tmux.expect(lambda screen: "load average" in screen and re.search(r"PID +USER", screen))
    tmux.type("q", "")
    tmux.expect(lambda screen: screen.rstrip().endswith("remote>"))
    tmux.type("clear; echo back")
    tmux.expect(lambda screen: "load average" not in screen and "back\nremote>" in screen)

    tmux.type("clear; echo sleeping; sleep 1000")
    tmux.expect("sleeping\n")
    poll(lambda: run(sandbox, "pgrep -x sleep || true")["stdout"], 20, "a sleep to be interrupted")
    tmux.type("", "C-c")
    tmux.expect("^C")
    tmux.type("echo code=$?")
    tmux.expect("code=130")
    assert run(sandbox, "pgrep -c sleep || true")["stdout"] == "0\n"
    tmux.type("exit 7")
    tmux.expect(lambda screen: screen.rstrip().endswith("local>"))
    tmux.type("echo ours=$?; stty -a | grep -c ' echo '")
    tmux.expect(lambda screen: "ours=7\n1\n" in screen)


def test_ten_megabytes_of_bytes_come_as_they_are(create, put, typist):
    """A binary file through a remote terminal without output processing and a local raw one: count and hash are right;
    the local terminal is as before."""
    sandbox, blob = create(), _noise(BLOB)
    put(sandbox, "/root/blob", blob)
    one = typist("exec", "-t", sandbox["id"], "--", "sh", "-c", "stty -opost; cat /root/blob; exit 5")
    come = bytearray()
    assert one.drain(come.extend, 90) == 5, one.errors.read_text()
    assert (len(come), hashlib.sha256(come).digest()) == (BLOB, hashlib.sha256(blob).digest())
    assert one.restored()


def _noise(size):
    seed = hashlib.sha256(b"noise").digest()
    return b"".join(hashlib.sha256(seed + number.to_bytes(4)).digest() for number in range(size // 32))


def test_a_connection_that_is_lost_costs_no_byte(create, typist, cable):
    """Cut three times in the middle of output: the command attaches again, what the terminal shows has no gap and
    nothing twice, the keys work, and the exit code comes."""
    sandbox = create()
    script = f"stty -opost -echo; python3 -c '{COUNT}'; read line; echo got $line; exit 9"
    one = typist("exec", "-t", sandbox["id"], "--", "bash", "-c", script, url=cable.url)
    text = b""
    for _ in range(3):
        text += one.expect(b"00 x", 60) + b"00 x"
        cuts, cable.cut_after = cable.cuts, 10_000
        while cable.cuts == cuts:
            text += one.seen + one.read(1)
            one.seen = b""
    text += one.expect(b"%07d " % (LINES - 1), 60) + b"%07d " % (LINES - 1)
    text += one.expect(b"\n") + b"\n"
    assert text == b"".join(b"%07d %s\n" % (number, b"x" * 42) for number in range(LINES)), one.errors.read_text()
    one.type(b"these keys\r")
    one.expect(b"got these keys\n")
    assert one.drain(lambda _: None, 30) == 9
    assert one.errors.read_text().count("connected again") == 3
    assert "lost" not in one.errors.read_text().replace("connection was lost", "")
    assert one.restored()


def test_what_a_flood_lost_with_the_connection_is_said(create, typist, cable):
    """Nobody holds up a terminal that nobody is attached to: more than the sandbox keeps is lost, and its size told."""
    sandbox = create()
    size = 3 * MIB
    script = f"stty -opost; read go; head -c {size} /dev/zero | tr '\\0' z; printf END"
    one = typist("exec", "-t", sandbox["id"], "--", "bash", "-c", script, url=cable.url)
    while cable.cuts == 0:
        one.type(b"\n")
        cable.cut_after = cable.cut_after or MIB
        one.seen += one.read(0.5)
    come = bytearray()
    assert one.drain(come.extend) == 0, one.errors.read_text()
    lost = [int(number) for number in re.findall(r"(\d+) bytes of output were lost", one.errors.read_text())]
    print(f"lost with the connection: {sum(lost)} of {size} bytes")  # noqa: T201 - a figure
    assert come.endswith(b"zEND")
    assert come.count(b"z") + sum(lost) == size, (lost, one.errors.read_text())


def test_a_terminal_that_goes_ends_what_ran_in_it(create, run, typist, poll):
    """Ended by a signal, the command hangs up its remote process, and gives the local terminal back."""
    sandbox = create()
    one = typist("exec", "-t", sandbox["id"], "--", "python3", "-c", TICKER)
    one.expect(b"tick 3")
    one.process.send_signal(signal.SIGTERM)
    assert one.drain(lambda _: None, 20) == 128 + signal.SIGTERM, one.errors.read_text()
    assert one.restored()
    poll(lambda: run(sandbox, "pgrep -c python3 || true")["stdout"] == "0\n", 20, "a process that was hung up")


def test_sizes_arrive(create, typist):
    """Every change of the local terminal's size comes to the remote one; the last one counts."""
    sandbox = create()
    one = typist("exec", "-t", sandbox["id"], "--", "bash", "--norc", cols=133, rows=31)
    one.expect(b"# ")
    one.type(b"trap 'echo size $(stty size)' WINCH; echo at $(stty size)\r")
    one.expect(b"at 31 133\r\n")
    for cols, rows in ((90, 20), (200, 60), (40, 10)):
        one.resize(cols, rows)
        one.type(b"\r")  # bash runs traps between commands
        one.expect(b"size %d %d\r\n" % (rows, cols))
    one.type(b"exit\r")
    assert one.drain(lambda _: None, 20) == 0


def test_a_shell_outlives_its_hosts_daemon_and_a_pause(platform, create, api, typist, poll):
    """The agent is killed: the command attaches again by itself. The sandbox is paused: it says how to come back, and
    after the resume `capsule attach` is in the same shell."""
    sandbox = create()
    one = typist("exec", "-t", "-e", "PS1=> ", sandbox["id"], "--", "bash", "--norc")
    one.expect(b"> ")
    one.type(b"X=kept; echo set $X\r")
    one.expect(b"set kept\r\n")
    [agent] = platform.ready["agent_pids"]
    os.kill(agent, signal.SIGKILL)
    poll(lambda: "connected again" in one.errors.read_text(), 60, "a new connection")
    one.type(b"echo still $X\r")
    one.expect(b"still kept\r\n")
    assert api.post(f"/sandboxes/{sandbox['id']}/pause").status_code == 200
    assert one.drain(lambda _: None, 30) == 125
    assert one.restored()
    said = re.search(r"`capsule (attach \S+ \S+)` comes back", one.errors.read_text())
    assert said, one.errors.read_text()
    assert api.post(f"/sandboxes/{sandbox['id']}/resume").status_code == 200
    back = typist(*said[1].split())
    back.expect(b"> ")
    back.type(b"echo again $X; exit 6\r")
    back.expect(b"again kept\r\n")
    assert back.drain(lambda _: None, 30) == 6, back.errors.read_text()
    assert back.restored()
