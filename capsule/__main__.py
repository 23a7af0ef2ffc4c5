"""`capsule`: serve the control plane, run everything on one machine."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import trio

from agent.actor.logs import configure_logs
from agent.actor.settings import SettingsError, environment
from capsule import config, control
from capsule.db.errors import DatabaseError
from capsule.dev import files, platform
from capsule.hosts.ca import AuthorityLocked

EXPECTED = (SettingsError, DatabaseError, AuthorityLocked, files.DataDirectoryInUse, OSError)
"""Failures that are the operator's to mend: said in one line, without a traceback."""


@click.group()
def main() -> None:
    """Capsule: untrusted code in real microVMs."""


@main.command()
def serve() -> None:
    """Serve the control plane until SIGTERM."""
    try:
        settings = config.load(environment(Path(".env")))
        configure_logs(level=settings.log_level, json=settings.log_json)
        control.run(settings)
    except* EXPECTED as group:
        _fail(group)


@main.command()
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
    try:
        trio.run(
            platform.run,
            platform.Options(data=data.absolute(), ready_file=ready_file and ready_file.absolute()),
        )
    except* EXPECTED as group:
        _fail(group)


def _fail(group: BaseExceptionGroup[BaseException]) -> None:
    for error in _leaves(group):
        click.echo(f"capsule: {error}", err=True)
    sys.exit(1)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The single errors of a group, however nested."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


if __name__ == "__main__":
    main()
