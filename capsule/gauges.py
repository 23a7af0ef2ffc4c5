"""What /metrics says beyond HTTP: read from the live objects at each scrape."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

    from prometheus_client import CollectorRegistry, Metric

    from capsule.db.pool import Database
    from capsule.hosts.links import HostLinks
    from capsule.monitor.monitor import Monitor
    from capsule.sandboxes.operations import Operations


class FleetGauges(Collector):
    """Links to hosts, operations under way, the database pool, and whether this process leads."""

    def __init__(self, db: Database, links: HostLinks, operations: Operations, monitor: Monitor) -> None:
        self._db = db
        self._links = links
        self._operations = operations
        self._monitor = monitor

    def register(self, registry: CollectorRegistry) -> None:
        """Be scraped with `registry`."""
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """The figures of this moment."""
        links = self._links.statistics().values()
        yield _gauge("capsule_host_links", "Links to agents.", len(links))
        yield _gauge(
            "capsule_host_links_connected", "Links to agents that are up.", sum(link.connected for link in links)
        )
        yield _gauge(
            "capsule_operations", "Creates, destroys, pauses and their like under way.", self._operations.running()
        )
        yield _gauge("capsule_monitor_leads", "1 where the fleet's monitor runs.", int(self._monitor.leading))
        pool = GaugeMetricFamily("capsule_database_pool", "The database pool, by figure.", labels=["figure"])
        for name, value in msgspec.structs.asdict(self._db.statistics()).items():
            pool.add_metric([name], value)
        yield pool


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)
