"""Rates measured by the reviews in a store: each part counts once, at the stored verdicts and at other thresholds."""

import re
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from inspections import NOON, accept, inspection, stored_image, unreadable
from normweave.errors import DataError
from normweave.outcome.operating_point import Calibration
from normweave.serve.rates import measured_rates, newest_bundle, read_scores

BUNDLE = "c" * 64
CALIBRATION = Calibration(scores=np.arange(99) / 100, false_alarm_rate=0.05, unknown_rate=0.05)


def image(number, score, *, name=None, **fields):
    """An inspection at a threshold of 0.94, the one for 5 % false alarms."""
    digest = f"{number:064x}"
    verdict = "anomalous" if score > CALIBRATION.point().threshold else "normal"
    return inspection(
        number,
        name=name or f"part {number}.png",
        pred_score=score,
        verdict=verdict,
        p_value=0.5 if verdict == "normal" else 0.01,
        subclass_distance=None,
        routed=None,
        unseen=False,
        image=replace(stored_image(), image_hash=digest),
        **fields,
    )


@pytest.fixture
def filled(store):
    """Add images with their decisions, and return their inspections."""

    def add(*given):
        kept = store.add([one for one, _ in given])
        for one, decision in zip(kept, (decision for _, decision in given), strict=True):
            if decision is not None:
                store.review(one.id, accept(decision=decision, defect="hole" if decision == "reject" else ""))
        return kept

    return add


def planted():
    """20 of 40 reported images are reviewed, 10 of 100 normal ones."""
    reported = [(image(n, 1.0 + n / 1000), ("reject" if n < 16 else "accept") if n < 20 else None) for n in range(40)]
    passed = [(image(100 + n, 0.5), ("reject" if n < 2 else "accept") if n < 10 else None) for n in range(100)]
    return [*reported, *passed]


def test_rates_are_weighted(store, filled):
    filled(*planted(), (unreadable(), None), (image(900, 2.0, bundle_hash="d" * 64), "reject"))
    rates = measured_rates(store, BUNDLE)
    assert rates.inspections == 140
    assert rates.measured.detection.estimate == pytest.approx(32 / (32 + 20))
    assert rates.measured.false_alarms.estimate == pytest.approx(8 / (8 + 80))
    assert rates.measured.detection_by_defect["hole"].estimate == rates.measured.detection.estimate
    assert list(rates.measured.detection_by_subclass) == ["cloth/twill"]
    assert rates.operating_points == ()
    assert rates.as_dict()["measured"]["strata"][0] == {
        "shown": "normal",
        "images": 100,
        "reviewed": 10,
        "defective": 2,
    }


def test_operating_points_are_compared(store, filled):
    filled(*planted())
    rates = measured_rates(store, BUNDLE, calibration=CALIBRATION, detection=0.6)
    assert [point.false_alarm_rate for point in rates.operating_points] == [0.01, 0.02, 0.05, 0.1, 0.2]
    assert rates.present == 0.05
    at = {point.false_alarm_rate: point for point in rates.operating_points}
    assert at[0.05].detection == rates.measured.detection
    assert at[0.05].threshold == CALIBRATION.point().threshold
    assert rates.proposed == 0.01  # no score is between the thresholds
    unreachable = measured_rates(store, BUNDLE, calibration=CALIBRATION, detection=0.9)
    assert unreachable.proposed is None


def test_the_proposed_operating_point_finds_more(store, filled):
    """Half of the missed defects score just below the threshold."""
    close = [(image(200 + n, 0.9), "reject" if n % 2 else None) for n in range(10)]
    filled(*planted(), *close)
    rates = measured_rates(store, BUNDLE, calibration=CALIBRATION, detection=0.65)
    at = {point.false_alarm_rate: point.detection.estimate for point in rates.operating_points}
    assert at[0.05] < 0.65 < at[0.1] == at[0.2]
    assert rates.proposed == 0.1
    assert store.rates() == []  # it is not used


def test_images_sent_twice_and_images_of_a_part_count_once(store, filled):
    filled(
        (image(1, 1.0, name="a_1.png"), "reject"),
        (image(1, 1.0, name="a_1.png"), None),
        (image(2, 0.5, name="a_2.png"), "accept"),
        (image(3, 0.5, name="b_1.png"), "accept"),
    )
    rates = measured_rates(store, BUNDLE).measured
    assert [stratum.images for stratum in rates.strata] == [2, 0, 1, 0]
    rates = measured_rates(store, BUNDLE, part=re.compile("^(.)_")).measured
    assert [stratum[:] for stratum in rates.strata] == [
        ("normal", 1, 1, 0),
        ("borderline", 0, 0, 0),
        ("anomalous", 1, 1, 1),
        ("unknown", 0, 0, 0),
    ]


def test_the_last_review_counts(store, filled):
    first, second = filled((image(1, 1.0), "reject"), (image(1, 1.0), None))
    store.review(second.id, accept(at=NOON + timedelta(hours=1)))
    store.review(first.id, accept(at=NOON + timedelta(minutes=1), decision="reject"))
    assert measured_rates(store, BUNDLE).measured.strata[2].defective == 0


def test_good_images_close_to_the_limit_are_a_stratum_of_their_own(store, filled):
    near = image(1, 0.9)
    near = replace(near, outcome=replace(near.outcome, p_value=0.02, false_alarm_rate=0.01))
    filled((near, "accept"), (image(2, 0.5), None))
    strata = measured_rates(store, BUNDLE).measured.strata
    assert [stratum.images for stratum in strata] == [1, 1, 0, 0]


def test_the_newest_inspections_of_a_bundle(store, filled):
    with pytest.raises(DataError, match="No image was inspected yet"):
        newest_bundle(store)
    filled(*((image(n, 0.1 * n), None) for n in range(5)), (unreadable(), None))
    assert newest_bundle(store) == BUNDLE
    assert [one.score for one in read_scores(store, BUNDLE, newest=2)] == [0.1 * 3, 0.1 * 4]


def test_the_rates_over_rest(service, client, photos):
    from inspections import inspect_files

    found = inspect_files(service, *photos[:8])
    for one in found:
        body = {"decision": "accept" if one.outcome.verdict == "normal" else "reject"}
        if body["decision"] == "reject":
            body["defect"] = "hole"
        assert client.post(f"/v1/inspections/{one.id}/review", json=body).status_code == 200
    answer = client.get("/v1/reviews/rates", params={"wrong_reviews": 0, "detection": 0.5}).json()
    detector = service.detector
    rates = measured_rates(
        service.store, detector.bundle_hash, calibration=detector.calibration, wrong_reviews=0, detection=0.5
    )
    assert answer == rates.as_dict()
    assert answer["inspections"] == 8
    assert client.get("/v1/reviews/rates", params={"wrong_reviews": 0.5}).status_code == 422
    refused = client.post(f"/v1/inspections/{found[0].id}/review", json={"decision": "accept", "defect": "hole"})
    assert refused.status_code == 422
    assert "with reject" in refused.json()["detail"]
