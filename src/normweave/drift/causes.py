"""Name the causes of alarms: light or camera, focus or dirt, a new subclass, more defects, another mix of subclasses.

Alarms come from the tests alone. The rules below only explain them, from the newest images since the change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from normweave.drift.monitor import CELLS, FEW, IMAGE, PLACE, TESTED, Alarm, Monitor, Seen, Watched, cell_of
from normweave.drift.reference import COLUMNS, FOCUS, LIGHT, Product

Cause = Literal[
    "lighting or camera", "focus or dirt", "new subclass", "more defects", "mix of subclasses changed", "other change"
]
ADVICE: dict[Cause, str] = {
    "lighting or camera": (
        "Compare lamp, exposure and white balance with the time of the calibration. If the new light stays, compute "
        "the operating points again from good images under it (normweave calibrate)."
    ),
    "focus or dirt": "Clean the lens and the cover glass, and check the focus.",
    "new subclass": (
        "Look at the pictures. If these parts are good, add them as a new subclass (normweave add-subclass)."
    ),
    "more defects": "Look at the pictures. If these parts are good, review them and calibrate again.",
    "mix of subclasses changed": "Nothing, if the plan of the production has changed.",
    "other change": "Look at the pictures, and at what was changed on the line at that time.",
}
FEWEST = 5
"""Images since the change from which its causes are named."""
NEARBY = 20
"""Images by which the beginnings of one change differ between its alarms."""
EXAMPLES = 12
FAR = 6.0
"""Standard deviations of the routing distance from which an image is outside the known subclasses, as unknown ones."""
FAR_SHARE = 0.1
"""Share of images outside all known subclasses from which they are a new subclass."""
APART = 4.0
"""Standard deviations by which images of a new subclass differ from the others of the same time in a statistic."""
LOCAL = 1.5
"""Rise of the score in relation to that of the level of the map, both in standard deviations, from which a place has
risen rather than the whole map."""
MOST = 0.5
"""Share of images outside all known subclasses from which they may all be of a new one."""
MOVED = 0.35
"""Standard deviations by which the median of a statistic moves with another light."""
SURE = 3.0
"""Standard errors of the mean from which the images of all subclasses together have changed."""
BESIDE = 0.4
"""Smallest effect of light in relation to that of focus or dirt: a smaller one is an error of the explanation."""
UNEXPLAINED = 0.5
"""Share of a change of image statistics that the known variations leave, from which it is not of light or focus."""
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
"""Strengths at which a single variation is tried."""
NEARLY_ALL = 0.7
"""Share of the changed images that a single variation must explain."""
STRONGEST = 3.0
"""Largest multiple of a known variation."""
SAME_PLACE = 0.5
"""Share of the images whose highest score lies in the same place, if there is dirt."""
TAIL = 4.0
"""Distance above the median, in distances of the 16 % quantile below it, from which a score stands out."""
DEFECTS = 0.06
"""Share of images whose scores stand out more than in calibration."""
MIX_SHARE, MIX_IMAGES = 0.15, 100
"""Distance of a share from all earlier ones that is reported, and the images that a share needs."""
_SCORE, _LEVEL, _DISTANCE = (TESTED.index(name) for name in ("score", "map_level", "distance"))
_LIT = [IMAGE.index(name) for name in ("brightness", "warmth", "tint")]
"""Image statistics that light changes, and neither focus nor dirt."""
_X, _Y = COLUMNS.index("peak_x"), COLUMNS.index("peak_y")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A change with its cause."""

    cause: Cause
    alarm: bool
    """False: for information, without a guaranteed false-alarm rate."""
    products: tuple[Product, ...]
    since: str
    """Name of the image with which it began, by estimate."""
    since_at: str
    """When it began, or the window; empty: not known."""
    evidence: float | None
    """The largest e-value; its limit is `Monitor.limit`. None: no alarm."""
    effect: str
    """Size of the change, for people."""
    advice: str
    examples: tuple[str, ...] = ()
    """Names of images that show it, newest first."""


class _Images(NamedTuple):
    """Images since a change."""

    monitor: Monitor
    seen: list[Seen]
    z: NDArray[np.float64]
    """(n, 8) distances from the medians of the calibration images of the subclass, in standard deviations."""
    far: NDArray[np.bool_]
    """(n,) outside all known subclasses."""

    def part(self, chosen: NDArray[np.bool_]) -> _Images:
        seen = [one for one, is_chosen in zip(self.seen, chosen, strict=True) if is_chosen]
        return self._replace(seen=seen, z=self.z[chosen], far=self.far[chosen])

    @property
    def products(self) -> tuple[Product, ...]:
        return tuple(dict.fromkeys(one.product for one in self.seen))

    @property
    def cells(self) -> NDArray[np.int64]:
        """(n,) the fields of the image in which the highest scores lie."""
        return np.array([cell_of(np.array(one.numbers)) for one in self.seen], dtype=np.int64)


def findings(monitor: Monitor) -> list[Finding]:
    """Return the causes of all alarms, those with most evidence first, then what is for information."""
    alarms = monitor.alarms
    found: list[Finding] = []
    new: set[int] = set()  # numbers of the images of a new subclass
    own = [alarm for alarm in alarms if alarm.statistic == "distance" and alarm.sign > 0]
    if own:
        since = _strongest(own).since
        first = min((alarm for alarm in alarms if alarm.since >= since - NEARBY), key=lambda alarm: alarm.since)
        images = _since(monitor, first)
        far = images.part(of_new_subclass(images))
        if far.seen:
            share = len(far.seen) / len(images.seen)
            found.append(_finding("new subclass", own, f"{share:.0%} of the images belong to no known subclass", far))
            new = {one.number for one in far.seen}
    found += _causes_of_the_rest(monitor, alarms, new)
    if alarms and not found:
        images = _since(monitor, _strongest(alarms))
        lit = _lit(images)
        cause: Cause = "lighting or camera" if lit else "other change"
        names = [*IMAGE, *(alarm.statistic for alarm in alarms)] if lit else [alarm.statistic for alarm in alarms]
        found.append(_finding(cause, alarms, _effect(images, names), images))
    joined: dict[Cause, Finding] = {}
    for one in found:
        joined[one.cause] = _joined(joined[one.cause], one) if one.cause in joined else one
    return [*sorted(joined.values(), key=lambda one: -(one.evidence or 0)), *mix(monitor)]


def _causes_of_the_rest(monitor: Monitor, alarms: list[Alarm], new: set[int]) -> list[Finding]:
    """Return the causes that act on all subclasses, and more defects; images of a new subclass are left out."""
    found: list[Finding] = []

    def images_of(statistics: Sequence[str], sign: int = 0) -> tuple[list[Alarm], _Images | None]:
        own = [alarm for alarm in alarms if alarm.statistic in statistics and alarm.sign * sign >= 0]
        if not own:
            return own, None
        images = _since(monitor, _strongest(own), without=new)
        return own, images if len(images.seen) >= FEWEST else None

    lights = IMAGE[:-1]
    own, images = images_of(lights)
    if images is not None and explained(images).light and (not new or _follow(images, own)):
        found.append(_finding("lighting or camera", own, _effect(images, lights), images))
    own, images = images_of(["sharpness"], -1)
    if images is not None and explained(images).focus:
        found.append(_finding("focus or dirt", own, _effect(images, ["sharpness"]), images))
    own, images = images_of([PLACE], 1)
    dirty = None if images is None else same_place(images)
    if images is not None and dirty is not None:
        found.append(_finding("focus or dirt", own, dirty, images))
    own, images = images_of(["score"], 1)
    if images is not None:
        tail = standing_out(images, dirty=dirty is not None)
        if tail is not None:
            effect = f"the scores of {tail.mean():.0%} of the images stand out"
            found.append(_finding("more defects", own, effect, images.part(tail)))
            rest = images.part(~tail)
            if not any(one.cause == "lighting or camera" for one in found) and _lit(rest):
                found.append(_finding("lighting or camera", own, _effect(rest, lights), rest))
    return found


def _follow(images: _Images, alarms: Sequence[Alarm]) -> bool:
    """Return whether the images moved in the direction of some alarm, which those of a new subclass may have raised."""
    medians = np.median(images.z, axis=0)
    return any(alarm.sign * medians[TESTED.index(alarm.statistic)] >= MOVED for alarm in alarms)


def _strongest(alarms: Sequence[Alarm]) -> Alarm:
    return max(alarms, key=lambda alarm: alarm.evidence)


def _finding(cause: Cause, alarms: Sequence[Alarm], effect: str, images: _Images) -> Finding:
    strongest = _strongest(alarms)
    return Finding(
        cause=cause,
        alarm=True,
        products=images.products,
        since=strongest.since_name,
        since_at=strongest.since_at,
        evidence=strongest.evidence,
        effect=effect,
        advice=ADVICE[cause],
        examples=tuple(one.name for one in images.seen[::-1][:EXAMPLES]),
    )


def _joined(first: Finding, second: Finding) -> Finding:
    """Return one finding of two with the same cause."""
    stronger, weaker = sorted((first, second), key=lambda one: -(one.evidence or 0))
    return replace(
        stronger,
        products=tuple(dict.fromkeys((*first.products, *second.products))),
        effect=stronger.effect if stronger.effect == weaker.effect else f"{stronger.effect}; {weaker.effect}",
        examples=tuple(dict.fromkeys((*stronger.examples, *weaker.examples)))[:EXAMPLES],
    )


def _since(monitor: Monitor, alarm: Alarm, *, without: set[int] | frozenset[int] = frozenset()) -> _Images:
    """Return the newest images since the change."""
    seen = [one for one in monitor.recent if one.number >= alarm.since and one.number not in without]
    listed = [monitor.of(one.product).standardized(np.array(one.numbers)) for one in seen]
    z = np.array(listed).reshape(len(seen), len(TESTED))
    # With few calibration groups the threshold of the distance is loose, and no image is unknown.
    far = np.array([one.far for one in seen], dtype=bool) | (z[:, _DISTANCE] >= FAR)
    return _Images(monitor, seen, z, far)


def of_new_subclass(images: _Images) -> NDArray[np.bool_]:
    """Return which images (n,) are of a new subclass; none if there are few.

    They belong to no known subclass, and their whole map has risen rather than a place. Their image statistics differ
    from those of the other images of the same time, and from what the known variations do to their subclass; or their
    map and routing distance lie above those of the other images of their subclass: a new light or dirt would have moved
    all images. If all images are of the new subclass, the known variations do not explain them.
    """
    shift = images.z - np.median(images.z, axis=0)
    apart = (np.abs(shift[:, : len(IMAGE)]).max(axis=1) >= APART) & ~_known(images)
    apart |= _from_its_subclass(images)[:, [_LEVEL, _DISTANCE]].min(axis=1) >= APART
    whole = images.z[:, _SCORE] <= LOCAL * images.z[:, _LEVEL]
    whole &= shift[:, _SCORE] <= np.maximum(shift[:, _LEVEL], 0)  # blur has raised the maps of all
    chosen: NDArray[np.bool_] = images.far & apart & whole & ~_moved_products(images, apart)
    if chosen.sum() >= FEWEST and chosen.mean() >= FAR_SHARE:
        return chosen
    far = images.part(images.far)
    if images.far.mean() >= MOST and len(far.seen) >= FEWEST:
        medians = np.median(far.z, axis=0)
        if medians[_SCORE] <= LOCAL * medians[_LEVEL] and not (by := explained(far)).single and by.left >= UNEXPLAINED:
            return images.far
    return np.zeros(len(images.seen), dtype=bool)


class Explained(NamedTuple):
    """What the known variations explain of a change of the image statistics."""

    light: bool
    focus: bool
    """Or dirt on the lens."""
    left: float
    """Share that neither explains."""
    single: bool
    """One variation explains most of the changed images, as those of some known subclass."""


def explained(images: _Images) -> Explained:
    """Return whether light and whether focus moved the image statistics; focus only if the sharpness has fallen.

    The change of the medians is written as a sum of the known variations with factors from 0 to `STRONGEST`, by least
    squares in standard deviations.
    """
    moved = np.median(images.z[:, : len(IMAGE)], axis=0)
    size = float(np.linalg.norm(moved))
    atoms = _variations(images)
    if atoms is None or size == 0:
        return Explained(bool(np.abs(moved[_LIT]).max() >= MOVED), bool(moved[-1] <= -MOVED), 0.0, False)
    parts = atoms.mean(axis=0) * _factors(atoms, moved)
    light = parts[:, : len(LIGHT)].sum(axis=1)
    focus = parts[:, len(LIGHT) :].sum(axis=1)
    left = float(np.linalg.norm(moved - light - focus)) / size
    lit = float(np.abs(light[_LIT]).max())
    single, _ = _single_variation(images)
    return Explained(
        light=(lit >= max(MOVED, BESIDE * float(np.abs(focus).max())) and single not in FOCUS) or single in LIGHT,
        focus=bool(max(focus[-1], moved[-1]) <= -MOVED) or single in FOCUS,
        left=left,
        single=single is not None,
    )


def _lit(images: _Images) -> bool:
    """Return whether light alone explains the change of all images together, whose tests have raised no alarm.

    Where subclasses are lights, images under another light are taken for another subclass. The medians of the
    subclasses hardly move then, but the mean of all images does.
    """
    if len(images.seen) < FEWEST:
        return False
    by = _together(images)
    return by.light and not by.focus and by.left < UNEXPLAINED


def _together(images: _Images) -> Explained:
    """Return what explains the change of the mean of all images since those before them, if it is beyond chance.

    Their calibration images stand in for images that are no longer kept.
    """
    count = len(IMAGE)
    first = images.seen[0].number
    before = np.array([one.numbers[:count] for one in images.monitor.recent if one.number < first])
    if len(before) < FEW:
        references = [one.reference for one in images.monitor.subclasses if one.reference is not None]
        before = np.concatenate([np.zeros((0, count)), *(each.values[:, :count] for each in references)])
    nothing = Explained(False, False, 1.0, False)
    if not len(before):
        return nothing
    now = np.array([one.numbers[:count] for one in images.seen])
    moved = now.mean(axis=0) - before.mean(axis=0)
    error = np.sqrt(before.var(axis=0) / len(before) + now.var(axis=0) / len(now))
    if not (np.abs(moved) > SURE * error)[_LIT].any():
        return nothing
    spread = np.mean([images.monitor.of(product).spread[:count] for product in images.products], axis=0)
    return explained(images._replace(z=np.tile(moved / spread, (len(images.seen), 1))))


def _from_its_subclass(images: _Images) -> NDArray[np.float64]:
    """Return the distances (n, 8) from the medians of the images of the same subclass and time."""
    shift = np.empty_like(images.z)
    for product in images.products:
        own = np.array([one.product == product for one in images.seen])
        shift[own] = images.z[own] - np.median(images.z[own], axis=0)
    return shift


def _moved_products(images: _Images, apart: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which images (n,) are of a subclass that has moved as a whole, with as many images as before.

    A light or a saturation may move one subclass further than another. Images of a new subclass come on top.
    """
    first = images.seen[0].number
    before = [one.product for one in images.monitor.recent if one.number < first]
    now = [one.product for one in images.seen]
    moved = np.zeros(len(now), dtype=bool)
    for product in images.products:
        own = np.array([each == product for each in now])
        usual = before.count(product) / max(len(before), 1)
        moved |= own & bool(apart[own].mean() >= NEARLY_ALL and own.mean() <= 1.5 * usual)
    return moved


def _known(images: _Images) -> NDArray[np.bool_]:
    """Return which images (n,) look like some known subclass under the variations that explain the medians.

    Another light may also route images to another subclass, so that they are compared with all.
    """
    atoms = _variations(images)
    known = np.zeros(len(images.seen), dtype=bool)
    if atoms is None:
        return known
    known = _explained_by(images, _factors(atoms, np.median(images.z[:, : len(IMAGE)], axis=0)), UNEXPLAINED)
    _, single = _single_variation(images)
    return known | single


def _explained_by(images: _Images, factors: NDArray[np.float64], tolerance: float) -> NDArray[np.bool_]:
    """Return which images (n,) look like some known subclass under the variations with these factors."""
    known = np.zeros(len(images.seen), dtype=bool)
    values = np.array([one.numbers[: len(IMAGE)] for one in images.seen]).reshape(len(images.seen), len(IMAGE))
    for watched in images.monitor.watched.values():
        shifts = _in_std(watched)
        if shifts.size:
            z = (values - watched.median[: len(IMAGE)]) / watched.spread[: len(IMAGE)]
            expected = shifts @ factors
            most = max(APART, tolerance * float(np.abs(expected).max()))
            known |= np.abs(z - expected).max(axis=1) < most
    return known


def _single_variation(images: _Images) -> tuple[str | None, NDArray[np.bool_]]:
    """Return the one variation that explains most images, and which (n,); None if it does not explain most of the rest.

    A strong change routes images to other subclasses, so that the medians of a subclass mean little.
    """
    names = (*LIGHT, *FOCUS)
    unchanged = _explained_by(images, np.zeros(len(names)), 0)
    best: tuple[str | None, NDArray[np.bool_]] = (None, np.zeros(len(images.seen), dtype=bool))
    for index, name in enumerate(names):
        for factor in FACTORS:
            known = _explained_by(images, np.eye(len(names))[index] * factor, UNEXPLAINED / 2)
            if known.sum() > best[1].sum():
                best = name, known
    rest = ~unchanged
    if rest.sum() < FEWEST or best[1][rest].mean() < NEARLY_ALL:
        return None, np.zeros(len(images.seen), dtype=bool)
    return best


def _factors(atoms: NDArray[np.float64], moved: NDArray[np.float64]) -> NDArray[np.float64]:
    return bounded_least_squares(atoms.mean(axis=0), moved, STRONGEST)


def _variations(images: _Images) -> NDArray[np.float64] | None:
    """Return the change (n, 5, variations) of the image statistics of the subclass of each image, in its std.

    None: no subclass has calibration images. Subclasses without have the mean of the others.
    """
    of_product = {product: _in_std(images.monitor.of(product)) for product in images.products}
    of_known = {product: shifts for product, shifts in of_product.items() if shifts.size}
    if not of_known:
        return None
    mean = np.mean(list(of_known.values()), axis=0)
    return np.array([of_known.get(one.product, mean) for one in images.seen])


def _in_std(watched: Watched) -> NDArray[np.float64]:
    """Return the change (5, variations) of the image statistics of a subclass, in its std; empty: not known."""
    reference = watched.reference
    if reference is None or not reference.shifts:
        return np.zeros((len(IMAGE), 0))
    shifts = np.array([reference.shifts[name] for name in (*LIGHT, *FOCUS)])
    in_std: NDArray[np.float64] = shifts.T / watched.spread[: len(IMAGE), None]
    return in_std


def bounded_least_squares(atoms: NDArray[np.float64], wanted: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    """Return factors (k,) in [0, most] for which atoms (m, k) times factors is nearest to `wanted` (m,).

    By coordinate descent, which reaches the minimum of a convex quadratic function under such bounds.
    """
    factors = np.zeros(atoms.shape[1])
    squares = (atoms**2).sum(axis=0)
    for _ in range(200):
        for index in np.flatnonzero(squares > 0):
            rest = wanted - atoms @ factors + atoms[:, index] * factors[index]
            factors[index] = np.clip(atoms[:, index] @ rest / squares[index], 0, most)
    return factors


def same_place(images: _Images) -> str | None:
    """Return where the highest scores of most images lie, or None if they lie in different places."""
    medians = np.median(images.z, axis=0)
    if medians[_SCORE] <= LOCAL * medians[_LEVEL]:  # the whole map has risen
        return None
    cells = images.cells
    cell, share = _most_frequent(cells)
    usual = [one.reference for one in images.monitor.subclasses if one.product in images.products]
    before = [np.mean([cell_of(row) == cell for row in each.values]) for each in usual if each is not None]
    if share - (max(before) if before else 0) < SAME_PLACE:
        return None
    inside = [one.numbers for one, own in zip(images.seen, cells, strict=True) if own == cell]
    x, y = (np.median([one[index] for one in inside]) for index in (_X, _Y))
    return f"the highest score of {share:.0%} of the images lies at {x:.0%} of the width and {y:.0%} of the height"


def _most_frequent(cells: NDArray[np.int64]) -> tuple[int, float]:
    values, counts = np.unique(cells, return_counts=True)
    return int(values[counts.argmax()]), float(counts.max() / len(cells))


def standing_out(images: _Images, *, dirty: bool) -> NDArray[np.bool_] | None:
    """Return which images have scores that stand out (n,), if there are more of them than in calibration; else None.

    Args:
        dirty: the highest scores of most images lie in one place; only scores and boxes elsewhere count.
    """
    scores = images.z[:, _SCORE]
    now = _tail(scores)
    if dirty:
        cell, _ = _most_frequent(images.cells)
        now = (images.cells != cell) & (scores > TAIL)
        now |= [any(_apart(box, cell) for box in one.boxes) for one in images.seen]
    before = []
    for product in images.products:
        reference = images.monitor.of(product).reference
        if reference is not None:
            before.append(float(_tail(reference.values[:, COLUMNS.index("score")]).mean()))
    return now if now.mean() >= (np.mean(before) if before else 0) + DEFECTS else None


def _apart(first: int, second: int) -> bool:
    """Return whether two fields of the image are not neighbours."""
    (y, x), (v, u) = divmod(first, CELLS), divmod(second, CELLS)
    return max(abs(y - v), abs(x - u)) > 1


def _tail(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    low, median = np.quantile(values, (0.16, 0.5))
    return np.asarray(values > median + TAIL * max(float(median - low), 1e-9))


def _effect(images: _Images, names: Sequence[str]) -> str:
    """Return the change of the medians of some statistics, for people."""
    parts = []
    for name in dict.fromkeys(names):
        if name in TESTED:
            moved = float(np.median(images.z[:, TESTED.index(name)]))
            if abs(moved) >= MOVED or len(names) == 1:
                parts.append(f"{name.replace('_', ' ')} {moved:+.1f} standard deviations")
    return ", ".join(parts) or "small"


def mix(monitor: Monitor) -> list[Finding]:
    """Return the change of the mix of subclasses, for information: this raises no alarm.

    A line makes lots, so that images are not exchangeable in their subclass. The share of a subclass in the newest
    windows is therefore compared with those in all earlier stretches of as many windows: a lot as there were before is
    no change.
    """
    names = list(monitor.windows)
    products = [one.product for one in monitor.subclasses]
    counts = np.array(
        [[of[product].n if product in of else 0 for product in products] for of in monitor.windows.values()],
        dtype=np.float64,
    )
    if len(products) < 2 or len(names) < 6:
        return []
    found: tuple[float, int, int, float, float] | None = None
    for length in range(2, len(names) // 3 + 1):
        stretches = np.lib.stride_tricks.sliding_window_view(counts, length, axis=0).sum(axis=2)
        if stretches.sum(axis=1).min() < MIX_IMAGES:
            continue
        shares = stretches / stretches.sum(axis=1, keepdims=True)
        now, earlier = shares[-1], shares[:-length]
        beyond = np.maximum(now - earlier.max(axis=0), earlier.min(axis=0) - now)
        index = int(beyond.argmax())
        if beyond[index] >= MIX_SHARE and (found is None or beyond[index] >= found[0]):
            usual = float(np.median(earlier[:, index]))
            found = (float(beyond[index]), length, index, usual, float(now[index]))
    if found is None:
        return []
    _, length, index, before, after = found
    effect = f"{before:.0%} to {after:.0%} of the images"
    return [
        Finding(
            cause="mix of subclasses changed",
            alarm=False,
            products=(products[index],),
            since="",
            since_at=names[-length],
            evidence=None,
            effect=effect,
            advice=ADVICE["mix of subclasses changed"],
        )
    ]
