"""The data that passes between the stages. No torch at run time.

Axes: B images, D channels, (h, w) grid of patches, (H, W) pixels, P = h*w patches, K subclasses = experts.
Sizes are (height, width). Scores have one direction everywhere: higher = more anomalous.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, get_args, get_origin, get_type_hints

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Label = Literal["normal", "anomalous"]
Split = Literal["train", "calibration", "test"]
Verdict = Literal["normal", "anomalous", "unknown"]
PartVerdict = Literal["normal", "anomalous", "unknown", "incomplete"]
"""Verdict on a part of several views. incomplete: no view is anomalous or unknown, but one is missing or unreadable."""
Guarantee = Literal["conformal", "cross-validated", "uncalibrated"]
"""What the false-alarm rate of a threshold rests on.

conformal: held-out images; at most this share of new normal images exceeds it, on average over held-out sets.
cross-validated: each image scored by a head that has not seen its group; the rate is approximate.
uncalibrated: too few independent groups for the requested rate; the rate is the lowest that they allow.
"""
Progress = Callable[[str, int, int], None]
"""Called with (name of the step, number done, total)."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image of a data set: a row of the manifest with resolved paths."""

    image_path: Path
    category: str = "default"
    subclass: str | None = None
    """None: unknown; it is discovered or ignored."""
    group: str | None = None
    """The physical part, lot or session; images of one group are never divided between splits."""
    split: Split | None = None
    """None: not given; it is drawn by `data.splits.complete`."""
    label: Label = "normal"
    defect: str | None = None
    mask_path: Path | None = None

    @property
    def subclass_name(self) -> str:
        """`category/subclass`, or the category alone where there is no subclass; unique in a data set."""
        return self.category if self.subclass is None else f"{self.category}/{self.subclass}"


class Tile(NamedTuple):
    """A rectangle of an image, in pixels of the image on disk."""

    top: int
    left: int
    height: int
    width: int


class FeatureSource(Protocol):
    """Frozen features of many images, read from disk or computed in batches."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, h, w) of one image."""
        ...

    def __len__(self) -> int:
        """The number of images."""
        ...

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features (len(rows), D, h, w) float32 of these images, in the order of `rows`."""
        ...


class JointMaps(NamedTuple):
    """Linear maps from the patch tokens of each level to the joint space of images and text.

    For a raw token e (D_l,) of level l: j = n(e) W_l + b_l, then j / |j|, with n(e) = (e - mean(e)) / std(e) over its
    numbers where `layer_norm`, else e. Gains and offsets of a layer norm are merged into W_l and b_l.
    """

    weights: tuple[Tensor, ...]  # each (D_l, J)
    biases: tuple[Tensor, ...]  # each (J,)
    layer_norm: bool


class Text(Protocol):
    """The frozen text encoder of a vision-language pair, differentiable in its input embeddings."""

    joint_dim: int
    """J, the size of the joint space."""
    embedding_dim: int
    """V, the size of a token embedding."""
    output_dim: int
    """U, the size of the encoder's output for a token."""

    def embed_tokens(self, text: str) -> Tensor:
        """Return the token embeddings (n, V) of a text."""
        ...

    def encode_prompts(self, context: Tensor, states: Sequence[str]) -> Tensor:
        """Return unit vectors (len(states), J) of the prompts [context (m, V), state]; the context gets gradients."""
        ...

    def encode_context(self, context: Tensor, state: str) -> Tensor:
        """Return the outputs (m, U) at the positions of the context (m, V), in a prompt of context and state.

        The state follows the context, or precedes it if the encoder is causal.
        """
        ...


class Pair(Protocol):
    """A vision-language pair beside the extractor of its image side."""

    text: Text | None
    """None: the text encoder is not installed."""

    def joint_maps(self, normals: Iterable[Tensor]) -> JointMaps:
        """Return the maps into the joint space; those that the pair lacks are fitted on normal images.

        Args:
            normals: raw features of all fit images, in batches (B, D, h, w).
        """
        ...


class SyntheticAnomalies(NamedTuple):
    """Fit images with synthetic defects: row k * n + i is the k-th variant of image i."""

    features: FeatureSource  # standardised
    coverage: Callable[[NDArray[np.int64]], Tensor]
    """Rows to (len(rows), h, w) float32, the share of each cell that is defective."""


class SyntheticDefects(NamedTuple):
    """Fit images with one synthetic defect each, from which experts are weighted."""

    features: FeatureSource
    images: NDArray[np.int64]  # (m,) the fit image of each
    coverage: Callable[[NDArray[np.int64]], Tensor]
    """As of `SyntheticAnomalies`."""


@dataclass(frozen=True, kw_only=True)
class FitData:
    """The training data of a head: fit images only, neither calibration nor test images."""

    features: FeatureSource
    """Features of n images, standardised per channel."""
    subclasses: NDArray[np.int64]
    """(n,) indices into `names`; all -1 when no labels were given."""
    names: tuple[str, ...]
    """`Sample.subclass_name` of each subclass; empty when no labels were given."""
    groups: NDArray[np.int64]
    """(n,) physical part, lot or session; statistics on "other images" use other groups."""
    holdout: NDArray[np.bool_]
    """(n,) fit images not used for gradients, but for early stopping and the score scale of the experts."""
    seed: int = 0
    category_names: tuple[str, ...] = ("default",)
    given_categories: NDArray[np.int64] | None = None
    """(n,) indices into `category_names`; None: all images are of the first."""
    mean: Tensor | None = None
    """(D,) of the raw features; raw = standardised * std + mean. None: the features are raw."""
    std: Tensor | None = None
    """(D,) of the raw features."""
    pair: Pair | None = None
    """The vision-language pair of the features; None if the head uses no text."""
    synthetic: SyntheticAnomalies | None = None
    """None: the head uses none."""
    defects: SyntheticDefects | None = None
    """None: the head uses none."""

    @property
    def categories(self) -> NDArray[np.int64]:
        """(n,) indices into `category_names`."""
        return np.zeros(len(self), dtype=np.int64) if self.given_categories is None else self.given_categories

    def __len__(self) -> int:
        """The number of images n."""
        return len(self.features)


class RawOutput(NamedTuple):
    """The output of a network for n prepared images, on the CPU; None if its head has no such output."""

    scores: NDArray[np.float32]  # (n, h, w) patch scores
    image_scores: NDArray[np.float32] | None = None  # (n,); None: the maximum of the smoothed map
    reconstruction: NDArray[np.float32] | None = None  # (n, h, w) distance to the reconstruction
    weights: NDArray[np.float32] | None = None  # (n, K) routing weights, see `Routing`
    subclass: NDArray[np.int64] | None = None  # (n,)
    distance: NDArray[np.float32] | None = None  # (n,)
    adapted: NDArray[np.bool_] | None = None  # (n,)
    nearest: NDArray[np.int64] | None = None  # (n, h, w) most similar stored patch, see `PatchScores`

    @classmethod
    def concatenate(cls, parts: Sequence[RawOutput]) -> RawOutput:
        """Join the outputs of several batches."""
        columns = zip(*parts, strict=True)
        fields: Any = (None if column[0] is None else np.concatenate(column) for column in columns)
        return cls(*fields)

    def take(self, images: slice | NDArray[np.generic]) -> RawOutput:
        """Return the outputs of some images."""
        fields: Any = (None if field is None else field[images] for field in self)
        return RawOutput(*fields)


class Routing(NamedTuple):
    """The subclass that each image is routed to."""

    weights: Tensor  # (B, K) float32 >= 0, rows sum to 1, zero for experts that were not selected
    subclass: Tensor  # (B,) int64 nearest subclass, an index into the head's subclass_names
    distance: Tensor  # (B,) float32 >= 0, to the nearest known subclass; comparable within a subclass
    adapted: Tensor  # (B,) bool, whether test-time adaption changed the features


class PatchScores(NamedTuple):
    """The output of a head for a batch."""

    scores: Tensor  # (B, h, w) float32
    image_scores: Tensor | None  # (B,) float32; None: the maximum of the smoothed map is the image's score
    routing: Routing | None  # None: the head does not route
    reconstruction: Tensor | None = None  # (B, h, w) float32, distance to the reconstruction; heads that decode
    nearest: Tensor | None = None  # (B, h, w) int64 most similar stored patch, a row of the head's `origins`


class ExpertWeight(NamedTuple):
    """The weight of an expert in the score of an image; the weights of an image add up to 1."""

    name: str
    weight: float


class DefectBox(NamedTuple):
    """A connected region of the map above the operating point, in pixels of the image on disk.

    Models that store good patches also give the region around the good patch that is most similar to the patch at the
    peak, in pixels of its own image; else these fields are None.
    """

    x: int
    y: int
    width: int
    height: int
    peak: float  # the map's highest value inside
    reference: str | None = None  # good image, its path below the common folder of the fit images
    reference_x: int | None = None
    reference_y: int | None = None
    reference_width: int | None = None
    reference_height: int | None = None


class PartReason(NamedTuple):
    """Why a part is not normal."""

    reason: str  # anomalous, unknown, unreadable or missing
    view: str | None  # name of the view; None: a view is missing, and the expected ones have no names
    inspection: int | None  # id of the stored inspection of the view, if there is one


class ViewBundle(NamedTuple):
    """The bundle that inspected an image of a part."""

    view: str
    bundle_hash: str | None  # None: the image could not be read


class OutcomeColumn(NamedTuple):
    """A field of `Outcome` or `PartOutcome` as tables, schemas and databases need it."""

    name: str
    annotation: Any  # as declared, for example `float | None`
    type: Any  # str, float, int or bool; of a list the NamedTuple of its items
    is_list: bool
    optional: bool
    max_length: int | None  # characters that a database keeps of a text; None: its default
    in_file: bool  # an array that is kept in a file of its own; tables hold its path

    def as_json(self, value: Any) -> Any:
        """Return the value as a JSON value; None for an array."""
        if self.is_list:
            return [self.type._make(item)._asdict() for item in value]
        return None if self.in_file else value


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Result for one image. If `error` is set, the image could not be read and the other fields are empty.

    This is the only list of the fields: CSV and Parquet columns, REST models and database columns derive from
    `columns()`. A further field also needs a migration in `serve/migrations/versions`.
    """

    image_path: str | None = field(metadata={"max_length": 500})
    verdict: Verdict | None = None
    pred_score: float | None = None
    p_value: float | None = None
    """Share of held-out normal images of the same subclass that score at least as high, in (0, 1].

    Every group has the same weight.
    """
    threshold: float | None = None
    false_alarm_rate: float | None = None
    category: str | None = None
    subclass: str | None = None
    subclass_distance: float | None = None
    subclass_p_value: float | None = None
    """Share of held-out normal images at least as far from the known subclasses, in (0, 1]."""
    unseen: bool = False
    """Whether the image was routed to no known subclass and classified by the threshold for unseen subclasses."""
    experts: tuple[ExpertWeight, ...] = ()
    """Experts that scored the image, largest weight first."""
    adapted: bool = False
    """Whether test-time adaption changed the features."""
    boxes: tuple[DefectBox, ...] = ()
    guarantee: Guarantee | None = None
    """What `false_alarm_rate` rests on."""
    anomaly_map: NDArray[np.float32] | None = field(default=None, repr=False, compare=False, metadata={"in_file": True})
    """(H, W) at the size of the image on disk."""
    brightness: float | None = None
    """Mean of the prepared pixels, 0 to 1. This and the next seven are what `normweave drift` compares.

    They are None where the pixels were not read, as for images of `evaluate` whose features are cached.
    """
    contrast: float | None = None
    """Standard deviation of the grey values, 0 to 0.5."""
    warmth: float | None = None
    """Logarithm of mean red divided by mean blue."""
    tint: float | None = None
    """Logarithm of mean green divided by the mean of red and blue."""
    sharpness: float | None = None
    """Logarithm of the share of high frequencies in the variance of the grey values."""
    map_level: float | None = None
    """Median of the patch scores, in units of the anomaly map."""
    peak_x: float | None = None
    """Place of the highest patch score, as share of the width, 0 to 1; of a moved part, in the reference image."""
    peak_y: float | None = None
    """As share of the height."""
    shift_x: float | None = None
    """Pixels by which the part is moved to the right of its place in the reference image of a region that follows it.

    This and the next three are None without such a region.
    """
    shift_y: float | None = None
    """The same downwards."""
    rotation: float | None = None
    """Degrees by which the part is turned clockwise."""
    correlation: float | None = None
    """Of the part with the reference image, -1 to 1."""
    height: int | None = None
    width: int | None = None
    latency_ms: float | None = None
    model: str | None = None
    bundle_hash: str | None = None
    error: str | None = field(default=None, metadata={"max_length": 4000})
    part_id: str | None = field(default=None, metadata={"max_length": 500})
    """The part that the image shows; images of one part have one verdict together. None: no part was named."""
    view: str | None = field(default=None, metadata={"max_length": 500})
    """Name of the view of the part."""

    @classmethod
    def columns(cls) -> tuple[OutcomeColumn, ...]:
        """Return the fields in their order, with their types."""
        return _columns(cls)  # type: ignore[arg-type] # mypy: the hash of a dataclass is that of its instances

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values, without the pixels of the map."""
        return {column.name: column.as_json(getattr(self, column.name)) for column in self.columns()}


@dataclass(frozen=True, kw_only=True)
class PartOutcome:
    """Result for a part of several views."""

    part_id: str
    verdict: PartVerdict
    images: int
    """Number of images of the part."""
    reasons: tuple[PartReason, ...] = ()
    """Why it is not normal, worst first."""
    bundles: tuple[ViewBundle, ...] = ()
    """Which bundle inspected each image, in their order."""

    @classmethod
    def columns(cls) -> tuple[OutcomeColumn, ...]:
        """Return the fields in their order, with their types."""
        return _columns(cls)  # type: ignore[arg-type] # mypy: the hash of a dataclass is that of its instances

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as JSON values."""
        return {column.name: column.as_json(getattr(self, column.name)) for column in self.columns()}


@cache
def _columns(outcome: type[Outcome | PartOutcome]) -> tuple[OutcomeColumn, ...]:
    annotations = get_type_hints(outcome)
    columns = []
    for one in fields(outcome):
        annotation = annotations[one.name]
        alternatives = [part for part in get_args(annotation) if part is not type(None)]
        optional = type(None) in get_args(annotation)
        base = alternatives[0] if optional else annotation
        is_list = get_origin(base) is tuple
        in_file = one.metadata.get("in_file", False)
        if is_list:
            base = get_args(base)[0]
        elif in_file or get_origin(base) is Literal:
            base = str
        columns.append(
            OutcomeColumn(one.name, annotation, base, is_list, optional, one.metadata.get("max_length"), in_file)
        )
    return tuple(columns)
