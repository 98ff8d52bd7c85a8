"""A graph in ONNX Runtime."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, cast

from numpy.typing import NDArray

from normweave.caches import cache_folder
from normweave.errors import BundleError, MissingError, unknown
from normweave.network import OPENVINO
from normweave.network.base import GraphNetwork

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
ERRORS_ONLY = 3


def providers(device: str) -> list[Any]:
    """Return ONNX Runtime's execution providers for a device, best first; operators that one lacks run on the next.

    CUDA and TensorRT compute in float32, without rounding to 19 bits (TF32), as the thresholds were computed.

    Raises:
        MissingError: it is not available.
        ConfigError: no such device.
    """
    name, _, number = device.partition(":")
    available = library().get_available_providers()
    if name == "auto":
        names = [each for each in ("cuda", "cpu") if PROVIDERS[each] in available]
    elif name not in PROVIDERS or (number and (name == "cpu" or not number.isdecimal())):
        raise unknown(
            "device", device, ["auto", *PROVIDERS, OPENVINO], "cuda:1 and tensorrt:1 are the second of several."
        )
    elif PROVIDERS[name] not in available:
        raise MissingError(
            f"Device {device!r} was requested, but this onnxruntime has only {', '.join(available)}. Install "
            "onnxruntime-gpu instead of it (pip uninstall onnxruntime; pip install onnxruntime-gpu), which needs CUDA "
            "and cuDNN, and for tensorrt TensorRT, or use --device cpu."
        )
    else:
        names = [each for each in ("tensorrt", "cuda", "cpu") if PROVIDERS[each] in available or each == name]
        names = names[names.index(name) :]
    return [_with_options(each, number or "0") for each in names]


def _with_options(name: str, number: str) -> Any:
    """Return a provider, with its options if it has any."""
    if name == "cpu":
        return PROVIDERS[name]
    options = {"device_id": number}
    if name == "cuda":
        options["use_tf32"] = "0"
    else:
        folder = cache_folder("tensorrt")
        folder.mkdir(parents=True, exist_ok=True)
        # An engine takes minutes to build; it is kept for the same graph, card and version of TensorRT.
        options |= {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(folder), "trt_fp16_enable": "0"}
    return PROVIDERS[name], options


def library() -> ModuleType:
    """Import ONNX Runtime with its telemetry off, which some builds have."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return cast("ModuleType", onnxruntime)


class OnnxNetwork(GraphNetwork):
    """A graph in ONNX Runtime; see `GraphNetwork`.

    Args:
        device: `auto`, or the device that must compute it: ONNX Runtime would take the processor if it cannot start.
    """

    library = "ONNX Runtime"

    def __init__(
        self,
        content: bytes,
        *,
        where: str,
        size: tuple[int, int],
        threads: int | None,
        providers: Sequence[Any],
        device: str = "auto",
    ) -> None:
        self._threads = threads
        self._device = device
        self._providers = list(providers)
        super().__init__(content, where=where, size=size)

    def _load(self) -> tuple[dict[str, tuple[str, list[int]]], dict[str, tuple[str, int]]]:
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Waiting threads would take the processors from those that decode the next images, and from other programs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without this the first bytes select the format, which could be one that has not been checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            # With its fallback, ONNX Runtime would print to stdout and try the same again.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a provider that it leaves out: that is an error below
                self._session = onnxruntime.InferenceSession(
                    self.content, options, providers=self._providers, enable_fallback=0
                )
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {self._where}: {str(error)[:500]} "
                "Update onnxruntime, or train the bundle again."
            ) from error
        running = self._session.get_providers()
        if self._device != "auto" and running[0] != PROVIDERS[self._device.partition(":")[0]]:
            raise MissingError(
                f"Device {self._device!r} was requested, but ONNX Runtime {onnxruntime.__version__} could not start "
                f"it, and would compute on {', '.join(running)}. Install the versions of CUDA and cuDNN (and TensorRT) "
                "that this onnxruntime-gpu needs, check the card with nvidia-smi, or use --device cpu."
            )
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
