"""One control group per VM: its memory and processes bounded, and everything in it killable at once.

Version 2 of the interface only. On a machine that has its controllers in version 1 the groups still hold the
processes together; without any version 2 hierarchy nothing is done. Both are said once, and are not fatal.

Every method blocks (the kernel may wait for a grace period): call them from a thread.
"""

from __future__ import annotations

import errno
import threading
import time
from pathlib import Path

import structlog

log = structlog.get_logger()

MOUNTS = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
"""Where version 2 is mounted: alone, or beside version 1."""

CONTROLLERS = ("memory", "pids")

REMOVE_ATTEMPTS = 20
REMOVE_INTERVAL = 0.01
"""A group stays busy for a moment after its last process has been reaped; the kernel offers nothing to wait for."""


class CgroupTree:
    """The groups of one agent, all under one parent."""

    def __init__(self, mount: Path | None, parent: str = "capsule") -> None:
        self._mount = mount
        self._parent = None if mount is None else mount / parent
        self._prepared = False
        self._preparing = threading.Lock()

    @classmethod
    def detect(cls, parent: str = "capsule") -> CgroupTree:
        """Find the version 2 hierarchy of this machine."""
        return cls(next((mount for mount in MOUNTS if (mount / "cgroup.controllers").exists()), None), parent)

    def add(self, name: str, pid: int, *, memory_bytes: int, processes: int) -> None:
        """Create group `name` with these limits and move a process into it. Never raises OSError."""
        group = self._prepare(name)
        if group is None:
            return
        try:
            group.mkdir(exist_ok=True)
            # No swap: a page written out and read back would be lost to the tracking of dirty pages.
            limits = {"memory.max": memory_bytes, "memory.swap.max": 0, "memory.oom.group": 1, "pids.max": processes}
            for file, limit in limits.items():
                if (group / file).exists():
                    (group / file).write_text(str(limit))
            (group / "cgroup.procs").write_text(str(pid))
        except OSError as error:
            if error.errno != errno.ESRCH:  # it has died already; who waits for it will see
                log.warning("cgroup_not_used", group=str(group), error=str(error))

    def remove(self, name: str) -> None:
        """Kill whatever is left in group `name` and remove it; harmless if there is none. Never raises OSError."""
        if self._parent is None:
            return
        group = self._parent / name
        try:
            (group / "cgroup.kill").write_text("1")
            for _ in range(REMOVE_ATTEMPTS):
                if _remove_empty(group):
                    return
                time.sleep(REMOVE_INTERVAL)
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cgroup_not_removed", group=str(group), error=str(error))
            return
        log.warning("cgroup_not_removed", group=str(group), error="still busy")

    def group_of(self, pid: int) -> str | None:
        """Return the name of the group of ours that a process is in, None if in none: only root can change that."""
        if self._mount is None:
            return None
        try:
            lines = Path(f"/proc/{pid}/cgroup").read_text().splitlines()
        except OSError:
            return None
        path = next((Path(line.removeprefix("0::")) for line in lines if line.startswith("0::/")), Path("/"))
        return path.name if self._mount / path.parent.relative_to("/") == self._parent else None

    def remove_empty(self) -> None:
        """Remove every group that has no process; those in use stay."""
        if self._parent is not None and self._parent.is_dir():
            for group in self._parent.iterdir():
                if group.is_dir():
                    _remove_empty(group)

    def was_out_of_memory(self, name: str) -> bool:
        """Whether the kernel killed something in group `name` for its memory limit."""
        if self._parent is None:
            return False
        try:
            events = dict(line.split() for line in (self._parent / name / "memory.events").read_text().splitlines())
        except OSError:
            return False
        return int(events.get("oom_kill", "0")) > 0

    def _prepare(self, name: str) -> Path | None:
        """Create the parent and switch the controllers on, once; None where groups cannot be had."""
        with self._preparing:  # VMs are started by several threads, and the first ones must not go without limits
            if not self._prepared:
                if not self._set_up():
                    self._parent = None
                self._prepared = True
        return None if self._parent is None else self._parent / name

    def _set_up(self) -> bool:
        if self._mount is None or self._parent is None:
            log.warning("cgroup_missing", consequence="VMs are not limited in memory and processes")
            return False
        try:
            self._parent.mkdir(exist_ok=True)
            missing = [name for name in CONTROLLERS if not self._enable(self._mount, self._parent, name)]
        except OSError as error:
            log.warning("cgroup_missing", mount=str(self._mount), error=str(error))
            return False
        if missing:
            log.warning("cgroup_controllers_missing", mount=str(self._mount), controllers=missing)
        return True

    @staticmethod
    def _enable(mount: Path, parent: Path, controller: str) -> bool:
        if controller not in (mount / "cgroup.controllers").read_text().split():
            return False
        try:
            for directory in (mount, parent):
                (directory / "cgroup.subtree_control").write_text(f"+{controller}")
        except OSError:
            return False  # inside a container, whose own processes are in the way
        return True


def _remove_empty(group: Path) -> bool:
    try:
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in {errno.EBUSY, errno.ENOTEMPTY}:
            raise
        return False
    return True
