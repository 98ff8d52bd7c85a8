import numpy as np
import pytest
import torch

from builders import InMemory
from normweave.heads.adapted_moe.discovery import agreement, discover, position_variance
from normweave.types import FitData


def clusters(centres, *, each=20, spread=0.2, seed=0):
    """Statistics of images around these centres, and the cluster of each."""
    generator = np.random.default_rng(seed)
    subclasses = np.repeat(np.arange(len(centres)), each)
    generator.shuffle(subclasses)
    samples = np.asarray(centres)[subclasses] + spread * generator.normal(size=(len(subclasses), len(centres[0])))
    return samples.astype(np.float32), subclasses


FOUR = 3 * np.eye(4, 12)


@pytest.mark.parametrize("method", ["kmeans", "mixture"])
def test_finds_clusters_that_are_there(method):
    samples, subclasses = clusters(FOUR)

    found = discover(samples, method=method, most=16, seed=0)

    result = agreement(found.predict(samples), subclasses)
    assert result == (1.0, 1.0, 4, 4)


@pytest.mark.parametrize("method", ["kmeans", "mixture"])
def test_finds_one_subclass_where_there_is_one(method):
    samples, _ = clusters(FOUR[:1], each=80)

    found = discover(samples, method=method, most=16, seed=0)

    assert len(found.centres) == 1
    assert set(found.predict(samples)) == {0}


@pytest.mark.parametrize("method", ["kmeans", "mixture"])
def test_a_few_odd_images_are_not_a_subclass(method):
    samples, _ = clusters(FOUR[:1], each=60)
    samples[:2] += 100

    found = discover(samples, method=method, most=16, seed=0)

    assert np.bincount(found.predict(samples), minlength=len(found.centres)).min() >= 5


def test_never_finds_more_than_allowed():
    samples, _ = clusters(FOUR)

    assert len(discover(samples, method="kmeans", most=3, seed=0).centres) <= 3


def test_a_mixture_separates_subclasses_by_their_variance():
    """Two clusters with one centre, one narrow and one wide: only the likelihood separates them."""
    generator = np.random.default_rng(0)
    subclasses = np.arange(200) % 2
    samples = (np.where(subclasses, 5.0, 0.2)[:, None] * generator.normal(size=(200, 4))).astype(np.float32)

    found = discover(samples, method="mixture", most=2, seed=0)

    assert agreement(found.predict(samples), subclasses).purity > 0.9


@pytest.mark.parametrize("method", ["kmeans", "mixture"])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_few_images_are_one_subclass(method, count):
    samples, _ = clusters(FOUR, each=2)

    assert len(discover(samples[:count], method=method, most=16, seed=0).centres) == 1


def test_equal_images_are_one_subclass():
    assert len(discover(np.ones((20, 6), dtype=np.float32), method="kmeans", most=16, seed=0).centres) == 1


def test_new_images_get_the_subclass_of_similar_images():
    samples, subclasses = clusters(FOUR)
    found = discover(samples, method="kmeans", most=16, seed=0)
    fresh, fresh_kinds = clusters(FOUR, seed=1)

    name = {each: found.predict(samples[subclasses == each])[0] for each in range(4)}
    assert [name[kind] for kind in fresh_kinds] == found.predict(fresh).tolist()


def test_same_seed_same_subclasses():
    samples, _ = clusters(np.random.default_rng(1).normal(size=(7, 12)), spread=0.5)

    one, other = (discover(samples, method="kmeans", most=16, seed=3).predict(samples) for _ in range(2))

    assert (one == other).all()


def test_agreement_by_hand():
    """Clusters 0, 1 contain subclasses a a b and b b: 4 of 5 images have the main subclass of their cluster."""
    result = agreement(np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 1]))

    # Pairs: 2 agree within both; expected 4 * 4 / 10; mean of both numbers of pairs is 4.
    assert result.adjusted_rand_index == pytest.approx((2 - 1.6) / (4 - 1.6))
    assert result.purity == pytest.approx(0.8)
    assert (result.found, result.given) == (2, 2)


def fit_data(features, *, groups=None):
    count = len(features)
    return FitData(
        features=InMemory(features),
        subclasses=np.zeros(count, dtype=np.int64),
        names=("a",),
        groups=np.arange(count) if groups is None else groups,
        holdout=np.zeros(count, dtype=bool),
    )


def noise(count, seed=0):
    return torch.randn(count, 6, 16, 16, generator=torch.Generator().manual_seed(seed))


def test_position_variance_a_layout_and_not_a_texture():
    place = noise(1, seed=1)

    assert position_variance(fit_data(noise(40)), channels=6) < 0.005
    assert position_variance(fit_data(noise(40) + 0.5 * place), channels=6) > 0.1


def test_what_position_variance_by_hand():
    features, groups = noise(9) + 0.7 * noise(1, seed=1), np.array([0, 0, 1, 1, 2, 2, 3, 3, 3])

    got = position_variance(fit_data(features, groups=groups), channels=4)

    inner = features[:, :4, 2:14, 2:14].double().numpy()
    inner = (inner - inner.mean(axis=(2, 3), keepdims=True)) / inner.std(axis=(2, 3), keepdims=True)
    pooled = inner.reshape(9, 4, 6, 2, 6, 2).mean(axis=(3, 5))
    gap = sum(((pooled[i] - pooled[groups != groups[i]].mean(axis=0)) ** 2).sum() for i in range(9))
    assert got == pytest.approx(1 - gap / (pooled**2).sum(), rel=1e-5)


def test_padding_and_coarse_channels_do_not_count_as_position():
    features = noise(40)
    features[:, :, :2], features[:, :, -2:] = 5.0, 5.0  # the effect of a convolution's padding on every image
    features[:, 3:] += noise(1, seed=1)[:, 3:]

    assert position_variance(fit_data(features), channels=3) < 0.005


def test_images_of_one_group_give_no_position_variance():
    assert position_variance(fit_data(noise(5), groups=np.zeros(5, dtype=np.int64)), channels=6) == 0
