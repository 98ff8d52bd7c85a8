"""Exchange tensors of an exported graph for longer ones, instead of exporting it again.

A network with added subclasses differs from one with more of them only in the length of some tensors. They stay tensors
of the graph under their own names: nothing is computed from them in advance, and no operator holds their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx_ir import Model

WEIGHTS = "weights"
"""The output (B, K) whose width is the number of subclasses."""


@contextmanager
def apart(model: Model, names: Sequence[str]) -> Iterator[None]:
    """Make inputs of these tensors, of unknown length, so that no step in between computes anything from them."""
    import onnx_ir

    graph = model.graph
    values = {name: value for name in names if (value := graph.initializers.pop(name, None)) is not None}
    tensors = {name: value.const_value for name, value in values.items()}
    shapes = {name: value.shape for name, value in values.items()}
    for name, value in values.items():
        assert value.shape is not None
        value.const_value, value.shape = None, onnx_ir.Shape([f"length of {name}", *value.shape[1:]])
        graph.inputs.append(value)
    yield
    for name, value in values.items():
        graph.inputs.remove(value)
        value.const_value, value.shape = tensors[name], shapes[name]
        if value.uses():
            graph.initializers[name] = value


def exchanged(graph: bytes, tensors: Mapping[str, NDArray[np.generic]], *, subclasses: int) -> bytes | None:
    """Return an ONNX graph with other tensors.

    Args:
        tensors: by name, the first of them the one that every such graph holds; others need not be in the graph.
        subclasses: K.

    Returns:
        None: the graph does not hold the first tensor, or it is of a type or form that does not fit.
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model_from_string(graph)
    held = {each.name: each for each in model.graph.initializer}
    if next(iter(tensors)) not in held:
        return None
    for name in tensors.keys() & held.keys():
        old, new = numpy_helper.to_array(held[name]), tensors[name]
        if old.dtype != new.dtype or old.shape[1:] != new.shape[1:]:
            return None
        held[name].CopyFrom(numpy_helper.from_array(new, name))
    for output in model.graph.output:
        if output.name == WEIGHTS:
            output.type.tensor_type.shape.dim[1].dim_value = subclasses
    content: bytes = model.SerializeToString(deterministic=True)
    return content
