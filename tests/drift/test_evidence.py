"""Ranks among all images before, and evidence whose false-alarm rate holds over the whole stream."""

import json

import numpy as np
import pytest

from normweave.drift.evidence import Evidence, Ranks, bank, odds


def test_a_rank_is_the_share_of_smaller_values_plus_a_random_part_of_equal_ones():
    ranks = Ranks()
    assert ranks.add(5.0, 0.3) == 0.3
    assert ranks.add(7.0, 0.5) == (1 + 0.5 * 1) / 2
    assert ranks.add(5.0, 0.25) == (0 + 0.25 * 2) / 3
    assert ranks.add(6.0, 0.5) == (2 + 0.5 * 1) / 4
    assert ranks.add(-1.0, 1.0) == 1 / 5


@pytest.mark.parametrize("draw", [lambda rng: rng.standard_normal(), lambda rng: float(rng.integers(3)), lambda _: 4.0])
def test_ranks_are_uniform_also_with_ties(draw):
    found = []
    for seed in range(40):
        rng, ranks = np.random.default_rng(seed), Ranks()
        found += [ranks.add(draw(rng), rng.random()) for _ in range(100)][20:]
    counts, _ = np.histogram(found, bins=10, range=(0, 1))
    expected = len(found) / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # 0.1 % of chi-squared with 9 degrees of freedom


def test_memory_is_bounded_by_the_digits():
    ranks, rng = Ranks(), np.random.default_rng(0)
    for _ in range(5000):
        ranks.add(1 + 0.01 * rng.random(), rng.random())
    assert len(ranks.as_dict()["values"]) <= 11


def test_the_bank_and_what_it_has_paid_add_up_to_the_start():
    paid = [bank(t) - bank(t + 1) for t in range(1000)]
    assert min(paid) > 0
    assert bank(0) == 1
    assert bank(1000) + sum(paid) == pytest.approx(1)


def test_the_evidence_is_a_martingale():
    """The expected e-value after the next rank, uniform, is the e-value now: checked by quadrature."""
    evidence, rng = Evidence(1), np.random.default_rng(0)
    for _ in range(30):
        evidence.add(rng.random(1))
    state, before = evidence.as_dict(), evidence.values[0]
    grid = (np.arange(20_000) + 0.5) / 20_000
    # x = 3 s^2 - 2 s^3 has more points near 0 and 1, where the densities are steep
    points, weights = 3 * grid**2 - 2 * grid**3, 6 * grid * (1 - grid)
    many = Evidence.from_dict(
        {"count": state["count"]} | {name: state[name] * len(grid) for name in ("capital", "rise", "start")}
    )
    many.add(points)
    assert (weights * many.values).mean() == pytest.approx(before, rel=0.02)


def test_false_alarms_are_below_the_rate_over_the_whole_stream():
    """1,000 quiet streams of 1,000 images: e-values that ever reach 10 are at most a tenth of them."""
    evidence, rng = Evidence(1000), np.random.default_rng(1)
    highest = np.zeros(1000)
    for _ in range(1000):
        evidence.add(rng.random(1000))
        highest = np.maximum(highest, evidence.values)
    assert 0 < (highest >= 10).mean() <= 0.1


@pytest.mark.parametrize(("low", "sign"), [(True, -1), (False, 1)])
def test_a_change_is_found_with_its_beginning_and_its_direction(low, sign):
    evidence, rng = Evidence(2), np.random.default_rng(2)
    for number in range(340):
        changed = rng.random() * 0.1
        evidence.add(np.array([(changed if low else 1 - changed) if number >= 300 else rng.random(), rng.random()]))
    assert evidence.values[0] > 1e6
    assert evidence.values[1] < 10
    since, found = evidence.best(0)
    assert found == sign
    assert abs(since - 301) <= 5


def test_it_continues_where_it_was_saved():
    evidence, ranks, rng = Evidence(3), Ranks(), np.random.default_rng(3)
    for _ in range(50):
        evidence.add(rng.random(3))
        ranks.add(rng.standard_normal(), 0.5)
    other = Evidence.from_dict(json.loads(json.dumps(evidence.as_dict())))
    more = Ranks.from_dict(json.loads(json.dumps(ranks.as_dict())))
    assert ranks.add(0.1, 0.5) == more.add(0.1, 0.5)
    for each in (evidence, other):
        each.add(np.array([0.1, 0.5, 0.9]))
    np.testing.assert_array_equal(evidence.values, other.values)
    assert evidence.best(0) == other.best(0)


def test_evidence_is_a_number_of_two_digits():
    assert [odds(one) for one in (7234.0, 1_438_212.3, 1e9, 1e26)] == [
        "7,200",
        "1,400,000",
        *2 * ["more than 1,000,000,000"],
    ]
