"""Streams of images whose numbers are drawn, not scored."""

import numpy as np

from normweave.drift.monitor import Image, Monitor
from normweave.drift.reference import COLUMNS, FOCUS, LIGHT, Reference

SUBCLASSES = tuple(("cloth", name) for name in ("denim", "linen", "silk"))
SPREAD = np.array([0.01, 0.01, 0.02, 0.01, 0.1, 0.5, 1.0, 1.0])
SHIFTS = {
    "brighter": (0.1, -0.02, 0, 0, 0),
    "darker": (-0.2, -0.03, 0, 0, 0),
    "warmer": (0, 0, 0.15, 0.01, 0),
    "cooler": (0, 0, -0.15, -0.01, 0),
    "gamma-low": (0.08, -0.01, 0, 0, 0),
    "gamma-high": (-0.09, 0.005, 0, 0, 0),
    "blurred": (0, -0.02, 0, 0, -0.6),
    "spotted": (-0.004, 0.01, 0, 0, -0.2),
}
LIGHT_CHANGE = {"brightness": -0.08, "contrast": -0.01, "map_level": 0.3}
INDEX = {name: index for index, name in enumerate(COLUMNS)}


def numbers(product, rng):
    """The numbers of a good image of a subclass; subclasses differ in brightness and sharpness."""
    own = SUBCLASSES.index(product) if product in SUBCLASSES else 7
    middle = np.array([0.3 + 0.1 * own, 0.1, 0.0, 0.0, -1.0 - own, 5.0, 10.0, 2.0])
    values = middle + SPREAD * rng.standard_normal(8)
    return np.array([*values[:6], *rng.random(2), *values[6:]])


def references(rng, *, images=40, groups=None, subclasses=SUBCLASSES, cross_validated=False):
    assert set(SHIFTS) == {*LIGHT, *FOCUS}
    shifts = {name: np.array(shift, dtype=float) for name, shift in SHIFTS.items()}
    own = np.arange(images) if groups is None else np.asarray(groups)
    return [
        Reference(product, np.array([numbers(product, rng) for _ in own]), own, shifts, cross_validated)
        for product in subclasses
    ]


def line(seed=0, **settings):
    """A monitor, and the generator of its images."""
    rng = np.random.default_rng(seed)
    alarm_rate = settings.pop("alarm_rate", 0.01)
    return Monitor(references(rng, **settings), alarm_rate=alarm_rate, seed=seed), rng


def image(number, rng, *, change=None, product=None, verdict="normal", window=None):
    """The next image of a line.

    Args:
        change: changes the numbers in place, by name.
    """
    product = product or SUBCLASSES[int(rng.integers(len(SUBCLASSES)))]
    values = numbers(product, rng)
    for name, amount in (change or {}).items():
        values[INDEX[name]] += amount
    window = f"{number // 50:03}" if window is None else window
    return Image(f"{number}.png", product, verdict, False, values, f"12:{number}", window)


def feed(monitor, rng, count, **given):
    """Add images to a monitor."""
    for _ in range(count):
        monitor.add(image(monitor.count, rng, **given))
