"""`capsule dev` as a whole, with stand-ins for its programs: what they are told, when it is ready, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import sys
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
import trio

from capsule.config import Settings
from capsule.db.errors import DatabaseUnavailable
from capsule.dev import environments, files, platform
from capsule.dev.platform import Options, Platform

STAND_IN = """#!{python} -S
import os, signal, sys
name = {{"capsule serve": "control", "agent serve": "agent"}}.get(" ".join(sys.argv[2:4]), " ".join(sys.argv[2:]))
def say(what):
    with open({log!r}, "a") as log:
        log.write(f"{{what}} {{name}}\\n")
def stop(*_):
    say("stopped")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
secrets = [key for key in ("CAPSULE_SECRET_KEY", "CAPSULE_DATABASE_URL", "CAPSULE_API_KEY") if key in os.environ]
say("started" + "".join(" with " + key for key in secrets))
while "serve" in sys.argv:
    signal.pause()
"""


@pytest.fixture
def log(tmp_path, monkeypatch):
    """Stand-ins for both daemons and for `purge`; what they wrote."""
    program, path = tmp_path / "python", tmp_path / "log"
    program.write_text(STAND_IN.format(python=os.path.realpath(sys.executable), log=str(path)))
    program.chmod(0o755)
    monkeypatch.setattr(platform.sys, "executable", str(program))
    path.touch()
    return lambda: path.read_text().splitlines()


@pytest.fixture
def control_port():
    """Somebody listens where the control plane would."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield listener.getsockname()[1]


@pytest.fixture
def make(tmp_path, db, control_port):
    """A platform on a data directory of the test's."""

    def make(database=None):
        data = tmp_path / "data"
        (data / "agent").mkdir(parents=True, exist_ok=True)
        environ = {
            **os.environ,
            "CAPSULE_AGENT_STATE": str(data / "agent"),
            "CAPSULE_SECRET_KEY": "s" * 32,
            "CAPSULE_DATABASE_URL": "postgresql://",
            "CAPSULE_API_KEY": "cap_",
        }
        settings = Settings(database_url="postgresql://", secret_key="s" * 32, bind=f"127.0.0.1:{control_port}")
        options = Options(data=data, ready_file=tmp_path / "ready.json")
        return Platform(options, environ, settings, None, database or db)

    return make


@asynccontextmanager
async def running(one):
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.run, stop)
        yield
        stop.set()


async def test_from_start_to_end(make, log, until, sql, add_host, control_port, tmp_path):
    """Ready when a sandbox can be created, not before; the ready file is true at every moment, and then gone; the agent
    stops first, then its VMs, then the control plane; the rows say so."""
    ready = tmp_path / "ready.json"
    ready.write_text("left by an earlier run")
    one = make()
    host = await add_host()
    environments.credentials(one.environ).write_text(json.dumps({"host_id": f"host-{host}"}))
    await sql("update hosts set last_heartbeat = now() - interval '1 day'")
    await sql("insert into templates (team_id, name, type) values ($1, 'minimal', 'base')", UUID(int=0))
    with trio.fail_after(60):
        async with running(one):
            await until(lambda: len(log()) == 2)
            assert sorted(log()) == [
                "started agent",
                "started with CAPSULE_SECRET_KEY with CAPSULE_DATABASE_URL control",
            ]
            assert not ready.exists()
            await sql("update hosts set last_heartbeat = now()")
            await until(ready.exists)
            told = json.loads(ready.read_text())
            assert stat.S_IMODE(ready.stat().st_mode) == 0o600
            assert told == {
                "url": f"http://127.0.0.1:{control_port}",
                "api_key": files.read_secrets(one.options.data)["CAPSULE_API_KEY"],
                "agent_pids": [one.programs["agent"].pid],
                "control_pids": [one.programs["control"].pid],
                "postgres_pids": [],
            }
            os.kill(told["agent_pids"][0], signal.SIGKILL)
            await until(lambda: json.loads(ready.read_text())["agent_pids"] not in ([], told["agent_pids"]))
            remembered = {record["pid"] for record in json.loads((one.options.data / "programs.json").read_bytes())}
            assert remembered == {one.programs["agent"].pid, one.programs["control"].pid}
            await until(lambda: log().count("started agent") == 2)
            await _insert_running(sql, host)
    assert log()[3:] == ["stopped agent", "started agent purge --yes", "stopped control"]
    assert not ready.exists()
    (row,) = await sql("select status, reason from sandboxes")
    assert tuple(row) == ("stopped", "the platform was stopped")


async def _insert_running(sql, host):
    (team,) = await sql("select id from teams where id <> $1", UUID(int=0))
    sandbox = uuid4()
    await sql(
        """insert into sandboxes (id, team_id, template, vcpus, memory_mb, disk_mb, transition_deadline)
           values ($1, $2, 'minimal', 1, 1, 1, $3)""",
        sandbox,
        team["id"],
        datetime.now(UTC) + timedelta(hours=1),
    )
    await sql("update sandboxes set status = 'starting', generation = 2, host_id = $2 where id = $1", sandbox, host)
    await sql(
        "update sandboxes set status = 'running', generation = 3, transition_deadline = null where id = $1", sandbox
    )


async def test_stopped_before_it_is_ready(make, log, until, tmp_path):
    """Ctrl-C at once: nothing hangs, nothing is announced."""
    one = make()
    with trio.fail_after(60):
        async with running(one):
            pass
    assert not (tmp_path / "ready.json").exists()
    assert "stopped control" in log() or "started control" not in " ".join(log())


async def test_an_agent_that_has_to_register(make, sql, tmp_path):
    """One host, however often its agent is started before it is registered; each time a token of its own."""
    one = make()
    first, second = await one._agent_environment(), await one._agent_environment()
    assert first["CAPSULE_AGENT_URL"] == one.settings.url
    assert first["CAPSULE_AGENT_TOKEN"] != second["CAPSULE_AGENT_TOKEN"]
    assert len(await sql("select 1 from hosts")) == 1
    assert not {"CAPSULE_SECRET_KEY", "CAPSULE_DATABASE_URL", "CAPSULE_API_KEY"} & first.keys()


async def test_an_agent_with_credentials(make, sql, add_host):
    """Of this database: no token. Of another one: they are put aside, and it registers."""
    one = make()
    credentials = environments.credentials(one.environ)
    credentials.write_text(json.dumps({"host_id": f"host-{await add_host()}"}))
    assert "CAPSULE_AGENT_TOKEN" not in await one._agent_environment()
    credentials.write_text(json.dumps({"host_id": f"host-{uuid4()}"}))
    assert "CAPSULE_AGENT_TOKEN" in await one._agent_environment()
    assert not credentials.exists()
    assert credentials.with_suffix(".old").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"host_id": 5}', '{"host_id": "host-x"}', "null"])
async def test_damaged_credentials(make, content):
    """Are none."""
    one = make()
    environments.credentials(one.environ).write_text(content)
    assert "CAPSULE_AGENT_TOKEN" in await one._agent_environment()


async def test_lost_credentials_are_of_the_same_host(make, sql):
    """It holds its address: a second row would be refused for ever. So too when they were revoked."""
    one = make()
    credentials, known = environments.credentials(one.environ), environments.host_id_file(one.environ)
    assert "CAPSULE_AGENT_TOKEN" in await one._agent_environment()
    (row,) = await sql("update hosts set credential_epoch = 1, address = '127.0.0.1:7443' returning id")
    host = f"host-{row['id']}"
    credentials.write_text(json.dumps({"host_id": host}))
    assert "CAPSULE_AGENT_TOKEN" not in await one._agent_environment()
    await sql("update hosts set credentials_revoked_at = now()")
    assert "CAPSULE_AGENT_TOKEN" in await one._agent_environment()
    assert not credentials.exists()
    for content in (host, "nonsense"):
        known.write_text(content)
        credentials.write_text("{")
        assert "CAPSULE_AGENT_TOKEN" in await make()._agent_environment()
    assert len(await sql("select 1 from hosts")) == 1
    assert len(await sql("select 1 from host_registration_tokens where used_at is null")) == 1


async def test_sandboxes_without_credentials(make, log, sql, add_host):
    """Those of a host in this database stay, and the agent learns whose they are; what no row knows is removed."""
    one = make()
    known = environments.host_id_file(one.environ)
    (environments.credentials(one.environ).parent / "sandboxes" / str(uuid4())).mkdir(parents=True)
    known.write_text(f"host-{await add_host()}")
    await one._agent_environment()
    assert (log(), await sql("select 1 from hosts where provider = 'capsule dev'")) == ([], [])
    known.write_text(f"host-{uuid4()}")
    await one._agent_environment()
    assert log() == ["started agent purge --yes"]
    (row,) = await sql("select id from hosts where provider = 'capsule dev'")
    known.unlink()
    await one._agent_environment()
    assert (len(log()), known.read_text()) == (1, f"host-{row['id']}\n")


async def test_a_database_that_is_away_is_waited_for(make, db, monkeypatch):
    """An agent that dies while the server restarts does not take the platform with it."""
    monkeypatch.setattr(platform, "RETRY_PAUSE", 0.0)

    class Away:
        refusals = 3

        def __getattr__(self, name):
            return getattr(db, name)

        async def run(self, *args, **kwargs):
            if self.refusals:
                self.refusals -= 1
                await trio.lowlevel.checkpoint()
                raise DatabaseUnavailable("away")
            return await db.run(*args, **kwargs)

    with trio.fail_after(20):
        assert "CAPSULE_AGENT_TOKEN" in await make(Away())._agent_environment()


def test_our_own_environment_wins(tmp_path, monkeypatch):
    """Over `.env`, over what was decided; the secret key is the installation's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("CAPSULE_BIND=127.0.0.1:1\nCAPSULE_LOG_LEVEL=debug\n")
    monkeypatch.setenv("CAPSULE_BIND", "127.0.0.1:2")
    (tmp_path / "data").mkdir()
    environ = environments.base(tmp_path / "data")
    assert environ["CAPSULE_BIND"] == "127.0.0.1:2"
    assert environ["CAPSULE_LOG_LEVEL"] == "debug"
    assert environ["CAPSULE_AGENT_STATE"] == str(tmp_path / "data" / "agent")
    assert environ["CAPSULE_SECRET_KEY"] == files.read_secrets(tmp_path / "data")["CAPSULE_SECRET_KEY"]
