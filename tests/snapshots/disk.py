"""The store's system calls, recorded, failed, or cut off as by a kill; and small snapshots to make with them."""

from __future__ import annotations

import errno
import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Self
from unittest.mock import patch
from uuid import uuid4

from agent.snapshots import files
from agent.snapshots.header import NIL, PAGE, Run
from agent.snapshots.manifest import Description
from agent.snapshots.memory import MemoryReader
from agent.snapshots.merge import overlay

OPERATIONS = (
    "make_directory",
    "create",
    "write",
    "sync",
    "sync_directory",
    "set_owner",
    "set_mode",
    "link",
    "rename",
    "unlink",
    "remove_directory",
)
PAGES = 256
"""In a memory of one MiB, the smallest that a manifest can have."""


class Killed(BaseException):
    """The process is gone; so is whatever it would have cleaned up."""


class Disk:
    """While entered, every operation of `files` passes through here. Counts from 1."""

    def __init__(self, *, durable: bool = False) -> None:
        self.calls: list[tuple[str, str]] = []
        self._durable = durable
        self.harmed = False
        """Since the last `kill_at` or `fail_at`."""
        self._kill_at = self._fail_at = 0
        self._errno = 0
        self._patches = ExitStack()

    def __enter__(self) -> Self:
        for name in OPERATIONS:
            self._patches.enter_context(patch.object(files, name, self._wrapped(name, getattr(files, name))))
        return self

    def __exit__(self, *_):
        self._patches.close()

    def kill_at(self, number: int) -> None:
        """Die in the operation with that number: a write is half done, everything else not at all."""
        self.calls.clear()
        self.harmed = False
        self._kill_at, self._fail_at = number, 0

    def fail_at(self, number: int, code: int = errno.ENOSPC) -> None:
        """Fail the operation with that number, and every later one that would need room on the disk."""
        self.calls.clear()
        self.harmed = False
        self._kill_at, self._fail_at, self._errno = 0, number, code

    def recover(self) -> None:
        self.calls.clear()
        self._kill_at = self._fail_at = 0

    def _wrapped(self, name, original):
        def call(*arguments):
            self.calls.append((name, _target(name, arguments)))
            number = len(self.calls)
            if self._kill_at and number >= self._kill_at:
                if name == "write" and number == self._kill_at:
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self.harmed = True
                raise Killed
            needs_room = name in {"make_directory", "create", "write", "link", "sync"}
            if self._fail_at and (number == self._fail_at or (number > self._fail_at and needs_room)):
                if name == "write":
                    original(arguments[0], arguments[1][: len(arguments[1]) // 2])
                self.harmed = True
                raise OSError(self._errno, os.strerror(self._errno))
            if name in {"sync", "sync_directory"} and not self._durable:
                return None
            return original(*arguments)

        return call


def _target(name, arguments) -> str:
    first = arguments[-1] if name in {"link", "rename"} else arguments[0]
    return str(Path(f"/proc/self/fd/{first}").readlink()) if isinstance(first, int) else str(first)


def page(value: int) -> bytes:
    """The content of a page: zeros for 0, else something that no other value has."""
    return bytes(PAGE) if value == 0 else hashlib.shake_128(value.to_bytes(8, "little")).digest(PAGE)


def description(kind="named", owner="", memory_mb=PAGES * PAGE >> 20, **others):
    return Description(
        **{
            "kind": kind,
            "owner": owner,
            "image_name": "minimal",
            "image_digest": "d" * 64,
            "kernel": "/images/kernel",
            "initramfs": "/images/initramfs",
            "rootfs": "/images/rootfs",
            "vcpus": 1,
            "memory_mb": memory_mb,
            "disk_mb": 64,
            "vmm": "qemu 7.2",
            **others,
        }
    )


def capture(draft, parent, changed: dict[int, int], memory_bytes: int = PAGES * PAGE):
    """The plainest capture: every page of `changed` (page number to value) is written, zeros become NIL runs."""
    writer = draft.new_build()
    runs = []
    for number in sorted(changed):
        if changed[number] == 0:
            runs.append(Run(number * PAGE, PAGE, NIL, 0))
        else:
            runs.append(Run(number * PAGE, PAGE, writer.build, writer.append(memoryview(page(changed[number])))))
    draft.write_header(overlay(parent, runs, memory_bytes=memory_bytes, build=writer.build))


def publish(store, changed: dict[int, int], *, parent=None, disk: Path | None = None, state=b"state", snapshot_id=None):
    """Make a snapshot over `parent` (a Snapshot); `disk` becomes one more layer."""
    snapshot_id = snapshot_id or uuid4()
    with store.draft(snapshot_id) as draft:
        layers = parent.manifest.layers if parent is not None else ()
        if disk is not None:
            layers = (*layers, draft.add_layer(disk))
        draft.state_path.write_bytes(state)
        capture(draft, parent.header if parent is not None else None, changed)
        return draft.publish(description(), layers)


def pages_of(store, snapshot) -> bytes:
    with MemoryReader(snapshot.header, store.builds) as memory:
        return memory.read(0, snapshot.header.memory_bytes)


def contents(root: Path) -> set[str]:
    """Everything below a store's root, except what is inside of builds and snapshots."""
    found = set()
    for name in ("snapshots", "builds", "layers"):
        found |= {f"{name}/{entry.name}" for entry in (root / name).iterdir()}
    return found


def needed(snapshots) -> set[str]:
    """What there must be for these snapshots, as `contents` names it."""
    found = set()
    for each in snapshots:
        found.add(f"snapshots/{each.id}")
        found |= {f"builds/{build}" for build in each.manifest.builds}
        found |= {f"layers/{layer}.qcow2" for layer in each.manifest.layers}
    return found


def flip(path: Path, bit: int) -> None:
    """Turn one bit of a file over; also of a read-only one."""
    mode = path.stat().st_mode
    path.chmod(0o600)
    data = bytearray(path.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    path.write_bytes(data)
    path.chmod(mode)
