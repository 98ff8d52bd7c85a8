"""A bundle's graph in ONNX Runtime or OpenVINO: prepared pixels to what the head says of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from normweave.errors import BundleError, MissingError, unknown
from normweave.network import allow_list

PIXELS = "pixels"
"""(B, 3, height, width) uint8."""
EXCLUDED = "excluded"
"""(B,) int64, the subclass whose expert is not asked; -1 asks all. Only where the head knows strangers."""
ANSWERS = {
    "scores": ("tensor(float)", 3),
    "image_scores": ("tensor(float)", 1),
    "reconstruction": ("tensor(float)", 3),
    "weights": ("tensor(float)", 2),
    "subclass": ("tensor(int64)", 1),
    "distance": ("tensor(float)", 1),
    "adapted": ("tensor(bool)", 1),
}
"""Outputs by name, their type and number of axes; `scores` is always there. See `PatchScores` and `Routing`."""
ROUTING = ("weights", "subclass", "distance", "adapted")
OPENVINO = "openvino"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
ERRORS_ONLY = 3


class Engine(Protocol):
    """A library that has loaded a graph."""

    name: str
    inputs: dict[str, tuple[str, list[int]]]
    """Type and sizes, but for that of the batch, by name."""
    outputs: dict[str, tuple[str, int]]
    """Type and number of axes by name."""

    def run(self, given: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        ...


class Network:
    """A graph, checked and loaded.

    Args:
        content: of the ONNX file.
        where: what it is called in messages.
        size: (height, width) of the prepared pixels that it must take.
        threads: of one pass; None: as many as there are processors.
        device: auto, cpu, cuda or cuda:N of ONNX Runtime; openvino (on the processor) or openvino:GPU.

    Attributes:
        library: what computes it.

    Raises:
        BundleError: the graph is not self-contained, not one of ours, or has an operator that the library lacks.
        MissingError: the device is not there.
    """

    def __init__(
        self,
        content: bytes,
        *,
        where: str,
        size: tuple[int, int],
        threads: int | None = None,
        device: str = "auto",
    ) -> None:
        allow_list.check(content, where=where)
        self._where = where
        self._engine = _engine(content, where=where, threads=threads, device=device)
        self.library = self._engine.name
        inputs, outputs = self._engine.inputs, self._engine.outputs
        self.knows_strangers = EXCLUDED in inputs
        wanted: dict[str, tuple[str, list[int]]] = {PIXELS: ("tensor(uint8)", [3, *size])}
        if self.knows_strangers:
            wanted[EXCLUDED] = ("tensor(int64)", [])
        routes = set(ROUTING) & outputs.keys()
        if (
            inputs != wanted
            or "scores" not in outputs
            or routes not in (set(), set(ROUTING))
            or any(ANSWERS.get(name) != form for name, form in outputs.items())
        ):
            raise BundleError(
                f"{where} takes {inputs} and gives {outputs}, which is not what this normweave asks for ({wanted} "
                f"to some of {ANSWERS}). Train it again with this version."
            )

    def __call__(
        self, pixels: NDArray[np.uint8], excluded: NDArray[np.int64] | None = None
    ) -> dict[str, NDArray[Any]]:
        """What the head says of (B, 3, height, width), by the names of `ANSWERS`.

        Args:
            excluded: (B,) the subclass of each image whose expert is not asked.

        Raises:
            BundleError: the graph cannot be computed, or gives something else than an answer an image.
        """
        given: dict[str, NDArray[Any]] = {PIXELS: pixels}
        if self.knows_strangers:
            given[EXCLUDED] = np.full(len(pixels), -1, dtype=np.int64) if excluded is None else excluded
        try:
            answers = self._engine.run(given)
        except Exception as error:  # the libraries' errors have no class in common
            raise BundleError(f"{self._where} cannot be computed: {error}. Train it again.") from error
        if wrong := [name for name, answer in answers.items() if len(answer) != len(pixels)]:
            raise BundleError(
                f"{self._where} gives {len(answers[wrong[0]])} {wrong[0]} of {len(pixels)} images. Train it again."
            )
        return answers


def _engine(content: bytes, *, where: str, threads: int | None, device: str) -> Engine:
    kind, _, plugin = device.partition(":")
    if kind == OPENVINO:
        from normweave.network.openvino import OpenVino

        return OpenVino(content, where=where, threads=threads, plugin=plugin or "CPU")
    return _OnnxRuntime(content, where=where, threads=threads, providers=providers(device))


def providers(device: str) -> list[str]:
    """ONNX Runtime's name of a device, best first.

    Raises:
        MissingError: it is not there.
        ConfigError: no such device.
    """
    kind, _, number = device.partition(":")
    there = library().get_available_providers()
    if kind == "auto":
        return [PROVIDERS[name] for name in ("cuda", "cpu") if PROVIDERS[name] in there]
    if kind not in PROVIDERS:
        raise unknown("device", device, ["auto", *PROVIDERS, OPENVINO], "cuda:1 is the second of several.")
    if PROVIDERS[kind] not in there:
        raise MissingError(
            f"Device {device!r} was asked for, but this onnxruntime has {', '.join(there)} only. "
            "Install onnxruntime-gpu in its place, or use --device cpu."
        )
    if number:
        return [(PROVIDERS[kind], {"device_id": number}), PROVIDERS["cpu"]]  # type: ignore[list-item]
    return list(dict.fromkeys([PROVIDERS[kind], PROVIDERS["cpu"]]))


def library() -> ModuleType:
    """ONNX Runtime, told before it is loaded that nothing may leave the machine: some builds send telemetry."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    return cast("ModuleType", onnxruntime)


class _OnnxRuntime:
    """A loaded graph; see `Engine`."""

    name = "ONNX Runtime"

    def __init__(self, content: bytes, *, where: str, threads: int | None, providers: Sequence[Any]) -> None:
        onnxruntime = library()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = ERRORS_ONLY
        if threads is not None:
            options.intra_op_num_threads = threads
        # Else the first bytes decide, and they could name a format that has not been checked.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        try:
            # With its fallback it would print to stdout, and try the same again.
            self._session = onnxruntime.InferenceSession(
                content, options, providers=list(providers), enable_fallback=0
            )
        except Exception as error:  # ONNX Runtime's errors have no class in common
            raise BundleError(
                f"ONNX Runtime {onnxruntime.__version__} cannot load {where}: {str(error)[:500]} "
                "Update onnxruntime, or train the bundle again."
            ) from error
        try:
            self.inputs: dict[str, tuple[str, list[int]]] = {
                given.name: (given.type, given.shape[1:]) for given in self._session.get_inputs()
            }
            self.outputs: dict[str, tuple[str, int]] = {
                given.name: (given.type, len(given.shape)) for given in self._session.get_outputs()
            }
        except UnicodeDecodeError as error:
            raise BundleError(
                f"{where}: its inputs and outputs have not the names of text. Copy the bundle again, or train it again."
            ) from error

    def run(self, given: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name."""
        names = list(self.outputs)
        return dict(zip(names, self._session.run(names, given), strict=True))
