"""configure, and users as the image's files tell them. In a private /etc and host name: these tests change both."""

from __future__ import annotations

import os
import signal
import time

import pytest

from agent.guest.build import compile_daemon
from agent.wire.messages import Cancel

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
def lib(tmp_path):
    (tmp_path / "lib" / "dbus").mkdir(parents=True)
    return tmp_path / "lib"


@pytest.fixture
def private(etc, lib):
    """Runs a command with an /etc, a /var/lib and a host name of its own."""
    script = f'mount --bind {etc} /etc && mount --bind {lib} /var/lib && exec "$@"'
    return ("unshare", "-m", "-u", "sh", "-c", script, "sh")


@pytest.fixture
def client(private, start_guest):
    return start_guest("--system-changes", "on", prefix=private).connect()


def test_hostname_and_resolver(client, etc):
    """Set and written; a resolv.conf that is a link is replaced, not followed."""
    body = {"hostname": "box-1", "dns": ["1.1.1.1", "2606:4700::1111"]}
    assert client.call("configure", body).reply == {}
    assert client.call("exec", {"cmd": "uname -n"}).stdout == b"box-1\n"
    assert (etc / "hostname").read_text() == "box-1\n"
    assert not (etc / "resolv.conf").is_symlink()
    assert (etc / "resolv.conf").read_text() == "nameserver 1.1.1.1\nnameserver 2606:4700::1111\n"
    assert sorted(path.name for path in etc.iterdir()) == ["group", "hostname", "passwd", "resolv.conf"]


@pytest.mark.parametrize("dbus", ["file", "link", "none"])
def test_machine_id(client, etc, lib, dbus):
    """In /etc, and in D-Bus's own file where that is one."""
    (etc / "machine-id").write_text("0" * 31 + "1\n")
    if dbus == "file":
        (lib / "dbus" / "machine-id").write_text("0" * 31 + "1\n")
    elif dbus == "link":
        (lib / "dbus" / "machine-id").symlink_to("/etc/machine-id")
    assert client.call("configure", {"machine_id": "0123456789abcdef" * 2}).reply == {}
    assert (etc / "machine-id").read_text() == "0123456789abcdef" * 2 + "\n"
    own = lib / "dbus" / "machine-id"
    if dbus == "file":
        assert own.read_text() == "0123456789abcdef" * 2 + "\n"
    assert own.is_symlink() == (dbus == "link")
    assert [file.name for file in own.parent.iterdir()] == ([] if dbus == "none" else ["machine-id"])
    assert not list(etc.glob("*.capsule"))


def test_a_machine_id_that_leads_elsewhere_is_replaced(client, etc, tmp_path):
    """A link is not written through."""
    (tmp_path / "victim").write_text("untouched")
    (etc / "machine-id").symlink_to(tmp_path / "victim")
    assert client.call("configure", {"machine_id": "b" * 32}).reply == {}
    assert not (etc / "machine-id").is_symlink()
    assert (tmp_path / "victim").read_text() == "untouched"


IDENTITY = {"hostname": "box-2", "machine_id": "c" * 32, "dns": ["1.1.1.1"]}


def contents(etc):
    return [(etc / name).read_text() for name in ("hostname", "machine-id", "resolv.conf")]


def lines_of(body):
    dns = "".join(f"nameserver {server}\n" for server in body["dns"])
    return [body["hostname"] + "\n", body["machine_id"] + "\n", dns]


def test_what_is_right_already_is_not_written(start_guest, private, etc):
    """A new daemon does not know what the one before has written, and looks: no page of the disk gets dirty."""
    found = []
    for _ in range(2):
        client = start_guest("--system-changes", "on", prefix=private).connect()
        assert client.call("configure", IDENTITY).reply == {}
        found.append({file.name: file.stat().st_ino for file in etc.iterdir()})
    assert found[0] == found[1]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    """A daemon that notes each of its children, and how many it has noted."""
    directory = tmp_path_factory.mktemp("forks")
    noted = directory / "noted"
    noted.touch()
    header = directory / "forks.h"
    header.write_text(f"""#include <fcntl.h>
#include <unistd.h>
static inline pid_t noted_fork(void) {{
    int fd = open("{noted}", O_WRONLY | O_APPEND);
    (void)!write(fd, ".", 1);
    close(fd);
    return fork();
}}
#define fork() noted_fork()
""")
    compile_daemon(directory / "guest", compiler="musl-gcc", flags=("-static", "-O1", "-include", str(header)))
    return directory / "guest", lambda: noted.stat().st_size


def test_what_it_has_been_told_before_takes_no_child_and_writes_nothing(forks, start_guest, private, etc):
    """A resume where it was paused: entropy and clock, and what the user has made of the files meanwhile stays."""
    binary, count = forks
    client = start_guest("--system-changes", "on", binary=binary, prefix=private).connect()
    before = count()
    assert client.call("configure", {**IDENTITY, "entropy": bytes(64)}).reply == {}
    assert count() == before + 1
    for name in ("hostname", "machine-id", "resolv.conf"):
        (etc / name).write_text("mine")
    assert client.call("configure", {**IDENTITY, "entropy": bytes(64)}).reply == {}
    assert client.call("configure", {}).reply == {}
    assert count() == before + 1
    assert contents(etc) == ["mine"] * 3


@pytest.mark.parametrize("part", IDENTITY)
def test_only_what_differs_is_written(client, etc, part):
    """A clone in the same network keeps the resolver of its template, whatever that was made into."""
    assert client.call("configure", IDENTITY).reply == {}
    for name in ("hostname", "machine-id", "resolv.conf"):
        (etc / name).write_text("mine")
    other = {"hostname": "box-3", "machine_id": "d" * 32, "dns": ["1.1.1.2", "1.1.1.1"]}
    assert client.call("configure", {**IDENTITY, part: other[part]}).reply == {}
    expected = [new if name == part else "mine" for name, new in zip(IDENTITY, lines_of(other), strict=True)]
    assert contents(etc) == expected
    assert client.call("exec", {"cmd": "uname -n"}).stdout.decode() == f"box-{3 if part == 'hostname' else 2}\n"
    assert client.call("configure", IDENTITY).reply == {}
    expected = [old if name == part else "mine" for name, old in zip(IDENTITY, lines_of(IDENTITY), strict=True)]
    assert contents(etc) == expected


def test_files_that_cannot_be_written_are_named(start_guest, etc, private):
    """A read-only disk: the kernel knows the new name, the clock and the entropy all the same. The next time again."""
    (etc / "hostname").write_text("box-2\n")
    read_only = (*private, "sh", "-c", 'mount -o remount,bind,ro /etc && exec "$@"', "sh")
    client = start_guest("--system-changes", "on", prefix=read_only).connect()
    for _ in range(2):
        reply = client.call("configure", {**IDENTITY, "entropy": bytes(64)}).reply
        assert reply == {"failed": ["/etc/machine-id", "/etc/resolv.conf"]}
    assert client.call("exec", {"cmd": "uname -n"}).stdout == b"box-2\n"


def test_one_of_the_same_size_is_written_in_place(start_guest, private, etc):
    """On a disk without room for another file, too: a clone of a full template gets its own name."""
    full = (*private, "sh", "-c", 'mount -t tmpfs -o nr_inodes=3 t /etc && exec "$@"', "sh")
    client = start_guest("--system-changes", "on", prefix=full).connect()
    assert client.call("configure", OLD).reply == {}
    assert client.call("configure", NEW).reply == {}
    assert client.call("exec", {"cmd": "cat /etc/*; ls /etc"}).stdout.decode().split() == [
        *NEW.values(),
        *("hostname", "machine-id"),
    ]
    longer = {"hostname": "longer-name"}
    assert client.call("configure", longer).reply == {"failed": ["/etc/hostname"]}


def test_one_with_another_name_is_replaced(client, etc):
    """What else the file is keeps what it has."""
    assert client.call("configure", OLD).reply == {}
    (etc / "other").hardlink_to(etc / "hostname")
    assert client.call("configure", NEW).reply == {}
    assert (etc / "hostname").read_text() == "box-b\n"
    assert (etc / "other").read_text() == "box-a\n"
    assert (etc / "machine-id").read_text() == "b" * 32 + "\n"


WATCH = "while :; do read name < /etc/hostname; read id < /etc/machine-id; echo $(uname -n) $name $id; done"
"""Prints who it thinks the guest is, again and again."""


@pytest.fixture(scope="module")
def slow_binary(tmp_path_factory):
    """A daemon that takes half a second for each file that it replaces or writes anew, and longer for a configure's
    file of a number (from 0) while there is a `held-NUMBER` beside it."""
    directory = tmp_path_factory.mktemp("slow")
    header = directory / "slow.h"
    header.write_text(f"""#include <stdio.h>
#include <unistd.h>
static int files_before; /* of this child */
static inline void slowly(void) {{
    char held[] = "{directory}/held-0";
    held[sizeof held - 2] += files_before++;
    usleep(500000);
    while (access(held, F_OK) == 0) {{
        usleep(1000);
    }}
}}
#define rename(...) (slowly(), rename(__VA_ARGS__))
#define pwrite(fd, data, count, at) ((count) > 1 ? slowly() : (void)0, pwrite(fd, data, count, at))
""")
    compile_daemon(directory / "guest", compiler="musl-gcc", flags=("-static", "-O1", "-include", str(header)))
    return directory / "guest"


@pytest.fixture
def watched(slow_binary, start_settling, private, tmp_path, until):
    """Of a guest that was box-a: a connection, its group, and the lines that a process in it has printed. Frozen."""
    guest, group = start_settling("--system-changes", "on", binary=slow_binary, prefix=private[1:])
    client = guest.connect()
    client.call("configure", OLD)
    out = tmp_path / "out"
    client.call("exec", {"cmd": f"{WATCH} > {out}", "background": True})
    until(lambda: out.exists() and out.stat().st_size, "it watches")
    assert client.call("settle").reply["frozen"] is True
    return client, group, lambda: out.read_text().splitlines()


OLD = {"hostname": "box-a", "machine_id": "a" * 32}
NEW = {"hostname": "box-b", "machine_id": "b" * 32}


def test_nobody_sees_the_old_identity_after_the_thaw(watched, until):
    """configure thaws last: but for what was read before the freeze, every line is of the new identity."""
    client, _, lines = watched
    seen = len(lines())
    assert client.call("configure", NEW).reply == {}
    until(lambda: len(lines()) > seen + 5, "it goes on")
    assert set(lines()[seen + 1 : -1]) == {f"box-b box-b {'b' * 32}"}


def test_a_configure_that_was_given_up_thaws_nothing(watched):
    """A half-told guest waits for the next try."""
    client, group, _ = watched
    assert client.call("configure", NEW, timeout_ms=100).fault == "deadline_exceeded"
    assert group.frozen()
    assert client.call("configure", NEW).reply == {}
    assert not group.frozen()


@pytest.fixture
def slow(slow_binary, start_guest, private, until):
    """A daemon that has been told who it is, and a connection to it."""
    guest = start_guest("--system-changes", "on", binary=slow_binary, prefix=private)
    client = guest.connect()
    assert client.call("configure", OLD).reply == {}
    until(lambda: guest.children() == {}, "its child has ended")
    return guest, client


@pytest.fixture
def held(slow_binary):
    """`held(number)`: the file that keeps the slow daemon from the file of that number, as long as it is there."""
    made = []

    def hold(number):
        made.append(slow_binary.with_name(f"held-{number}"))
        made[-1].touch()
        return made[-1]

    yield hold
    for file in made:
        file.unlink(missing_ok=True)


def test_one_that_was_given_up_half_way_is_made_good(slow, etc, until, held):
    """The daemon no longer believes what it wrote before: the old values are written anew."""
    guest, client = slow
    second = held(1)
    stream = client.open("configure", NEW)
    until(lambda: (etc / "hostname").read_text() == "box-b\n", "the first is written")
    client.send(Cancel(stream))
    assert client.finish(stream).fault == "cancelled"
    until(lambda: guest.children() == {}, "its child has ended")
    second.unlink()
    assert (etc / "machine-id").read_text() == "a" * 32 + "\n"
    assert client.call("configure", OLD).reply == {}
    assert (etc / "hostname").read_text() == "box-a\n"
    assert client.call("exec", {"cmd": "uname -n"}).stdout == b"box-a\n"


def test_of_two_at_once_nothing_is_believed(slow, etc, until, held):
    """The first to begin is the last to write, and the values of the second are written again when they come again."""
    guest, client = slow
    replacing = held(0)
    first = client.open("configure", {"hostname": "box-first"})
    (child,) = until(guest.children, "it has a child")
    until((etc / "hostname.capsule").exists, "it is about to replace the file")
    os.kill(child, signal.SIGSTOP)
    until(lambda: guest.children()[child] == "T", "it stands still")
    replacing.unlink()
    (etc / "hostname.capsule").rename(etc / "hostname.kept")
    assert client.call("configure", {"hostname": "box-second"}).reply == {}
    (etc / "hostname.kept").rename(etc / "hostname.capsule")
    os.kill(child, signal.SIGCONT)
    assert client.finish(first).reply == {}
    assert (etc / "hostname").read_text() == "box-first\n"
    assert client.call("configure", {"hostname": "box-second"}).reply == {}
    assert (etc / "hostname").read_text() == "box-second\n"


@pytest.mark.parametrize(
    ("capability", "body"),
    [("sys_time", {"time_ns": time.time_ns}), ("sys_admin", {"entropy": lambda: bytes(64)})],
)
def test_a_kernel_that_refuses_thaws_nothing(start_settling, daemon_binary, private, etc, tmp_path, capability, body):
    """Clock or entropy: the caller hears of it, nothing after it is done, and the guest stands still."""
    weak = tmp_path / "weak"
    weak.write_text(f'#!/bin/sh\nexec setpriv --bounding-set=-{capability} {daemon_binary} "$@"\n')
    weak.chmod(0o755)
    guest, group = start_settling("--system-changes", "on", binary=weak, prefix=private[1:])
    client = guest.connect()
    bystander = guest.connect()
    client.call("exec", {"cmd": "sleep 1000", "background": True})
    assert client.call("settle").reply["frozen"] is True
    given = {name: value() for name, value in body.items()}
    assert guest.connect().call("configure", {**IDENTITY, **given}).fault == "permission_denied"
    assert group.frozen()
    assert not (etc / "hostname").exists()
    assert bystander.call("info").reply["frozen"] is True


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
        {"machine_id": ""},
        {"machine_id": "0" * 32},
        {"machine_id": "a" * 31},
        {"machine_id": "a" * 33},
        {"machine_id": "A" * 32},
        {"machine_id": "g" * 32},
        {"machine_id": b"a" * 32},
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
