"""An exported graph to one whose backbone computes in whole numbers of eight bits.

Static quantization (Jacob et al. 2018, arXiv 1712.05877, section 2): r = S (q - Z), S and Z from the smallest and the
largest value that each tensor takes on real images, weights with an S for each channel. Only the backbone, which is
nearly all of the work: a head measures distances, which rounding would swallow.
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
from normweave.network.export import bare
from normweave.network.onnx import EXCLUDED, PIXELS, library

if TYPE_CHECKING:
    from onnx import ModelProto

BACKBONE = "extractor."
"""Weights of the backbone are called so in the graph: what `export.Whole` calls it."""
WITH_IT = ("Add", "Clip", "Relu")
"""Operators behind a convolution that compute on its whole numbers as they are."""
FLOAT_FIRST = 3
"""Convolutions at the start that stay float: of EfficientNet-Lite0 they are a tenth of the work and made a third of the
rounding (docs/log.md)."""


def quantize(graph: bytes, images: Iterable[NDArray[np.uint8]]) -> bytes:
    """The graph with the convolutions of its backbone in int8.

    Args:
        images: prepared pixels (n, 3, height, width) of the tiles of each; which values are usual is seen on them.

    Raises:
        ConfigError: the backbone has no convolutions, or few.
        MissingError: onnx is not installed.
    """
    library()  # before anything else of it is loaded
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
            f"Only convolutions are computed in int8, but for the first {FLOAT_FIRST}, and this backbone has no "
            "others. Leave out --int8, or choose a convolutional backbone."
        )
    asked = any(given.name == EXCLUDED for given in model.graph.input)

    def passes() -> Iterator[dict[str, NDArray[Any]]]:
        for pixels in images:
            yield {PIXELS: pixels} | ({EXCLUDED: np.full(len(pixels), -1, dtype=np.int64)} if asked else {})

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # it asks for a pass that our graphs have been through
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
                # Not seven bits of weights, which would be safe without VNNI too: three times the rounding.
                reduce_range=False,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            model = onnx.load(path)
    finally:
        logging.disable(before)
    del model.opset_import[:]  # ONNX's own operators are enough, and a bundle may ask for no others
    model.opset_import.extend(onnx.load_from_string(graph).opset_import)
    content: bytes = bare(model).SerializeToString(deterministic=True)
    return content


def backbone(model: ModelProto) -> list[str]:
    """Names of the convolutions of the backbone but the first, and of the activations and sums that follow them."""
    own = [
        node.name
        for node in model.graph.node
        if node.op_type == "Conv" and node.input[1].startswith(BACKBONE)
    ]
    computed: set[str] = set()  # values that are whole numbers then
    chosen = []
    for node in model.graph.node:  # in the order of computation
        follows = node.op_type in WITH_IT and bool(computed.intersection(node.input))
        if node.name in own[FLOAT_FIRST:] or follows:
            computed.update(node.output)
            chosen.append(node.name)
    return chosen
