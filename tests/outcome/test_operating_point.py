import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normweave.errors import BundleError, CheckError, ConfigError, DataError
from normweave.outcome.operating_point import Calibration, draw_threshold, groups_needed, p_value

NAMES = ("cloth/red", "cloth/blue", "cloth/rare")


def calibration(seed=0, *, each=(60, 40, 5), false_alarm_rate=0.05, unknown_rate=0.01):
    """Two subclasses with enough normals of different scale, and one with too few."""
    random = np.random.default_rng(seed)
    subclasses = np.repeat(np.arange(3), each)
    return Calibration(
        scores=random.normal(loc=10.0 * subclasses).astype(np.float32),
        distances=random.exponential(size=sum(each)),
        subclasses=subclasses,
        subclass_names=NAMES,
        false_alarm_rate=false_alarm_rate,
        unknown_rate=unknown_rate,
    )


@pytest.mark.parametrize(("n", "rate", "rank"), [(19, 0.05, 19), (99, 0.05, 95), (99, 0.29, 71), (104, 0.01, 104)])
def test_the_threshold_is_the_quantile_of_the_paper(n, rate, rank):
    """The ceil((n + 1)(1 - a))-th smallest, also where 100 * 0.29 is 28.999999999999996."""
    scores = np.random.default_rng(0).permutation(n)
    assert draw_threshold(scores, false_alarm_rate=rate).threshold == rank - 1


@pytest.mark.parametrize(("n", "rate"), [(99, 0.05), (104, 0.05), (24, 0.1)])
def test_the_false_alarm_rate_holds_on_new_normal_images(n, rate):
    """Averaged over many draws, false alarms come out at floor((n + 1) a) / (n + 1), never above a."""
    random = np.random.default_rng(0)
    rates = []
    for _ in range(2000):
        point = draw_threshold(random.normal(size=n), false_alarm_rate=rate)
        rates.append((random.normal(size=500) > point.threshold).mean())
    mean, error = np.mean(rates), np.std(rates) / math.sqrt(len(rates))
    assert abs(mean - math.floor((n + 1) * rate) / (n + 1)) < 4 * error
    assert mean < rate + 4 * error


def test_the_false_alarm_rate_holds_in_each_subclass():
    """The scores of the subclasses are far apart: one shared threshold would be wrong for both."""
    alarms = np.zeros(2)
    random = np.random.default_rng(1)
    draws, new = 300, 200
    for seed in range(draws):
        held_out = calibration(seed, each=(99, 59, 0))
        for k in range(2):
            fresh = random.normal(loc=10.0 * k, size=new)
            alarms[k] += sum(held_out.decide(score=s, subclass=k).verdict == "anomalous" for s in fresh)
    np.testing.assert_allclose(alarms / (draws * new), [0.05, 3 / 60], atol=0.006)


@pytest.mark.parametrize("rate", [5e-324, 1e-10])
def test_a_rate_below_the_lowest_is_refused(rate):
    with pytest.raises(ConfigError, match="must be at least 1e-09"):
        groups_needed(rate)
    assert groups_needed(1e-9) == 10**9 - 1


def test_too_few_normal_images_are_refused_with_the_number_needed():
    with pytest.raises(CheckError, match=r"rate of 0\.01 needs at least 99 independent groups .*, got 98; ") as caught:
        draw_threshold(np.zeros(98), false_alarm_rate=0.01)
    assert caught.value.exit_code == 3
    assert [groups_needed(rate) for rate in (0.01, 0.05, 0.1, 0.3, 0.5, 0.9)] == [99, 19, 9, 3, 1, 1]
    for rate in (0.01, 0.05, 0.07, 0.3):
        draw_threshold(np.zeros(groups_needed(rate)), false_alarm_rate=rate)


@pytest.mark.parametrize("rate", [0, 1, -0.1, float("nan")])
def test_rates_outside_of_0_to_1_are_refused(rate):
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\), got"):
        draw_threshold(np.zeros(10), false_alarm_rate=rate)


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.lists(st.integers(0, 6), min_size=9, max_size=60), st.integers(-1, 7), st.integers(10, 40))
def test_an_image_is_anomalous_exactly_when_its_p_value_is_low_enough(scores, score, percent):
    """With many ties."""
    rate = percent / 100
    point = draw_threshold(scores, false_alarm_rate=rate)
    assert (score > point.threshold) == (p_value(score, scores) <= rate + 1e-12)


def test_p_value_counts_the_image_itself():
    assert p_value(3.0, [1, 2, 3, 4]) == 3 / 5
    assert p_value(5.0, [1, 2, 3, 4]) == 1 / 5
    assert p_value(0.0, [1, 2, 3, 4]) == 1


def test_a_subclass_with_enough_normal_images_has_its_own_threshold():
    held_out = calibration()
    red = held_out.decide(score=9.0, distance=0.5, subclass=0)
    blue = held_out.decide(score=9.0, distance=0.5, subclass=1)
    assert (red.verdict, red.pooled, red.p_value) == ("anomalous", False, 1 / 61)
    assert (blue.verdict, blue.pooled) == ("normal", False)
    assert blue.p_value > 0.5
    assert red.threshold < 5 < blue.threshold


def test_a_subclass_with_too_few_uses_the_threshold_of_all():
    held_out = calibration()
    rare = held_out.decide(score=15.0, distance=0.5, subclass=2)
    assert rare.pooled
    assert rare.threshold == draw_threshold(held_out.scores, false_alarm_rate=0.05).threshold
    assert rare.p_value == p_value(15.0, held_out.scores)
    assert [point["pooled"] for point in held_out.as_dict()["operating_points"]] == [True, False, False, True]


def test_unknown_takes_precedence_over_anomalous():
    decision = calibration().decide(score=100.0, distance=1000.0, subclass=0)
    assert decision.verdict == "unknown"
    assert decision.subclass_p_value == 1 / 106


def test_unknown_has_its_own_rate_or_the_lowest_attainable_rate():
    random = np.random.default_rng(2)
    for each, unknown_rate, expected in (
        ((60, 40, 0), 0.05, (3 / 61, 2 / 41)),  # own thresholds: floor(61 * .05) / 61, floor(41 * .05) / 41
        ((60, 40, 0), 0.01, (1 / 101, 1 / 101)),  # too few in a subclass: all 100
        ((30, 20, 0), 0.01, (1 / 51, 1 / 51)),  # too few of all: beyond the largest distance
    ):
        unknown = np.zeros(2)
        for seed in range(300):
            held_out = calibration(seed, each=each, unknown_rate=unknown_rate)
            for k in range(2):
                fresh = random.exponential(size=200)
                unknown[k] += sum(
                    held_out.decide(score=0.0, distance=d, subclass=k).verdict == "unknown" for d in fresh
                )
        np.testing.assert_allclose(unknown / (300 * 200), expected, atol=0.005)
    points = held_out.as_dict()["operating_points"]
    assert points[0]["unknown_rate"] == 1 / 51
    assert points[0]["unknown_beyond"] == held_out.distances.max()


def test_each_image_keeps_its_own_distance_and_subclass():
    """Distances of the second subclass are a hundred times the first's, in an order unlike that of the scores."""
    random = np.random.default_rng(3)
    subclasses = random.permutation(np.repeat([0, 1], 30))
    held_out = Calibration(
        scores=random.normal(size=60),
        distances=np.where(subclasses == 0, 1.0, 100.0) * random.uniform(1, 2, size=60),
        subclasses=subclasses,
        subclass_names=NAMES[:2],
        false_alarm_rate=0.05,
        unknown_rate=0.05,
    )
    decisions = [held_out.decide(score=0.0, distance=50.0, subclass=k) for k in (0, 1, None)]
    assert [decision.subclass_p_value for decision in decisions] == [1 / 31, 1.0, 31 / 61]
    assert [decision.verdict for decision in decisions] == ["unknown", "normal", "normal"]


def test_a_score_at_the_threshold_is_normal():
    held_out = calibration()
    threshold = held_out.point(0).threshold
    assert held_out.decide(score=threshold, subclass=0).verdict == "normal"
    assert held_out.decide(score=np.nextafter(threshold, np.inf), subclass=0).verdict == "anomalous"


def test_without_routing_no_image_is_unknown():
    held_out = Calibration(scores=np.arange(40.0), false_alarm_rate=0.05, unknown_rate=0.01)
    decision = held_out.decide(score=38.5)
    assert decision.verdict == "anomalous"
    assert decision.pooled
    assert decision.subclass_p_value is None
    assert len(held_out.as_dict()["operating_points"]) == 1
    assert Calibration.from_dict(held_out.as_dict()).decide(score=38.5) == decision


def test_another_rate_changes_every_threshold():
    held_out = calibration()
    stricter = held_out.with_rate(0.02)
    assert stricter.decide(score=0.0, distance=0.1, subclass=0).false_alarm_rate == 0.02
    assert stricter.point(0).threshold > held_out.point(0).threshold
    assert stricter.point(1) == stricter.point(None)  # 40 are too few for 0.02
    assert stricter.with_rate(0.05).as_dict() == held_out.as_dict()
    with pytest.raises(CheckError, match="needs at least 199 independent groups of held-out normal images, got 105"):
        held_out.with_rate(0.005)


def test_goes_through_json_without_a_change():
    held_out = calibration()
    again = Calibration.from_dict(json.loads(json.dumps(held_out.as_dict())))
    assert again.as_dict() == held_out.as_dict()
    for score in held_out.scores:
        for k in (0, 1, 2, None):
            assert again.decide(score=score, distance=0.3, subclass=k) == held_out.decide(
                score=score, distance=0.3, subclass=k
            )
    assert len(again) == 105


@pytest.mark.parametrize(
    ("key", "change", "complaint"),
    [
        ("scores", lambda values: [math.nan, *values[1:]], "must be finite"),
        ("scores", lambda values: values[::-1], "out of order"),
        ("scores", lambda values: values[1:], "104 scores but 105 distances"),
        ("scores", lambda values: ["a"], "could not convert"),
        ("distances", lambda values: values[1:], "105 scores but 104 distances"),
        ("subclasses", lambda values: [3, *values[1:]], r"indices into 3 names, got 0\.\.3"),
        ("false_alarm_rate", lambda value: 7, "must be in"),
        ("false_alarm_rate", lambda value: 0.001, "needs at least 999"),
        ("unknown_rate", lambda value: 0, "must be in"),
        ("operating_points", lambda points: points[:1], "do not follow"),
        ("operating_points", lambda points: [points[0] | {"threshold": 0.0}, *points[1:]], "do not follow"),
        ("subclass_names", lambda names: None, "not iterable"),
    ],
)
def test_a_damaged_record_is_refused(key, change, complaint):
    record = calibration().as_dict()
    record[key] = change(record[key])
    with pytest.raises(BundleError, match=complaint):
        Calibration.from_dict(record)


@pytest.mark.parametrize("record", [None, [], "scores"])
def test_a_record_that_is_no_object_is_refused(record):
    with pytest.raises(BundleError, match=f"it must be an object, got {re.escape(repr(record))}"):
        Calibration.from_dict(record)


def test_a_record_with_something_missing_is_refused():
    record = calibration().as_dict()
    del record["distances"]
    with pytest.raises(BundleError, match="'distances' is missing"):
        Calibration.from_dict(record)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="must be finite, got 1 that are not"):
        draw_threshold([1.0, math.inf, 2.0], false_alarm_rate=0.3)
    with pytest.raises(DataError, match=r"one number per image, got shape \(2, 2\)"):
        draw_threshold(np.zeros((2, 2)), false_alarm_rate=0.3)
    with pytest.raises(DataError, match="must be finite, got nan"):
        calibration().decide(score=math.nan)
    with pytest.raises(DataError, match="must be finite"):
        calibration().decide(score=1.0, distance=math.inf)


def with_unseen() -> Calibration:
    """Known normals score 1..99 at distances 1..99, and 10 times that without their own subclass."""
    numbers = np.arange(1.0, 100.0)
    shared = {"false_alarm_rate": 0.05, "unknown_rate": 0.01}
    unseen = Calibration(scores=10 * numbers, distances=10 * numbers, **shared)
    return Calibration(scores=numbers, distances=numbers, unseen=unseen, **shared)


@pytest.mark.parametrize(
    ("score", "distance", "verdict", "threshold", "unseen"),
    [
        (94, 99, "normal", 95, False),
        (96, 99, "anomalous", 95, False),
        (96, 100, "normal", 950, True),
        (951, 990, "anomalous", 950, True),
        (1, 991, "unknown", 950, True),
    ],
)
def test_an_unseen_subclass_has_its_own_threshold(score, distance, verdict, threshold, unseen):
    decision = with_unseen().decide(score=score, distance=distance)
    assert (decision.verdict, decision.threshold, decision.unseen) == (verdict, threshold, unseen)


def test_leave_one_subclass_out_scores_go_through_json_and_follow_the_rate():
    held_out = with_unseen()
    assert Calibration.from_dict(json.loads(json.dumps(held_out.as_dict()))).as_dict() == held_out.as_dict()
    assert held_out.with_rate(0.1).decide(score=901, distance=100).verdict == "anomalous"
    damaged = held_out.as_dict()
    damaged["unseen"]["scores"][0] = 1e9
    with pytest.raises(BundleError):
        Calibration.from_dict(damaged)


SUBCLASS_NAMES = ("cloth/red", "cloth/blue", "tile/a", "tile/b", "board")
CATEGORIES = ("cloth", "cloth", "tile", "tile", "board")


def of_categories(seed=0, *, each=(12, 12, 30, 4, 5), categories=CATEGORIES, **given):
    """Cloth scores around 0, tiles around 10, boards around 20; distances likewise."""
    random = np.random.default_rng(seed)
    subclasses = np.repeat(np.arange(5), each)
    level = np.array([0.0, 0.0, 10.0, 10.0, 20.0])[subclasses]
    settings = {"false_alarm_rate": 0.05, "unknown_rate": 0.05} | given
    return Calibration(
        scores=level + random.normal(size=sum(each)),
        distances=level + random.exponential(size=sum(each)),
        subclasses=subclasses,
        subclass_names=SUBCLASS_NAMES,
        subclass_categories=categories,
        **settings,
    )


def test_a_subclass_with_too_few_uses_the_threshold_of_its_category_before_that_of_all():
    """At a rate of 0.25 three images are enough: the highest score of the category, else of all."""
    held_out = Calibration(
        scores=[1, 2, 3, 40, 11, 12, 13, 14],
        distances=[0.5, 0.6, 0.7, 4, 1, 2, 3, 5],
        subclasses=[0, 0, 1, 4, 2, 2, 2, 3],
        subclass_names=SUBCLASS_NAMES,
        subclass_categories=CATEGORIES,
        false_alarm_rate=0.25,
        unknown_rate=0.25,
    )
    taken = [held_out.decide(score=2.5, distance=0.55, subclass=k) for k in range(5)]
    assert [decision.pooled_over for decision in taken] == [
        "category",
        "category",
        "subclass",
        "category",
        "all",
    ]
    assert [decision.pooled for decision in taken] == [True, True, False, True, True]
    assert [decision.threshold for decision in taken] == [3, 3, 13, 14, 14]  # of all: the 7th of 8
    assert [decision.p_value for decision in taken] == [2 / 4, 2 / 4, 1, 1, 7 / 9]
    assert [decision.subclass_p_value for decision in taken] == [3 / 4, 3 / 4, 1, 1, 8 / 9]
    assert [held_out.point(k).drawn_from for k in range(5)] == [3, 3, 3, 4, 8]
    assert held_out.point(np.int64(0)) == held_out.point(0)
    for distance, k, verdict in (
        (0.75, 0, "unknown"),
        (3.5, 2, "unknown"),
        (3.5, 3, "normal"),
        (4.5, 4, "unknown"),
    ):
        assert held_out.decide(score=0.0, distance=distance, subclass=k).verdict == verdict
    points = held_out.as_dict()["operating_points"]
    assert [(point["category"], point["subclass"], point["normals"], point["pooled_over"]) for point in points] == [
        (None, None, 8, "all"),
        ("cloth", None, 3, "category"),
        ("tile", None, 4, "category"),
        ("cloth", "cloth/red", 2, "category"),
        ("cloth", "cloth/blue", 1, "category"),
        ("tile", "tile/a", 3, "subclass"),
        ("tile", "tile/b", 1, "category"),
        ("board", "board", 1, "all"),
    ]
    assert [point["pooled"] for point in points] == [True, False, False, True, True, False, True, True]
    assert [point["unknown_beyond"] for point in points] == [4, 0.7, 5, 0.7, 0.7, 3, 5, 4]


def test_a_category_with_too_few_uses_the_threshold_of_all():
    held_out = of_categories(each=(9, 9, 30, 4, 5))  # 19 are needed
    assert held_out.decide(score=0.0, distance=0.1, subclass=0).pooled_over == "all"
    assert held_out.point(0) == held_out.point(None)
    assert held_out.as_dict()["operating_points"][1]["pooled_over"] == "all"
    assert held_out.decide(score=0.0, distance=0.1, subclass=3).pooled_over == "category"


def test_the_false_alarm_rate_holds_in_each_category():
    """Subclasses with 12 normals each, 24 a category: floor(25 * 0.05) / 25. One for all would give 0 and 2/25."""
    random = np.random.default_rng(7)
    alarms, unknown = np.zeros(4), np.zeros(4)
    draws, new = 1500, 40
    for seed in range(draws):
        held_out = of_categories(seed, each=(12, 12, 12, 12, 0))
        for k in range(4):
            level = 10.0 * (k // 2)
            alarms[k] += (level + random.normal(size=new) > held_out.point(k).threshold).sum()
        for k in (0, 2):
            distances = 10.0 * (k // 2) + random.exponential(size=5)
            verdicts = [held_out.decide(score=0.0, distance=far, subclass=k).verdict for far in distances]
            unknown[k] += verdicts.count("unknown")
    np.testing.assert_allclose(alarms / (draws * new), 1 / 25, atol=0.004)
    np.testing.assert_allclose(unknown[[0, 2]] / (draws * 5), 1 / 25, atol=0.01)


def test_one_category_changes_nothing():
    """Its name has no effect either, not even on the record."""
    without, alone = of_categories(categories=()), of_categories(categories=("cloth",) * 5)
    assert alone.as_dict() == without.as_dict()
    assert "subclass_categories" not in alone.as_dict()
    for k in (None, *range(5)):
        assert alone.decide(score=9.0, distance=1.0, subclass=k) == without.decide(score=9.0, distance=1.0, subclass=k)
    assert without.decide(score=9.0, distance=1.0, subclass=0).pooled_over == "all"


def test_categories_of_one_subclass_each_have_no_other_thresholds():
    names = ("a", "b", "c", "d", "e")
    held_out, without = of_categories(categories=names), of_categories(categories=())
    assert [point["pooled_over"] for point in held_out.as_dict()["operating_points"]] == [
        *("all", "all", "all", "subclass", "all", "all")
    ]
    for k in (None, *range(5)):
        assert held_out.point(k) == without.point(k)


def test_categories_go_through_json():
    held_out = of_categories()
    again = Calibration.from_dict(json.loads(json.dumps(held_out.as_dict())))
    assert again.as_dict() == held_out.as_dict()
    assert again.decide(score=1.0, distance=0.5, subclass=0) == held_out.decide(score=1.0, distance=0.5, subclass=0)
    assert again.decide(score=1.0, distance=0.5, subclass=0).pooled_over == "category"
    assert held_out.with_rate(0.1).decide(score=1.0, distance=0.5, subclass=0).pooled_over == "subclass"
    assert held_out.with_rate(0.04).decide(score=1.0, distance=0.5, subclass=0).pooled_over == "category"


def test_a_record_without_categories_is_read():
    record = of_categories(categories=()).as_dict()
    assert set(record) == {
        *("false_alarm_rate", "unknown_rate", "operating_points", "subclass_names", "scores", "distances"),
        *("subclasses", "unseen", "groups", "guarantee", "cross_validated"),
    }
    assert set(record["operating_points"][1]) == {
        *("subclass", "normals", "pooled", "threshold", "drawn_from", "unknown_beyond", "unknown_rate"),
        *("groups", "false_alarm_rate"),
    }
    assert Calibration.from_dict(record).decide(score=1.0, distance=0.5, subclass=0).pooled_over == "all"


@pytest.mark.parametrize(
    ("categories", "complaint"),
    [(["cloth"] * 4, "Each of 5 subclasses must have a category, got 4"), (list("abcde"), "do not follow")],
)
def test_damaged_categories_are_refused(categories, complaint):
    with pytest.raises(BundleError, match=complaint):
        Calibration.from_dict(of_categories().as_dict() | {"subclass_categories": categories})


def test_an_unseen_subclass_is_compared_within_its_category():
    """Without its subclass, cloth has scores and distances 1..40, a tile 101..140. A board has none: it is alone."""
    rate = {"false_alarm_rate": 0.1, "unknown_rate": 0.1}
    known = {"subclass_names": SUBCLASS_NAMES, "subclass_categories": CATEGORIES, **rate}
    numbers = np.concatenate([np.arange(1.0, 41), np.arange(101.0, 141)])
    unseen = Calibration(scores=numbers, distances=numbers, subclasses=np.repeat([0, 1, 2, 3], 20), **known)
    held_out = Calibration(
        scores=np.zeros(100),
        distances=np.zeros(100),
        subclasses=np.repeat(range(5), 20),
        unseen=unseen,
        **known,
    )
    for subclass, score, distance, verdict, threshold in (
        (0, 36, 30, "normal", 37),
        (1, 38, 30, "anomalous", 37),
        (1, 38, 38, "unknown", 37),
        (2, 38, 38, "normal", 137),
        (3, 138, 100, "anomalous", 137),
    ):
        decision = held_out.decide(score=score, distance=distance, subclass=subclass)
        assert (decision.verdict, decision.threshold) == (verdict, threshold)
        assert decision.unseen
        assert decision.pooled_over == "category"
    board = held_out.decide(score=0.0, distance=1.0, subclass=4)
    assert (board.verdict, board.unseen) == ("unknown", False)


def test_too_few_leave_one_subclass_out_scores_for_a_rate_are_dropped():
    numbers = np.arange(1.0, 100.0)
    few = Calibration(scores=numbers[:9], distances=numbers[:9], false_alarm_rate=0.1, unknown_rate=0.1)
    held_out = Calibration(scores=numbers, distances=numbers, unseen=few, false_alarm_rate=0.1, unknown_rate=0.1)
    assert held_out.decide(score=1.0, distance=100.0).verdict == "unknown"
    assert held_out.decide(score=1.0, distance=100.0).unseen
    assert held_out.with_rate(0.2).unseen is not None
    assert held_out.with_rate(0.05).unseen is None


# ── groups ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def split_conformal(scores, rate):
    """The ceil((n + 1)(1 - a))-th smallest score, literally from Bates et al."""
    n = len(scores)
    return sorted(scores)[math.ceil((n + 1) * (1 - rate) - 1e-9) - 1]


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.integers(0, 30), min_size=9, max_size=80), st.integers(10, 60))
def test_one_image_a_group_is_split_conformal_prediction(scores, percent):
    rate = percent / 100
    own = np.random.default_rng(0).permutation(len(scores)) * 7 - 50
    point = draw_threshold(scores, false_alarm_rate=rate, groups=own)
    assert point == draw_threshold(scores, false_alarm_rate=rate)
    assert point.threshold == split_conformal(scores, rate)
    assert point.groups == point.drawn_from == len(scores)
    for score in range(-1, 32):
        assert p_value(score, scores, own) == (1 + sum(each >= score for each in scores)) / (len(scores) + 1)


def weighted_quantile(scores, groups, rate):
    """The smallest score whose weighted share is at least 1 - a, literally from Lee, Barber and Willett."""
    count = len(set(groups))
    weight = [1 / ((count + 1) * list(groups).count(group)) for group in groups]
    return min(s for s in scores if sum(w for t, w in zip(scores, weight, strict=True) if t <= s) >= 1 - rate - 1e-12)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=20, max_size=60), st.integers(20, 60))
def test_the_threshold_is_the_weighted_quantile_of_the_paper(rows, percent):
    scores, groups = zip(*rows, strict=True)
    rate = percent / 100
    if len(set(groups)) < groups_needed(rate):
        with pytest.raises(CheckError, match=rf"got {len(set(groups))} of {len(rows)} images"):
            draw_threshold(scores, false_alarm_rate=rate, groups=groups)
        return
    point = draw_threshold(scores, false_alarm_rate=rate, groups=groups)
    assert point.threshold == weighted_quantile(scores, groups, rate)
    for score in range(-1, 14):
        assert (score > point.threshold) == (p_value(score, scores, groups) <= rate + 1e-9)


def grouped(random, groups, *, rate=0.1):
    """Scores of groups of very different sizes, the images of a group being nearly alike."""
    sizes = np.where(random.random(groups) < 0.3, 40, 1)
    number = np.repeat(np.arange(groups), sizes)
    return random.normal(size=groups)[number] + 0.1 * random.normal(size=len(number)), number


def share_above(thresholds, random):
    """Share of new images, one of a new group for each threshold, that score above it; and its standard error."""
    new = random.normal(size=(len(thresholds), 50)) + 0.1 * random.normal(size=(len(thresholds), 50))
    shares = (new > np.array(thresholds)[:, None]).mean(axis=1)
    return shares.mean(), shares.std() / math.sqrt(len(shares))


def test_the_false_alarm_rate_holds_for_new_groups():
    """19 groups at a rate of 0.1. A threshold from the images, as if each were a group of its own, exceeds it."""
    random = np.random.default_rng(0)
    sets = [grouped(random, 19) for _ in range(2000)]
    by_group = [draw_threshold(scores, false_alarm_rate=0.1, groups=groups).threshold for scores, groups in sets]
    mean, error = share_above(by_group, random)
    assert mean < 0.1 + 3 * error
    assert mean > 0.05
    by_image = [draw_threshold(scores, false_alarm_rate=0.1).threshold for scores, _ in sets]
    mean, error = share_above(by_image, random)
    assert mean > 0.1 + 10 * error


def of_groups(**given):
    """Ten images of each of 24 groups, in two subclasses of 20 and 4 groups."""
    random = np.random.default_rng(5)
    groups = np.repeat(np.arange(24), 10)
    settings = {"false_alarm_rate": 0.05, "unknown_rate": 0.05} | given
    return Calibration(
        scores=random.normal(size=24)[groups] + 0.1 * random.normal(size=240),
        distances=random.exponential(size=240),
        subclasses=(groups >= 20).astype(int),
        subclass_names=NAMES[:2],
        groups=100 - groups,
        **settings,
    )


def test_pools_count_groups():
    held_out = of_groups()
    points = held_out.as_dict()["operating_points"]
    assert [(point["normals"], point["groups"], point["pooled"]) for point in points] == [
        (240, 24, True),
        (200, 20, False),
        (40, 4, True),  # 40 images would be enough for the rate, 4 groups are not
    ]
    assert held_out.independent_groups == 24
    low = held_out.decide(score=-100.0, distance=0.0, subclass=0)
    high = held_out.decide(score=100.0, distance=100.0, subclass=0)
    assert (low.p_value, low.subclass_p_value) == (1.0, 1.0)
    assert (high.p_value, high.subclass_p_value) == (1 / 21, 1 / 21)
    with pytest.raises(CheckError, match=r"needs at least 99 independent groups .*, got 24 of 240 images"):
        held_out.with_rate(0.01)


def test_groups_go_through_json_and_follow_the_rate():
    held_out = of_groups()
    again = Calibration.from_dict(json.loads(json.dumps(held_out.as_dict())))
    assert again.as_dict() == held_out.as_dict()
    assert again.with_rate(0.2).as_dict() == of_groups(false_alarm_rate=0.2).as_dict()
    damaged = held_out.as_dict()
    damaged["groups"] = damaged["groups"][::-1]
    with pytest.raises(BundleError, match="do not follow"):
        Calibration.from_dict(damaged)


def test_a_record_without_groups_has_one_image_a_group():
    now = with_unseen()
    before = now.as_dict()
    for record in (before, before["unseen"]):
        for key in ("groups", "guarantee", "cross_validated"):
            del record[key]
        for point in record["operating_points"]:
            del point["groups"], point["false_alarm_rate"]
    read = Calibration.from_dict(before)
    assert read.as_dict() == now.as_dict()
    assert read.groups is None
    assert read.independent_groups == 99


def test_each_decision_names_its_guarantee():
    numbers = np.arange(19.0)
    shared = {"scores": numbers, "false_alarm_rate": 0.05, "unknown_rate": 0.05}
    assert Calibration(**shared).decide(score=1.0).guarantee == "conformal"
    cross = Calibration(**shared, cross_validated=True)
    assert cross.decide(score=1.0).guarantee == cross.with_rate(0.1).guarantee == "cross-validated"
    assert Calibration.from_dict(cross.as_dict()).guarantee == "cross-validated"


@pytest.mark.parametrize("cross_validated", [False, True])
def test_too_few_groups_have_the_lowest_rate_that_they_allow(cross_validated):
    few = Calibration(
        scores=[1, 2, 3, 4, 5, 5.5],
        groups=[0, 1, 2, 3, 4, 4],
        distances=[1, 2, 3, 4, 5, 6],
        cross_validated=cross_validated,
        attainable=True,
        false_alarm_rate=0.05,
        unknown_rate=0.01,
    )
    decision = few.decide(score=5.6, distance=1.0)
    assert (decision.verdict, decision.guarantee) == ("anomalous", "uncalibrated")
    assert (decision.threshold, decision.false_alarm_rate, decision.p_value) == (5.5, 1 / 6, 1 / 6)
    assert few.decide(score=5.5, distance=6.0).verdict == "normal"
    assert few.false_alarm_rate == 0.05  # the requested rate
    assert few.as_dict()["operating_points"][0]["false_alarm_rate"] == 1 / 6
    assert Calibration.from_dict(json.loads(json.dumps(few.as_dict()))).as_dict() == few.as_dict()
    attained = few.with_rate(0.2)
    assert attained.guarantee == ("cross-validated" if cross_validated else "conformal")
    with pytest.raises(CheckError, match=r"needs at least 9 independent groups .*, got 5 of 6 images"):
        few.with_rate(0.1)


def test_the_promise_of_one_part_is_in_the_singular():
    one = Calibration(scores=[1.0], attainable=True, false_alarm_rate=0.05, unknown_rate=0.05)
    assert one.promise.startswith("1 independent good part can promise 50 % false alarms at best")


def test_the_promise_says_for_which_subclasses_the_rate_holds_only_together():
    together = (
        " Subclasses with fewer than 19 of these parts (1 of 3) use a common threshold, whose rate holds for them all "
        "together, not for each."
    )
    promise = (
        "At most 5 % false alarms on average, computed from 105 independent good parts that were not used for fitting."
    )
    assert calibration().promise == promise + together
    assert "not for each" not in calibration(each=(60, 40, 19)).promise
    assert "(3 of 3)" in calibration(each=(8, 8, 8)).promise
    assert "not for each" not in Calibration(scores=np.arange(50.0), false_alarm_rate=0.05, unknown_rate=0.01).promise
