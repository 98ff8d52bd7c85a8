"""The backbone in int8: close to the float graph, smaller, and still a graph that a bundle may hold."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from normweave.config import TimmConfig
from normweave.errors import ConfigError
from normweave.features import build
from normweave.network import open_graph
from normweave.network.export import to_onnx
from normweave.network.quantize import FLOAT_FIRST, backbone, quantize_backbone

SIDE = 64


class Mean(nn.Module):
    """A head: the mean over channels, and a convolution of its own."""

    can_exclude = False

    def __init__(self, extractor):
        super().__init__()
        self.extractor = extractor
        self.own = nn.Conv2d(extractor.shape[0], 1, 1)
        nn.init.constant_(self.own.weight, 1 / extractor.shape[0])

    def outputs(self, pixels):
        return {"scores": self.own(self.extractor(pixels))[:, 0]}

    def forward(self, pixels):
        return tuple(self.outputs(pixels).values())


@pytest.fixture(scope="module")
def graph():
    extractor = build(TimmConfig(weights="random", strides=(8,)), height=SIDE, width=SIDE)
    return to_onnx(Mean(extractor).eval(), height=SIDE, width=SIDE)


def make_images(count, *, seed):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (1, 3, SIDE, SIDE), np.uint8) for _ in range(count)]


@pytest.fixture(scope="module")
def int8(graph):
    return quantize_backbone(graph, make_images(8, seed=1))


def scores(content, pixels):
    return open_graph(content, where="graph", size=(SIDE, SIDE), threads=1, device="cpu")(pixels).scores


def test_close_to_the_float_graph_and_not_the_same(graph, int8):
    pixels = np.concatenate(make_images(5, seed=2))
    ours, theirs = scores(graph, pixels), scores(int8, pixels)
    away = np.abs(theirs - ours).mean() / ours.std()
    assert 0 < away < 0.2


def test_smaller(graph, int8):
    assert len(int8) < 0.5 * len(graph)


def test_the_same_images_give_the_same_bytes(graph, int8):
    assert quantize_backbone(graph, make_images(8, seed=1)) == int8


def test_the_first_convolutions_and_those_of_the_head_stay_float(graph, int8):
    model = onnx.load_from_string(graph)
    weights = {node.name: node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    chosen = [weights[name] for name in backbone(model) if name in weights]
    assert all(name.startswith("extractor.") for name in chosen)
    assert len(chosen) == len(weights) - FLOAT_FIRST - 1  # and one of the head
    kept = {tensor.name for tensor in onnx.load_from_string(int8).graph.initializer}
    assert "own.weight" in kept
    assert weights[min(weights, key=lambda name: list(weights).index(name))] in kept
    assert not kept & set(chosen)


def test_a_backbone_without_convolutions():
    class Flat(nn.Module):
        shape = (3, SIDE, SIDE)

        def forward(self, pixels):
            return pixels.float() / 255

    with torch.no_grad():
        content = to_onnx(Mean(Flat()).eval(), height=SIDE, width=SIDE)
    with pytest.raises(
        ConfigError, match=r"Only convolutions after the first 3 .*, and this backbone has none\. Leave out"
    ):
        quantize_backbone(content, make_images(1, seed=1))
