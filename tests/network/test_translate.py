"""A traced network becomes ONNX as it was traced, and is decomposed only where that is not possible."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from normweave.network.translate import translate

SHAPE = (2, 4, 7, 9)


class Function(nn.Module):
    """A function of (B, 4, 7, 9) as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.BatchNorm2d(4)
        for tensor in (self.norm.weight.data, self.norm.bias.data, self.norm.running_mean, self.norm.running_var):
            tensor.uniform_(0.5, 2, generator=generator)
        self.register_buffer("matrix", torch.randn(4, 9, generator=generator))

    def forward(self, x):
        return self.function(self, x)


def in_place(module, x):
    y = 2 * x
    y += x
    return y


AS_TRACED = {
    "square": lambda module, x: x.square(),
    "scalar minus tensor": lambda module, x: 1.5 - x,
    "both": lambda module, x: ((x > 0) & (x < 1)).float(),
    "transposed matrix": lambda module, x: x @ module.matrix.T,
    "type": lambda module, x: (100 * x).to(torch.int32).to(torch.float32),
    "batch normalization": lambda module, x: module.norm(x),
    "pooling to equal cells": lambda module, x: nn.functional.adaptive_avg_pool2d(x, (7, 3)),
    "pooling to cells of several sizes": lambda module, x: nn.functional.adaptive_avg_pool2d(x, (4, 5)),
    "view": lambda module, x: torch.stack([x.flatten(1)[:, 3:7].unsqueeze(1), x[:, 0, :1, :4]]),
}
DECOMPOSED = {
    "in place": in_place,
    "condition": lambda module, x: torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)),
    "without a translation": lambda module, x: x.movedim(1, 2),
    "bits": lambda module, x: ((10 * x).to(torch.int32) & torch.full((9,), 3, dtype=torch.int32)).float(),
    "scalar minus a multiple of a tensor": lambda module, x: torch.rsub(x, 1.5, alpha=2),
    "batch normalization without weights": lambda module, x: nn.functional.batch_norm(
        x, module.norm.running_mean, module.norm.running_var
    ),
}


@pytest.fixture
def decompositions(monkeypatch):
    """Return a list with an element for each time that a traced network is decomposed."""
    calls = []
    original = ExportedProgram.run_decompositions

    def counted(self, *arguments):
        calls.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return calls


def check(function):
    """Assert that the graph gives what torch gives, for any number of images."""
    module = Function(function).eval()
    batch = Dim("batch")
    shapes = ({0: batch},)
    with torch.no_grad():
        traced = torch.export.export(module, (torch.zeros(SHAPE),), dynamic_shapes=shapes)
        program = translate(traced, opset_version=18, input_names=["x"], output_names=["y"], dynamic_shapes=shapes)
    content = program.model_proto.SerializeToString()
    onnx.checker.check_model(onnx.load_from_string(content))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for count in (1, 2, 5):
        x = torch.randn(count, *SHAPE[1:], generator=torch.Generator().manual_seed(count))
        (y,) = session.run(None, {"x": x.numpy()})
        with torch.no_grad():
            np.testing.assert_allclose(y, module(x).numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", AS_TRACED)
def test_an_operator_is_translated_as_it_was_traced(name, decompositions):
    check(AS_TRACED[name])

    assert not decompositions


@pytest.mark.parametrize("name", DECOMPOSED)
def test_other_networks_are_decomposed(name, decompositions):
    check(DECOMPOSED[name])

    assert len(decompositions) == 1
