"""The monitor of a line: quiet lines stay quiet, changes are found, and the state can be saved."""

import json

import numpy as np
import pytest

from drifting import SUBCLASSES, feed, image, line, references
from normweave.drift.monitor import PLACE, TESTED, Monitor, cell_of


def test_a_quiet_line_is_quiet():
    """Subclasses differ by ten standard deviations: ranks among another subclass's images would raise alarms."""
    monitor, rng = line()
    feed(monitor, rng, 1500)
    assert monitor.alarms == []


def test_a_statistic_with_one_value_raises_no_alarm():
    """The tint of grey images is always 0: equal values are broken at random."""
    rng = np.random.default_rng(2)
    quiet = references(np.random.default_rng(1))
    for each in quiet:
        each.values[:, 3] = 0.0
    monitor = Monitor(quiet)
    for _ in range(400):
        one = image(monitor.count, rng)
        one.numbers[3] = 0.0
        monitor.add(one)
    assert monitor.alarms == []


def test_all_tests_share_the_false_alarm_rate():
    monitor, _ = line()
    assert monitor.tests == (len(SUBCLASSES) + 2) * (len(TESTED) + 1)
    assert monitor.limit == monitor.tests / 0.01


def test_the_rate_holds_over_all_tests_together():
    """At a rate of 30 % at most 30 % of quiet lines raise an alarm; if each test had it, nearly all would."""
    alarms = []
    for seed in range(20):
        monitor, rng = line(seed, images=12, alarm_rate=0.3)
        feed(monitor, rng, 150)
        alarms.append(bool(monitor.alarms))
    assert np.mean(alarms) <= 0.3


def test_a_change_of_all_subclasses_is_found_by_the_test_of_the_line_first():
    monitor, rng = line()
    feed(monitor, rng, 300)
    while not monitor.alarms and monitor.count < 600:
        feed(monitor, rng, 1, change={"brightness": -0.015})
    first = monitor.alarms[0]
    assert (first.product, first.statistic, first.sign) == (None, "brightness", -1)
    assert abs(first.since - 301) <= 15
    assert first.since_name == f"{first.since - 1}.png"
    assert first.raised == monitor.count
    assert monitor.count < 400


def test_a_change_of_one_subclass_is_its_own():
    monitor, rng = line()
    feed(monitor, rng, 300)
    feed(monitor, rng, 40, change={"sharpness": -0.5}, product=SUBCLASSES[1])
    assert {alarm.product for alarm in monitor.alarms} == {None, SUBCLASSES[1]}


def test_the_same_place_is_found():
    monitor, rng = line()
    feed(monitor, rng, 200)
    for _ in range(40):
        one = image(monitor.count, rng)
        one.numbers[6:8] = 0.7, 0.2
        monitor.add(one)
    assert {(alarm.statistic, alarm.sign) for alarm in monitor.alarms} == {(PLACE, 1)}
    assert cell_of(one.numbers) == 1 * 8 + 5


def test_groups_count_once():
    """Calibration images of one part resemble each other; as single images they would be a narrow reference."""
    rng = np.random.default_rng(5)
    of_groups = references(rng, images=60, groups=np.repeat(np.arange(6), 10), subclasses=SUBCLASSES[:1])
    values, groups = of_groups[0].values, of_groups[0].groups
    part = 5 * rng.standard_normal(6)
    values[:, 0] += 0.01 * (part - part.mean())[groups]
    monitor = Monitor(of_groups)
    assert monitor.watched[SUBCLASSES[0]].ranks[0].as_dict()["counts"] != []
    assert sum(monitor.watched[SUBCLASSES[0]].ranks[0].as_dict()["counts"]) == 6


def test_scores_of_a_cross_validation_are_no_reference():
    monitor, rng = line(cross_validated=True)
    feed(monitor, rng, 200, change={"score": 3.0, "map_level": 1.0, "distance": 3.0})
    assert monitor.alarms == []
    feed(monitor, rng, 60, change={"score": 6.0})
    assert {alarm.statistic for alarm in monitor.alarms} == {"score", "map_level", "distance"}


def test_a_head_without_routing_has_no_test_of_the_distance():
    monitor, rng = line()
    for _ in range(100):
        one = image(monitor.count, rng)
        one.numbers[-1] = np.nan
        monitor.add(one)
    assert monitor.alarms == []


def test_images_of_a_subclass_without_calibration_images_are_compared_with_those_before():
    monitor, rng = line()
    feed(monitor, rng, 60, product=("cloth", "wool"))
    assert monitor.alarms == []
    feed(monitor, rng, 60, product=("cloth", "wool"), change={"brightness": 0.1})
    assert {alarm.product for alarm in monitor.alarms} == {None, (None, None)}


@pytest.mark.parametrize("change", [{}, {"brightness": -0.05}])
def test_a_saved_state_continues_as_if_it_had_not_stopped(change):
    whole, rng = line()
    feed(whole, rng, 120)
    images = [image(number, rng, change=change) for number in range(120, 180)]
    again = Monitor(references(np.random.default_rng(0)))
    again.load(json.loads(json.dumps(whole.as_dict())))
    for monitor in (whole, again):
        for one in images:
            monitor.add(one)
    assert again.alarms == whole.alarms
    assert bool(whole.alarms) == bool(change)
    assert json.dumps(again.as_dict()) == json.dumps(whole.as_dict())


def test_the_state_of_another_bundle_is_refused():
    monitor, _ = line()
    other = Monitor(references(np.random.default_rng(0), subclasses=SUBCLASSES[:2]))
    with pytest.raises(ValueError, match=r"zip\(\)|subclass"):
        other.load(monitor.as_dict())


def test_windows_count_images_and_sum_their_differences():
    monitor, rng = line()
    feed(monitor, rng, 30, product=SUBCLASSES[0], window="08:00")
    feed(monitor, rng, 10, product=SUBCLASSES[0], window="09:00", change={"brightness": 0.1}, verdict="anomalous")
    first, second = (of[SUBCLASSES[0]] for of in monitor.windows.values())
    assert (first.n, first.not_good, second.n, second.not_good) == (30, 0, 10, 10)
    assert second.sums[0] / 10 > 5 > abs(first.sums[0] / 30)
