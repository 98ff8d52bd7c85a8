"""A bundle's graph in OpenVINO, which reads the same file: often the fastest on Intel's processors."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normweave.errors import BundleError, MissingError

if TYPE_CHECKING:
    from openvino import CompiledModel

NAME = "OpenVINO"
TYPES = {"u8": "tensor(uint8)", "i64": "tensor(int64)", "f32": "tensor(float)", "boolean": "tensor(bool)"}
"""Its names of types, and ONNX Runtime's."""


class OpenVino:
    """A loaded graph.

    Args:
        content: of the ONNX file, which has been checked.
        where: what it is called in messages.
        plugin: OpenVINO's name of a device, as CPU or GPU.

    Attributes:
        inputs: type and sizes, but for that of the batch, by name.
        outputs: type and number of axes by name.

    Raises:
        BundleError: OpenVINO cannot load it.
        MissingError: OpenVINO or the device is not there.
    """

    name = NAME

    def __init__(self, content: bytes, *, where: str, threads: int | None, plugin: str) -> None:
        try:
            import openvino
        except ImportError as error:
            raise MissingError(
                'Device openvino needs OpenVINO: pip install "normweave[openvino]", or use --device cpu.'
            ) from error
        core = openvino.Core()
        there = core.available_devices
        if plugin not in (*there, *(name.partition(".")[0] for name in there)):
            raise MissingError(
                f"Device 'openvino:{plugin}' was asked for, but OpenVINO finds {', '.join(there)} only. "
                "Install its driver, or use --device openvino."
            )
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY"}
        if plugin == "CPU":
            # Left to itself it computes in bfloat16 where the processor can: other scores than those of training.
            settings["INFERENCE_PRECISION_HINT"] = "f32"
            if threads is not None:
                settings["INFERENCE_NUM_THREADS"] = threads
        try:
            model = core.read_model(content)
            self._compiled: CompiledModel = core.compile_model(model, plugin, settings)
            self.inputs = {
                given.any_name: (_type(given), [side.get_length() for side in list(given.partial_shape)[1:]])
                for given in self._compiled.inputs
            }
            self.outputs = {
                given.any_name: (_type(given), given.partial_shape.rank.get_length())
                for given in self._compiled.outputs
            }
        except Exception as error:  # OpenVINO's errors are plain RuntimeErrors, and others
            raise BundleError(
                f"OpenVINO {openvino.__version__} cannot load {where}: {str(error)[:500]} "
                "Update openvino, use --device cpu, or train the bundle again."
            ) from error
        self._request = self._compiled.create_infer_request()
        self._turn = threading.Lock()  # a request serves one caller at a time

    def run(self, given: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        with self._turn:
            said = self._request.infer({name: np.ascontiguousarray(value) for name, value in given.items()})
        return {name: said[name] for name in self.outputs}


def _type(given: Any) -> str:
    name: str = given.element_type.get_type_name()
    return TYPES.get(name, name)
