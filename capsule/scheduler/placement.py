"""Which host gets a sandbox: a pure function over a view of the fleet, with the strategy as a plug.

A host will do when it is open to the asker: a team that brings its own hosts gets those and no others. It must have the
tags that were asked for, and to fit: what it has sold already, plus what is wanted, stays within its size times the
overcommit factor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
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
    """One online host: what may be sold of it, and what is. `team`: whose it is, None for a regular one. `closed`: it
    takes no new sandboxes; those that rest there may be resumed."""

    id: UUID
    limit: Size
    sold: Size = Size()
    team: UUID | None = None
    tags: frozenset[str] = frozenset()
    closed: bool = False

    def shortages(self, want: Size) -> list[str]:
        """Names of the limits that `want` would break; empty when it fits."""
        after = self.sold + want
        return [name for name in ("vcpus", "memory_mb", "disk_mb") if getattr(after, name) > getattr(self.limit, name)]

    def plus(self, reserved: Size) -> HostLoad:
        """With `reserved` sold, too."""
        return replace(self, sold=self.sold + reserved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a host is sought for: `size`, on one of the regular hosts, or of those of the `team` that brings its own.
    `among`: only these will do, which have the snapshot. `tags`: it has to have all of them. `refused`: hosts that were
    asked and had no room."""

    size: Size
    team: UUID | None = None
    tags: frozenset[str] = frozenset()
    among: frozenset[UUID] | None = None
    refused: frozenset[UUID] = frozenset()

    def narrow(self, hosts: Iterable[HostLoad]) -> list[HostLoad] | Refusal:
        """Those of `hosts` that will do if they have room."""
        left = [host for host in hosts if host.team == self.team and not host.closed and host.id not in self.refused]
        if not left:
            return Refusal(0, ("hosts",))
        if self.among is not None and not (left := [host for host in left if host.id in self.among]):
            return Refusal(0, ("snapshot",))
        tagged = [host for host in left if self.tags <= host.tags]
        return tagged or Refusal(len(left), ("tags",))

    def explain(self, refusal: Refusal) -> str:
        """For the end user: what was wanted, and which limit was hit."""
        own = self.team is not None
        if refusal.limits == ("hosts",) and own:
            return "your team brings its own hosts, and none of them is online and open for new sandboxes"
        if refusal.limits == ("hosts",):
            return "no host is online and open for new sandboxes; add one, or try again later"
        if refusal.limits == ("snapshot",):
            whose = "none of your team's own hosts that are online has the snapshot"
            return f"{whose if own else 'no host that has the snapshot is online'}; try again later"
        hosts = _hosts(refusal.hosts, own=own, which="" if self.among is None else "that {have} the snapshot")
        if refusal.limits == ("tags",):
            verb = "lacks one of the tags" if refusal.hosts == 1 else "has all of the tags"
            return f"{hosts} {verb} {', '.join(sorted(self.tags))}; tag a host, or ask for others in metadata"
        those = f" with the tags {', '.join(sorted(self.tags))}" if self.tags else ""
        return f"{hosts}{those} {_lacks(refusal, self.size)}; destroy sandboxes, add a host, or try again later"


@dataclass(frozen=True, slots=True, kw_only=True)
class WishThere:
    """What is sought on one certain host, where a sandbox is already, whoever's that is. `resident`: it rests there,
    and a host that takes no new ones will do."""

    size: Size
    host: UUID
    resident: bool = False

    def narrow(self, hosts: Iterable[HostLoad]) -> list[HostLoad] | Refusal:
        """The one, if it will do."""
        there = [host for host in hosts if host.id == self.host and (self.resident or not host.closed)]
        return there or Refusal(0, ("hosts",))

    def explain(self, refusal: Refusal) -> str:
        """For the end user: which limit was hit."""
        if refusal.limits == ("hosts",):
            return f"the sandbox's host is not online{'' if self.resident else ' and open for new sandboxes'}"
        return f"the sandbox's host {_lacks(refusal, self.size)}; destroy sandboxes there, or try again later"


@dataclass(frozen=True, slots=True)
class Refusal:
    """No host will do. `limits`: of `hosts` that would, these are what stood in the way; or one of `hosts` (none is
    open to the asker), `snapshot`, `tags` (none of them has it)."""

    hosts: int
    limits: tuple[str, ...]


def _hosts(count: int, *, own: bool, which: str) -> str:
    """The only online host / none of the 3 online hosts."""
    online = "online host of your team" if own else "online host"
    if count == 1:
        return f"the only {online} {which.format(have='has')}".rstrip()
    return f"none of the {count} {online.replace('host', 'hosts')} {which.format(have='have')}".rstrip()


def _lacks(refusal: Refusal, want: Size) -> str:
    words = {
        "vcpus": f"{want.vcpus} vCPUs",
        "memory_mb": f"{want.memory_mb} MiB of memory",
        "disk_mb": f"{want.disk_mb} MiB of disk",
    }
    missing = " and ".join(words[name] for name in refusal.limits)
    return f"{'lacks' if refusal.hosts == 1 else 'has'} {missing} to spare"


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


STRATEGIES: Mapping[str, Strategy] = {"round_robin": RoundRobin(), "least_loaded": LeastLoaded()}
"""By the names that the setting knows them by."""


def choose(
    hosts: Iterable[HostLoad], wish: Wish | WishThere, *, strategy: Strategy, last: UUID | None = None
) -> UUID | Refusal:
    """The host for `wish`, or why there is none."""
    known = wish.narrow(hosts)
    if isinstance(known, Refusal):
        return known
    fitting = [host for host in known if not host.shortages(wish.size)]
    if fitting:
        return strategy.pick(sorted(fitting, key=lambda host: host.id), last).id
    limits = {name for host in known for name in host.shortages(wish.size)}
    return Refusal(len(known), tuple(sorted(limits)))


def _fullness(host: HostLoad) -> float:
    pairs = (
        (host.sold.vcpus, host.limit.vcpus),
        (host.sold.memory_mb, host.limit.memory_mb),
        (host.sold.disk_mb, host.limit.disk_mb),
    )
    return max(sold / limit if limit else float(sold > 0) for sold, limit in pairs)
