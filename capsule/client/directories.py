"""Directories, as tar streams: packed and unpacked in a thread, with nothing but a few pieces in memory."""

from __future__ import annotations

import os
from collections.abc import Callable

from capsule.client.answers import Transfer
from capsule.client.transport import Transport

Progress = Callable[[int, int | None], None]


async def upload(
    transport: Transport, files: str, source: str | os.PathLike[str], path: str, on_progress: Progress | None
) -> Transfer:
    """What `source` holds, into the directory `path`."""
    raise NotImplementedError


async def download(
    transport: Transport, files: str, path: str, target: str | os.PathLike[str], on_progress: Progress | None
) -> Transfer:
    """The directory `path`, as `target`."""
    raise NotImplementedError
