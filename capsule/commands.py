"""Commands of who runs the platform: serve the control plane, everything on one machine, say who its admins are.

They import all of it, and therefore are loaded only when they are asked for (capsule/__main__.py).
"""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click
import trio

from agent.actor.logs import configure_logs
from agent.actor.settings import SettingsError, environment
from capsule import config, control
from capsule.db.errors import DatabaseError
from capsule.db.migrate import migrate
from capsule.db.pool import open_database
from capsule.dev import environments, files, platform
from capsule.errors import CapsuleError
from capsule.hosts.ca import AuthorityLocked
from capsule.people.admins import Admins
from capsule.principals import PERMISSIONS, Permission

EXPECTED = (SettingsError, DatabaseError, AuthorityLocked, CapsuleError, files.DataDirectoryInUse, OSError)
"""Failures that are the operator's to mend: said in one line, without a traceback."""

ADMIN_PATIENCE = 10.0
"""Seconds that somebody at a terminal waits for the database."""

T = TypeVar("T")


@click.command()
def serve() -> None:
    """Serve the control plane until SIGTERM."""
    with _failures_in_a_line():
        settings = config.load(environment(Path(".env")))
        configure_logs(level=settings.log_level, json=settings.log_json)
        control.run(settings)


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("/var/lib/capsule"),
    envvar="CAPSULE_DATA",
    show_default=True,
    help="Where database, agent state and images live.",
)
@click.option(
    "--ready-file", type=click.Path(path_type=Path, dir_okay=False), help="Write {url, api_key, …_pids} here."
)
def dev(data: Path, ready_file: Path | None) -> None:
    """Run PostgreSQL, a control plane and an agent here, until Ctrl-C."""
    configure_logs()
    with _failures_in_a_line():
        trio.run(
            platform.run,
            platform.Options(data=data.absolute(), ready_file=ready_file and ready_file.absolute()),
        )


@click.group()
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data directory of a running `capsule dev`; without it CAPSULE_DATABASE_URL says which database.",
)
@click.pass_context
def admin(context: click.Context, data: Path | None) -> None:
    """Say who the platform's admins are."""
    configure_logs(level="warning")
    context.obj = data and data.absolute()


@admin.command("create")
@click.option("--email", required=True)
@click.option("--name", help="Of a new account.")
@click.option("--password-stdin", is_flag=True, help="Read a new account's password from the first line of the input.")
@click.option(
    "--permission",
    "permissions",
    type=click.Choice(PERMISSIONS),
    multiple=True,
    default=PERMISSIONS,
    show_default="all",
    help="What they may; can be given again.",
)
@click.pass_obj
def create_admin(
    data: Path | None, *, email: str, name: str | None, password_stdin: bool, permissions: tuple[Permission, ...]
) -> None:
    """Make somebody a platform admin: the account with this address, or a new one."""
    if _administer(data, lambda admins: admins.promote(email, permissions)):
        click.echo(f"{email} has an account, which may now: {', '.join(permissions)}. Its password stays.")
        return
    if name is None:
        raise click.UsageError(f"nobody has an account with {email}: give --name for a new one")
    password = _password(from_stdin=password_stdin)
    _administer(data, lambda admins: admins.create(email=email, name=name, password=password, permissions=permissions))
    click.echo(f"{email} has a new account, which may: {', '.join(permissions)}.")


@admin.command("list")
@click.pass_obj
def list_admins(data: Path | None) -> None:
    """Who is a platform admin, and what they may."""
    for found in _administer(data, Admins.list):
        click.echo(f"{found.email}\t{', '.join(sorted(found.permissions)) or '-'}")


@admin.command("revoke")
@click.option("--email", required=True)
@click.pass_obj
def revoke_admin(data: Path | None, email: str) -> None:
    """Somebody is no platform admin any more; the account stays."""
    if not _administer(data, lambda admins: admins.revoke(email)):
        raise click.ClickException(f"{email} is no platform admin; `capsule admin list` says who is")
    click.echo(f"{email} is no platform admin any more.")


def _password(*, from_stdin: bool) -> str:
    """The password of a new account. Never an argument: those are for all to see."""
    if from_stdin:
        return sys.stdin.readline().rstrip("\r\n")
    if not sys.stdin.isatty():
        raise click.UsageError("there is no terminal to ask for a password: use --password-stdin")
    answer: str = click.prompt("Password", hide_input=True, confirmation_prompt=True)
    return answer


def _administer(data: Path | None, action: Callable[[Admins], Awaitable[T]]) -> T:
    """Do it in the database of `data`, or of our environment."""

    async def act() -> T:
        settings = config.load(environment(Path(".env")) if data is None else environments.of_running(data))
        control.check_database_url(settings.database_url)
        async with open_database(settings.database_url, max_size=1) as db:
            await control.wait_for_database(db, patience=ADMIN_PATIENCE)
            await migrate(db)
            return await action(Admins(db, settings))

    with _failures_in_a_line():
        return trio.run(act)


@contextmanager
def _failures_in_a_line() -> Iterator[None]:
    failures: list[BaseException] = []
    try:
        yield
    except* EXPECTED as group:
        failures = _leaves(group)
    if failures:  # an exit from within `except*` would leave as a group, with a traceback
        for error in failures:
            click.echo(f"capsule: {error}", err=True)
        sys.exit(1)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The single errors of a group, however nested."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found
