"""Which host gets a sandbox: a pure function over a view of the fleet, with the strategy as a plug.

A host fits when what it has sold already, plus what is wanted, stays within its size times the overcommit factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence
    from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """vCPUs, MiB of memory, MiB of disk: of a host, of what is sold on it, or of one sandbox."""

    vcpus: int = 0
    memory_mb: int = 0
    disk_mb: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(
            vcpus=self.vcpus + other.vcpus,
            memory_mb=self.memory_mb + other.memory_mb,
            disk_mb=self.disk_mb + other.disk_mb,
        )

    def times(self, count: int) -> Size:
        """What `count` of this size hold together."""
        return Size(vcpus=self.vcpus * count, memory_mb=self.memory_mb * count, disk_mb=self.disk_mb * count)


@dataclass(frozen=True, slots=True, kw_only=True)
class Overcommit:
    """How many times a host's resource may be sold."""

    vcpus: float = 1.0
    memory: float = 1.0
    disk: float = 1.0

    def limit(self, host: Size) -> Size:
        """What may be sold of `host`, rounded down."""
        return Size(
            vcpus=int(host.vcpus * self.vcpus),
            memory_mb=int(host.memory_mb * self.memory),
            disk_mb=int(host.disk_mb * self.disk),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLoad:
    """One schedulable host (online, not cordoned, open to the asker): what may be sold of it, and what is."""

    id: UUID
    limit: Size
    sold: Size

    def shortages(self, want: Size) -> list[str]:
        """Names of the limits that `want` would break; empty when it fits."""
        after = self.sold + want
        return [name for name in ("vcpus", "memory_mb", "disk_mb") if getattr(after, name) > getattr(self.limit, name)]


@dataclass(frozen=True, slots=True)
class Refusal:
    """No host fits. `limits`: which limits stood in the way, empty when there is no host at all. `narrowed`: only
    certain hosts would do, those that have the snapshot."""

    hosts: int
    limits: tuple[str, ...] = ()
    narrowed: bool = False

    def message(self, want: Size) -> str:
        """For the end user: what was wanted, and which limit was hit."""
        if not self.hosts and self.narrowed:
            return "no host that has the snapshot is online; try again later"
        if not self.hosts:
            return "no host is online and open for new sandboxes; add one, or try again later"
        words = {
            "vcpus": f"{want.vcpus} vCPUs",
            "memory_mb": f"{want.memory_mb} MiB of memory",
            "disk_mb": f"{want.disk_mb} MiB of disk",
        }
        missing = " and ".join(words[name] for name in self.limits)
        which = " that has the snapshot" if self.narrowed and self.hosts == 1 else ""
        those = " that have the snapshot" if self.narrowed else ""
        online = f"the only online host{which}" if self.hosts == 1 else f"none of the {self.hosts} online hosts{those}"
        verb = "lacks" if self.hosts == 1 else "has"
        return f"{online} {verb} {missing} to spare; destroy sandboxes, add a host, or try again later"


class Strategy(Protocol):
    """Picks one of several hosts that fit."""

    def pick(self, fitting: Sequence[HostLoad], last: UUID | None) -> HostLoad:
        """`fitting` is not empty and ordered by id; `last` is the host that was chosen before this one."""
        ...


class RoundRobin:
    """The next host after the last one chosen, in the order of ids."""

    def pick(self, fitting: Sequence[HostLoad], last: UUID | None) -> HostLoad:
        """The first id above `last`, else the lowest."""
        return next((host for host in fitting if last is None or host.id > last), fitting[0])


class LeastLoaded:
    """The host whose fullest resource is the emptiest."""

    def pick(self, fitting: Sequence[HostLoad], last: UUID | None) -> HostLoad:  # noqa: ARG002
        """Equals are settled by id, so that two control planes with the same view agree."""
        return min(fitting, key=lambda host: (_fullness(host), host.id))


def choose(
    hosts: Iterable[HostLoad],
    want: Size,
    *,
    strategy: Strategy,
    last: UUID | None = None,
    among: Collection[UUID] | None = None,
) -> UUID | Refusal:
    """The host for `want`, one of `among` when that is given, or why there is none."""
    known = sorted((host for host in hosts if among is None or host.id in among), key=lambda host: host.id)
    fitting = [host for host in known if not host.shortages(want)]
    if fitting:
        return strategy.pick(fitting, last).id
    limits = {name for host in known for name in host.shortages(want)}
    return Refusal(len(known), tuple(sorted(limits)), narrowed=among is not None)


def _fullness(host: HostLoad) -> float:
    pairs = (
        (host.sold.vcpus, host.limit.vcpus),
        (host.sold.memory_mb, host.limit.memory_mb),
        (host.sold.disk_mb, host.limit.disk_mb),
    )
    return max(sold / limit if limit else float(sold > 0) for sold, limit in pairs)
