"""`capsule-agent`: make this machine a host, serve it, say what it lacks, clear it."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
import trio

from agent import daemon, enrolment
from agent.actor.logs import configure_logs
from agent.actor.settings import SettingsError
from agent.config import Settings, load
from agent.doctor.checks import Subject, run_checks
from agent.doctor.report import exit_code, render
from agent.enrol.address import split_url
from agent.enrol.errors import EnrolError
from agent.enrol.joining import Joining, check_token
from agent.net.errors import NetworkError
from agent.net.host_network import lock_host_network
from agent.pager.supervisor import stop_pager
from agent.sandboxes.adoption import StateDirectoryInUse, lock_state_directory
from agent.sandboxes.purge import purge as purge_host
from agent.sandboxes.records import StateDirectory
from agent.vmm.driver import VmmError
from agent.vmm.kvm import probe_kvm

if TYPE_CHECKING:
    from agent.doctor.report import Check
    from agent.enrol.credentials import Credentials

EXPECTED = (
    SettingsError,
    EnrolError,
    NetworkError,
    VmmError,
    StateDirectoryInUse,
    enrolment.NotRegistered,
    daemon.CannotListen,
)
"""Failures that are the operator's to mend: said in one line, without a traceback."""


@click.group()
def main() -> None:
    """The agent of one Capsule host."""


def _settings() -> Settings:
    try:
        settings = load()
    except SettingsError as err:
        raise click.ClickException(str(err)) from err
    configure_logs(level=settings.log_level, json=settings.log_json)
    return settings


@main.command()
def serve() -> None:
    """Serve until SIGTERM; the VMs live on."""
    _run(_settings())


def _run(settings: Settings, joining: Joining | None = None) -> None:
    try:
        daemon.run(settings, joining)
    except* EXPECTED as group:
        for error in _leaves(group):
            click.echo(f"capsule-agent: {error}", err=True)
        sys.exit(1)


@main.command()
@click.option("--url", default="", help="The control plane's URL; by default CAPSULE_AGENT_URL.")
@click.option("--token", default="", help="The one-time token of this host; by default CAPSULE_AGENT_TOKEN.")
@click.option("--address", default="", help="host:port where the control plane dials this machine.")
@click.option("--force", is_flag=True, help="Register anew a host that lost its place; its sandboxes are kept.")
@click.option("--serve/--no-serve", "and_serve", default=True, help="Serve afterwards (the default), or only register.")
def join(*, url: str, token: str, address: str, force: bool, and_serve: bool) -> None:
    """Make this machine a host of a fleet, and serve it."""
    settings = _settings()
    given = {"url": url, "token": token, "address": address}
    settings = msgspec.structs.replace(settings, **{name: value for name, value in given.items() if value})
    try:
        split_url(settings.url)
        check_token(settings.token)
    except EnrolError as err:
        raise click.ClickException(str(err)) from err
    _refuse_unfit(settings)
    _run(settings, Joining(force=force, serve=and_serve, tell=_tell_joined))


def _refuse_unfit(settings: Settings) -> None:
    """End unless sandboxes can run here, before the token is spent."""
    if os.geteuid() != 0:
        raise click.ClickException("joining needs root")
    missing = [check for check in _checks(settings) if check.failed]
    if missing:
        click.echo(render(missing, json=False), err=True)
        sys.exit(1)


def _tell_joined(credentials: Credentials) -> None:
    click.echo(f"This machine is {credentials.host_id}; {credentials.url} dials it at {credentials.address}.")


@main.command()
@click.option("--yes", is_flag=True, required=True, help="Really end every sandbox of this host.")
def purge(*, yes: bool) -> None:  # noqa: ARG001 - click demands it
    """End every VM of this host and remove all it has of them. The agent must not be running."""
    settings = _settings()

    async def work() -> None:
        state = StateDirectory(settings.state_directory())
        state.prepare()
        lock_state_directory(state.root)
        lock_host_network()
        parts = await daemon.make_parts(settings, state)
        stop = partial(stop_pager, state.root / daemon.PAGER_DIRECTORY)
        count = await purge_host(parts, state.root / daemon.HOST_NETWORK_FILE, stop)
        click.echo(f"{count} sandboxes ended")

    try:
        trio.run(work)
    except EXPECTED as err:
        raise click.ClickException(str(err)) from err


@main.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def doctor(*, as_json: bool) -> None:
    """List what this machine has for being a host, what is missing, and the command that mends it."""
    checks = _checks(load())
    click.echo(render(checks, json=as_json))
    sys.exit(exit_code(checks))


def _checks(settings: Settings) -> list[Check]:
    answer = trio.run(probe_kvm)
    subject = Subject(
        state=settings.state_directory(), images=Path(settings.images), kvm_probe=lambda: (answer.usable, answer.reason)
    )
    return run_checks(subject)


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    """The single errors of a group, however nested."""
    found: list[BaseException] = []
    for error in group.exceptions:
        found.extend(_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    return found


if __name__ == "__main__":
    main()
