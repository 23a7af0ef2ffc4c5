"""The control plane as a process: how it starts, what it says when it cannot, how it stops."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
import structlog
import trio
from click.testing import CliRunner

from agent.actor.settings import SettingsError
from capsule import control
from capsule.__main__ import main
from capsule.config import Settings
from capsule.db.pool import open_database
from capsule.dev import bootstrap
from tests.fixtures.fleet import World

SECRET = "CAPSULE_SECRET_KEY=" + "s" * 40
BOUND = 60


@pytest.fixture
def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def serve(tmp_path, free_port):
    """Starts `capsule serve` with these settings and nothing else."""
    processes = []

    def start(*settings):
        given = dict(one.split("=", 1) for one in settings)
        process = subprocess.Popen(
            [sys.executable, "-m", "capsule", "serve"],
            env={"PATH": os.environ["PATH"], "CAPSULE_BIND": f"127.0.0.1:{free_port}", **given},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def said(process):
    """Everything a process said that ends by itself."""
    return process.communicate(timeout=BOUND)[0]


def wait_for(process, text):
    """Read its log up to a line with `text`."""
    for line in process.stdout:
        if text in line:
            return line
    raise AssertionError(f"it ended without saying {text!r}")


@pytest.fixture
def complaint(tmp_path, monkeypatch, free_port):
    """What `capsule serve` says with these settings, and its exit code; in this process, which starts faster."""

    def run(*settings, patience=2.0):
        for name in list(os.environ):
            if name.startswith("CAPSULE_"):
                monkeypatch.delenv(name)
        for name, value in (one.split("=", 1) for one in (f"CAPSULE_BIND=127.0.0.1:{free_port}", *settings)):
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(control, "DATABASE_PATIENCE", patience)
        result = CliRunner().invoke(main, ["serve"])
        return result.output.splitlines()[-1], result.exit_code, result.output

    yield run
    structlog.reset_defaults()


URL = "CAPSULE_DATABASE_URL="


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([], "CAPSULE_SECRET_KEY must be at least"),
        ([SECRET], "CAPSULE_DATABASE_URL is not set"),
        ([SECRET, f"{URL}nonsense"], "CAPSULE_DATABASE_URL must be like"),
        ([SECRET, f"{URL}mysql://u:geheim@h/d"], "CAPSULE_DATABASE_URL must be like"),
        ([SECRET, f"{URL}postgresql://u:geheim@h:port/d"], "CAPSULE_DATABASE_URL must be like"),
        ([SECRET, f"{URL}postgresql://h/d", "CAPSULE_BIND=here"], "CAPSULE_BIND: 'here' is not"),
        ([SECRET, f"{URL}postgresql://h/d", "CAPSULE_CREATE_TIMEOUT=soon"], "CAPSULE_CREATE_TIMEOUT"),
        ([SECRET, f"{URL}postgresql://u:geheim@127.0.0.1:1/d"], "the database is unavailable"),
        ([SECRET, f"{URL}postgresql://u:geheim@/d?host=/nonexistent"], "the database is unavailable"),
    ],
)
def test_what_the_operator_must_mend_is_one_clear_line(complaint, settings, words):
    """Exit code 1, the variable named, no traceback, no secret."""
    line, code, everything = complaint(*settings)
    assert line.startswith(f"capsule: {words}")
    assert "Traceback" not in everything
    assert "geheim" not in everything
    assert code == 1


def test_a_database_that_refuses_us(complaint, postgres_server):
    """It may yet be made, or the operator mend it: waited for, then one clear line."""
    line, code, _ = complaint(SECRET, f"{URL}{postgres_server.dsn('nosuch')}")
    assert line.startswith("capsule: the database ")
    assert code == 1


async def test_a_refusal_of_a_kind_that_nobody_foresaw():
    """Is said in the server's words, too."""

    class Refusing:
        async def wait_available(self, **_):
            await trio.lowlevel.checkpoint()
            raise RuntimeError("permission denied for schema public")

    with pytest.raises(SettingsError, match="refuses us: permission denied for schema public"):
        await control.wait_for_database(Refusing())


def test_an_address_that_is_taken(complaint, postgres_dsn, free_port):
    with socket.socket() as one:
        one.bind(("127.0.0.1", free_port))
        one.listen()
        line, code, _ = complaint(SECRET, f"{URL}{postgres_dsn}", patience=BOUND)
    assert line.startswith("capsule: ")
    assert "ddress already in use" in line
    assert code == 1


@pytest.mark.parametrize("url", ["postgres://h", "postgresql://a:1,b,[::1]:5/d?x=y", "postgresql://u:p%40@/d?host=/s"])
def test_addresses_that_are_none_of_our_business(url):
    """Whatever else the driver understands."""
    control.check_database_url(url)


@pytest.fixture
def not_yet(postgres_dsn, tmp_path):
    """The database at an address where nobody is yet; `come()` brings it there."""
    parts = urlsplit(postgres_dsn)
    (directory,) = parse_qs(parts.query)["host"]
    place = tmp_path / "s"
    place.mkdir()
    dsn = parts._replace(query=f"host={place}").geturl()
    return dsn, lambda: (place / ".s.PGSQL.5432").symlink_to(Path(directory, ".s.PGSQL.5432"))


def test_a_database_that_is_not_up_yet_is_waited_for(serve, not_yet, free_port):
    """Started together with its database it comes up as soon as that is there; SIGTERM ends it with 0."""
    dsn, come = not_yet
    process = serve(SECRET, f"CAPSULE_DATABASE_URL={dsn}")
    wait_for(process, "control_plane_starting")
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://127.0.0.1:{free_port}/health", trust_env=False)
    come()
    wait_for(process, "control_plane_serving")
    assert httpx.get(f"http://127.0.0.1:{free_port}/ready", trust_env=False, timeout=BOUND).status_code == 200
    process.send_signal(signal.SIGTERM)
    said(process)
    assert process.returncode == 0


def test_stopped_while_it_waits_for_its_database(serve, not_yet):
    """At once, and with 0: nothing had begun."""
    process = serve(SECRET, f"CAPSULE_DATABASE_URL={not_yet[0]}", "CAPSULE_SHUTDOWN_TIMEOUT=25")
    wait_for(process, "control_plane_starting")
    process.send_signal(signal.SIGTERM)
    assert "control_plane_stopped" in said(process)
    assert process.returncode == 0


def test_the_hard_deadline(serve, postgres_dsn, free_port):
    """A client that never finishes its request, and a second signal, do not keep it longer than it may take."""
    process = serve(SECRET, f"CAPSULE_DATABASE_URL={postgres_dsn}", "CAPSULE_SHUTDOWN_TIMEOUT=0.4")
    wait_for(process, "control_plane_serving")
    with socket.create_connection(("127.0.0.1", free_port)) as slow:
        head = (
            b"POST /v1/hosts/register HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
        )
        slow.sendall(head + b"Expect: 100-continue\r\n\r\n")
        assert slow.recv(100).startswith(b"HTTP/1.1 100")  # it has begun, and waits for the body
        process.send_signal(signal.SIGTERM)
        wait_for(process, "stop_requested")
        process.send_signal(signal.SIGTERM)
        said(process)
    assert process.returncode == -signal.SIGALRM


@contextmanager
def no_alarm(monkeypatch):
    """The deadline would be this process's end."""
    armed = []
    with monkeypatch.context() as patch:
        patch.setattr(control.signal, "setitimer", lambda which, seconds: armed.append((which, seconds)))
        yield armed


@pytest.mark.parametrize("client_stays", [True, False])
async def test_sigterm_lets_a_create_finish(postgres_dsn, free_port, monkeypatch, nursery, client_stays):
    """The client that was there before the signal gets its 201, a later one finds nobody, and then it ends. A client
    that went away meanwhile has its sandbox, too."""
    settings = Settings(
        database_url=postgres_dsn, secret_key="s" * 40, bind=f"127.0.0.1:{free_port}", shutdown_timeout=20
    )
    async with open_database(postgres_dsn) as db:
        world = World(db, nursery, lambda: datetime.now(UTC))
        monkeypatch.setattr(control, "tls_dial", lambda _contexts: world.dial)
        agent = await world.add_host()
        await world.add_template()
        key = await db.transaction(bootstrap.ensure_key, None)
        gate = agent.hold("sandbox.create")
        stopped, answers = trio.Event(), []
        leave = trio.CancelScope()

        async def run():
            await control.serve(settings)
            stopped.set()

        async def create(client):
            with leave:
                answers.append((await client.post("/v1/sandboxes", headers={"X-API-Key": key})).status_code)

        with no_alarm(monkeypatch) as armed, trio.fail_after(BOUND):
            nursery.start_soon(run)
            async with httpx.AsyncClient(base_url=settings.url, trust_env=False, timeout=BOUND) as client:
                while not await _answers(client):
                    await trio.sleep(0.02)
                nursery.start_soon(create, client)
                await agent.reached["sandbox.create"].wait()
                if not client_stays:
                    leave.cancel()
                os.kill(os.getpid(), signal.SIGTERM)
                while not armed or await _answers(client):
                    await trio.sleep(0.02)
                if client_stays:
                    os.kill(os.getpid(), signal.SIGTERM)
                with trio.move_on_after(0.3 if client_stays else 1):  # longer than it takes when nothing is waited for
                    await stopped.wait()
                assert not stopped.is_set()
                gate.set()
                await stopped.wait()
        assert answers == ([201] if client_stays else [])
        assert armed == [(signal.ITIMER_REAL, 20)]
        (row,) = await world.sql("select status from sandboxes")
        assert row["status"] == "running"


async def _answers(client):
    """Whether a new connection is served."""
    try:
        async with httpx.AsyncClient(base_url=client.base_url, trust_env=False) as other:
            return (await other.get("/health")).status_code == 200
    except httpx.TransportError:
        return False
