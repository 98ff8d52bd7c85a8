import numpy as np
import pytest

from normweave.heads.adapted_moe.discovery import agreement, discover


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
