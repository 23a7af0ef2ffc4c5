"""`<directory>/pager.json`: which process serves from a pager's directory, for those who watch or end it."""

from __future__ import annotations

import os
from importlib.metadata import version
from typing import TYPE_CHECKING

import msgspec

from agent.pager.process import ProcessIdentity, start_time_of

if TYPE_CHECKING:
    from pathlib import Path

NAME = "pager.json"


class ProcessFile(msgspec.Struct, frozen=True):
    """`version`: of the program; a pager of another one is replaced when an agent starts."""

    pid: int
    start_time: int
    version: str = ""

    @property
    def identity(self) -> ProcessIdentity:
        """Which process it was; it may have gone."""
        return ProcessIdentity(self.pid, self.start_time)


def program_version() -> str:
    """The version of this program."""
    return version("capsule")


def write_process_file(directory: Path) -> None:
    """Say that it is us. Raises OSError."""
    start_time = start_time_of(os.getpid())
    assert start_time is not None  # noqa: S101 - we run
    temporary = directory / f"{NAME}.new"
    temporary.write_bytes(msgspec.json.encode(ProcessFile(os.getpid(), start_time, program_version())))
    temporary.replace(directory / NAME)


def read_process_file(directory: Path) -> ProcessFile | None:
    """Who serves, or served; None if nobody ever did."""
    try:
        return msgspec.json.decode((directory / NAME).read_bytes(), type=ProcessFile)
    except (OSError, msgspec.MsgspecError):
        return None
