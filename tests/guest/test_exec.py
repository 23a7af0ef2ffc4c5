"""exec: what runs, as whom, with what around it, and what comes back."""

from __future__ import annotations

import os

import pytest

from agent.wire.messages import End

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="exec as root is the default, which needs root")


def test_a_command_line_goes_to_the_shell(client):
    """Without args, cmd is a shell command line; output, exit code and the pid notice come back."""
    stream = client.open("exec", {"cmd": "echo out; echo err >&2; exit 7"})
    notice = client.notice(stream)
    assert notice.keys() == {"pid"}
    outcome = client.finish(stream)
    assert (outcome.stdout, outcome.stderr) == (b"out\n", b"err\n")
    assert outcome.reply is not None
    assert outcome.reply["exit_code"] == 7
    assert outcome.reply["timed_out"] is False
    assert outcome.reply["duration_ms"] >= 0
    assert "signal" not in outcome.reply


def test_arguments_are_not_interpreted(client):
    """With args, cmd is a program: quotes, spaces and dollars arrive as they are; an empty list counts as given."""
    outcome = client.call("exec", {"cmd": "printf", "args": ["%s|", "a b", "$HOME", "'"]})
    assert outcome.stdout == b"a b|$HOME|'|"
    assert client.call("exec", {"cmd": "true", "args": []}).reply["exit_code"] == 0
    assert client.call("exec", {"cmd": "true; echo x", "args": []}).reply["exit_code"] == 127


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({"cmd": "/no/such/program", "args": []}, 127, b"No such file"),
        ({"cmd": "nosuchprogram", "args": []}, 127, b"No such file"),
        ({"cmd": "/etc/passwd", "args": []}, 126, b"Permission denied"),
        ({"cmd": "ls", "args": [], "envs": {"PATH": "/nowhere"}}, 127, b"ls"),
    ],
)
def test_a_program_that_cannot_start_exits_as_in_a_shell(client, body, code, text):
    """126 and 127 with the reason on stderr; PATH is that of the process's own environment."""
    outcome = client.call("exec", body)
    assert outcome.reply["exit_code"] == code
    assert text in outcome.stderr


def test_environment_is_small_and_the_request_wins(client):
    """A fixed base, then the exec's envs; nothing of the daemon's own environment."""
    outcome = client.call("exec", {"cmd": "env", "args": [], "envs": {"HOME": "/elsewhere", "N": "é\nü"}})
    lines = outcome.stdout.decode()
    assert "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n" in lines
    assert "USER=root\nLOGNAME=root\nSHELL=/bin/" in lines
    assert "HOME=/elsewhere\nN=é\nü\n" in lines or "HOME=/elsewhere" in lines
    assert "N=é\nü\n" in lines
    assert "ASAN_OPTIONS" not in lines


def test_default_directory_is_home(client, tmp_path):
    """cwd is the user's home when it exists; a given cwd wins."""
    assert client.call("exec", {"cmd": "pwd"}).stdout == b"/root\n"
    assert client.call("exec", {"cmd": "pwd", "cwd": str(tmp_path)}).stdout.decode() == f"{tmp_path}\n"


@pytest.mark.parametrize("user", ["nobody", "65534"])
def test_another_user_by_name_or_number(client, user):
    """uid, gid and the environment are the user's; its home does not exist, so it starts in /."""
    outcome = client.call("exec", {"cmd": "id -u; id -G; echo $USER $LOGNAME; pwd", "user": user})
    assert outcome.stdout.decode() == "65534\n65534\nnobody nobody\n/\n"


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"cmd": "id", "user": "nosuchuser"}, "nosuchuser"),
        ({"cmd": "id", "user": "4294967295"}, "4294967295"),
        ({"cmd": "pwd", "cwd": "/no/such"}, "/no/such"),
        ({"cmd": "pwd", "cwd": "/etc/passwd"}, "/etc/passwd"),
    ],
)
def test_unknown_user_or_directory_is_a_fault(client, body, text):
    """Nothing is started, no pid is told."""
    outcome = client.call("exec", body)
    assert outcome.fault == "not_found"
    assert text in outcome.message
    assert outcome.notices == []


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"cmd": ""},
        {"cmd": 1},
        {"cmd": None},
        {"cmd": "a\0b"},
        {"cmd": "true", "args": "x"},
        {"cmd": "true", "args": ["a\0"]},
        {"cmd": "true", "args": [1]},
        {"cmd": "true", "envs": {"A=B": "c"}},
        {"cmd": "true", "envs": {"": "c"}},
        {"cmd": "true", "envs": {"A": 1}},
        {"cmd": "true", "envs": {"A": "\0"}},
        {"cmd": "true", "cwd": "relative"},
        {"cmd": "true", "cwd": ""},
        {"cmd": "true", "user": 0},
        {"cmd": "true", "stdin": 1},
        {"cmd": "true", "timeout_ms": -1},
        {"cmd": "true", "timeout_ms": True},
        {"cmd": "true", "tag": ""},
        {"cmd": "true", "tag": "t" * 129},
        {"cmd": "true", "background": True, "stdin": True},
    ],
)
def test_wrong_bodies_are_refused(client, body):
    """A FAULT, and the connection lives on."""
    assert client.call("exec", body).fault == "invalid_argument"
    assert client.call("info").reply is not None


def test_unknown_keys_are_ignored(client):
    """The opener may be newer than the guest's image."""
    outcome = client.call("exec", {"cmd": "true", "later": {"a": [1, 2.5, None, b"x"]}})
    assert outcome.reply["exit_code"] == 0


def test_stdin_is_carried_and_closed_by_end(client):
    """END closes the process's stdin; more than the credit window arrives whole."""
    content = os.urandom(1 << 20)
    outcome = client.upload({"cmd": "cat", "stdin": True}, content, method="exec")
    assert outcome.stdout == content
    assert outcome.reply["exit_code"] == 0


def test_stdin_is_empty_unless_asked_for(client):
    """Without stdin the process reads /dev/null, and what the opener sends is dropped, not kept."""
    assert client.upload({"cmd": "cat; sleep 0.05"}, b"x" * 300_000, method="exec").stdout == b""


def test_a_process_that_closes_stdin_does_not_block_the_opener(client):
    """Credit is granted for what nobody will read."""
    body = {"cmd": "exec 0<&-; sleep 0.2; echo done", "stdin": True}
    assert client.upload(body, b"x" * (1 << 20), method="exec").stdout == b"done\n"


def test_a_clean_start(client):
    """No descriptor of the daemon, its own session, default signals, umask 022, ordinary OOM score."""
    body = {
        "cmd": "ls /proc/self/fd | wc -l; umask; grep -E '^Sig(Blk|Ign)' /proc/self/status; "
        "cat /proc/self/oom_score_adj; [ $(ps -o sid= -p $$) -eq $$ ] && echo leader"
    }
    lines = client.call("exec", body).stdout.decode().split("\n")
    assert lines[0] == "4"  # 0, 1, 2 and the directory that ls reads
    assert lines[1] == "0022"
    assert lines[2:4] == ["SigBlk:\t0000000000000000", "SigIgn:\t0000000000000000"]
    assert lines[4:6] == ["0", "leader"]


def test_many_at_once_on_one_connection(client):
    """Streams are independent: the slow first one does not hold the others up."""
    slow = client.open("exec", {"cmd": "read x; echo slow", "stdin": True})
    streams = [client.open("exec", {"cmd": f"echo {i}"}) for i in range(20)]
    assert [client.finish(stream).stdout for stream in streams] == [b"%d\n" % i for i in range(20)]
    client.send(End(slow))
    assert client.finish(slow).stdout == b"slow\n"
