"""Counters of the HTTP layer, by route template: a label is never something a client wrote."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0)
"""Seconds: from an answer out of memory to a long exec."""

STANDARD_CODES = range(1000, 1016)
APPLICATION_CODES = range(4400, 4600)
"""Close codes that are ours: 4000 and an HTTP status."""


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
        self.streams = Gauge("capsule_http_streams", "WebSockets open now.", ["kind"], registry=registry)
        self.streams_ended = Counter(
            "capsule_http_streams_ended",
            "WebSockets that ended, by close code; 1006 is a client that was gone, other a code of the client's own.",
            ["kind", "code"],
            registry=registry,
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request. `route` is a template of ours."""
        known = method if method in METHODS else "other"
        self.requests.labels(known, route, str(status)).inc()
        self.seconds.labels(known, route).observe(seconds)

    @contextmanager
    def stream(self, kind: str) -> Iterator[None]:
        """Count a WebSocket as open. `kind` is the name of an operation."""
        self.streams.labels(kind).inc()
        try:
            yield
        finally:
            self.streams.labels(kind).dec()

    def stream_ended(self, kind: str, code: int | None) -> None:
        """Count its end. None: it was cut off."""
        known = code is not None and (code in STANDARD_CODES or code in APPLICATION_CODES)
        self.streams_ended.labels(kind, str(code) if known else "cut" if code is None else "other").inc()
