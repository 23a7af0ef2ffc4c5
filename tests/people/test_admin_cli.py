"""`capsule admin`, as an operator types it, against a real database."""

from __future__ import annotations

import asyncio
import os
import pty
import subprocess
import sys
from contextlib import closing
from functools import partial
from pathlib import Path

import asyncpg
import pytest
import trio

from agent.actor.settings import SettingsError
from capsule import errors
from capsule.db.embedded import dsn_of
from capsule.db.errors import ConstraintViolated
from capsule.dev import environments, files
from capsule.people.admins import Admins
from tests.fixtures.people import QUICK, SECRET

PASSWORD = "correct horse battery staple"
ALL = "hosts, byoc, directory, templates"
PATIENCE = 60


@pytest.fixture
def operator(postgres_dsn, tmp_path):
    """Runs `capsule admin …` in a shell where CAPSULE_DATABASE_URL is set; (code, output, errors)."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith("CAPSULE_")}
    environ |= {"CAPSULE_DATABASE_URL": postgres_dsn, "CAPSULE_SECRET_KEY": SECRET, "PYTHONPATH": str(Path.cwd())}
    environ |= {f"CAPSULE_{name.upper()}": str(value) for name, value in QUICK.items()}

    def run(*arguments, stdin="", **changes):
        ran = subprocess.run(
            [sys.executable, "-m", "capsule", "admin", *arguments],
            env={name: value for name, value in {**environ, **changes}.items() if value is not None},
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert "Traceback" not in ran.stderr
        assert PASSWORD not in ran.stdout + ran.stderr
        return ran.returncode, ran.stdout, ran.stderr

    run.environ = environ
    run.cwd = tmp_path
    return run


@pytest.fixture
def sql(postgres_dsn):
    """Rows of a statement."""

    def run(statement, *args):
        async def fetch():
            connection = await asyncpg.connect(postgres_dsn)
            try:
                return [tuple(row) for row in await connection.fetch(statement, *args)]
            finally:
                await connection.close()

        return asyncio.run(fetch())

    return run


def test_the_first_admin(operator, sql):
    """An account with a default team, every permission, and a password nobody can read; then it is listed."""
    code, said, _ = operator(
        "create", "--email", "Root@example.com", "--name", "Root", "--password-stdin", stdin=f"{PASSWORD}\n"
    )
    assert (code, said) == (0, f"Root@example.com has a new account, which may: {ALL}.\n")
    [(admin, stored, role, default)] = sql(
        """select u.is_admin, u.password_hash, m.role, m.is_default
           from users u join memberships m on m.user_id = u.id"""
    )
    assert (admin, role, default) == (True, "owner", True)
    assert stored.startswith("$argon2id$")
    assert operator("list")[1] == "root@example.com\tbyoc, directory, hosts, templates\n"


def test_an_account_that_exists_is_promoted(operator, sql):
    """With what is named, beside what it has; whatever the address's case; its password stays."""
    sql("insert into users (email, name, password_hash) values ('ada@example.com', 'Ada', 'kept')")
    code, said, _ = operator("create", "--email", "ADA@example.com", "--permission", "byoc")
    assert code == 0
    assert "Its password stays." in said
    assert operator("create", "--email", "ada@example.com", "--permission", "hosts", "--permission", "byoc")[0] == 0
    assert operator("list")[1] == "ada@example.com\tbyoc, hosts\n"
    assert sql("select password_hash from users") == [("kept",)]


def test_revoking(operator, sql):
    """Permissions go, the account stays; who is none is said to be none."""
    sql("insert into users (email, name) values ('ada@example.com', 'Ada')")
    operator("create", "--email", "ada@example.com")
    assert operator("revoke", "--email", "Ada@Example.com")[0] == 0
    assert operator("list")[1] == ""
    assert sql("select (select count(*) from users), (select count(*) from admin_permissions)") == [(1, 0)]
    code, _, failure = operator("revoke", "--email", "ada@example.com")
    assert code == 1
    assert "is no platform admin" in failure


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        (("--email", "nobody", "--name", "N", "--password-stdin"), PASSWORD, "capsule: email:"),
        (("--email", "n@example.com", "--password-stdin"), PASSWORD, "--name"),
        (("--email", "n@example.com", "--name", "N"), "", "--password-stdin"),
        (("--email", "n@example.com", "--name", "N", "--password-stdin"), "short\n", "8 characters"),
        (("--email", "n@example.com", "--name", "N", "--password-stdin"), "", "8 characters"),
        (("--email", "n@example.com", "--name", "\x1b[2J", "--password-stdin"), PASSWORD, "printable"),
        (("--email", "n@example.com", "--permission", "all"), "", "--permission"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(operator, sql, arguments, stdin, said):
    """And nothing is made."""
    code, _, failure = operator("create", *arguments, stdin=stdin)
    assert code != 0
    assert said in failure
    assert sql("select count(*) from users") == [(0,)]


def test_without_its_settings_or_its_database(operator):
    """One line that names the variable, or says that the database is away; the URL's password is in neither."""
    code, _, failure = operator("list", CAPSULE_DATABASE_URL=None)
    assert (code, failure) == (1, "capsule: CAPSULE_DATABASE_URL is not set\n")
    code, _, failure = operator("list", CAPSULE_DATABASE_URL="mysql://root:hunter2@db/x")
    assert code == 1
    assert "CAPSULE_DATABASE_URL" in failure
    assert "hunter2" not in failure


def test_the_password_is_asked_for_without_showing_it(operator, sql):
    """Twice, at a terminal."""
    ours, theirs = pty.openpty()
    with closing(os.fdopen(ours, "rb+", buffering=0)) as terminal:
        program = subprocess.Popen(
            [sys.executable, "-m", "capsule", "admin", "create", "--email", "a@example.com", "--name", "A"],
            env=operator.environ,
            cwd=operator.cwd,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        try:
            shown = b""
            for prompt in (b"Password:", b"Repeat for confirmation:"):
                while not shown.endswith(prompt + b" "):
                    shown += terminal.read(1024)
                terminal.write(PASSWORD.encode() + b"\n")
            assert program.wait(PATIENCE) == 0
        finally:
            program.kill()
            program.wait()
    assert PASSWORD.encode() not in shown
    assert sql("select is_admin from users") == [(True,)]


def test_the_data_directory_of_a_running_platform(operator, tmp_path):
    """`--data` finds its secrets and its database; one that is not, or does not run, is said to be so."""
    data = tmp_path / "data"
    code, _, failure = operator("--data", str(data), "list")
    assert code == 1
    assert "is not the data directory" in failure
    assert not data.exists()
    data.mkdir()
    files.read_secrets(data)
    code, _, failure = operator("--data", str(data), "list", CAPSULE_DATABASE_URL=None)
    assert code == 1
    assert "start it" in failure
    code, said, failure = operator("--data", str(data), "list", CAPSULE_SECRET_KEY=None)  # its own is in the directory
    assert (code, said, failure) == (0, "", "")


def test_the_embedded_database_is_found_while_its_platform_runs(tmp_path, monkeypatch):
    """By the place of its socket."""
    monkeypatch.delenv("CAPSULE_DATABASE_URL", raising=False)
    monkeypatch.chdir(tmp_path)
    files.read_secrets(tmp_path)
    with pytest.raises(SettingsError):
        environments.of_running(tmp_path)
    held = files.lock(tmp_path)
    try:
        found = environments.of_running(tmp_path)
    finally:
        os.close(held)
    assert found["CAPSULE_DATABASE_URL"] == dsn_of(tmp_path / "run")
    assert len(found["CAPSULE_SECRET_KEY"]) == 64
    assert not files.is_locked(tmp_path)


def test_what_an_operator_changes_is_on_record(operator, sql):
    """A row of no team for each change, in the order they were made; none for what changed nothing."""
    root = ("--email", "root@example.com")
    for arguments in (
        ("create", *root, "--name", "Root", "--permission", "hosts", "--password-stdin"),
        ("create", *root, "--permission", "byoc", "--permission", "hosts"),
        ("revoke", *root),
    ):
        assert operator(*arguments, stdin=f"{PASSWORD}\n")[0] == 0
    assert operator("revoke", *root)[0] == 1
    assert operator("revoke", "--email", "nobody@example.com")[0] == 1
    assert operator("create", "--email", "nobody@example.com")[0] != 0
    [(root_id,)] = sql("select id from users")
    assert sql("""
        select actor_type, actor_name, resource_type, resource_id, scope, status, team_id, action,
          metadata ->> 'permissions' from audit_logs where action <> 'create' order by created_at
    """) == [
        ("system", "capsule admin", "user", f"usr-{root_id}", "admin", "warning", None, action, permissions)
        for action, permissions in (
            ("admin_grant", "hosts"),
            ("admin_grant", "byoc, hosts"),
            ("admin_revoke", "byoc, hosts"),
        )
    ]


async def test_an_admin_is_on_record_or_is_none(people):
    """The row is part of the change: without it there is neither an account nor a permission."""
    ada = await people.sign_up("Ada")
    await people.sql("alter table audit_logs add constraint no_grants check (action not like 'admin%') not valid")
    admins = Admins(people.world.db, people.settings)
    new = partial(admins.create, email="root@example.com", name="Root", password=PASSWORD)
    for change in (partial(admins.promote, ada.email), new):
        with pytest.raises(ConstraintViolated):
            await change(permissions=["hosts"])
    assert not await people.sql("select from users where is_admin or email = 'root@example.com'")
    assert not await people.sql("select from admin_permissions")
    await people.make_admin(ada, "hosts")
    with pytest.raises(ConstraintViolated):
        await admins.revoke(ada.email)
    assert len(await people.sql("select from users u join admin_permissions p on p.user_id = u.id where is_admin")) == 1


async def test_of_two_that_make_the_same_admin_one_is_told(people):
    """Both find no account; one makes it, the other is told to try again. No half of an account is left."""
    outcomes = []

    async def create():
        try:
            await Admins(people.world.db, people.settings).create(
                email="root@example.com", name="Root", password=PASSWORD, permissions=["hosts"]
            )
            outcomes.append("made")
        except errors.EmailTaken:
            outcomes.append("taken")

    async with trio.open_nursery() as nursery:
        for _ in range(4):
            nursery.start_soon(create)
    assert sorted(outcomes) == ["made", "taken", "taken", "taken"]
    [row] = await people.sql("select (select count(*) from teams where slug <> '000000-000000') as teams")
    assert row["teams"] == 1


async def test_an_admin_is_made_while_nobody_is_revoked(people, overtake, queued):
    """Between the two halves of a revocation that finds no admin: what was given stays, with the role."""
    ada = await people.sign_up("Ada")
    admins = Admins(people.world.db, people.settings)
    promote = partial(admins.promote, ada.email, ["hosts"])
    overtaking = overtake(partial(queued, people.world.db, promote), before="delete from admin_permissions")
    revoked = await admins.revoke(ada.email)
    await queued.done()
    assert overtaking.done
    assert (revoked, [one.permissions for one in await admins.list()]) == (False, [frozenset({"hosts"})])


async def test_an_admin_made_at_the_machine_logs_in_and_administers(people):
    """With the password that was given; an admin who was revoked is refused with the next request."""
    admins = Admins(people.world.db, people.settings)
    await admins.create(email="root@example.com", name="Root", password=PASSWORD, permissions=["directory"])
    answer = await people.nobody.post("/v1/auth/login", {"email": "ROOT@example.com", "password": PASSWORD})
    root = people.person(answer.json())
    listed = (await root.get("/v1/admin/users")).json()["items"]
    assert [(item["email"], item["permissions"]) for item in listed] == [("root@example.com", ["directory"])]
    assert await admins.revoke("root@example.com")
    assert (await root.get("/v1/admin/users")).status_code == 403
