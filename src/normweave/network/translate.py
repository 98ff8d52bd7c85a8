"""Translate a network that torch.export has traced to ONNX."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram
from torch.onnx import OnnxExporterError

from normweave.nearest import onnx_largest_product

if TYPE_CHECKING:
    from torch.fx import Node
    from torch.onnx import ONNXProgram

Translations = dict[Callable[..., Any], Callable[..., Any]]
"""By operator of PyTorch a function that emits the operators of ONNX."""


def translate(traced: ExportedProgram, **options: Any) -> ONNXProgram:
    """Return the ONNX program of a traced network.

    torch.onnx.export decomposes the operators of PyTorch into fewer ones first, and traces the network a second time
    for that, which is almost half of the time of an export. Most operators of a network have a translation as they are.
    Only a network with an operator that has none, or that changes its input in place, is decomposed.

    Args:
        traced: the network; the call changes it.
        options: of torch.onnx.export.

    Raises:
        OnnxExporterError: ONNX has no operator for a part of the network.
    """
    own, others = _translations()
    decomposed = options | {"custom_translation_table": own}
    if not all(_is_functional(node) for node in traced.graph.nodes):
        return _program(traced, decomposed)
    as_it_is = copy(traced)
    vars(as_it_is)["run_decompositions"] = lambda *_: as_it_is
    try:
        return _program(as_it_is, options | {"custom_translation_table": own | others})
    except OnnxExporterError:
        return _program(traced, decomposed)


def _program(traced: ExportedProgram, options: dict[str, Any]) -> ONNXProgram:
    program = torch.onnx.export(traced, dynamo=True, optimize=False, verbose=False, **options)
    assert program is not None  # without a file name it is returned
    return program


def _is_functional(node: Node) -> bool:
    """Return whether the node leaves its inputs as they are, and has no graph of its own as a condition has."""
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return not target._schema.is_mutable
    return node.op == "call_function" and getattr(target, "__module__", None) in (operator.__name__, "_operator")


def _averages(size: int, cells: int) -> NDArray[np.float32]:
    """Return a matrix (cells, size) whose product with a column is adaptive average pooling."""
    matrix = np.zeros((cells, size), dtype=np.float32)
    for cell in range(cells):
        start, end = cell * size // cells, -(-(cell + 1) * size // cells)
        matrix[cell, start:end] = 1 / (end - start)
    return matrix


def _translations() -> tuple[Translations, Translations]:
    """Return how our own operators are translated, and how those are that torch.onnx.export decomposes."""
    import onnx_ir
    from onnxscript import opset18

    onnx: Any = opset18  # its types are those of eager execution

    def square(x: Any) -> Any:
        return onnx.Mul(x, x)

    def subtract_from(x: Any, other: float, alpha: float = 1) -> Any:
        if alpha != 1:
            raise OnnxExporterError(f"aten.rsub with alpha {alpha} has no translation.")
        return onnx.Sub(onnx.CastLike(other, x), x)

    def both(x: Any, other: Any) -> Any:
        if x.dtype != onnx_ir.DataType.BOOL:
            raise OnnxExporterError(f"The bits of {x.dtype} have no translation.")
        return onnx.And(x, other)

    def transpose(x: Any) -> Any:
        return onnx.Transpose(x)

    def convert(x: Any, dtype: int, non_blocking: bool = False, copy: bool = False) -> Any:
        return onnx.Cast(x, to=dtype)

    def normalize(
        x: Any,
        weight: Any,
        bias: Any,
        running_mean: Any,
        running_var: Any,
        training: bool,
        momentum: float,
        eps: float,
        cudnn_enabled: bool,
    ) -> Any:
        if training or weight is None or bias is None:
            raise OnnxExporterError("Only batch normalization of a network in eval mode has a translation.")
        return onnx.BatchNormalization(x, weight, bias, running_mean, running_var, epsilon=eps)

    def pool(x: Any, output_size: Sequence[int]) -> Any:
        sizes = list(zip(x.shape[-2:], output_size, strict=True))
        if not any(size % cells for size, cells in sizes):
            kernel = [size // cells for size, cells in sizes]
            return onnx.AveragePool(x, kernel_shape=kernel, strides=kernel)
        rows, columns = (onnx.Constant(value=onnx_ir.tensor(_averages(*each))) for each in sizes)
        return onnx.MatMul(onnx.MatMul(rows, x), onnx.Transpose(columns))

    def largest(patches: Any, bank: Any, offset: Any) -> Any:
        return onnx_largest_product(onnx, patches, bank, offset)

    aten = torch.ops.aten
    return {torch.ops.normweave.largest_product.default: largest}, {
        aten.square.default: square,
        aten.rsub.Scalar: subtract_from,
        aten.__and__.Tensor: both,
        aten.numpy_T.default: transpose,
        aten.to.dtype: convert,
        aten.batch_norm.default: normalize,
        aten.adaptive_avg_pool2d.default: pool,
    }
