"""What the agent asks of the pager: the interface, its figures and its failures.

A restored VM's memory arrives page by page: its VMM connects to a socket of the pager's, hands over its userfaultfd,
and the pager serves from then on, whatever becomes of the agent. It keeps its own records: one that was killed serves
on when it is started again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import msgspec

CONNECT_TIMEOUT = 60.0
"""Seconds a VMM may take from `listen` to its handshake; then the pager stops listening and the VM counts as failed."""

LATENCY_BOUNDS = (
    0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0,
)  # fmt: skip
"""Upper bounds of the latency histogram's buckets in seconds; one more bucket holds what took longer."""


class PagerError(Exception):
    """Base of everything a pager raises; never raised itself."""


class PagerUnavailable(PagerError):  # noqa: N818 - says what happened
    """The pager's process does not answer. VMs that are served already go on waiting; try again."""


class SnapshotUnreadable(PagerError):  # noqa: N818 - says what happened
    """The snapshot's memory cannot be served; the message names the file."""


class SnapshotNotOpened(PagerError):  # noqa: N818 - says what happened
    """The host is short of descriptors or memory, or its disk had a hiccup: nothing is known about the snapshot; try
    again."""


class SocketRefused(PagerError):  # noqa: N818 - says what happened
    """The socket for the VMM cannot be made; the message names it."""


class NotPaged(PagerError):  # noqa: N818 - says what happened
    """The pager has no such VM: never listened for, or released."""


class ConnectTimeout(PagerError):  # noqa: N818 - says what happened
    """The VMM has not connected in time."""


class PagingFailed(PagerError):  # noqa: N818 - says what happened
    """The VM is not served any more and never will be; the message is what `Pager.failure` returns."""


class PagingDamaged(PagingFailed):
    """It is not served because the snapshot's data is damaged; the message names the file."""


class PagedVm(msgspec.Struct, frozen=True, kw_only=True):
    """A VM about to be restored.

    `vm_id`: the sandbox's id, it names the pager's record. `snapshot`: the snapshot's directory, which must stay until
    `release` (its header is read again by a pager that was restarted); `builds`: where the builds lie that its header
    names. `socket`: absolute, in a directory only root writes to; made by the pager, given to `uid`, the only user who
    may connect. `prefetch`: bring the working set in before the VM asks for it.
    """

    vm_id: str
    snapshot: Path
    builds: Path
    socket: Path
    uid: int
    prefetch: bool = True


class PagerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What serving one VM took, since its handshake or since the pager was last started.

    `faults`: page faults answered; `fault_bytes`: brought in around them, zeros included; `prefetched_bytes`: brought
    in before they were asked for. `latency`: how many faults fell into each bucket of LATENCY_BOUNDS, from the moment
    the pager heard of the fault to its answer. `connected`: the VMM has shaken hands and is being served.
    """

    faults: int = 0
    fault_bytes: int = 0
    prefetched_bytes: int = 0
    latency: tuple[int, ...] = (0,) * (len(LATENCY_BOUNDS) + 1)
    connected: bool = False

    def latency_quantile(self, share: float) -> float:
        """Upper bound in seconds of the bucket in which this share (0 to 1) of the faults is reached; 0 without faults,
        infinity beyond the last bound."""
        wanted = share * sum(self.latency)
        seen = 0
        for count, bound in zip(self.latency, (*LATENCY_BOUNDS, float("inf")), strict=True):
            seen += count
            if seen and seen >= wanted:
                return bound
        return 0.0


class Pager(Protocol):
    """Serves the page faults of restored VMs. Every method raises PagerUnavailable when the process does not answer."""

    async def listen(self, vm: PagedVm) -> None:
        """Get ready for the VMM; when this returns, it can connect. A VM of the same id is released first.

        The snapshot's header and the presence of its builds are checked here. Raises SnapshotUnreadable,
        SnapshotNotOpened and SocketRefused; then nothing is left.
        """
        ...

    async def wait_connected(self, vm_id: str, *, timeout: float) -> None:  # noqa: ASYNC109 - travels to the process
        """Wait until the VMM is served and the working set is in its memory.

        Raises ConnectTimeout (the VM stays, wait again or release it), PagingFailed, PagingDamaged and NotPaged.
        """
        ...

    async def record_working_set(self, vm_id: str) -> None:
        """Write what the VM has touched so far into its snapshot's `working-set`, combined with earlier runs.

        To be called once per resume, when the guest has given its first answer; later calls change nothing. Best
        effort: what cannot be recorded is logged. Raises NotPaged.
        """
        ...

    async def release(self, vm_id: str) -> PagerStatistics | None:
        """Stop serving and forget the VM; its figures, or None if the pager has no such VM. Never hangs.

        The VM must be dead, or to be killed next: it stands still at its next page fault.
        """
        ...

    async def failure(self, vm_id: str) -> str | None:
        """Why the pager ended this VM (a damaged file, named) or refused it; None while all is well or unknown."""
        ...

    async def damage(self, vm_id: str) -> str | None:
        """The same, if the snapshot's data is the reason: None after what only concerns this run of the VM."""
        ...

    async def statistics(self) -> dict[str, PagerStatistics]:
        """Figures by VM, of all that were not released."""
        ...
