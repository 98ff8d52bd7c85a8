import re
from types import SimpleNamespace

import numpy as np
import pytest

from normweave.errors import CheckError, ConfigError
from normweave.outcome.operating_point import Calibration
from normweave.serve.pages.model import (
    ALL,
    UNSEEN,
    decided,
    limits,
    refusal,
    score_chart,
    training,
    views_with_bundles,
    weights,
)
from normweave.serve.records import ScoredImage

RECORD = {
    "categories": {"cloth": ["red", "<b>"], "bottle": []},
    "model": "adapted-moe",
    "config": {"features": {"kind": "timm", "backbone": "resnet18"}},
    "fit_images": 40,
    "calibration_images": 20,
    "preparation": {"width": 64, "height": 48},
    "seed": 0,
    "software": {"numpy": "2.0"},
    "data_fingerprint": "abc",
}


def calibration(**given):
    scores = np.arange(60.0)
    return Calibration(
        scores=scores,
        distances=scores,
        subclasses=np.r_[np.zeros(50, np.int64), np.ones(10, np.int64)],
        subclass_names=("cloth/red", "cloth/<b>"),
        false_alarm_rate=0.05,
        unknown_rate=0.05,
        **given,
    )


def cells(text):
    return [
        [re.sub("<.*?>", "", cell) for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.DOTALL)]
        for row in re.findall("<tr>(.*?)</tr>", text, re.DOTALL)
    ][1:]


def test_every_product_has_a_row_with_its_limit():
    unseen = Calibration(scores=np.arange(30.0), false_alarm_rate=0.05, unknown_rate=0.05)
    rows = cells(limits(calibration(unseen=unseen)))
    assert [row[0] for row in rows] == [
        "all products in training",
        "cloth/red",
        "cloth/&lt;b&gt;",
        "products not in training",
    ]
    assert [row[3] for row in rows] == ["60 shared", "50", "60 shared", "30 shared"]
    assert rows[-1][4] == "–"


def test_the_weights_of_each_category_are_shown_with_their_source():
    methods = [
        {"name": "memory", "synthetic_auroc": 0.912, "weight": 0.25},
        {"name": "layout", "synthetic_auroc": 0.5, "weight": 0.75},
    ]
    categories = [
        {"category": "<cloth>", "held_out_images": 24, "synthetic_defects": 128, "experts": methods},
        {"category": "bottle", "held_out_images": 5, "synthetic_defects": 0, "experts": methods},
    ]
    text = weights(categories)
    assert "<th>memory</th><th>layout</th>" in text
    assert cells(text) == [
        ["&lt;cloth&gt;", "24", "128", "0.25 (91.2)", "0.75 (50.0)"],
        ["bottle", "–", "0", "0.25", "0.75"],
    ]


def test_the_training_data_is_escaped_and_products_without_subclasses_are_named():
    text = training(RECORD, "1234", cross_validated=False)
    assert "cloth/&lt;b&gt;" in text
    assert ">bottle</span>" in text
    assert "<dd>64 × 48 pixels</dd>" in text
    assert "<dd>the same, by cross-validation</dd>" in training(RECORD, "1234", cross_validated=True)


def two_limits(**given):
    """Good parts of two subclasses, whose scores differ by 100, so that each has its own limit."""
    scores = np.r_[np.arange(40.0), 100 + np.arange(40.0)]
    subclasses = np.repeat([0, 1], 40)
    given = {"unknown_rate": 0.05, "false_alarm_rate": 0.05, "distances": np.tile(np.arange(40.0), 2)} | given
    return Calibration(scores=scores, subclasses=subclasses, subclass_names=("a", "b"), **given)


def counts(text):
    return {name: int(number) for name, number in re.findall(r">([\w ]+, (?:above|below)): (\d+)<", text)}


def test_the_chart_of_all_products_counts_as_the_verdicts_do():
    calibration = two_limits()
    assert calibration.point(0).threshold < 50 < calibration.point(1).threshold
    images = [
        ScoredImage("normal", score, 1.0, subclass, False)
        for score, subclass in ((10.0, 0), (50.0, 0), (60.0, 0), (110.0, 1), (150.0, 1), (90.0, 1))
    ]
    images.append(ScoredImage("unknown", 500.0, 1e6, 0, False))  # no limit was applied
    judged = [calibration.decide(score=one.score, distance=one.distance, subclass=one.routed) for one in images]
    defective = sum(one.verdict == "anomalous" for one in judged)
    stored = decided(calibration, images)
    text = score_chart(calibration, calibration, stored, ALL)
    assert defective == 3
    assert counts(text)["inspections, above"] == defective
    assert counts(text)["inspections, below"] == 3
    assert counts(text)["good parts, above"] == sum(
        calibration.decide(score=score, distance=1.0, subclass=subclass).verdict == "anomalous"
        for score, subclass in zip(calibration.scores, calibration.subclasses, strict=True)
    )
    assert "score minus the limit of its product" in text
    assert counts(score_chart(calibration, calibration, stored, "0"))["inspections, above"] == 2


def test_a_single_limit_is_drawn_with_the_new_one():
    calibration = two_limits(false_alarm_rate=0.02)  # too few good parts for limits of their own
    moved = calibration.with_rate(0.02 + 1e-4)
    text = score_chart(calibration, calibration.with_rate(0.024), decided(calibration, []), ALL)
    assert f"limit: {calibration.point().threshold:.4g}<" in text
    assert "new limit" not in score_chart(calibration, moved, decided(calibration, []), ALL)
    lower = two_limits(false_alarm_rate=0.05)
    text = score_chart(lower, lower.with_rate(0.3), decided(lower, []), "1")
    assert f"new limit: {lower.with_rate(0.3).point(1).threshold:.4g}<" in text


def test_products_not_in_training_are_compared_with_the_limit_of_their_category():
    scores = np.r_[np.arange(40.0), 100 + np.arange(40.0)]
    names = {"subclass_names": ("a/1", "a/2", "b/1", "b/2"), "subclass_categories": ("a", "a", "b", "b")}
    subclasses = np.repeat([0, 1, 2, 3], 20)
    rates = {"false_alarm_rate": 0.05, "unknown_rate": 0.05}
    unseen = Calibration(scores=scores, subclasses=subclasses, **names, **rates)
    distances = np.tile(np.arange(20.0), 4)
    calibration = Calibration(
        scores=scores, subclasses=subclasses, distances=distances, unseen=unseen, **names, **rates
    )
    images = [ScoredImage("normal", score, 1e6, routed, True) for score, routed in ((60.0, 0), (10.0, 0), (90.0, 2))]
    judged = [calibration.decide(score=one.score, distance=one.distance, subclass=one.routed) for one in images]
    assert [one.verdict for one in judged] == ["anomalous", "normal", "normal"]
    text = score_chart(calibration, calibration, decided(calibration, images), UNSEEN)
    assert counts(text)["inspections, above"] == 1
    assert counts(text)["inspections, below"] == 2


@pytest.mark.parametrize("rate", [0.0, 1.0, 1e-12, 2.5])
def test_a_rate_that_is_none_is_refused_in_the_terms_of_the_page(rate):
    with pytest.raises(ConfigError) as error:
        calibration().with_rate(rate)
    text = refusal(error.value, rate, calibration())
    assert text.startswith("The rate must be above 0\u00a0% and below 100\u00a0%")


def test_a_refused_rate_names_no_setting_and_the_lowest_rate_that_is_possible():
    with pytest.raises(CheckError) as error:
        calibration().with_rate(0.005)
    text = refusal(error.value, 0.005, calibration())
    assert "needs at least 199 independent groups" in text
    assert "lowest possible rate is 1.64\u00a0%" in text
    assert "_" not in text
    assert calibration().with_rate(1 / 61).point().drawn_from == 60


def test_views_with_bundles_of_their_own_are_listed():
    detectors = {
        view: SimpleNamespace(
            calibration=calibration(), subclasses=subclasses, record=RECORD, bundle_hash=f"{view} hash"
        )
        for view, subclasses in (("top", {"cloth/<b>": ("cloth", "<b>")}), ("back", {}))
    }
    assert cells(views_with_bundles(detectors)) == [
        ["back", "cloth, bottle", "5\u00a0%", "back hash"],
        ["top", "cloth/&lt;b&gt;", "5\u00a0%", "top hash"],
    ]
