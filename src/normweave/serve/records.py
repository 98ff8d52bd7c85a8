"""Records that the store keeps and that the REST interface and the pages show."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

from normweave.errors import NormweaveError
from normweave.types import Outcome, PartReason, PartVerdict, Tile, Verdict

Role = Literal["operator", "engineer"]
"""An operator inspects, reviews and reads. An engineer also changes the false-alarm rate and manages tokens."""
Source = Literal["api", "page", "folder", "camera", "genicam", "video", "mqtt", "http"]
"""How an image came in; the last five are types of `sources` in `line.yaml`."""
ReviewDecision = Literal["accept", "reject", "undo"]
"""Reviewer decision on a part: good, defective, or an earlier decision withdrawn."""
Bucket = Literal["hour", "day", "week"]
Subject = Literal["inspections", "parts", "drift"]
"""What an output delivers: inspections, verdicts on parts of several views, alarms of drift."""
WatchStatus = Literal["watching", "paused", "folder missing", "failed"]
"""State of the watched folder. failed: the folder, the store or the list of inspected files cannot be used."""
AuditEvent = Literal[
    "login",
    "login_failed",
    "logout",
    "token_created",
    "token_revoked",
    "rate_changed",
    "bundle_loaded",
    "shadow_started",
    "shadow_stopped",
    "shadow_failed",
    "model_promoted",
    "model_rolled_back",
    "teach_started",
    "teach_kept",
    "teach_discarded",
    "delivery_lost",
    "delivery_loss_acknowledged",
]
SERVER = "server"
"""Actor of what the server does at its start, and of tokens made by the command line."""
NAME_LENGTH = 500
"""Maximum number of characters of the name of an image, the same in requests and in the database."""


class NotFoundError(NormweaveError):
    """The store has no inspection or token with this id."""


class LastTokenError(NormweaveError):
    """The last valid token of an engineer cannot be revoked."""


@dataclass(frozen=True, kw_only=True)
class Review:
    """A reviewer decision on an inspection. The last one counts; earlier ones are kept."""

    at: datetime
    """UTC."""
    decision: ReviewDecision
    reviewer: str
    """Name of the token that the decision came with."""
    token: int | None = None
    """Id of this token; 0: a server without tokens; None: stored by an earlier version."""
    comment: str = ""
    defect: str = ""
    """Name of the defect; empty: not named."""


@dataclass(frozen=True, kw_only=True)
class StoredImage:
    """Files of an inspection, named by the SHA-256 of their content, and values to compute its anomaly map from."""

    image_hash: str
    image_type: str
    """MIME type."""
    image_bytes: int
    grids_hash: str
    """SHA-256 of the file that `rendering.grids_file` writes: the patch scores of each tile."""
    grids_bytes: int
    tiles: tuple[Tile, ...]
    smoothing: float
    map_threshold: float
    """Threshold of the anomaly map, in its own units."""
    size: tuple[int, int] | None = field(default=None, compare=False)
    """(height, width) of the image, a copy of the outcome's; None: that of the tiles together."""


class RequestPart(NamedTuple):
    """The place of an image in a request that was sent with an Idempotency-Key."""

    key: str
    hash: str
    """SHA-256 of all names and images of the request."""
    place: int
    """Counts from 0."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """An image with its outcome, who sent it, and its review."""

    id: int = 0
    """Counts from 1 in the order of storage, which may differ from the order of arrival. 0: not stored yet."""
    received_at: datetime
    """UTC."""
    name: str
    """File name given by the sender; never used as a path."""
    source: Source
    actor: str
    """Name of the token that the image came with."""
    token: int | None = None
    """Id of this token; 0: a server without tokens; None: the watched folder, or stored by an earlier version."""
    line: str = ""
    """Name of the line (`serve --name`)."""
    outcome: Outcome
    """Without its anomaly map."""
    routed: int | None = None
    """Index of the subclass that the head routed to; used to classify the score at another threshold."""
    image: StoredImage | None = None
    """None: the image could not be read, or retention has removed it."""
    review: Review | None = None
    """The last decision, unless it was undone."""
    request: RequestPart | None = None
    """None: it was sent without a key."""


class ScoredImage(NamedTuple):
    """The numbers of an inspection that another threshold is applied to."""

    verdict: Verdict
    score: float
    distance: float | None
    routed: int | None
    unseen: bool


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Conditions on inspections, all of which must hold. None or empty: no condition."""

    since: datetime | None = None
    until: datetime | None = None
    """Exclusive."""
    verdicts: tuple[Verdict, ...] = ()
    unreadable: bool | None = None
    category: str | None = None
    subclass: str | None = None
    name: str | None = None
    """The whole name."""
    name_contains: str | None = None
    """A part of the name, letter case ignored (SQLite: of ASCII letters only)."""
    source: Source | None = None
    line: str | None = None
    bundle_hash: str | None = None
    reviewed: bool | None = None
    """Whether the inspection has a review that was not undone."""
    decision: Literal["accept", "reject"] | None = None
    p_value_within: float | None = None
    """The p-value is at most this multiple of the false-alarm rate at which the image was inspected."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """Numbers of inspections of a category and subclass in a time span."""

    start: datetime
    category: str | None
    subclass: str | None
    normal: int
    anomalous: int
    unknown: int
    unreadable: int
    accepted: int
    """Number of inspections that a reviewer accepted."""
    rejected: int


@dataclass(frozen=True, kw_only=True)
class Token:
    """An access token, without its secret."""

    id: int = 0
    name: str
    role: Role
    digest: str
    """SHA-256 of the secret, in hex."""
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        """Return whether the token is neither revoked nor expired."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)


@dataclass(frozen=True, kw_only=True)
class RateChange:
    """A change of the false-alarm rate of a bundle."""

    at: datetime
    bundle_hash: str
    false_alarm_rate: float
    actor: str


@dataclass(frozen=True, kw_only=True)
class RatePreview:
    """Verdicts of stored inspections at another false-alarm rate."""

    false_alarm_rate: float
    n: int
    """Number of inspections: the newest ones of this bundle."""
    now: dict[str, int]
    """Number of inspections with each verdict, as stored."""
    then: dict[str, int]
    """Number of inspections with each verdict at the new rate."""
    changed: int
    """Number of inspections whose verdict differs."""


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """The verdict on a part when it was closed, or a later correction of it."""

    id: int = 0
    """Counts from 1 in the order of storage, as those of inspections. 0: not stored yet."""
    at: datetime
    """Time of closing or of the correction, UTC."""
    part_id: str
    line: str
    """Name of the line (`serve --name`)."""
    verdict: PartVerdict
    reasons: tuple[PartReason, ...]
    """Why it is not normal, worst first."""
    images: int
    """Number of its images at this time."""
    expected: int | tuple[str, ...] | None
    """Number or names of the expected views; None: any."""
    corrects: int | None = None
    """Id of the record that was stored when the part was closed; None: this is that record."""

    @property
    def root(self) -> int:
        """Id of the record that was stored when the part was closed."""
        return self.corrects or self.id


@dataclass(frozen=True, kw_only=True)
class DriftAlarm:
    """A change of the images of a line since the calibration."""

    id: int = 0
    """Counts from 1 in the order of storage. 0: not stored yet."""
    time: datetime
    """When it was raised, UTC."""
    line: str
    """Name of the line (`serve --name`)."""
    bundle_hash: str
    cause: str
    subclass: str
    """CATEGORY/SUBCLASS; empty: all images."""
    since: str
    """When it began, by estimate; empty: not known."""
    since_inspection: int
    """Id of the inspection with which it began, by estimate."""
    evidence: float | None
    effect: str
    """Size of the change, for people."""
    advice: str
    inspections: tuple[int, ...]
    """Ids of inspections that show it, newest first."""


@dataclass(frozen=True, kw_only=True)
class WatchState:
    """What the watcher of a folder does."""

    state: WatchStatus
    files_behind: int
    """Number of images that are not inspected yet."""
    last_error: str | None
    """Why the folder or a file in it is not inspected; None if there is no such reason."""


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """An event of the audit table, whose entries the database neither changes nor removes."""

    id: int = 0
    at: datetime
    """UTC."""
    event: AuditEvent
    actor: str = ""
    """Name of the token, or `SERVER`; empty: unknown, since the login failed."""
    token: int | None = None
    """Id of the token of the actor."""
    address: str = ""
    """Network address of the client; empty: not of a request, or not recorded."""
    detail: dict[str, Any] = field(default_factory=dict)
    """What belongs to this event, as JSON values."""
    line: str = ""
    """Name of the line (`serve --name`)."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A login of a person, without its secret."""

    digest: str
    """SHA-256 of the value of the cookie, in hex."""
    token: int
    """Id of the token."""
    created_at: datetime
    used_at: datetime
