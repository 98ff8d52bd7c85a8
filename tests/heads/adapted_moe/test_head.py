import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from builders import InMemory, head_config
from normweave.config import AdaptedMoEConfig
from normweave.errors import DataError
from normweave.heads import build
from normweave.heads.adapted_moe.adaption import (
    FullAdaption,
    GuardedAdaption,
    NoAdaption,
    PaperAdaption,
    statistics,
)
from normweave.heads.adapted_moe.experts.discriminator import DiscriminatorExperts
from normweave.heads.adapted_moe.experts.gaussian import GaussianExperts
from normweave.heads.adapted_moe.experts.layout import LayoutExperts
from normweave.heads.adapted_moe.experts.memory import MemoryExperts
from normweave.heads.adapted_moe.experts.subspace import SubspaceExperts
from normweave.heads.adapted_moe.head import aggregate
from normweave.heads.adapted_moe.router import select_experts
from normweave.heads.grid import replace_border
from normweave.heads.novelty import block_statistics
from normweave.training import train
from normweave.types import FitData

SHAPE = (6, 10, 9)
K = 3
EXPERTS = {
    "fusion": {"memory.max_patches": 40, "memory.max_pool": 300, "layout.cells": 4},
    "layout": {"cells": 4},
    "gaussian": {},
    "subspace": {"cells": 4},
    "memory": {"max_patches": 40, "max_pool": 300},
    "discriminator": {"hidden": 8, "patches": 64, "training.epochs": 2},
}
NETWORK = {"method": "network", "embedding": 8, "training.epochs": 15, "training.learning_rate": 1e-2}


def config(expert="fusion", routing="statistics", **values):
    """Settings of a small head."""
    expert = {"kind": expert} if isinstance(expert, str) else expert
    routing = NETWORK if routing == "network" else routing
    return head_config(expert=EXPERTS[expert["kind"]] | expert, routing=routing, **values)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(count, *, seed, layout=False):
    """Subclasses that differ in the mean of the channels; with `layout` also a pattern at a fixed position."""
    subclasses = np.arange(count) % K
    features = 0.5 * random(count, *SHAPE, seed=seed) + random(K, SHAPE[0], 1, 1, seed=101)[subclasses]
    if layout:
        features = features + random(*SHAPE, seed=102)
    return features, subclasses


def fit_data(*, count=36, layout=False, labelled=True, holdout=True):
    features, subclasses = images(count, seed=1, layout=layout)
    groups = np.arange(count) // (2 * K) * K + subclasses
    return FitData(
        features=InMemory(features),
        subclasses=subclasses if labelled else np.full(count, -1),
        names=("cloth/a", "cloth/b", "cloth/c") if labelled else (),
        groups=groups,
        holdout=(groups < 2 * K) & holdout,
        seed=0,
    )


def fitted(data=None, **settings):
    data = fit_data() if data is None else data
    head = build(config(**settings), shape=SHAPE)
    head.begin(data)
    for stage in head.stages(data):
        train(stage, data, device="cpu")
    head.finish(data)
    return head


def test_forward_is_route_adapt_ask_standardise_and_put_together():
    """Step by step through the parts, with the paper's settings; image by image."""
    head = fitted(expert="discriminator", routing="network", adaption="paper", top_k=2, temperature=0.3, border=1)
    features, _ = images(4, seed=2)

    out = head(features)

    way = head.branch
    for row in range(4):
        one = features[row : row + 1]
        cosines = head.router.similarity(one)[0].tolist()
        exponentials = np.exp(np.array(cosines) / 0.3)
        weights = exponentials / exponentials.sum()
        best = np.argsort(-weights)[:2]
        total, divisor = 0.0, 0.0
        for expert in best:
            asked = torch.tensor([[int(expert)]])
            adapted = way.adaption(one, statistics(one), asked)
            score = way.experts(adapted, asked)[0, 0, 0]
            score = (score - way.scale_mean[expert]) / way.scale_std[expert]
            total = total + weights[expert] * score
            divisor += weights[expert]
        expected = replace_border((total / divisor)[None].float(), 1, grid=SHAPE[1:])[0]
        torch.testing.assert_close(out.scores[row], expected, rtol=1e-3, atol=1e-3)
        assert out.routing.subclass[row] == best[0]
        kept = np.zeros(K)
        kept[best] = weights[best] / weights[best].sum()
        np.testing.assert_allclose(out.routing.weights[row], kept, rtol=1e-4)
        assert out.routing.distance[row] == pytest.approx(head.novelty(block_statistics(one)).min().item(), rel=1e-4)
    assert out.routing.adapted.all()


@pytest.mark.parametrize("how", ["paper", "min", "mean"])
def test_aggregation_by_hand(how):
    scores, weights = random(2, 3, 4, 5), torch.tensor([[0.5, 0.3, 0.1], [1.0, 2.0, 0.5]])

    got = aggregate(scores, weights, how=how)

    for b in range(2):
        for y in range(4):
            for x in range(5):
                values = [scores[b, t, y, x].item() for t in range(3)]
                match how:
                    case "paper":
                        w = weights[b].tolist()
                        expected = sum(a * v for a, v in zip(w, values, strict=True)) / sum(w)
                    case "min":
                        expected = min(values)
                    case "mean":
                        expected = sum(values) / 3
                assert got[b, y, x].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("how", ["paper", "min", "mean"])
def test_aggregation_is_a_setting(how):
    head = fitted(expert="gaussian", routing="statistics", aggregation=how, top_k=3, border=0)
    features, _ = images(3, seed=2)
    everyone = torch.arange(K).expand(3, -1)

    scores = head.branch(features, statistics(features), everyone)[:, :, 0]
    expected = aggregate(scores, head(features).routing.weights, how=how)

    torch.testing.assert_close(head(features).scores, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("border", [0, 2])
def test_border_is_a_setting(border):
    head = fitted(expert="gaussian", border=border)
    scores = head(images(2, seed=2)[0]).scores

    assert torch.equal(scores[:, 0], scores[:, 2]) == (border == 2)


ROUTINGS = ["statistics", "likelihood", "network"]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routes_new_images_to_their_subclass(routing):
    head = fitted(expert={"kind": "gaussian", "pooled": 0.0}, adaption="off", routing=routing)
    features, subclasses = images(12, seed=2)

    assert (head(features).routing.subclass.numpy() == subclasses).all()


def test_routing_by_likelihood_asks_all_and_keeps_those_that_find_the_image_usual():
    head = fitted(expert="gaussian", routing="likelihood", top_k=2, border=0)
    features, _ = images(3, seed=2)
    all_scores = head.branch(features, statistics(features), torch.arange(K).expand(3, -1))[:, :, 0]

    choice = select_experts(-all_scores.mean(dim=(2, 3)), temperature=0.25, top_k=2)
    expected = aggregate(all_scores[torch.arange(3)[:, None], choice.experts], choice.weights, how="paper")

    torch.testing.assert_close(head(features).scores, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("top_k", [1, 2, 3, 9])
def test_only_the_top_experts_count(top_k):
    head = fitted(expert="gaussian", top_k=top_k)
    weights = head(images(5, seed=2)[0]).routing.weights

    assert ((weights > 0).sum(dim=1) == min(top_k, K)).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(5))


def test_one_expert_for_all_without_moe():
    head = fitted(expert="gaussian", moe=False)
    out = head(images(4, seed=2)[0])

    assert head.subclass_names == ("all",)
    assert head.branch.experts.offset.shape[0] == 1
    assert len(head.novelty.means) == K  # the distance still uses all subclasses
    assert out.routing.weights.tolist() == [[1.0]] * 4


@pytest.mark.parametrize(
    ("expert", "kind"),
    [
        ("layout", LayoutExperts),
        ("gaussian", GaussianExperts),
        ("subspace", SubspaceExperts),
        ("memory", MemoryExperts),
        ("discriminator", DiscriminatorExperts),
    ],
)
@pytest.mark.parametrize("adaption", ["off", "full", "paper", "guarded"])
def test_every_expert_works_under_every_adaption(expert, kind, adaption):
    head = fitted(expert=expert, adaption=adaption)
    out = head(images(4, seed=2)[0])

    assert type(head.branch.experts) is kind
    assert out.scores.shape == (4, *SHAPE[1:])
    assert torch.isfinite(out.scores).all()
    assert (out.image_scores is not None) == (expert == "layout")
    assert out.routing.adapted.tolist() == [adaption != "off"] * 4


@pytest.mark.parametrize(
    ("expert", "adaption"),
    [
        ("layout", NoAdaption),
        ("subspace", NoAdaption),
        ("gaussian", FullAdaption),
        ("memory", NoAdaption),
        ("discriminator", GuardedAdaption),
    ],
)
def test_the_adaption_that_suits_an_expert(expert, adaption):
    (way,) = build(config(expert=expert), shape=SHAPE).branches

    assert type(way.adaption) is adaption


def test_adaption_paper_is_fitted_to_each_expert_own_images():
    data = fit_data()
    head = fitted(data, expert="gaussian", adaption="paper")

    assert type(head.branch.adaption) is PaperAdaption
    for expert in range(K):
        own = data.features.features[data.subclasses == expert]
        torch.testing.assert_close(head.branch.adaption.centres[expert], own.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_noise_of_discriminators_shrinks_with_patches_of_length_one():
    (plain,) = build(config(expert="discriminator"), shape=SHAPE).branches
    (unit,) = build(config(expert="discriminator", adaption="paper"), shape=SHAPE).branches

    assert plain.experts.noise == 0.5
    assert unit.experts.noise == pytest.approx(0.5 / 6**0.5)


def test_a_fitted_fusion_survives_saving_and_is_fitted_anew():
    head, other = fitted(fit_data(layout=True)), build(config(), shape=SHAPE)
    features, _ = images(3, seed=2, layout=True)

    other.load_state(head.state())
    torch.testing.assert_close(other(features), head(features), rtol=0, atol=0)

    data = fit_data()
    head.branches[0].remove()
    head.begin(data)
    head.finish(data)
    torch.testing.assert_close(head(features), fitted(data)(features))


@pytest.mark.parametrize("expert", ["gaussian", "memory", "subspace", "discriminator"])
def test_scale_is_that_of_held_out_images_of_the_expert_own_subclass(expert):
    data = fit_data()
    head = fitted(data, expert=expert, adaption="off")

    for k in range(K):
        own = data.features.features[data.holdout & (data.subclasses == k)]
        scores = head.branch.experts(own[:, None], torch.full((len(own), 1), k))
        assert head.branch.scale_mean[k].item() == pytest.approx(scores.mean().item(), rel=1e-3, abs=1e-4)
        assert head.branch.scale_std[k].item() == pytest.approx(scores.std(correction=0).item(), rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("expert", ["memory", "subspace", "gaussian"])
def test_experts_do_not_learn_from_held_out_images(expert):
    data = fit_data()
    changed = data.features.features.clone()
    # Same statistics, so nothing else changes: the patches of each held-out image in another order.
    changed[data.holdout] = changed[data.holdout].flip(2)
    other = replace(data, features=InMemory(changed))

    one, two = (fitted(each, expert=expert, adaption="off").branch.experts for each in (data, other))

    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name


def test_a_subclass_with_few_held_out_images_takes_the_scale_of_all():
    data = fit_data()
    holdout = data.holdout.copy()
    holdout[np.flatnonzero(holdout & (data.subclasses == 2))[1:]] = False
    data = replace(data, holdout=holdout)
    head = fitted(data, expert="gaussian", adaption="off")

    scores = torch.cat(
        [
            head.branch.experts(
                data.features.features[holdout & (data.subclasses == k)][:, None],
                torch.full((int((holdout & (data.subclasses == k)).sum()), 1), k),
            )
            for k in range(K)
        ]
    )
    assert head.branch.scale_mean[2].item() == pytest.approx(scores.mean().item(), rel=1e-3)


@pytest.mark.parametrize("every", [True, False])
def test_fits_where_nothing_or_all_of_a_subclass_is_held_out(every):
    data = fit_data()
    holdout = data.subclasses == 1 if every else np.zeros(len(data), dtype=bool)

    head = fitted(replace(data, holdout=holdout), expert="gaussian")

    assert torch.isfinite(head(images(3, seed=2)[0]).scores).all()


@pytest.mark.parametrize("routing", ROUTINGS)
def test_score_excluding_leaves_out_the_expert_of_the_own_subclass(routing):
    head = fitted(expert="gaussian", routing=routing, border=0)
    features, subclasses = images(6, seed=2)
    own = torch.from_numpy(subclasses)

    out = head.score_excluding(features, own)

    assert (out.routing.weights.gather(1, own[:, None]) == 0).all()
    everyone = torch.arange(K).expand(6, -1)
    scores = head.branch(features, statistics(features), everyone)[:, :, 0]
    torch.testing.assert_close(out.scores, aggregate(scores, out.routing.weights, how="paper"), rtol=1e-3, atol=1e-4)
    assert (out.routing.distance > head(features).routing.distance).all()


def test_score_excluding_with_one_expert_uses_it():
    head = fitted(expert="gaussian", moe=False)
    features, _ = images(3, seed=2)

    torch.testing.assert_close(head.score_excluding(features, torch.zeros(3, dtype=torch.int64)), head(features))


def test_an_unseen_subclass_is_farther_than_new_images_of_known_subclasses():
    head = fitted()
    known, _ = images(12, seed=2)
    strange = known + 4 * random(1, SHAPE[0], 1, 1, seed=9)

    assert head(strange).routing.distance.min() > 3 * head(known).routing.distance.max()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("discovery", ["kmeans", "mixture"])
def test_finds_subclasses_where_none_are_given(discovery, routing):
    head = fitted(
        fit_data(labelled=False),
        expert={"kind": "gaussian", "pooled": 0.0},
        adaption="off",
        discovery=discovery,
        routing=routing,
    )
    features, subclasses = images(12, seed=2)

    assert head.subclass_names == ("found-1", "found-2", "found-3")
    assert head.agreement is None  # nothing to compare with
    found = head(features).routing.subclass.numpy()
    assert len(set(zip(found, subclasses, strict=True))) == K  # one to one


def test_discovered_subclasses_are_compared_with_given_ones():
    head = fitted(discover="always", expert="gaussian")

    assert head.subclass_names == ("found-1", "found-2", "found-3")
    assert head.agreement == (1.0, 1.0, 3, 3)


def test_never_finds_more_subclasses_than_allowed():
    assert len(fitted(fit_data(labelled=False), max_subclasses=1).subclass_names) == 1


def test_one_subclass_needs_no_router():
    data = fit_data()
    data = replace(data, subclasses=np.zeros(len(data), dtype=np.int64), names=("cloth",))
    head = build(config(routing="network", adaption="guarded"), shape=SHAPE)

    head.begin(data)
    assert [stage.name for stage in head.stages(data)] == []
    head.finish(data)

    out = head(images(2, seed=2)[0])
    assert head.subclass_names == ("cloth",)
    assert out.routing.weights.tolist() == [[1.0], [1.0]]
    assert not out.routing.adapted.any()  # one subclass gives no direction


def test_stages_are_the_parts_that_need_gradients():
    data = fit_data()

    def names(**settings):
        head = build(config(**settings), shape=SHAPE)
        head.begin(data)
        return [stage.name for stage in head.stages(data)]

    assert names() == []
    assert names(routing="network", expert="memory") == ["router"]
    assert names(expert="discriminator") == ["experts"]
    assert names(routing="network", expert="discriminator") == ["router", "experts"]
    assert names(expert="discriminator", moe=False) == ["experts"]


@pytest.mark.parametrize("settings", [{"norm": False}, {"alpha": 0.0}, {"stride": 1}])
def test_settings_of_the_router_reach_it(settings):
    router = build(config(routing={"method": "network"} | settings), shape=SHAPE).router

    ((name, value),) = settings.items()
    assert getattr(router.config, name) == value


@pytest.mark.parametrize("discover", ["missing", "always"])
def test_reads_a_few_images_at_a_time(discover):
    data = fit_data(count=72, layout=True)

    fitted(data, discover=discover)

    assert data.features.largest_read <= 16


def test_same_seed_same_head_another_seed_another():
    data = fit_data()
    features, _ = images(3, seed=2)
    settings = {"expert": "discriminator", "routing": "network"}

    one = fitted(data, **settings)(features)
    torch.manual_seed(77)
    two = fitted(data, **settings)(features)
    other = fitted(replace(data, seed=1), **settings)(features)

    assert torch.equal(one.scores, two.scores)
    assert not torch.equal(one.scores, other.scores)


def test_training_on_nothing_is_refused():
    data = fit_data()
    nothing = FitData(
        features=InMemory(torch.empty(0, *SHAPE)),
        subclasses=np.empty(0, dtype=np.int64),
        names=(),
        groups=np.empty(0, dtype=np.int64),
        holdout=np.empty(0, dtype=bool),
    )
    head = build(AdaptedMoEConfig(), shape=SHAPE)

    with pytest.raises(DataError, match=r"no normal image to learn from\. Give it at least one"):
        head.begin(nothing)
    with pytest.raises(DataError, match=re.escape("No normal image is left to learn cloth/d from. Give these")):
        head.begin(replace(data, names=(*data.names, "cloth/d")))


@pytest.mark.parametrize("expert", ["layout", "gaussian", "subspace", "memory", "discriminator"])
@pytest.mark.parametrize("adaption", ["off", "paper"])
def test_no_image_gives_no_scores(expert, adaption):
    out = fitted(expert=expert, adaption=adaption)(torch.empty(0, *SHAPE))

    assert out.scores.shape == (0, *SHAPE[1:])
    assert out.routing.weights.shape == (0, K)
