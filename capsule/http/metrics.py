"""Counters of the HTTP layer, by route template: a label is never something a client wrote."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)
"""Seconds: from an answer out of memory to a long exec."""


class HttpMetrics:
    """The HTTP layer's metrics in a registry of the caller's."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "capsule_http_requests",
            "Requests answered; status 499 is a client that hung up first.",
            ["method", "route", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "capsule_http_request_duration_seconds",
            "From the request's head to the answer's last byte.",
            ["method", "route"],
            buckets=BUCKETS,
            registry=registry,
        )
        self.in_flight = Gauge("capsule_http_requests_in_flight", "Requests being answered now.", registry=registry)
        self.connections = Gauge("capsule_http_connections", "Connections open now.", registry=registry)

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. `route` is a template of ours."""
        known = method if method in METHODS else "other"
        self.requests.labels(known, route, str(status)).inc()
        self.seconds.labels(known, route).observe(seconds)
