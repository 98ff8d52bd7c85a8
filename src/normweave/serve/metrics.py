"""Metrics for Prometheus."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Enum, Gauge, Histogram, Info, generate_latest

from normweave.serve.records import Inspection, WatchStatus

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_BATCH = (1, 2, 4, 8, 16, 32)


class Metrics:
    """Metrics of one server.

    Args:
        line: the name of the line.
    """

    def __init__(self, *, line: str = "") -> None:
        self._registry = CollectorRegistry()
        Info("normweave_line", "The line of this server.", registry=self._registry).info({"line": line})
        self.inspections = Counter(
            "normweave_inspections",
            "Images inspected and stored; the verdict is error if the image could not be read.",
            ["verdict", "category", "subclass", "source"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "normweave_inspection_seconds",
            "Time from the arrival of an image until its inspection is stored.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.batch = Histogram(
            "normweave_batch_images",
            "Number of images scored in one batch.",
            buckets=_BATCH,
            registry=self._registry,
        )
        self.waiting = Gauge(
            "normweave_waiting_images", "Images accepted and not yet answered.", registry=self._registry
        )
        self.refused = Counter(
            "normweave_refused_images",
            "Images refused because too many were waiting.",
            registry=self._registry,
        )
        self._model = Info("normweave_model", "The active bundle.", registry=self._registry)
        self.shadow_images = Counter(
            "normweave_shadow_images",
            "Images for the model in the shadow; skipped: it did not judge them, to keep its budget.",
            ["result"],
            registry=self._registry,
        )
        self.shadow_differences = Counter(
            "normweave_shadow_differences",
            "Images on which the model in the shadow and the active one have different verdicts.",
            registry=self._registry,
        )
        self.watch = Enum(
            "normweave_watch_state",
            "The watched folder; off: there is none.",
            states=["off", *get_args(WatchStatus)],
            registry=self._registry,
        )
        self.files_behind = Gauge(
            "normweave_watch_files_behind",
            "Images in the watched folder that are not inspected yet.",
            registry=self._registry,
        )
        output = ["name", "type"]
        self.output_delivered = Counter(
            "normweave_output_delivered", "Messages that an output has delivered.", output, registry=self._registry
        )
        self.output_behind = Gauge(
            "normweave_output_behind",
            "Messages that an output has not delivered yet.",
            output,
            registry=self._registry,
        )
        self.output_up = Gauge(
            "normweave_output_up", "1: an output is connected and its last delivery succeeded.", output,
            registry=self._registry,
        )  # fmt: skip
        self.output_last_success = Gauge(
            "normweave_output_last_success_seconds",
            "Time of the last delivery of an output since the start of the server, in seconds since 1970.",
            output,
            registry=self._registry,
        )
        self.output_dead_letters = Gauge(
            "normweave_output_dead_letters",
            "Messages that the counterpart of an output has refused for good.",
            output,
            registry=self._registry,
        )
        self.source_frames = Counter(
            "normweave_source_frames",
            "Frames that the trigger of a source chose; dropped: a newer one came before they were inspected; missed: "
            "signals of the trigger without a frame.",
            ["name", "result"],
            registry=self._registry,
        )
        self.source_connected = Gauge(
            "normweave_source_connected", "1: the source is connected.", ["name"], registry=self._registry
        )
        self.leader = Gauge(
            "normweave_leader",
            "1: this server reads the sources of the line, delivers to its outputs, and closes its parts.",
            registry=self._registry,
        )
        self.drift_alarm = Gauge(
            "normweave_drift_alarm",
            "1: the images have changed since the calibration, with this cause, in this subclass.",
            ["cause", "subclass"],
            registry=self._registry,
        )

    def name_bundle(self, bundle_hash: str, *, model: str) -> None:
        """Name the bundle that inspects from now on."""
        self._model.info({"bundle_hash": bundle_hash, "model": model})

    def observe(self, inspection: Inspection, *, seconds: float) -> None:
        """Count a stored inspection."""
        outcome = inspection.outcome
        self.inspections.labels(
            outcome.verdict or "error", outcome.category or "", outcome.subclass or "", inspection.source
        ).inc()
        self.seconds.observe(seconds)

    def text(self) -> bytes:
        """Return all metrics in the text format of Prometheus."""
        return generate_latest(self._registry)
