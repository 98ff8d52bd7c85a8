"""The held-out scores of a new subclass come from experts that were not fitted to the image."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from normweave import fitting
from normweave.config import DataConfig
from normweave.data import layouts, rows
from normweave.errors import DataError
from normweave.network.torch import named_outputs
from normweave.scoring import TileScores
from normweave.subclass_fit import SubclassFit
from normweave.types import RawOutput


@pytest.fixture(scope="module")
def fitted_detector(fusion_bundle):
    return fitting.load(fusion_bundle)


def fit(detector, samples):
    images = rows.scan([replace(each, split="train") for each in samples], detector.preparation)
    network = detector.network
    return SubclassFit(detector, network, network.head, images, name=samples[0].subclass_name, progress=None)


@pytest.fixture(scope="module")
def third(cloth):
    """Good images of a subclass that the bundle does not know, and of one that it does."""
    samples = layouts.read(cloth, DataConfig(subclass_from="column"))
    names = sorted({each.subclass for each in samples if each.split == "train"})
    train = [each for each in samples if each.split == "train"]
    return [each for each in train if each.subclass == names[2]][:10], [
        each for each in train if each.subclass == names[0]
    ][:10]


def test_held_out_images_score_higher_than_those_that_were_fitted_to(fitted_detector, third):
    new, _ = third
    fitted = fit(fitted_detector, new)
    before = fitted_detector.network.head.state_dict()
    head, held_out, routed, described = fitted.fit()
    with torch.inference_mode():
        outputs = named_outputs(head(fitted.data.features.read(np.arange(len(new)))))
    raw = RawOutput(**{name: value.numpy() for name, value in outputs.items()})
    parts = [fitted.images.part_inside(row) for row in range(len(new))]
    own = TileScores.of(raw, fitted_detector.config, parts).scores
    assert len(held_out) == len(routed) == len(described) == len(new)
    assert ([each.score for each in held_out] > own + 0.5).all()
    after = fitted_detector.network.head.state_dict()
    assert all(value.equal(after[name]) for name, value in before.items())  # the given head does not change
    assert head.subclass_names == (*fitted_detector.subclass_names, new[0].subclass_name)


def test_folds_keep_groups_together(fitted_detector, third):
    new = [replace(each, group=str(number // 2)) for number, each in enumerate(third[0])]
    fold = fit(fitted_detector, new).fold
    assert (fold[::2] == fold[1::2]).all()
    assert len(set(fold)) == 5


def test_images_of_a_known_subclass_are_refused(fitted_detector, third):
    known = [replace(each, subclass="other") for each in third[1]]
    with pytest.raises(DataError, match=r"are nearest to it when they are held out, and at least 4 must be"):
        fit(fitted_detector, known).fit()
