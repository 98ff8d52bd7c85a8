"""Detection and false-alarm rate of a bundle, measured by the reviews in a store, also at other operating points."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import select

from normweave.detector import Detector
from normweave.errors import CheckError, DataError
from normweave.outcome.measured import LEVEL, WRONG_REVIEWS, JudgedImage, MeasuredRates, Rate, Shown, measure
from normweave.outcome.operating_point import Calibration
from normweave.outcome.parts import part_of
from normweave.serve.records import RatePreview
from normweave.serve.reviews import LABELS
from normweave.serve.store import Store
from normweave.serve.tables import INSPECTIONS
from normweave.types import Verdict

NEWEST = 20_000
"""Default of the number of inspections that rates are measured on."""
DETECTION = 0.95
"""Default of the detection rate that the proposed operating point must reach."""
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
"""False-alarm rates whose operating points are compared, as far as the held-out good images allow them."""
BORDERLINE = 2.0
"""A good part is close to the limit if its p-value is at most this multiple of the false-alarm rate."""
_SEVERITY: dict[Shown, int] = {"normal": 0, "borderline": 1, "unknown": 2, "anomalous": 3}
_INSPECTION = INSPECTIONS.c


def preview(store: Store, detector: Detector, *, rate: float, newest: int) -> RatePreview:
    """Return the verdicts that the newest inspections of a bundle would have.

    Args:
        detector: with the thresholds for this rate.
    """
    calibration = detector.calibration
    assert calibration is not None  # with_rate needs it
    now: Counter[str] = Counter()
    then: Counter[str] = Counter()
    changed = 0
    for one in store.scored_images(detector.bundle_hash or "", newest=newest):
        verdict = calibration.decide(score=one.score, distance=one.distance, subclass=one.routed).verdict
        now[one.verdict] += 1
        then[verdict] += 1
        changed += verdict != one.verdict
    return RatePreview(false_alarm_rate=rate, n=now.total(), now=dict(now), then=dict(then), changed=changed)


class ScoredReview(NamedTuple):
    """An inspection of a readable image, with its review if it has one."""

    id: int
    name: str
    image_hash: str | None
    verdict: Verdict
    p_value: float
    false_alarm_rate: float
    score: float
    distance: float | None
    routed: int | None
    category: str | None
    subclass: str | None
    decision: str | None
    reviewed_at: datetime | None
    defect: str | None

    @property
    def shown(self) -> Shown:
        """What a reviewer saw."""
        close = self.verdict == "normal" and self.p_value <= BORDERLINE * self.false_alarm_rate
        return "borderline" if close else self.verdict


class OperatingPointRates(NamedTuple):
    """What the reviews show about the operating point of a false-alarm rate."""

    false_alarm_rate: float
    """The highest expected share of new good images that are reported, from held-out good images."""
    threshold: float
    """Of all images together; subclasses may have their own."""
    detection: Rate
    false_alarms: Rate


@dataclass(frozen=True, kw_only=True)
class ReviewRates:
    """Rates of a bundle at its operating point, and at others."""

    bundle_hash: str
    inspections: int
    """Number of inspections that were used, the newest."""
    measured: MeasuredRates
    operating_points: tuple[OperatingPointRates, ...]
    """Empty without the bundle. Rising false-alarm rates."""
    present: float | None
    """False-alarm rate of the present operating point; None without the bundle: the stored verdicts are used."""
    proposed: float | None
    """The lowest of these false-alarm rates whose measured detection rate reaches `detection`; None: none does."""
    detection: float

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        measured = {name: _json(value) for name, value in vars(self.measured).items()}
        points = [_json(point) for point in self.operating_points]
        return asdict(self) | {"measured": measured, "operating_points": points}


def newest_bundle(store: Store) -> str:
    """Return the hash of the bundle of the newest inspection with a verdict.

    Raises:
        DataError: there is none.
    """
    query = select(_INSPECTION.bundle_hash).where(_INSPECTION.verdict.is_not(None)).order_by(_INSPECTION.id.desc())
    with store.database.reading() as connection:
        found = connection.scalars(query.limit(1)).first()
    if found is None:
        raise DataError("No image was inspected yet, so that there is nothing to measure.")
    return str(found)


def measured_rates(
    store: Store,
    bundle_hash: str,
    *,
    calibration: Calibration | None = None,
    part: re.Pattern[str] | None = None,
    wrong_reviews: float = WRONG_REVIEWS,
    level: float = LEVEL,
    detection: float = DETECTION,
    newest: int = NEWEST,
) -> ReviewRates:
    """Return what the reviews of the inspections of a bundle show about its operating points.

    Args:
        calibration: that of the bundle at its present false-alarm rate; None: only the stored verdicts are measured.
        part: as in `reviews.export`: images of one part count once.
        wrong_reviews, level: as in `measured.measure`.
        detection: the detection rate that the proposed operating point must reach.
        newest: largest number of inspections.

    Raises:
        ConfigError: a share is out of range.
    """
    parts = _parts(read_scores(store, bundle_hash, newest=newest), part)

    def rates(at: Calibration | None) -> MeasuredRates:
        return measure([_judged(images, at) for images in parts], wrong_reviews=wrong_reviews, level=level)

    present = rates(calibration)
    points = []
    if calibration is not None:
        for rate in sorted({*RATES, calibration.false_alarm_rate}):
            try:
                other = calibration.with_rate(rate)
            except CheckError:  # too few held-out good images
                continue
            measured = rates(other)
            points.append(OperatingPointRates(rate, other.point().threshold, measured.detection, measured.false_alarms))
    enough = (one for one in points if one.detection.estimate is not None and one.detection.estimate >= detection)
    return ReviewRates(
        bundle_hash=bundle_hash,
        inspections=sum(map(len, parts)),
        measured=present,
        operating_points=tuple(points),
        present=None if calibration is None else calibration.false_alarm_rate,
        proposed=next((point.false_alarm_rate for point in enough), None),
        detection=detection,
    )


def read_scores(store: Store, bundle_hash: str, *, newest: int) -> list[ScoredReview]:
    """Return the newest inspections of a bundle, oldest first."""
    columns = (
        _INSPECTION.id,
        _INSPECTION.name,
        _INSPECTION.image_hash,
        _INSPECTION.verdict,
        _INSPECTION.p_value,
        _INSPECTION.false_alarm_rate,
        _INSPECTION.pred_score,
        _INSPECTION.subclass_distance,
        _INSPECTION.routed,
        _INSPECTION.category,
        _INSPECTION.subclass,
        _INSPECTION.decision,
        _INSPECTION.reviewed_at,
        _INSPECTION.defect,
    )
    query = select(*columns).where(_INSPECTION.bundle_hash == bundle_hash, _INSPECTION.verdict.is_not(None))
    with store.database.reading() as connection:
        rows = connection.execute(query.order_by(_INSPECTION.id.desc()).limit(newest)).all()
    return [ScoredReview._make(row) for row in reversed(rows)]


def _parts(scores: Sequence[ScoredReview], part: re.Pattern[str] | None) -> list[list[ScoredReview]]:
    """Return the images of each part, each once: the last inspection of a content, with the last review of it."""
    contents: dict[str | int, list[ScoredReview]] = defaultdict(list)
    for score in scores:
        contents[score.image_hash or score.id].append(score)
    parts: dict[tuple[str, str | int], list[ScoredReview]] = defaultdict(list)
    for content, same in contents.items():
        reviews = [score for score in same if score.reviewed_at is not None]
        last = max(reviews, key=lambda score: score.reviewed_at or score.id, default=None)
        image = same[-1] if last is None else last
        name = part_of(image.name, part)
        parts[("content", content) if name is None else ("part", name)].append(image)
    return list(parts.values())


def _judged(images: Sequence[ScoredReview], calibration: Calibration | None) -> JudgedImage:
    """Return a part: defective if one of its images is, and reported if one of them is."""
    worst = max(images, key=lambda image: _SEVERITY[image.shown])
    decided = [image for image in images if image.decision is not None]
    rejected = [image for image in decided if LABELS[str(image.decision)] == "anomalous"]
    return JudgedImage(
        shown=worst.shown,
        reported=any(_is_reported(image, calibration) for image in images),
        label="anomalous" if rejected else "normal" if decided else None,
        subclass="/".join(name for name in (worst.category, worst.subclass) if name),
        defect=next((image.defect for image in rejected if image.defect), ""),
    )


def _is_reported(image: ScoredReview, calibration: Calibration | None) -> bool:
    verdict = image.verdict
    if calibration is not None:
        verdict = calibration.decide(score=image.score, distance=image.distance, subclass=image.routed).verdict
    return verdict != "normal"


def _json(value: Any) -> Any:
    """Return named tuples and their containers as JSON values."""
    if hasattr(value, "_asdict"):
        return {name: _json(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {name: _json(part) for name, part in value.items()}
    return [_json(part) for part in value] if isinstance(value, list | tuple) else value
