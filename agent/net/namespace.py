"""Network namespaces by name, as `ip netns` keeps them: a bind mount in /run/netns.

Everything here that enters a namespace changes the calling thread and therefore insists on a SlotThread.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cffi import FFI

from agent.net.threads import require_slot_thread

if TYPE_CHECKING:
    from collections.abc import Iterator

NAMESPACE_DIR = Path("/run/netns")
_OWN_NAMESPACE = "/proc/thread-self/ns/net"

_CLONE_NEWNET = 0x40000000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_SHARED = 1 << 20
_MNT_DETACH = 2

_ffi = FFI()
_ffi.cdef(
    """
    int unshare(int flags);
    int setns(int fd, int nstype);
    int mount(const char *source, const char *target, const char *fstype, unsigned long flags, const void *data);
    int umount2(const char *target, int flags);
    """
)
_libc: Any = _ffi.dlopen(None)


def create_namespace(name: str) -> None:
    """Make namespace `name` and leave the calling thread in it; FileExistsError if there is one already.

    On any other error nothing of it is left.
    """
    require_slot_thread()
    _ensure_namespace_dir()
    path = NAMESPACE_DIR / name
    # O_EXCL is what decides between two makers of one name.
    os.close(os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0))
    try:
        _check(_libc.unshare(_CLONE_NEWNET), name)
        _mount(_OWN_NAMESPACE, path, _MS_BIND)
    except OSError:
        path.unlink()
        raise


def enter_namespace(name: str) -> None:
    """Move the calling thread into namespace `name`; FileNotFoundError if there is none.

    A file left by a maker that died before it mounted the namespace gives OSError (EINVAL).
    """
    require_slot_thread()
    fd = os.open(NAMESPACE_DIR / name, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.setns(fd, _CLONE_NEWNET), name)
    finally:
        os.close(fd)


def delete_namespace(name: str) -> None:
    """Take the name away, whatever state it is in; no error if there is none.

    The kernel ends the namespace, and all devices in it, when its last user has gone: soon, not now.
    """
    path = NAMESPACE_DIR / name
    try:
        _check(_libc.umount2(os.fsencode(path), _MNT_DETACH), name)
    except OSError as err:
        if err.errno not in {errno.EINVAL, errno.ENOENT}:  # not a mount point, no such file
            raise
    path.unlink(missing_ok=True)


def namespace_names() -> set[str]:
    """Names of all namespaces of the host, half-made ones included."""
    with suppress(FileNotFoundError):
        return {entry.name for entry in NAMESPACE_DIR.iterdir()}
    return set()


@contextmanager
def own_namespace() -> Iterator[int]:
    """A descriptor of the calling thread's namespace, for moving devices into it."""
    fd = os.open(_OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


def _ensure_namespace_dir() -> None:
    """Make /run/netns a shared mount, so that taking a name away reaches every mount namespace that copied it."""
    NAMESPACE_DIR.mkdir(mode=0o755, exist_ok=True)
    try:
        _mount("none", NAMESPACE_DIR, _MS_SHARED | _MS_REC)
    except OSError as err:
        if err.errno != errno.EINVAL:  # it is not a mount point yet
            raise
        _mount(str(NAMESPACE_DIR), NAMESPACE_DIR, _MS_BIND | _MS_REC)
        _mount("none", NAMESPACE_DIR, _MS_SHARED | _MS_REC)


def _mount(source: str, target: Path, flags: int) -> None:
    _check(_libc.mount(source.encode(), os.fsencode(target), b"none", flags, _ffi.NULL), str(target))


def _check(result: int, name: str) -> None:
    if result < 0:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno), name)
