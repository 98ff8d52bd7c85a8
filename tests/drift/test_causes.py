"""The causes of alarms, from streams whose numbers are drawn."""

import numpy as np
import pytest

from drifting import LIGHT_CHANGE as LIGHT
from drifting import SUBCLASSES, feed, image, line
from normweave.drift.causes import bounded_least_squares, findings

BLUR = {"sharpness": -0.4, "contrast": -0.012, "map_level": 1.0}


def causes(monitor, *, alarm=True):
    return {each.cause for each in findings(monitor) if each.alarm is alarm}


def changed(monitor, rng, *, light=None, defects=0.0, new=0.0, dirt=False, count=150):
    for _ in range(count):
        drawn = rng.random()
        if drawn < new:
            one = image(monitor.count, rng, change=(light or {}) | {"map_level": 20.0, "score": 5.0, "distance": 30.0})
            one.numbers[[2, 3]] += 0.3
            one = one._replace(verdict="unknown")
        else:
            one = image(monitor.count, rng, change=light)
            if drawn < new + defects:
                one.numbers[8] += 12
                one = one._replace(boxes=(50,))
        if dirt:
            one = one._replace(boxes=(18, *one.boxes))
            one.numbers[6:9] = 0.3, 0.3, max(one.numbers[8], 20)
        monitor.add(one)


def test_a_quiet_line_has_no_findings():
    monitor, rng = line()
    feed(monitor, rng, 300)
    assert findings(monitor) == []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"light": LIGHT}, ["lighting or camera"]),
        ({"light": {"warmth": 0.1}}, ["lighting or camera"]),
        ({"light": BLUR}, ["focus or dirt"]),
        ({"dirt": True}, ["focus or dirt"]),
        ({"defects": 0.3}, ["more defects"]),
        ({"new": 0.3}, ["new subclass"]),
        ({"light": LIGHT, "defects": 0.3}, ["lighting or camera", "more defects"]),
        ({"light": BLUR, "defects": 0.3}, ["focus or dirt", "more defects"]),
        ({"dirt": True, "defects": 0.3}, ["focus or dirt", "more defects"]),
        ({"light": LIGHT, "new": 0.3}, ["lighting or camera", "new subclass"]),
    ],
    ids=str,
)
def test_each_cause_and_two_at_once(given, expected):
    right = 0
    for seed in range(3):
        monitor, rng = line(seed)
        feed(monitor, rng, 300)
        changed(monitor, rng, **given)
        right += causes(monitor) == set(expected)
    assert right == 3


def test_a_finding_has_its_beginning_its_size_its_evidence_and_what_to_do():
    monitor, rng = line()
    feed(monitor, rng, 300)
    changed(monitor, rng, light=LIGHT)
    (found,) = findings(monitor)
    assert set(found.products) == set(SUBCLASSES)
    assert abs(int(found.since.removesuffix(".png")) - 300) <= 5
    assert found.since_at == f"12:{found.since.removesuffix('.png')}"
    assert found.evidence >= monitor.limit
    assert "brightness -" in found.effect
    assert "normweave calibrate" in found.advice


def test_a_new_subclass_lists_its_images_and_the_command_that_takes_them():
    monitor, rng = line()
    feed(monitor, rng, 300)
    changed(monitor, rng, new=0.3)
    (found,) = findings(monitor)
    far = {one.name for one in monitor.recent if one.far}
    assert found.examples
    assert set(found.examples) <= far
    assert "normweave add-subclass" in found.advice


def test_a_new_subclass_that_replaces_all_others():
    monitor, rng = line()
    feed(monitor, rng, 300)
    changed(monitor, rng, new=1.0, count=60)
    assert causes(monitor) == {"new subclass"}


def test_a_lamp_that_makes_all_images_unknown_is_no_new_subclass():
    monitor, rng = line()
    feed(monitor, rng, 300)
    for _ in range(60):
        change = {"brightness": -0.3, "contrast": -0.045, "map_level": 5.0, "distance": 20.0, "score": 2.0}
        monitor.add(image(monitor.count, rng, change=change)._replace(verdict="unknown"))
    assert causes(monitor) == {"lighting or camera"}


def test_a_change_that_nothing_explains_is_named_so():
    monitor, rng = line()
    feed(monitor, rng, 300)
    feed(monitor, rng, 60, change={"sharpness": 1.0})
    assert causes(monitor) == {"other change"}


def test_another_mix_of_subclasses_is_for_information():
    monitor, rng = line()
    feed(monitor, rng, 600)
    assert findings(monitor) == []
    for _ in range(300):
        product = SUBCLASSES[0] if rng.random() < 0.6 else None
        feed(monitor, rng, 1, product=product)
    assert causes(monitor) == set()
    (found,) = findings(monitor)
    assert (found.cause, found.alarm, found.evidence) == ("mix of subclasses changed", False, None)
    assert found.products == (SUBCLASSES[0],)
    assert found.since_at in {"012", "013"}


def test_lots_are_no_change_of_the_mix():
    """A line that makes one subclass after the other, each for two windows."""
    monitor, rng = line()
    for lot in range(12):
        feed(monitor, rng, 100, product=SUBCLASSES[lot % 3])
    assert findings(monitor) == []


def test_least_squares_with_bounds():
    atoms = np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    np.testing.assert_allclose(bounded_least_squares(atoms, atoms @ [0.5, 1.5], 3.0), [0.5, 1.5], atol=1e-6)
    np.testing.assert_allclose(bounded_least_squares(atoms, np.array([0.0, -1.0, 0.0]), 3.0), [0, 0])
    assert bounded_least_squares(atoms[:, :1], np.array([9.0, 0.0, 9.0]), 3.0).tolist() == [3.0]
