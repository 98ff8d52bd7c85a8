"""`AdaptedMoE.add`: images that are nearer to the other subclasses keep every bit of their scores."""

from copy import deepcopy

import numpy as np
import pytest
import torch

from builders import SHAPE, fit, head_config, normals, subclass_images
from normweave.heads import build
from normweave.heads.adapted_moe.experts.layout import View
from normweave.heads.adapted_moe.experts.memory import MemoryExperts
from normweave.heads.adapted_moe.head import AdaptedMoE
from normweave.heads.novelty import SubclassNovelty

CONFIG = head_config(expert={"kind": "fusion", "memory": {"max_patches": 60, "max_pool": 2000}, "layout": {"cells": 4}})
SUBCLASSES = 5


def some(count, *, of, seed=2):
    """Images of the chosen subclasses, and the subclass of each."""
    features, subclass = subclass_images(count * SUBCLASSES, subclasses=SUBCLASSES, seed=seed)
    chosen = np.isin(subclass, of)
    return features[chosen], subclass[chosen]


def data(of, names):
    features, subclass = some(8, of=of)
    return normals(
        features,
        subclasses=np.searchsorted(of, subclass),
        names=names,
        groups=np.arange(len(features)),
        holdout=np.zeros(len(features), dtype=bool),
        given_categories=np.zeros(len(features), dtype=np.int64),
    )


def trained(number):
    """A head that was trained on the first subclasses."""
    return fit(build(CONFIG, shape=SHAPE), data(list(range(number)), tuple(f"cloth/{k}" for k in range(number))))


def with_next(head):
    """The head with one more subclass."""
    head = deepcopy(head)
    new = data([len(head.subclass_names)], (f"cloth/{len(head.subclass_names)}",))
    head.add(new)
    head.fusion.append_like(0)
    return head


def compare(old, new, known):
    """Return for each test image whether it is nearer to a new subclass, and whether its scores have the same bits."""
    features, _ = some(6, of=list(range(SUBCLASSES)), seed=5)
    before, after = old(features), new(features)
    same = (before.scores == after.scores).all(dim=(1, 2)) & (before.image_scores == after.image_scores)
    return after.routing.subclass >= known, same


@pytest.mark.parametrize("first", [1, 2, 3])
def test_scores_of_images_that_are_nearer_to_the_others_keep_every_bit(first):
    """Also those of images that are nearer to a subclass that was added before."""
    heads = [trained(first)]
    while len(heads[-1].subclass_names) < SUBCLASSES:
        heads.append(with_next(heads[-1]))
        nearer, same = compare(heads[-2], heads[-1], len(heads[-2].subclass_names))
        assert nearer.any()
        assert same[~nearer].all()
        assert not same[nearer].all()


def test_a_state_is_loaded_with_what_was_added():
    head = with_next(with_next(trained(2)))
    loaded = build(CONFIG, shape=SHAPE)
    loaded.load_state(head.state())
    loaded.subclass_names = head.subclass_names
    _, same = compare(head, loaded, 0)

    assert same.all()
    assert loaded.state().keys() == head.state().keys()
    assert (loaded.stored_by() == head.stored_by()).all()


def test_removing_what_was_added_restores_the_state():
    before = trained(2)
    first, second = with_next(before), with_next(with_next(before))
    second.remove(3)
    states = [first.state(), second.state()]
    first.remove(2)

    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first.state().keys() == before.state().keys()
    assert all(torch.equal(first.state()[name], tensor) for name, tensor in before.state().items())


def test_the_subclass_that_was_added_first_can_be_removed_first():
    before = trained(2)
    head = with_next(with_next(before))
    head.remove(2)
    nearer, same = compare(before, head, 2)

    assert head.subclass_names == ("cloth/0", "cloth/1", "cloth/3")
    assert nearer.any()
    assert same[~nearer].all()


def all_experts(self, distances, allowed):
    """Let every expert score every image."""
    return torch.ones_like(distances, dtype=torch.bool) if allowed is None else allowed


def fitted_again(self, samples, add=SubclassNovelty.add):
    """Change the whitening of the first training a little."""
    add(self, samples)
    self.whitener = 1.01 * self.whitener
    self.means = 1.01 * self.means


def for_all(self, features, added, residual=View.residual):
    """Use the added subspace for all images."""
    return residual(self, features, None if added is None else added.clamp(min=0))


def all_patches(self, features, allowed, score_united=MemoryExperts.score_united):
    """Compare every image with the added patches, too."""
    return score_united(self, features, None if allowed is None else torch.ones_like(allowed))


@pytest.mark.parametrize(
    ("owner", "name", "broken"),
    [
        (AdaptedMoE, "usable", all_experts),
        (SubclassNovelty, "add", fitted_again),
        (View, "residual", for_all),
        (MemoryExperts, "score_united", all_patches),
    ],
)
def test_the_comparison_finds_a_change_of_the_other_scores(monkeypatch, owner, name, broken):
    before = trained(3)
    monkeypatch.setattr(owner, name, broken)
    nearer, same = compare(before, with_next(before), 3)

    assert not same[~nearer].all()
