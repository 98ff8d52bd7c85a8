"""Rates measured by reviews: the estimate is weighted by how reviews were sampled, and the intervals hold."""

import numpy as np
import pytest

from normweave.errors import ConfigError, DataError
from normweave.outcome.measured import JudgedImage, exact_interval, measure
from normweave.report.metrics import binomial_interval

DRAWS = 200


def images(shown, *, good=0, defective=0, unreviewed=0, **fields):
    """Images that were shown so, reported unless they passed."""
    fields = {"reported": shown not in ("normal", "borderline")} | fields
    labels = ["normal"] * good + ["anomalous"] * defective + [None] * unreviewed
    return [JudgedImage(shown=shown, label=label, **fields) for label in labels]


def test_interval_is_that_of_clopper_and_pearson():
    for successes, trials in ((0, 1), (1, 1), (0, 40), (3, 40), (40, 40), (17, 1000)):
        for level in (0.8, 0.95, 0.99):
            expected = binomial_interval(successes, trials, level)
            assert exact_interval(successes, trials, level=level) == pytest.approx(expected, abs=1e-9)
    assert exact_interval(0, 0, level=0.95) == (0.0, 1.0)
    with pytest.raises(DataError, match="got 3 of 2"):
        exact_interval(3, 2, level=0.95)


def test_estimate_is_weighted_by_the_share_that_was_reviewed():
    """Half of the reported images and a fiftieth of the others are reviewed."""
    given = [
        *images("anomalous", defective=40, good=10, unreviewed=50),
        *images("normal", defective=1, good=19, unreviewed=980),
    ]
    rates = measure(given)
    found, missed = 100 * 40 / 50, 1000 * 1 / 20
    assert rates.detection.estimate == pytest.approx(found / (found + missed))  # not 40 of 41
    assert rates.false_alarms.estimate == pytest.approx(20 / (20 + 950))  # not 10 of 29
    assert rates.detection.low < rates.detection.estimate < rates.detection.high
    assert [stratum[:] for stratum in rates.strata] == [
        ("normal", 1000, 20, 1),
        ("borderline", 0, 0, 0),
        ("anomalous", 100, 50, 40),
        ("unknown", 0, 0, 0),
    ]
    assert rates.detection.reviewed == 41
    assert rates.false_alarms.reviewed == 29


def test_without_reviewed_normal_verdicts_nothing_is_measured():
    rates = measure([*images("anomalous", defective=40, good=10), *images("normal", unreviewed=500)])
    assert rates.detection.estimate is None
    assert rates.detection.low < 0.1
    assert rates.detection.high == 1.0
    assert "None of the 500 images that are normal is reviewed" in rates.detection.reason
    assert rates.false_alarms.estimate is None
    assert "good images is unknown" in rates.false_alarms.reason


def test_borderline_images_do_not_stand_for_all_normal_ones():
    """The page Review lists them, and more of them are defective."""
    given = [*images("anomalous", defective=40, good=10), *images("borderline", good=15, defective=5)]
    assert measure([*given, *images("normal", unreviewed=950)]).detection.estimate is None
    rate = measure([*given, *images("normal", unreviewed=900, good=50)]).detection
    assert rate.estimate == pytest.approx(40 / 45)
    unread = [*images("anomalous", defective=40), *images("borderline", unreviewed=9), *images("normal", good=30)]
    assert "9 images that are normal and close to the limit is reviewed" in measure(unread).detection.reason


def test_without_defective_reviews_there_is_no_detection_rate():
    rates = measure(images("normal", good=30, unreviewed=500))
    assert rates.detection.reason == "No reviewed image is defective."
    assert rates.false_alarms.estimate == 0.0
    assert measure([]).false_alarms.reason == "No reviewed image is good."


def test_another_operating_point_divides_the_strata():
    """Reviews were sampled by the stored verdict; the operating point that is measured reports fewer of them."""
    given = [
        *images("anomalous", defective=30, good=0, unreviewed=30),
        *images("anomalous", defective=10, good=10, unreviewed=20, reported=False),
        *images("normal", defective=0, good=50, unreviewed=450),
    ]
    rates = measure(given)
    assert rates.detection.estimate == pytest.approx(60 / (60 + 20))
    unread = measure([*given[30:], *images("anomalous", unreviewed=30)])  # none above the threshold is reviewed
    assert unread.detection.estimate == pytest.approx(60 * 0.5 / (60 * 0.5 + 20))
    assert unread.detection.low == 0.0


def test_few_images_without_an_alarm_leave_a_wide_interval():
    """Although every image is reviewed."""
    rates = measure(images("normal", good=9, defective=9), wrong_reviews=0.0)
    for rate in (rates.detection, rates.false_alarms):
        assert (rate.estimate, rate.low) == (0.0, 0.0)
        assert rate.high > binomial_interval(0, 9)[1]
    assert measure(images("normal", good=2000), wrong_reviews=0.0).false_alarms.high < 0.004


def test_a_verdict_without_reviews_widens_the_interval_only():
    given = [*images("anomalous", defective=50), *images("normal", good=100), *images("unknown", unreviewed=10)]
    without = measure(given[:150]).detection
    rate = measure(given).detection
    assert rate.estimate == without.estimate == 1.0
    assert rate.low <= without.low


def test_by_subclass_and_by_name_of_the_defect():
    given = [
        *images("anomalous", defective=30, subclass="cloth/twill", defect="hole"),
        *images("normal", defective=10, subclass="cloth/twill", defect="stain"),
        *images("normal", good=60, subclass="cloth/plain"),
    ]
    rates = measure(given)
    assert rates.detection.estimate == pytest.approx(0.75)
    assert {name: rate.estimate for name, rate in rates.detection_by_defect.items()} == {"hole": 1.0, "stain": 0.0}
    assert list(rates.detection_by_subclass) == ["cloth/twill"]
    assert rates.detection_by_subclass["cloth/twill"].estimate == pytest.approx(0.75)
    assert rates.false_alarms_by_subclass["cloth/plain"].estimate == 0.0


def test_wrong_reviews_widen_the_interval():
    given = [*images("anomalous", defective=40, good=10), *images("normal", defective=2, good=48, unreviewed=950)]
    exact, lenient = (measure(given, wrong_reviews=share).detection for share in (0.0, 0.05))
    assert lenient.low < exact.low < exact.high < lenient.high
    assert lenient.estimate == exact.estimate


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ConfigError, match=r"must be in \[0, 0.5\), got 0.5"):
        measure([], wrong_reviews=0.5)
    with pytest.raises(ConfigError, match=r"must be in \(0, 1\), got 1"):
        measure([], level=1.0)


def planted(generator, *, wrong, detection=0.9, defective=0.05, false_alarms=0.02, parts=2000, reviews=100):
    """Inspected images of which half of the reviews are of reported ones; some decisions are wrong."""
    is_defective = generator.random(parts) < defective
    reported = generator.random(parts) < np.where(is_defective, detection, false_alarms)
    reviewed = np.zeros(parts, dtype=bool)
    for stratum in (reported, ~reported):
        rows = np.flatnonzero(stratum)
        reviewed[generator.permutation(rows)[: reviews // 2]] = True
    decided = is_defective ^ (generator.random(parts) < wrong)
    return [
        JudgedImage(
            shown="anomalous" if reported[row] else "normal",
            reported=bool(reported[row]),
            label=("anomalous" if decided[row] else "normal") if reviewed[row] else None,
        )
        for row in range(parts)
    ], float(reported[is_defective].mean())


@pytest.mark.parametrize("detection", [0.6, 0.9])
def test_interval_covers_the_true_rate_with_wrong_reviews(detection):
    generator = np.random.default_rng(13)
    covered = of_these = 0
    for _ in range(DRAWS):
        drawn, true = planted(generator, wrong=0.05, detection=detection)
        rate = measure(drawn).detection
        covered += rate.low <= detection <= rate.high
        of_these += rate.low <= true <= rate.high
    assert covered >= 0.95 * DRAWS
    assert of_these >= 0.95 * DRAWS


def test_unweighted_interval_does_not_cover():
    """What would be reported if the reviewed images were taken as they are."""
    generator = np.random.default_rng(13)
    covered = 0
    for _ in range(DRAWS):
        drawn, _ = planted(generator, wrong=0.0, detection=0.6)
        defects = [image for image in drawn if image.label == "anomalous"]
        low, high = exact_interval(sum(image.reported for image in defects), len(defects), level=0.95)
        covered += low <= 0.6 <= high
    assert covered < 0.5 * DRAWS
