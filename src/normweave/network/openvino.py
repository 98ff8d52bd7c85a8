"""A graph in OpenVINO, often the fastest library on Intel processors."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normweave.errors import BundleError, MissingError
from normweave.network.base import GraphNetwork

TYPES = {"u8": "tensor(uint8)", "i64": "tensor(int64)", "f32": "tensor(float)", "boolean": "tensor(bool)"}
"""OpenVINO's names of types to ONNX Runtime's."""


class OpenVinoNetwork(GraphNetwork):
    """A graph in OpenVINO; see `GraphNetwork`.

    Args:
        plugin: OpenVINO's name of a device, such as CPU or GPU.
    """

    library = "OpenVINO"

    def __init__(self, content: bytes, *, where: str, size: tuple[int, int], threads: int | None, plugin: str) -> None:
        self._threads = threads
        self._plugin = plugin
        super().__init__(content, where=where, size=size)

    def _load(self) -> tuple[dict[str, tuple[str, list[int]]], dict[str, tuple[str, int]]]:
        try:
            import openvino
        except ImportError as error:
            raise MissingError(
                'Device openvino needs OpenVINO: pip install "normweave[openvino]", or use --device cpu.'
            ) from error
        core = openvino.Core()
        available = core.available_devices
        if self._plugin not in (*available, *(name.partition(".")[0] for name in available)):
            raise MissingError(
                f"Device 'openvino:{self._plugin}' was requested, but OpenVINO finds only {', '.join(available)}. "
                "Install its driver, or use --device openvino."
            )
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if self._plugin == "CPU":
            # By default it computes in bfloat16 where the processor can, which changes the scores.
            settings["INFERENCE_PRECISION_HINT"] = "f32"
            if self._threads is not None:
                settings["INFERENCE_NUM_THREADS"] = self._threads
        try:
            compiled = core.compile_model(core.read_model(self.content), self._plugin, settings)
            inputs = {
                port.any_name: (_type(port), [side.get_length() for side in list(port.partial_shape)[1:]])
                for port in compiled.inputs
            }
            outputs = {port.any_name: (_type(port), port.partial_shape.rank.get_length()) for port in compiled.outputs}
        except Exception as error:  # OpenVINO's errors are plain RuntimeErrors, and others
            raise BundleError(
                f"OpenVINO {openvino.__version__} cannot load {self._where}: {str(error)[:500]} "
                "Update openvino, use --device cpu, or train the bundle again."
            ) from error
        self._names = list(outputs)
        self._request = compiled.create_infer_request()
        self._lock = threading.Lock()  # a request serves one caller at a time
        return inputs, outputs

    def _run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        contiguous = {name: np.ascontiguousarray(value) for name, value in inputs.items()}
        with self._lock:
            outputs = self._request.infer(contiguous)
        return {name: outputs[name] for name in self._names}


def _type(port: Any) -> str:
    name: str = port.element_type.get_type_name()
    return TYPES.get(name, name)
