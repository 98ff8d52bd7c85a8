"""What the store keeps, and what REST and page both speak of."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal, NamedTuple

from normweave.errors import NormweaveError
from normweave.types import Outcome, Tile, Verdict

Role = Literal["operator", "engineer"]
"""An operator inspects, reviews and looks back; an engineer also moves the line, hands out tokens and sees who did."""
Source = Literal["api", "page", "folder"]
"""By which door an image came in."""
Decision = Literal["accept", "reject", "undo"]
"""Of a person, on the part: good, defective, or neither any more."""
Bucket = Literal["hour", "day", "week"]


class NotFoundError(NormweaveError):
    """An inspection or a token that the store does not know."""


@dataclass(frozen=True, kw_only=True)
class Review:
    """What a person said of an inspection; the last one counts, earlier ones are kept."""

    at: datetime
    """UTC."""
    decision: Decision
    reviewer: str
    comment: str = ""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """Where the image and the scores of an inspection lie, by the SHA-256 of their content, and how to draw them."""

    image_hash: str
    image_type: str
    """MIME type."""
    image_bytes: int
    grids_hash: str
    """Of an .npy file: (n, h, w) float32, the patch scores of each tile."""
    grids_bytes: int
    tiles: tuple[Tile, ...]
    smoothing: float
    map_threshold: float
    """Where the map was called anomalous, in its own units."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An image that was judged, or that could not be read."""

    id: int = 0
    """From 1, in the order in which they were kept, which may be another for images that come together; 0: not yet."""
    received_at: datetime
    """UTC."""
    name: str
    """As the sender called it; never a path on this machine."""
    source: Source
    actor: str
    """Name of the token that it came with."""
    outcome: Outcome
    """Without its map."""
    routed: int | None = None
    """Index of the subclass that the head routed to, to judge the scores anew."""
    image: StoredImage | None = None
    """None: the image could not be read, or retention has removed it."""
    review: Review | None = None
    """The last one, unless it was undone."""


class ScoredImage(NamedTuple):
    """What it takes to judge an inspection anew."""

    verdict: Verdict
    score: float
    distance: float | None
    routed: int | None
    unseen: bool


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Which inspections are meant; what is None or empty does not narrow."""

    since: datetime | None = None
    until: datetime | None = None
    """Before this moment."""
    verdicts: tuple[Verdict, ...] = ()
    unreadable: bool | None = None
    category: str | None = None
    subclass: str | None = None
    name: str | None = None
    """Exactly."""
    source: Source | None = None
    bundle_hash: str | None = None
    reviewed: bool | None = None
    """Whether a review stands that was not undone."""
    decision: Literal["accept", "reject"] | None = None
    p_value_below: float | None = None
    """p at or below this."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """Inspections of a category and subclass in a span of time."""

    start: datetime
    category: str | None
    subclass: str | None
    normal: int
    anomalous: int
    unknown: int
    unreadable: int
    accepted: int
    """By a person."""
    rejected: int


@dataclass(frozen=True, kw_only=True)
class Token:
    """A key to the server; the secret itself is kept nowhere."""

    id: int = 0
    name: str
    role: Role
    digest: str
    """SHA-256 of the secret, in hex."""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        """Whether it still opens anything."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


@dataclass(frozen=True, kw_only=True)
class RateChange:
    """Somebody moved the line of a bundle."""

    at: datetime
    bundle_hash: str
    false_alarm_rate: float
    actor: str
