"""The contract of a network, and what ONNX Runtime and OpenVINO have in common. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normweave import bundle, checks
from normweave.checks import Checks
from normweave.data.rows import Rows
from normweave.errors import BundleError
from normweave.network import allow_list
from normweave.references import References, bundle_files
from normweave.types import Progress, RawOutput

if TYPE_CHECKING:
    from normweave.outcome.operating_point import Calibration

PIXELS = "pixels"
"""Input (B, 3, height, width) uint8."""
EXCLUDED = "excluded"
"""Input (B,) int64, the subclass whose expert is left out; -1 leaves out none. Only for heads that can exclude."""
OUTPUTS = {
    "scores": ("tensor(float)", 3),
    "image_scores": ("tensor(float)", 1),
    "reconstruction": ("tensor(float)", 3),
    "weights": ("tensor(float)", 2),
    "subclass": ("tensor(int64)", 1),
    "distance": ("tensor(float)", 1),
    "adapted": ("tensor(bool)", 1),
    "nearest": ("tensor(int64)", 3),
}
"""Type and number of axes of each output, the fields of `RawOutput`; `scores` is always present."""
ROUTING = ("weights", "subclass", "distance", "adapted")


class Network(ABC):
    """Turns prepared pixels into raw outputs.

    Attributes:
        library: the name of what computes it, for messages.
        can_exclude: whether the expert of an image's own subclass can be left out.
        embeds: whether its readers return embeddings.
        parameters: how many floating-point numbers it has; 0 if unknown.
        references: the good images that `RawOutput.nearest` refers to; None if there are none.
        checks: images with the outputs of the graph; None: there are none, or the graph is not exported yet.
    """

    library: str
    can_exclude: bool = False
    parameters: int = 0
    embeds: bool = False
    references: References | None = None
    checks: Checks | None = None

    @abstractmethod
    def __call__(self, pixels: NDArray[np.uint8], excluded: NDArray[np.int64] | None = None) -> RawOutput:
        """Return the raw outputs of (n, 3, height, width) prepared pixels.

        Args:
            excluded: (n,) the subclass of each image whose expert is left out; -1 leaves out none.
        """

    def reader(self, images: Rows, *, cache: Path | None = None, progress: Progress | None = None) -> Reader:
        """Return a reader for the rows of a data set.

        Args:
            cache: folder of the feature cache, for networks that can use one.
        """
        return Reader(self, images)

    def stored(self, cache: Path, keys: Sequence[str]) -> Sequence[bool]:
        """Return for each row key whether its features are in the cache, so that the image need not be decoded."""
        return [False] * len(keys)

    @abstractmethod
    def write(
        self, folder: Path, *, record: Mapping[str, Any], calibration: Calibration | None, overwrite: bool
    ) -> None:
        """Write a bundle with this network.

        Raises:
            BundleError: the folder exists and `overwrite` is not set.
            CheckError: the exported graph does not give the scores of this network.
        """


class Reader:
    """Reads and scores rows of a data set; this one passes pixels to the network."""

    def __init__(self, network: Network, images: Rows) -> None:
        self.network = network
        self.images = images

    def read(self, rows: NDArray[np.int64]) -> Any:
        """Return the inputs of these rows."""
        return np.stack([self.images.load(int(row)) for row in rows])

    def score(self, inputs: Any, excluded: NDArray[np.int64] | None = None) -> RawOutput:
        """Return the raw outputs of inputs that `read` returned."""
        return self.network(inputs, excluded)

    def embed(self, inputs: Any) -> NDArray[np.float32] | None:
        """Return the embeddings (n, C) of the images, which separate the subclasses; None if the network has none."""
        return None


class GraphNetwork(Network):
    """An ONNX graph, checked before any library loads it.

    Args:
        content: the ONNX file.
        where: its name in messages.
        size: (height, width) of the prepared pixels.
        threads: number of threads of one pass; None: the number of processors.

    Attributes:
        bundle: the folder that the graph was loaded from or saved to; None if it has not been saved.
        weights: tensors by name that a bundle needs beside the graph; only where `bundle` is None.

    Raises:
        BundleError: the graph is not self-contained, is not from normweave, or has an operator that the library lacks.
        MissingError: the library or the device is not available.
    """

    bundle: Path | None = None
    weights: Mapping[str, Any] | None = None

    def __init__(self, content: bytes, *, where: str, size: tuple[int, int]) -> None:
        allow_list.check(content, where=where)
        self.content = content
        self._where = where
        inputs, outputs = self._load()
        self.can_exclude = EXCLUDED in inputs
        expected: dict[str, tuple[str, list[int]]] = {PIXELS: ("tensor(uint8)", [3, *size])}
        if self.can_exclude:
            expected[EXCLUDED] = ("tensor(int64)", [])
        routing = set(ROUTING) & outputs.keys()
        if (
            inputs != expected
            or "scores" not in outputs
            or routing not in (set(), set(ROUTING))
            or any(OUTPUTS.get(name) != form for name, form in outputs.items())
        ):
            raise BundleError(
                f"{where} has the inputs {inputs} and the outputs {outputs}, but this normweave needs {expected} and "
                f"some of {OUTPUTS}. Train it again with this version."
            )

    @abstractmethod
    def _load(self) -> tuple[dict[str, tuple[str, list[int]]], dict[str, tuple[str, int]]]:
        """Load the graph; return type and sizes (without the batch) of inputs, type and number of axes of outputs."""

    @abstractmethod
    def _run(self, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Return the outputs by name."""

    def __call__(self, pixels: NDArray[np.uint8], excluded: NDArray[np.int64] | None = None) -> RawOutput:
        """Return the raw outputs of (n, 3, height, width) prepared pixels.

        Raises:
            BundleError: the graph cannot be computed, or an output does not have one row for each image.
        """
        inputs: dict[str, NDArray[Any]] = {PIXELS: pixels}
        if self.can_exclude:
            inputs[EXCLUDED] = np.full(len(pixels), -1, dtype=np.int64) if excluded is None else excluded
        try:
            outputs = self._run(inputs)
        except Exception as error:  # the libraries' errors have no class in common
            raise BundleError(f"{self._where} cannot be computed: {error}. Train it again.") from error
        if wrong := [name for name, output in outputs.items() if len(output) != len(pixels)]:
            raise BundleError(
                f"{self._where} returns {len(outputs[wrong[0]])} {wrong[0]} for {len(pixels)} images. Train it again."
            )
        return RawOutput(**outputs)

    def write(
        self, folder: Path, *, record: Mapping[str, Any], calibration: Calibration | None, overwrite: bool
    ) -> None:
        """Write a bundle with the same graph and weights and another record."""
        if self.bundle is not None:
            bundle.rewrite(self.bundle, folder, record=record, overwrite=overwrite)
        else:
            assert self.weights is not None  # a graph comes from a bundle or from a fit
            files = {bundle.GRAPH: self.content} | bundle_files(self.references) | checks.bundle_files(self.checks)
            bundle.write(folder, tensors=self.weights, record=record, files=files, overwrite=overwrite)
        self.bundle = folder
