"""Puts pages into a VMM's memory through its userfaultfd, and knows what each of the kernel's answers means.

Of the errors of UFFDIO_COPY (ioctl_userfaultfd(2)): EAGAIN with bytes copied: go on behind them; EAGAIN without: the
VMM is about to change its memory, hear what it says first; EEXIST: the page is there, wake who waits for it; ENOENT:
the VMM has unmapped it; ESRCH: the VMM is ending; ENOMEM: its memory limit, or the host's, is reached.
"""

from __future__ import annotations

import errno
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING

from agent.pager.abi import COPY_MODE_WP, PAGE, Userfault, address_of
from agent.pager.faults import PIECE, PRESENT

if TYPE_CHECKING:
    from agent.pager.faults import PageMap
    from agent.pager.regions import Region


class Again(Exception):  # noqa: N818 - says what to do
    """Not now: the VMM changes its memory at this moment. Read its events, then try again."""


class OutOfMemory(Exception):  # noqa: N818 - says what happened
    """No page could be had. It may be different in a moment."""


class VmGone(Exception):  # noqa: N818 - says what happened
    """The VMM has no memory any more: its process is ending."""


class FaultUnserved(Exception):  # noqa: N818 - says what happened
    """A fault cannot be answered, now or ever; the message says why."""


class Staging:
    """A page-aligned buffer of PIECE bytes with its address."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, PIECE)
        self.view = memoryview(self._memory)
        self.address = address_of(self._memory)


class Filler:
    """Brings pages to one VM and keeps its page map true."""

    def __init__(self, userfault: Userfault, pages: PageMap, zeros: Staging) -> None:
        """`zeros`: never written to, shared by all VMs."""
        self._userfault = userfault
        self._pages = pages
        self._zeros = zeros
        self._mode = COPY_MODE_WP
        self.bytes = 0
        """Brought so far, zeros included."""

    def bring(self, region: Region, page: int, count: int, source: int) -> None:
        """Copy `count` pages from address `source` of ours. Raises Again, OutOfMemory, VmGone, FaultUnserved.

        What came before the error is there and marked.
        """
        self._copy(region, page, count, source, self._mode)

    def zero(self, region: Region, page: int, count: int) -> None:
        """Zeros that count as written. Raises as `bring`."""
        self._copy(region, page, count, self._zeros.address, 0)

    def wake(self, region: Region, page: int) -> None:
        """Have who waits for this page look again."""
        with suppress(OSError):
            self._userfault.wake(_address(region, page), PAGE)

    def _copy(self, region: Region, page: int, count: int, source: int, mode: int) -> None:
        end, most = page + count, count
        while page < end:
            length = min(end - page, most) * PAGE
            copied, error = self._userfault.copy(_address(region, page), source, length, mode)
            if copied:
                self._pages.mark(page, copied // PAGE, PRESENT)
                self.bytes += copied
                page += copied // PAGE
                source += copied
                if error in {0, errno.EAGAIN}:
                    continue
            if error == errno.EEXIST:
                self._pages.mark(page, 1, PRESENT)
                self.wake(region, page)
                page += 1
                source += PAGE
            elif error == errno.EINVAL and mode == COPY_MODE_WP == self._mode:
                # Memory that is not registered for write protection: a kernel without the asynchronous kind.
                mode = self._mode = 0
            elif error == errno.ENOENT and length > PAGE:
                most = 1  # the VMM has unmapped some of it: which?
            elif error == errno.ENOENT:
                self.wake(region, page)
                page += 1
                source += PAGE
            else:
                raise _failure(error)

    def count_as_written(self, region: Region, page: int, count: int) -> None:
        """Else pages that were removed and are never looked at again would pass for unchanged ones. Raises Again."""
        if self._mode:
            try:
                self._userfault.write_unprotect(_address(region, page), count * PAGE)
            except OSError as err:
                if err.errno == errno.EAGAIN:
                    raise Again from None


def _address(region: Region, page: int) -> int:
    return region.address + page * PAGE - region.offset


def _failure(error: int) -> Exception:
    if error == errno.EAGAIN:
        return Again()
    if error in {errno.ENOMEM, errno.ENOSPC}:
        return OutOfMemory()
    if error == errno.ESRCH:
        return VmGone()
    return FaultUnserved(f"the kernel refused a page: {errno.errorcode.get(error, error)}")
