"""Starting a process inside a network namespace: a child gets the namespace of the thread that makes it."""

from __future__ import annotations

import ctypes
import os
import threading
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")

CLONE_NEWNET = 0x40000000


def start_inside(namespace: Path, start: Callable[[], T]) -> T:
    """Run `start` in a thread that has entered `namespace` and ends with it; blocks. Raises OSError.

    Never in a pooled thread: its next job would find itself in there.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            _enter(namespace)
            results.append(start())
        except Exception as error:  # noqa: BLE001 - raised again where it can be handled
            errors.append(error)

    thread = threading.Thread(target=work, name="start-inside")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(namespace: Path) -> None:
    """setns(2) of the calling thread (os.setns comes with Python 3.12)."""
    descriptor = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, os.strerror(error), str(namespace))
    finally:
        os.close(descriptor)
