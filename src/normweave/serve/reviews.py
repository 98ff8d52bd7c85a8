"""Reviewed images of a server as a data set: read them from its store or over REST, and write them as a manifest.

All inspections with the same content are one image, whose last review counts. Good ones are training images, defective
ones are test images. Image files are copied, so that the data set remains when retention removes them from the server.
"""

from __future__ import annotations

import hashlib
import json
import mimetypes
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.error import HTTPError, URLError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

from sqlalchemy import select

from normweave.atomic import write_atomically
from normweave.data.manifest import write_manifest
from normweave.errors import DataError
from normweave.outcome.parts import part_of
from normweave.serve.files import MissingFileError
from normweave.serve.records import Filter, Inspection, Review
from normweave.serve.rendering import media_type
from normweave.serve.store import Store
from normweave.serve.tables import REVIEWS
from normweave.types import DefectBox, Label, Progress, Sample, Verdict

PAGE = 200
"""Inspections read from a server at a time."""
SECONDS = 60.0
"""Longest wait for an answer of a server."""
MOST_NAMES = 200
"""Names of defects that are proposed."""
LABELS: dict[str, Label] = {"accept": "normal", "reject": "anomalous"}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True)
class ReviewedInspection:
    """A readable image with a decision that was not undone."""

    id: int
    name: str
    image_hash: str | None
    """SHA-256 of the image file; None: retention has removed it."""
    verdict: Verdict
    unseen: bool
    category: str | None
    subclass: str | None
    boxes: tuple[DefectBox, ...]
    reviews: tuple[Review, ...]
    """All, oldest first; the last one is the current one."""

    @property
    def review(self) -> Review:
        """The decision that counts."""
        return self.reviews[-1]

    @property
    def label(self) -> Label:
        """Good or defective."""
        return LABELS[self.review.decision]


class ReviewSource(Protocol):
    """Where reviewed images are read from."""

    def reviewed(self) -> Iterator[ReviewedInspection]:
        """Yield all reviewed images, oldest inspection first."""
        ...

    def content(self, inspection: ReviewedInspection) -> bytes:
        """Return the image file.

        Raises:
            MissingFileError: retention has removed it.
            DataError: it cannot be read.
        """
        ...


class StoreSource:
    """The data of a server on this machine, which may be running.

    Args:
        read: returns the image file with a hash; raises MissingFileError if there is none.
    """

    def __init__(self, store: Store, read: Callable[[str], bytes]) -> None:
        self._store, self._read = store, read

    def reviewed(self) -> Iterator[ReviewedInspection]:
        """Yield all reviewed images, oldest inspection first."""
        for inspection in self._store.iter_inspections(Filter(reviewed=True, unreadable=False)):
            reviews = self._store.reviews(inspection.id)
            if reviews and reviews[-1].decision != "undo":  # undone since the list was read
                yield _of_record(inspection, reviews)

    def content(self, inspection: ReviewedInspection) -> bytes:
        """Return the image file."""
        return self._read(inspection.image_hash or "")


class ServerSource:
    """A running server, asked over its REST interface.

    Args:
        url: http or https, as `normweave serve` prints it.
        token: secret of a token; empty: the server requires none.
    """

    def __init__(self, url: str, token: str = "") -> None:
        self._url, self._token = url.rstrip("/"), token

    def reviewed(self) -> Iterator[ReviewedInspection]:
        """Yield all reviewed images, oldest inspection first."""
        after: int | None = 0
        while after is not None:
            page = self.read("/v1/inspections", reviewed="true", unreadable="false", after=after, limit=PAGE)
            for listed in page["inspections"]:
                values = self.read(f"/v1/inspections/{listed['id']}")
                if values["review"] is not None:
                    yield _of_json(values)
            after = page["next"]

    def content(self, inspection: ReviewedInspection) -> bytes:
        """Return the image file."""
        content = self._get(f"/v1/inspections/{inspection.id}/image")
        if hashlib.sha256(content).hexdigest() != inspection.image_hash:
            raise DataError(f"The image of inspection {inspection.id} arrived damaged. Run the command again.")
        return content

    def read(self, path: str, **query: object) -> Any:
        """Return the JSON of a GET request.

        Raises:
            DataError: the server does not answer, refuses the request, or its answer is no JSON.
        """
        text = self._get(f"{path}?{urlencode(query)}" if query else path)
        try:
            return json.loads(text)
        except ValueError as error:
            raise DataError(f"{self._url}{path} did not answer with JSON. Is it a normweave server?") from error

    def _get(self, path: str) -> bytes:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        try:
            with urlopen(Request(self._url + path, headers=headers), timeout=SECONDS) as answer:
                content: bytes = answer.read()
                return content
        except HTTPError as error:
            if error.code == 410:
                raise MissingFileError(f"{self._url}{path}: the image was removed by retention.") from error
            cure = "Give a valid token (--token-file)." if error.code in (401, 403) else "See the log of the server."
            raise DataError(f"{self._url}{path} answered {error.code} {error.reason}. {cure}") from error
        except (URLError, OSError, ValueError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            raise DataError(f"{self._url} does not answer: {reason}. Check the address and the server.") from error


class Contradiction(NamedTuple):
    """Different last decisions of several reviewers on one image."""

    name: str
    inspection: int
    """Id of the inspection whose review counts."""
    decisions: dict[str, str]
    """Last decision of each reviewer, in the order of time."""


class Export(NamedTuple):
    """What an export wrote, and what it found."""

    samples: tuple[Sample, ...]
    reported: int
    """Number of good images that the server had reported as anomalous or unknown."""
    removed: int
    """Number of reviewed images that are left out, because retention has removed them."""
    contradictions: tuple[Contradiction, ...]


def export(
    source: ReviewSource,
    manifest: Path,
    *,
    part: re.Pattern[str] | None = None,
    progress: Progress | None = None,
) -> Export:
    """Write a manifest of all reviewed images, and their files into a folder beside it.

    Args:
        manifest: .csv or .parquet; the folder has its name with `_images`.
        part: the first group of its match in a file name is the name of the part; images of one part are one group. If
            one of them is defective, all are test images.

    Raises:
        DataError: nothing is reviewed, a file cannot be read, or the ending of the manifest is wrong.
    """
    images = by_content(source.reviewed())
    if not images:
        raise DataError("No image is reviewed. Review some on the page Review, or with POST /v1/inspections/ID/review.")
    folder = manifest.with_name(f"{manifest.stem}_images")
    folder.mkdir(parents=True, exist_ok=True)
    groups = [part_of(image.name, part) for image, _ in images]
    defective = {group for group, (image, _) in zip(groups, images, strict=True) if image.label == "anomalous"}
    samples, notes, kept = [], [], []
    for number, (group, (image, _)) in enumerate(zip(groups, images, strict=True), start=1):
        try:
            path = _copy(source, image, folder)
        except MissingFileError:
            continue
        kept.append(image)
        samples.append(
            Sample(
                image_path=path,
                category=image.category or "default",
                subclass=None if image.unseen or image.verdict == "unknown" else image.subclass,
                group=group,
                split="test" if image.label == "anomalous" or (group and group in defective) else "train",
                label=image.label,
                defect=image.review.defect or None if image.label == "anomalous" else None,
            )
        )
        notes.append(_notes(image))
        if progress is not None:
            progress("copying images", number, len(images))
    if not samples:
        raise DataError(
            f"Retention has removed all {len(images)} reviewed images, or the server has them elsewhere. Keep more "
            "(--keep-days, --keep-gib), or give their place (--images)."
        )
    write_manifest(samples, manifest, notes=notes)
    return Export(
        tuple(samples),
        reported=sum(image.label == "normal" and image.verdict != "normal" for image in kept),
        removed=len(images) - len(samples),
        contradictions=tuple(found for image, all_ in images if (found := _contradiction(image, all_)) is not None),
    )


def by_content(inspections: Iterable[ReviewedInspection]) -> list[tuple[ReviewedInspection, list[ReviewedInspection]]]:
    """Return the inspection with the last review of each image, and all inspections of the image."""
    found: dict[str | int, list[ReviewedInspection]] = defaultdict(list)
    for inspection in inspections:
        found[inspection.image_hash or inspection.id].append(inspection)
    return [(max(same, key=lambda one: (one.review.at, one.id)), same) for same in found.values()]


def defect_names(store: Store) -> list[str]:
    """Return the names of defects that reviewers gave, sorted."""
    query = select(REVIEWS.c.defect).where(REVIEWS.c.defect != "").distinct().limit(MOST_NAMES)
    with store.database.reading() as connection:
        return sorted(connection.scalars(query))


def _copy(source: ReviewSource, image: ReviewedInspection, folder: Path) -> Path:
    if image.image_hash is None:
        raise MissingFileError(f"The image of inspection {image.id} was removed by retention.")
    content = source.content(image)
    path = folder / f"{image.image_hash[:16]}{mimetypes.guess_extension(media_type(content)) or ''}"
    write_atomically(path, lambda unfinished: unfinished.write_bytes(content))
    return path


def _contradiction(image: ReviewedInspection, inspections: Sequence[ReviewedInspection]) -> Contradiction | None:
    valid: list[Review] = []
    for inspection in inspections:
        undone = max((row for row, one in enumerate(inspection.reviews) if one.decision == "undo"), default=-1)
        valid += inspection.reviews[undone + 1 :]
    decisions: dict[str, str] = {}
    for review in sorted(valid, key=lambda one: one.at):
        decisions.pop(review.reviewer, None)
        decisions[review.reviewer] = review.decision
    return Contradiction(image.name, image.id, decisions) if len(set(decisions.values())) > 1 else None


def _notes(image: ReviewedInspection) -> dict[str, str]:
    texts = {
        "name": image.name,
        "verdict": image.verdict,
        "decided_at": image.review.at.isoformat(),
        "reviewer": image.review.reviewer,
        "comment": image.review.comment,
        "boxes": json.dumps([box._asdict() for box in image.boxes]) if image.boxes else "",
    }
    return {name: f"'{text}" if text.startswith(_FORMULA) else text for name, text in texts.items()}


def _of_record(inspection: Inspection, reviews: Sequence[Review]) -> ReviewedInspection:
    outcome = inspection.outcome
    assert outcome.verdict is not None  # the filter leaves out unreadable images
    return ReviewedInspection(
        id=inspection.id,
        name=inspection.name,
        image_hash=None if inspection.image is None else inspection.image.image_hash,
        verdict=outcome.verdict,
        unseen=outcome.unseen,
        category=outcome.category,
        subclass=outcome.subclass,
        boxes=outcome.boxes,
        reviews=tuple(reviews),
    )


def _of_json(values: Mapping[str, Any]) -> ReviewedInspection:
    return ReviewedInspection(
        id=values["id"],
        name=values["name"],
        image_hash=values["image_hash"],
        verdict=values["verdict"],
        unseen=values["unseen"],
        category=values["category"],
        subclass=values["subclass"],
        boxes=tuple(DefectBox(**box) for box in values["boxes"]),
        reviews=tuple(Review(**one | {"at": _utc(one["at"])}) for one in values["reviews"]),
    )


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC)
