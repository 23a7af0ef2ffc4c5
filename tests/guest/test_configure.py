"""configure, and users as the image's files tell them. In a private /etc and host name: these tests change both."""

from __future__ import annotations

import os

import pytest

pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs mount and UTS namespaces"),
]

PASSWD = """root:x:0:0:root:/root:/bin/sh
broken line
worker:x:1500:1500:Worker,,,:{home}:/bin/bash
1500:x:1501:1501::/:
noshell:x:1502:1500::/nowhere:
"""
GROUP = """root:x:0:
worker:x:1500:
extra:x:1600:someone,worker
other:x:1601:workers,notworker
last:x:1602:worker"""


@pytest.fixture
def etc(tmp_path):
    etc = tmp_path / "etc"
    home = tmp_path / "home"
    etc.mkdir()
    home.mkdir()
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    (etc / "passwd").write_text(PASSWD.format(home=home))
    (etc / "group").write_text(GROUP)
    (etc / "resolv.conf").symlink_to("/run/no/such/stub")
    return etc


@pytest.fixture
def client(etc, start_guest):
    script = f'mount --bind {etc} /etc && exec "$@"'
    prefix = ("unshare", "-m", "-u", "sh", "-c", script, "sh")
    return start_guest("--system-changes", "on", prefix=prefix).connect()


def test_hostname_and_resolver(client, etc):
    """Set and written; a resolv.conf that is a link is replaced, not followed."""
    body = {"hostname": "box-1", "dns": ["1.1.1.1", "2606:4700::1111"]}
    assert client.call("configure", body).reply == {}
    assert client.call("exec", {"cmd": "uname -n"}).stdout == b"box-1\n"
    assert (etc / "hostname").read_text() == "box-1\n"
    assert not (etc / "resolv.conf").is_symlink()
    assert (etc / "resolv.conf").read_text() == "nameserver 1.1.1.1\nnameserver 2606:4700::1111\n"
    assert sorted(path.name for path in etc.iterdir()) == ["group", "hostname", "passwd", "resolv.conf"]


def test_entropy(client):
    """Given to the kernel, which takes it."""
    assert client.call("configure", {"entropy": os.urandom(64)}).reply == {}


def test_default_envs(client):
    """For every exec after it, also on other connections; the exec's own win; the next configure replaces them."""
    client.call("configure", {"envs": {"A": "1", "B": "2", "PATH": "/bin"}})
    outcome = client.call("exec", {"cmd": "echo $A $B $C $PATH", "envs": {"B": "3"}})
    assert outcome.stdout == b"1 3 /bin\n"
    client.call("configure", {"hostname": "same-envs"})
    assert client.call("exec", {"cmd": "echo $A"}).stdout == b"1\n"
    client.call("configure", {"envs": {"C": "4"}})
    assert client.call("exec", {"cmd": "echo $A $C"}).stdout == b"4\n"
    client.call("configure", {"envs": {}})
    assert client.call("exec", {"cmd": "echo $C"}).stdout == b"\n"


@pytest.mark.parametrize(
    "body",
    [
        {"hostname": ""},
        {"hostname": "a b"},
        {"hostname": "-a"},
        {"hostname": "a\nb"},
        {"hostname": "a" * 65},
        {"dns": ["localhost"]},
        {"dns": ["1.1.1.1\noptions x"]},
        {"dns": ["1.1.1.1"] * 4},
        {"dns": "1.1.1.1"},
        {"envs": {"A=": "x"}},
        {"envs": {"A": "x" * 140_000}},
        {"time_ns": -1},
        {"time_ns": 1.5},
        {"entropy": "text"},
        {"entropy": b"x" * 513},
    ],
)
def test_wrong_values_change_nothing(client, etc, body):
    """Nothing of the request is applied."""
    assert client.call("configure", {"envs": {"X": "x"}, **body}).fault == "invalid_argument"
    assert client.call("exec", {"cmd": "echo $X"}).stdout == b"\n"
    assert not (etc / "hostname").exists()


def test_users_of_the_image(client, tmp_path):
    """Name before number, supplementary groups, home and shell; broken lines are no users."""
    body = {"cmd": "id -u; id -G; echo $HOME $USER $SHELL; pwd", "user": "worker"}
    home = tmp_path / "home"
    expected = f"1500\n1500 1600 1602\n{home} worker /bin/bash\n{home}\n"
    assert client.call("exec", body).stdout.decode() == expected
    assert client.call("exec", {"cmd": "id -u", "user": "1500"}).stdout == b"1501\n"
    assert client.call("exec", {"cmd": "echo $USER", "user": "1502"}).stdout == b"noshell\n"
    assert client.call("exec", {"cmd": "echo $SHELL; pwd", "user": "noshell"}).stdout == b"/bin/sh\n/\n"
    for user in ("broken line", "", "workers", "1600"):
        assert client.call("exec", {"cmd": "true", "user": user}).fault == "not_found"


def test_root_without_any_passwd(client, etc):
    """An image of one static binary still has root."""
    (etc / "passwd").unlink()
    (etc / "group").unlink()
    assert client.call("exec", {"cmd": "echo $HOME"}).stdout == b"/root\n"
    assert client.call("exec", {"cmd": "true", "user": "worker"}).fault == "not_found"
    entry = client.call("files.stat", {"path": "/"}).reply["entry"]
    assert (entry["owner"], entry["group"]) == ("0", "0")


def test_names_of_entries(client, etc):
    """From the image's files."""
    os.chown(etc / "group", 1502, 1602)
    entry = client.call("files.stat", {"path": "/etc/group"}).reply["entry"]
    assert (entry["owner"], entry["group"], entry["uid"], entry["gid"]) == ("noshell", "last", 1502, 1602)


def test_a_daemon_that_only_serves_leaves_its_machine_alone(start_guest):
    """Without --system-changes, configure only keeps the envs."""
    client = start_guest().connect()
    before = os.uname().nodename
    assert client.call("configure", {"hostname": "stolen", "time_ns": 1, "envs": {"A": "1"}}).reply == {}
    assert os.uname().nodename == before
    assert client.call("exec", {"cmd": "echo $A"}).stdout == b"1\n"
