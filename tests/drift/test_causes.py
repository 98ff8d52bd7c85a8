"""The causes of alarms, from streams whose numbers are drawn."""

import numpy as np
import pytest

from drifting import INDEX, SHIFTS, SUBCLASSES, feed, image, line, numbers
from drifting import LIGHT_CHANGE as LIGHT
from normweave.drift.causes import bounded_least_squares, findings
from normweave.drift.monitor import Monitor
from normweave.drift.reference import Reference

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


def blurred(monitor, rng, *, share, amount):
    """Feed 100 blurred images of one subclass, which are all unknown; a share of them differs by an amount."""
    blur = BLUR | {"sharpness": -1.5, "map_level": 5.0, "distance": 20.0}
    for _ in range(100):
        more = amount if rng.random() < share else {}
        one = image(monitor.count, rng, product=SUBCLASSES[0], change=blur)
        one.numbers[[INDEX[name] for name in more]] += list(more.values())
        monitor.add(one._replace(verdict="unknown"))


@pytest.mark.parametrize(
    ("amount", "expected"),
    [
        # The image statistics alone are those of known images under more or less blur.
        ({"warmth": 0.1, "map_level": 5.0, "score": 2.0, "distance": 10.0}, "new subclass"),
        # A place rises more than the map does.
        ({"warmth": 0.1, "map_level": 3.0, "score": 12.0, "distance": 6.0}, "more defects"),
    ],
    ids=["new", "defects"],
)
def test_a_new_subclass_and_defects_among_blurred_images_that_are_all_unknown(amount, expected):
    monitor, rng = line(subclasses=SUBCLASSES[:1])
    feed(monitor, rng, 200, product=SUBCLASSES[0])
    blurred(monitor, rng, share=0.3, amount=amount)
    assert causes(monitor) == {"focus or dirt", expected}


def test_light_is_not_named_for_an_alarm_that_a_new_subclass_raised():
    """The other images have moved a little, by chance, and the other way."""
    monitor, rng = line()
    feed(monitor, rng, 200)
    changed(monitor, rng, light={"warmth": -0.01}, new=0.3, count=100)
    assert ("warmth", 1) in [(one.statistic, one.sign) for one in monitor.alarms]
    assert causes(monitor) == {"new subclass"}


def test_light_that_raises_sharpness_is_no_loss_of_focus():
    """Light would have raised the sharpness; that of every fifth image is lower, and that of the others as before."""
    monitor, rng = line()
    for one in monitor.watched.values():
        one.reference.shifts["gamma-high"][4] = 0.3
    feed(monitor, rng, 200)
    light = {"brightness": -0.09, "contrast": 0.005}
    for number in range(250):
        monitor.add(image(monitor.count, rng, change=light | ({"sharpness": -0.5} if number % 5 == 0 else {})))
    assert any((one.statistic, one.sign) == ("sharpness", -1) for one in monitor.alarms)
    assert causes(monitor) == {"lighting or camera"}


@pytest.mark.parametrize("gain", [0.92, 1.0])
def test_light_beside_defects_where_subclasses_are_lights(gain):
    """Each image is taken for one of the subclass whose light is nearest, so that no subclass has moved."""
    rng = np.random.default_rng(0)

    def drawn(gain=1.0):
        values = numbers(SUBCLASSES[0], rng)
        values[0] = (0.3 + 0.08 * int(rng.integers(3)) + 0.04 * rng.standard_normal()) * gain
        return SUBCLASSES[int(np.clip(round((values[0] - 0.3) / 0.08), 0, 2))], values

    shifts = {name: np.array(shift, dtype=float) for name, shift in SHIFTS.items()}
    good = [drawn() for _ in range(200)]
    own = [np.array([values for each, values in good if each == product]) for product in SUBCLASSES]
    monitor = Monitor(
        [
            Reference(product, each, np.arange(len(each)), shifts, False)
            for product, each in zip(SUBCLASSES, own, strict=True)
        ]
    )
    for number in range(400):
        product, values = drawn(gain if number >= 200 else 1.0)
        if number >= 200 and rng.random() < 0.3:
            values[INDEX["score"]] += 12
        monitor.add(image(number, rng)._replace(product=product, numbers=values))
    assert causes(monitor) == {"more defects", *(["lighting or camera"] if gain < 1 else [])}


def test_a_change_soon_after_the_first_images_of_a_line_without_calibration_images():
    monitor, rng = line(subclasses=())
    feed(monitor, rng, 15)
    for number in range(40):
        feed(monitor, rng, 1, change={"map_level": float(number)})
    assert causes(monitor) == {"other change"}


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
