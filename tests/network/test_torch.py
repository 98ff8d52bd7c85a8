"""What only the torch network has; the rest is in the contract of networks."""

import numpy as np
import pytest
import torch

from normweave import fitting
from normweave.heads.base import Head
from normweave.network.torch import FittedRows, TorchModule, TorchNetwork, named_outputs
from normweave.types import PatchScores, Routing

OWNERS = np.array([0, 0, 1, 2, 2, 2, 3, 4, 5])  # nine tiles of six images


class Images:
    """Rows whose pixels hold their number."""

    owner = OWNERS

    def load(self, row):
        return np.full((3, 2, 2), row, np.uint8)


@pytest.mark.parametrize(
    ("at_most", "expected"),
    [(2, [[0, 1], [8]]), (3, [[0, 1], [3, 4, 5], [8]]), (9, [[0, 1], [3, 4, 5], [7], [8]])],
)
def test_tiles_are_of_whole_images_spread_over_the_chosen_rows(at_most, expected):
    chosen = np.array([0, 1, 3, 4, 5, 7, 8])
    found = FittedRows(Images(), chosen, chosen).tiles(chosen, at_most=at_most)
    assert [tiles[:, 0, 0, 0].tolist() for tiles in found] == expected


class Fixed(Head):
    """Scores the mean of the channels and routes everything to the subclass that is not excluded."""

    def __init__(self, *, can_exclude):
        super().__init__()
        self.can_exclude = can_exclude

    def forward(self, features):
        return self.score_excluding(features, torch.full((len(features),), 1))

    def score_excluding(self, features, subclasses):
        own = 1 - subclasses.clamp(min=0)
        routing = Routing(torch.nn.functional.one_hot(own, 2).float(), own, own.float(), own > 0)
        return PatchScores(scores=features.mean(1), image_scores=None, routing=routing, reconstruction=None)


@pytest.mark.parametrize("can_exclude", [True, False])
def test_the_module_excludes_only_if_the_head_can(can_exclude):
    module = TorchModule(
        extractor=torch.nn.Identity(), standard=torch.nn.Identity(), head=Fixed(can_exclude=can_exclude)
    )
    pixels = torch.rand(2, 3, 4, 4)
    outputs = module.outputs(pixels, torch.tensor([0, 1]))
    assert outputs["subclass"].tolist() == ([1, 0] if can_exclude else [0, 0])
    assert module.outputs(pixels)["subclass"].tolist() == [0, 0]
    assert [value.shape for value in module(pixels)] == [value.shape for value in outputs.values()]


def test_outputs_are_named_without_those_that_the_head_lacks():
    patches = Fixed(can_exclude=True)(torch.rand(2, 3, 4, 4))
    assert set(named_outputs(patches)) == {"scores", "weights", "subclass", "distance", "adapted"}
    assert set(named_outputs(patches._replace(routing=None))) == {"scores"}


def test_tensors_hold_every_part_and_are_counted(detector):
    network = detector.network
    tensors = network.tensors()
    assert {name.partition(".")[0] for name in tensors} == {"features", "standard", "head"}
    assert all(tensor.device.type == "cpu" and not tensor.requires_grad for tensor in tensors.values())
    assert network.parameters == sum(each.numel() for each in tensors.values() if each.is_floating_point())


def test_a_loaded_network_keeps_its_graph(detector, bundle):
    graph = detector.network.exported(detector.calibration)
    assert detector.network.exported(detector.calibration) is graph
    loaded = fitting.load(bundle, device="cpu").network
    assert isinstance(loaded, TorchNetwork)
    assert loaded.rows is None
    assert loaded.exported(None) == graph
