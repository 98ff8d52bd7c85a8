"""Contract of every test-time adaption. The methods are those of `AdaptionConfig`."""

from typing import get_args

import numpy as np
import pytest
import torch

from builders import SHAPE, subclass_images
from normweave.config import AdaptedMoEConfig, AdaptionConfig
from normweave.heads import build
from normweave.heads.adapted_moe.adaption import Adaption, build_adaption, statistics
from normweave.validation import fields_of

K, COUNT = 3, 24
CHOSEN = torch.tensor([[2, 0], [1, 2], [0, 1]])
CONFIGS = [
    part(method=method)
    for part in get_args(AdaptionConfig)
    for method in get_args(fields_of(part)["method"].annotation)
    if method != "auto"
]


def fitted(config):
    features, subclasses = subclass_images(COUNT, seed=2)
    adaption = build_adaption(config, default="off", width=SHAPE[0])
    adaption.fit(statistics(features).numpy(), subclasses.astype(np.int64), subclasses.astype(np.int64))
    return adaption


@pytest.fixture(params=CONFIGS, ids=lambda config: config.method)
def config(request):
    return request.param


@pytest.fixture
def adaption(config):
    return fitted(config)


@pytest.fixture(scope="module")
def unseen():
    return subclass_images(3, seed=3)[0]


def test_features_have_the_shape_that_experts_rely_on(adaption, unseen):
    assert isinstance(adaption, Adaption)
    adapted = adaption(unseen, statistics(unseen), CHOSEN)
    assert adapted.shape in ((3, 1, *SHAPE), (3, 2, *SHAPE))
    assert adapted.dtype == torch.float32
    assert torch.isfinite(adapted).all()
    if adaption.unit_length:
        torch.testing.assert_close(adapted.norm(dim=2), torch.ones(3, adapted.shape[1], *SHAPE[1:]))


def test_changes_tells_whether_the_features_change(adaption, unseen):
    changes = adaption.changes(statistics(unseen))
    assert (changes.shape, changes.dtype) == ((3,), torch.bool)
    adapted = adaption(unseen, statistics(unseen), CHOSEN)[:, 0]
    assert [not torch.equal(a, b) for a, b in zip(adapted, unseen, strict=True)] == changes.tolist()


def test_an_image_is_adapted_the_same_in_any_batch(adaption, unseen):
    together = adaption(unseen, statistics(unseen), CHOSEN)
    for row in range(3):
        one = unseen[row : row + 1]
        torch.testing.assert_close(adaption(one, statistics(one), CHOSEN[row : row + 1])[0], together[row])


def test_no_image_gives_no_features(adaption, unseen):
    none = unseen[:0]
    assert adaption(none, statistics(none), CHOSEN[:0]).shape[0] == 0
    assert adaption.changes(statistics(none)).shape == (0,)


def test_the_fitted_part_is_the_state(config, adaption, unseen):
    other = build_adaption(config, default="off", width=SHAPE[0])
    for name, tensor in adaption.state_dict().items():
        setattr(other, name, tensor)
    expected = adaption(unseen, statistics(unseen), CHOSEN)
    assert torch.equal(other(unseen, statistics(unseen), CHOSEN), expected)


def test_the_head_uses_the_adaption_that_its_settings_name(config, adaption):
    head = build(AdaptedMoEConfig(adaption=config), shape=SHAPE)
    assert {type(branch.adaption) for branch in head.branches} == {type(adaption)}
