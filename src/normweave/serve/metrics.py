"""What Prometheus may ask."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from normweave.serve.records import Inspection

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Counters of one server."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.inspections = Counter(
            "normweave_inspections",
            "Images judged and kept; error where one could not be read.",
            ["verdict", "category", "subclass", "source"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "normweave_inspection_seconds",
            "From an image's arrival until it is kept.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch = Histogram(
            "normweave_batch_images",
            "Images that went through the network together.",
            buckets=_BATCH,
            registry=self._registry,
        )
        self.waiting = Gauge(
            "normweave_waiting_images", "Images taken and not yet answered.", registry=self._registry
        )
        self.refused = Counter(
            "normweave_refused_images",
            "Images not taken since too many waited.",
            registry=self._registry,
        )

    def observe(self, inspection: Inspection, *, seconds: float) -> None:
        """Count an inspection that was kept."""
        outcome = inspection.outcome
        self.inspections.labels(
            outcome.verdict or "error", outcome.category or "", outcome.subclass or "", inspection.source
        ).inc()
        self.seconds.observe(seconds)

    def text(self) -> bytes:
        """Everything, as Prometheus reads it."""
        return generate_latest(self._registry)
