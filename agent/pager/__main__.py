"""`python -m agent.pager`: the pager's process. Started by the agent, in a session of its own; it outlives it."""

from __future__ import annotations

import gc
import os
import resource
import sys
from contextlib import suppress
from functools import partial
from pathlib import Path

import click
import trio

from agent.actor.logs import configure_logs
from agent.pager.daemon import AnotherPager, serve, take_directory
from agent.pager.service import CONNECT_TIMEOUT

ANOTHER_PAGER = 3
"""Exit status: somebody else serves from this directory."""
DESCRIPTORS = 1 << 20
SWITCH_INTERVAL = 0.0005
"""Seconds until a thread that computes (checksums of what came from the disk) gives the interpreter to the faults."""
PRIORITY = 1
"""The lowest real-time one. A guest stands still while its fault waits for a processor; among ordinary processes
a busy machine makes the pager wait longer than its work takes. That work is bounded: a page is brought once."""
NICENESS = -10
"""Where real-time priorities are not to be had."""
OOM_SCORE = -900
"""When the host runs out of memory, killing the pager would free little and stop every VM."""


@click.command()
@click.option("--directory", type=click.Path(path_type=Path, file_okay=False), required=True)
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-json", is_flag=True)
@click.option("--connect-timeout", type=float, default=CONNECT_TIMEOUT, help="Seconds a VMM may take to connect.")
@click.option("--ready-fd", type=int, default=None, help="Gets a byte when the socket listens.")
def main(directory: Path, log_level: str, log_json: bool, connect_timeout: float, ready_fd: int | None) -> None:
    """Serve the page faults of this host's restored VMs, until SIGTERM."""
    configure_logs(level=log_level, json=log_json)
    os.umask(0o077)  # sockets and records are nobody else's
    _prepare_process()
    try:
        take_directory(directory)
    except AnotherPager as err:
        click.echo(f"agent.pager: {err}", err=True)
        sys.exit(ANOTHER_PAGER)
    run = partial(serve, directory, connect_timeout=connect_timeout, ready=ready_fd)
    gc.freeze()
    trio.run(run)


def _prepare_process() -> None:
    sys.setswitchinterval(SWITCH_INTERVAL)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(PRIORITY))
    except OSError:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    for wanted in (max(most, DESCRIPTORS), most):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        except (ValueError, OSError):
            continue  # more than fs.nr_open
        return


if __name__ == "__main__":
    main()
