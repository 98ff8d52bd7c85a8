"""A graph in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

from numpy.typing import NDArray

from normweave.errors import BundleError, MissingError, unknown
from normweave.network import OPENVINO
from normweave.network.base import GraphNetwork

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERRORS_ONLY = 3


def providers(device: str) -> list[Any]:
    """Return ONNX Runtime's execution providers for a device, best first.

    Raises:
        MissingError: it is not available.
        ConfigError: no such device.
    """
    name, _, number = device.partition(":")
    available = library().get_available_providers()
    if name == "auto":
        return [PROVIDERS[each] for each in ("cuda", "cpu") if PROVIDERS[each] in available]
    if name not in PROVIDERS:
        raise unknown("device", device, ["auto", *PROVIDERS, OPENVINO], "cuda:1 is the second of several.")
    if PROVIDERS[name] not in available:
        raise MissingError(
            f"Device {device!r} was requested, but this onnxruntime has only {', '.join(available)}. "
            "Install onnxruntime-gpu instead of it, or use --device cpu."
        )
    if number:
        return [(PROVIDERS[name], {"device_id": number}), PROVIDERS["cpu"]]
    return list(dict.fromkeys([PROVIDERS[name], PROVIDERS["cpu"]]))


def library() -> ModuleType:
    """Import ONNX Runtime with its telemetry off, which some builds have."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return cast("ModuleType", onnxruntime)


class OnnxNetwork(GraphNetwork):
    """A graph in ONNX Runtime; see `GraphNetwork`."""

    library = "ONNX Runtime"

    def __init__(
        self, content: bytes, *, where: str, size: tuple[int, int], threads: int | None, providers: Sequence[Any]
    ) -> None:
        self._threads = threads
        self._providers = list(providers)
        super().__init__(content, where=where, size=size)

    def _load(self) -> tuple[dict[str, tuple[str, list[int]]], dict[str, tuple[str, int]]]:
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Without this the first bytes select the format, which could be one that has not been checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            # With its fallback, ONNX Runtime would print to stdout and try the same again.
            self._session = onnxruntime.InferenceSession(
                self.content, options, providers=self._providers, enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {self._where}: {str(error)[:500]} "
                "Update onnxruntime, or train the bundle again."
            ) from error
        try:
            inputs = {each.name: (each.type, each.shape[1:]) for each in self._session.get_inputs()}
            outputs = {each.name: (each.type, len(each.shape)) for each in self._session.get_outputs()}
        except UnicodeDecodeError as error:
            raise BundleError(
                f"{self._where}: the names of its inputs and outputs are not text. Copy the bundle again, or train it "
                "again."
            ) from error
        self._names = list(outputs)
        return inputs, outputs

    def _run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return dict(zip(self._names, self._session.run(self._names, inputs), strict=True))
