"""The graph of a network with one added subclass serves those with more of them, with other tensors."""

from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch

from builders import InMemory, Small, fit, head_config, normals
from normweave.features.standardize import ChannelStandardizer
from normweave.heads import build
from normweave.network import open_graph
from normweave.network.exchange import exchanged
from normweave.network.export import to_onnx
from normweave.network.torch import TorchModule

SIZE = (64, 48)
COLOURS = torch.tensor([[60.0, 90, 200], [180, 90, 60], [90, 200, 90], [200, 200, 60]])
FIRST = 2  # subclasses of the first training
MEMORY = {"max_patches": 100, "max_pool": 2000}
CONFIGS = [
    pytest.param({"expert": {"kind": "fusion", "memory": MEMORY, "layout": {"cells": 4}}}, id="default"),
    pytest.param(
        {"expert": {"kind": "fusion", "memory": MEMORY | {"calibrated": True}, "layout": {"cells": 4}}, "top_k": 1},
        id="calibrated, one expert",
    ),
    pytest.param(
        {"expert": {"kind": "fusion", "use": ["memory", "gaussian"], "memory": MEMORY}, "adaption": "guarded"},
        id="guarded",
    ),
]


def pixels_of(subclass, *, seed, count=8):
    noise = torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed + 10 * subclass))
    return (COLOURS[subclass][:, None, None] + 20 * noise).clamp(0, 255).to(torch.uint8)


def data(standard, extractor, subclasses):
    """Good images of these subclasses."""
    pixels = torch.cat([pixels_of(each, seed=1) for each in subclasses])
    return normals(
        standard(extractor(pixels).detach()),
        subclasses=np.repeat(np.arange(len(subclasses)), 8),
        names=tuple(f"cloth/{each}" for each in subclasses),
        groups=np.arange(len(pixels)),
        holdout=np.zeros(len(pixels), dtype=bool),
        given_categories=np.zeros(len(pixels), dtype=np.int64),
    )


@pytest.fixture(scope="module", params=CONFIGS)
def grown(request):
    """The networks with 0, 1 and 2 added subclasses."""
    extractor = Small()
    standard = ChannelStandardizer(channels=12)
    standard.fit(InMemory(extractor(torch.cat([pixels_of(each, seed=1) for each in range(FIRST)])).detach()))
    features = data(standard, extractor, range(FIRST))
    heads = [fit(build(head_config(**request.param), shape=features.features.shape), features)]
    for number in range(FIRST, len(COLOURS)):
        head = deepcopy(heads[-1])
        head.add(data(standard, extractor, [number]))
        head.fusion.append_like(0)
        heads.append(head)
    return [TorchModule(extractor=extractor, standard=standard, head=head).eval() for head in heads]


def graph(module):
    return to_onnx(module, height=SIZE[0], width=SIZE[1], growing=module.growing)


@pytest.fixture(scope="module")
def graphs(grown):
    """Those of 1 and 2 added subclasses, each exported."""
    return [graph(module) for module in grown[1:]]


def tensors(module):
    buffers = dict(module.named_buffers())
    return {name: buffers[name].numpy() for name in module.growing}


def outputs(content, excluded):
    network = open_graph(content, where="graph", size=SIZE, threads=1, device="cpu")
    pixels = torch.cat([pixels_of(each, seed=5, count=4) for each in range(len(COLOURS))])
    return network(pixels.numpy(), excluded)


def declared(content):
    """The outputs of a graph with their types and sizes."""
    return [each.SerializeToString() for each in onnx.load_from_string(content).graph.output]


def test_exchanged_tensors_give_the_outputs_of_an_export(grown, graphs):
    """Also back to fewer subclasses, and with the expert of a subclass left out."""
    one, two = graphs
    for old, new, module in ((one, two, grown[2]), (two, one, grown[1])):
        content = exchanged(old, tensors(module), subclasses=len(module.head.subclass_names))
        assert declared(content) == declared(new)
        for excluded in (None, np.arange(16) // 4 % len(module.head.subclass_names)):
            found, expected = outputs(content, excluded)._asdict(), outputs(new, excluded)._asdict()
            for name in expected:
                np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    assert outputs(two, None).weights.shape == (16, len(COLOURS))
    assert set(outputs(two, None).subclass) == set(range(len(COLOURS)))


def test_the_graph_does_not_grow_with_the_number_of_added_subclasses(graphs):
    one, two = (onnx.load_from_string(each).graph.node for each in graphs)

    assert [each.SerializeToString() for each in one] == [each.SerializeToString() for each in two]


def test_the_graph_of_a_first_training_is_exported_again(grown):
    """It has no added subclass, so that other operators are needed."""
    assert grown[0].growing == ()
    assert exchanged(graph(grown[0]), tensors(grown[1]), subclasses=FIRST + 1) is None


def test_a_tensor_that_does_not_fit_is_not_exchanged(grown, graphs):
    content, found = graphs[0], tensors(grown[2])

    for name, wrong in (
        ("head.novelty.means", found["head.novelty.means"][:, 1:]),
        ("head.novelty.means", found["head.novelty.means"].astype(np.float64)),
    ):
        assert exchanged(content, found | {name: wrong}, subclasses=FIRST + 2) is None
