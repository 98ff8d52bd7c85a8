"""Contract of every expert of Adapted-MoE, which covers the modules of `normweave.heads.adapted_moe.experts`.

The experts are those of `SingleExpertConfig`. Their equations are tested in tests/heads/adapted_moe/test_experts.py.
"""

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from builders import SHAPE, InParts, fit, seeded, subclass_images, subclass_normals
from normweave.config import AdaptedMoEConfig, SingleExpertConfig
from normweave.heads import build, locate
from normweave.heads.adapted_moe.experts.base import Experts, Normals
from normweave.training import train

K = 3
CHOSEN = torch.tensor([[2, 0], [1, 2], [0, 1]])
CONFIGS = get_args(SingleExpertConfig)


def made(config, *, shape=SHAPE):
    return locate("normweave.heads.adapted_moe.experts", config)(config, shape=shape)


def fitted(config, *, subclasses=K, count=24, source=lambda features: features):
    """Return experts fitted on features as they are."""
    data = subclass_normals(subclasses=subclasses, count=count)
    data = replace(data, features=source(data.features))
    experts = made(config)
    experts.start(experts=subclasses, generator=seeded(0))
    stages = experts.stages(assign=lambda _, given: given, adapt=lambda features, _: features)
    for stage in stages:
        train(stage, data, device="cpu")
    with torch.no_grad():
        normals = Normals(data.features, np.arange(count), data.subclasses, data.groups)
        experts.fit(normals, generator=seeded(0))
    return experts


@pytest.fixture(scope="module", params=CONFIGS, ids=lambda part: part.kind)
def config(request):
    return request.param()


@pytest.fixture(scope="module")
def experts(config):
    return fitted(config)


@pytest.fixture(scope="module")
def unseen():
    return subclass_images(3, seed=3)[0]


@torch.no_grad()
def test_scores_have_the_shape_that_the_head_relies_on(experts, unseen):
    shared = experts(unseen[:, None], CHOSEN)
    adapted = experts(unseen[:, None].repeat(1, 2, 1, 1, 1), CHOSEN)
    assert shared.shape == (3, 2, shared.shape[2], *SHAPE[1:])
    assert shared.shape[2] in (1, 2)
    assert shared.dtype == torch.float32
    assert torch.isfinite(shared).all()
    torch.testing.assert_close(adapted, shared, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_an_expert_scores_the_same_alone_and_with_others(experts, unseen):
    together = experts(unseen[:, None], CHOSEN)
    for image in range(3):
        for column in range(2):
            alone = experts(unseen[image : image + 1, None], CHOSEN[image : image + 1, column : column + 1])
            torch.testing.assert_close(alone[0, 0], together[image, column], rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_no_image_gives_no_scores(experts, unseen):
    assert experts(unseen[:0, None], CHOSEN[:0]).shape[0] == 0


@torch.no_grad()
def test_a_planted_defect_raises_the_score(experts, unseen):
    signs = torch.randn(SHAPE[0], generator=seeded(4)).sign()
    defective = unseen.clone()
    defective[:, :, 3, 4] += 5 * signs
    own = torch.arange(3)[:, None] % K
    before, after = (experts(each[:, None], own)[:, 0, 0, 3, 4] for each in (unseen, defective))
    assert (after > before).all()


def test_the_same_seed_gives_the_same_experts(config, experts):
    again = fitted(config).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in experts.state_dict().items())


def test_images_on_several_machines_give_the_same_experts(config, experts):
    if not experts.distributed:
        return
    apart = fitted(config, source=lambda features: InParts(features.features)).state_dict()
    for name, tensor in experts.state_dict().items():
        torch.testing.assert_close(apart[name], tensor, rtol=1e-6, atol=1e-6, msg=name)


@torch.no_grad()
def test_one_subclass_is_enough(config, unseen):
    scores = fitted(config, subclasses=1)(unseen[:, None], torch.zeros(3, 1, dtype=torch.int64))
    assert torch.isfinite(scores).all()


def test_the_class_states_what_the_head_needs(config, experts):
    assert isinstance(experts, Experts)
    assert isinstance(experts.standardised, bool)
    assert isinstance(config.border, bool)
    assert isinstance(experts.distributed, bool)
    assert experts.default_adaption in ("off", "full", "guarded")


def test_a_saved_head_with_these_experts_gives_the_same_scores(config, unseen):
    settings = AdaptedMoEConfig(expert=config)
    head = fit(build(settings, shape=SHAPE), subclass_normals())
    loaded = build(settings, shape=SHAPE)
    loaded.load_state(head.state())
    assert torch.equal(loaded(unseen).scores, head(unseen).scores)
    assert head.notes()["experts"] == config.kind
