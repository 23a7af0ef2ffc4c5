"""What the checks ask of the machine. Everything here only looks; a trial of the network happens in a namespace of its
own that is gone with the program.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import platform
import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

TRIAL_SECONDS = 10
PAGEMAP_SCAN = 0xC0606610  # _IOWR('f', 16, struct pm_scan_arg), Linux 6.7
PM_SCAN_ARG = struct.Struct("<12Q")
ADJTIMEX_BYTES = 208
ADJTIMEX_STATUS = 40  # offset of the status word in struct timex
STA_UNSYNC = 0x40


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended and what it said; `code` 127 when it is not there, 124 when it took too long."""

    code: int
    said: str


class Machine:
    """The machine we run on. Tests put another one in its place."""

    def is_root(self) -> bool:
        """Whether we run with all rights."""
        return os.geteuid() == 0

    def kernel(self) -> str:
        """The running kernel's release."""
        return platform.release()

    def read(self, path: str) -> str | None:
        """A small file's text, or None when it cannot be read."""
        try:
            return Path(path).read_text(errors="replace")
        except OSError:
            return None

    def run(self, argv: list[str], *, stdin: str = "") -> Ran:
        """Run a program to its end."""
        if shutil.which(argv[0]) is None:
            return Ran(127, f"{argv[0]} is not installed")
        try:
            done = subprocess.run(argv, input=stdin, capture_output=True, text=True, check=False, timeout=TRIAL_SECONDS)
        except subprocess.TimeoutExpired:
            return Ran(124, f"{argv[0]} did not answer within {TRIAL_SECONDS} s")
        return Ran(done.returncode, (done.stdout + done.stderr).strip())

    def open_error(self, path: str) -> str:
        """Why the device cannot be opened; empty when it can."""
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as err:
            return err.strerror or str(err)
        return ""

    def library_error(self, name: str) -> str:
        """Why the shared library cannot be loaded; empty when it can."""
        try:
            ctypes.CDLL(name)
        except OSError as err:
            return str(err)
        return ""

    def free_bytes(self, path: Path) -> int:
        """Free space where `path` is, or would be."""
        there = next(folder for folder in (path, *path.parents) if folder.exists())
        space = os.statvfs(there)
        return space.f_bavail * space.f_frsize

    def userfaultfd_error(self) -> str:
        """Why page faults, the kernel's own among them, cannot be handled in user space; empty when they can."""
        return self.open_error("/dev/userfaultfd")

    def pagemap_scan_error(self) -> str:
        """Why the kernel cannot list written pages; empty when it can (an empty range is asked for)."""
        request = bytearray(PM_SCAN_ARG.pack(PM_SCAN_ARG.size, *([0] * 11)))
        try:
            with Path("/proc/self/pagemap").open("rb") as pagemap:
                fcntl.ioctl(pagemap, PAGEMAP_SCAN, request)
        except OSError as err:
            return err.strerror or str(err)
        return ""

    def clock_is_synchronised(self) -> bool:
        """Whether the kernel's clock is kept by a time service."""
        state = ctypes.create_string_buffer(ADJTIMEX_BYTES)
        if ctypes.CDLL(None, use_errno=True).adjtimex(state) < 0:
            return False
        (status,) = struct.unpack_from("<i", state, ADJTIMEX_STATUS)
        return not status & STA_UNSYNC
