"""Quantise the backbone of an exported graph to int8.

Static quantization (Jacob et al. 2018, arXiv 1712.05877, section 2): r = S (q - Z), S and Z from the smallest and the
largest value that each tensor takes on real images, and an S for each channel of the weights. Only the backbone, which
takes nearly all of the time, is quantised: a head measures distances, in which rounding errors would matter.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normweave.errors import ConfigError, MissingError
from normweave.network.base import EXCLUDED, PIXELS
from normweave.network.export import bare
from normweave.network.onnx import library

if TYPE_CHECKING:
    from onnx import ModelProto

BACKBONE = "extractor."
"""Prefix of the backbone's weights in the graph, from `TorchModule`."""
WITH_IT = ("Add", "Clip", "Relu")
"""Operators after a convolution that can compute on its integers."""
FLOAT_FIRST = 3
"""The first convolutions stay float: in EfficientNet-Lite0 they take a tenth of the time and cause a third of the
rounding error (docs/log.md)."""


def quantize_backbone(graph: bytes, images: Iterable[NDArray[np.uint8]]) -> bytes:
    """Return the graph with the convolutions of its backbone in int8.

    Args:
        images: prepared pixels (n, 3, height, width) of the tiles of each, from which the ranges are measured.

    Raises:
        ConfigError: the backbone has no or too few convolutions.
        MissingError: onnx is not installed.
    """
    library()  # first: it turns telemetry off
    try:
        import onnx
        from onnxruntime import quantization
    except ImportError as error:
        raise MissingError('Quantization needs onnx: pip install "normweave[train]"') from error

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, passes: Iterator[dict[str, NDArray[Any]]]) -> None:
            self.passes = passes

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            return next(self.passes, None)

    model = onnx.load_from_string(graph)
    chosen = backbone(model)
    if not chosen:
        raise ConfigError(
            f"Only convolutions after the first {FLOAT_FIRST} are computed in int8, and this backbone has none. "
            "Leave out --int8, or choose a convolutional backbone."
        )
    excludes = any(port.name == EXCLUDED for port in model.graph.input)

    def passes() -> Iterator[dict[str, NDArray[Any]]]:
        for pixels in images:
            yield {PIXELS: pixels} | ({EXCLUDED: np.full(len(pixels), -1, dtype=np.int64)} if excludes else {})

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it recommends a preprocessing step that our graphs have had
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantization.quantize_static(
                model,
                path,
                Reader(passes()),
                nodes_to_quantize=chosen,
                op_types_to_quantize=["Conv", *WITH_IT],
                per_channel=True,
                # Seven-bit weights would be safe without VNNI too, but triple the rounding error.
                reduce_range=False,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            model = onnx.load(path)
    finally:
        logging.disable(before)
    del model.opset_import[:]  # only ONNX's own operators are used, and a bundle may use no others
    model.opset_import.extend(onnx.load_from_string(graph).opset_import)
    content: bytes = bare(model).SerializeToString(deterministic=True)
    return content


def backbone(model: ModelProto) -> list[str]:
    """Return the names of the operators to compute in int8.

    These are the convolutions of the backbone without its first `FLOAT_FIRST`, and the activations and sums after them.
    """
    own = [node.name for node in model.graph.node if node.op_type == "Conv" and node.input[1].startswith(BACKBONE)]
    computed: set[str] = set()  # values that are integers then
    chosen = []
    for node in model.graph.node:  # in the order of computation
        follows = node.op_type in WITH_IT and bool(computed.intersection(node.input))
        if node.name in own[FLOAT_FIRST:] or follows:
            computed.update(node.output)
            chosen.append(node.name)
    return chosen
