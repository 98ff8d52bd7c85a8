"""What a run keeps for the figures, beside its numbers: scores of every test image, maps of a few, where kinds lie."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave.atomic import write_atomically
from normweave.benchmark.evaluate import Contestant
from normweave.benchmark.protocols import Fold
from normweave.detector import Detector
from normweave.types import Sample

SHOWN = 7
"""Test images of a side whose maps are kept: of each category a good one, then defects, as many kinds as there are."""
LONGEST = 160
"""Longest side of a map that is kept."""
PLACED = 400
"""Images of each role, at most, whose place among the known kinds is kept."""
ROLES = ("fit and calibration", "good test images", "defective test images")


@dataclass(frozen=True, kw_only=True)
class RunArtifacts:
    """What a run has kept.

    Args:
        scores: by side, (n, 3) of the test images that could be judged: whether anomalous, pred_score, threshold.
        maps: by side, those of `shown`, (h, w) each; None where the image could not be judged.
        places: (n, C) in the space in which the head tells kinds apart; None: it has none.
        kinds: `Sample.subclass_name` of each of the places.
        roles: (n,) indices into `ROLES`.
    """

    scores: dict[str, NDArray[np.float64]]
    maps: dict[str, list[NDArray[np.float32] | None]]
    places: NDArray[np.float32] | None
    kinds: tuple[str, ...]
    roles: NDArray[np.int64]


def shown(tests: Sequence[Sample]) -> list[Sample]:
    """The images whose maps are kept, the same for every method: nothing that was measured decides.

    Of each category one good image, then one of each kind of defect, from different places of the lists.
    """
    found: dict[tuple[str, str], list[Sample]] = {}
    for sample in sorted(tests, key=lambda one: str(one.image_path)):
        if sample.label == "normal" or sample.mask_path is not None:
            defect = "" if sample.label == "normal" else sample.defect or "defect"
            found.setdefault((sample.category, defect), []).append(sample)
    drawn = {
        where: samples[len(samples) * (2 * place + 1) // (2 * len(found))]
        for place, (where, samples) in enumerate(sorted(found.items()))
    }
    queues = [
        [sample for (category, _), sample in drawn.items() if category == own]
        for own in dict.fromkeys(category for category, _ in drawn)
    ]
    taken = {id(one) for one in islice(_in_turn(queues), SHOWN)}
    return [sample for sample in drawn.values() if id(sample) in taken]


def _in_turn(queues: Sequence[Sequence[Sample]]) -> Iterator[Sample]:
    for place in range(max(map(len, queues), default=0)):
        yield from (queue[place] for queue in queues if place < len(queue))


def keep(
    path: Path,
    contestant: Contestant,
    fold: Fold,
    predictions: dict[str, list[dict[str, Any]]],
    *,
    cache: Path | None,
) -> None:
    """Write what the figures need.

    Args:
        predictions: by side, the rows of `measure`.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {f"scores/{side}": _scores(rows) for side, rows in predictions.items()}
    for side, tests in fold.tests.items():
        if contestant.image_level:
            break
        chosen = shown(tests)
        number = {sample: place for place, sample in enumerate(chosen)}
        for sample, outcome in contestant.stream_samples(chosen, cache=cache):
            if outcome.anomaly_map is not None:
                tensors[f"maps/{side}/{number[sample]}"] = small(outcome.anomaly_map)
    kinds: list[str] = []
    if isinstance(contestant, Detector):
        roles, rows = [], []
        for role, samples in enumerate(_of_each_role(fold)):
            for sample, place in contestant.stream_embeddings(samples, cache=cache):
                roles.append(role)
                rows.append(place)
                kinds.append(sample.subclass_name)
        if rows:
            tensors |= {"places": np.stack(rows), "roles": np.array(roles, dtype=np.int64)}
    about = {"kinds": json.dumps(kinds)}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=about))


def read(path: Path, fold: Fold) -> RunArtifacts:
    """What `keep` has written of this fold."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        about = file.metadata()
    return RunArtifacts(
        scores={side: tensors[f"scores/{side}"] for side in fold.tests},
        maps={
            side: [tensors.get(f"maps/{side}/{number}") for number in range(len(shown(tests)))]
            for side, tests in fold.tests.items()
        },
        places=tensors.get("places"),
        kinds=tuple(json.loads(about["kinds"])),
        roles=tensors.get("roles", np.empty(0, dtype=np.int64)),
    )


def _scores(rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    judged = [row for row in rows if row["error"] is None]
    return np.array(
        [(row["label"] == "anomalous", row["pred_score"], row["threshold"]) for row in judged],
        dtype=np.float64,
    ).reshape(-1, 3)


def small(picture: NDArray[Any]) -> NDArray[Any]:
    """A map or mask (h, w), or an image (h, w, 3), with no side longer than `LONGEST`."""
    height, width = picture.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


def _of_each_role(fold: Fold) -> list[list[Sample]]:
    """Images spread evenly over each of `ROLES`."""
    tests = [sample for side in fold.tests.values() for sample in side]
    roles = [
        list(fold.samples),
        [sample for sample in tests if sample.label == "normal"],
        [sample for sample in tests if sample.label == "anomalous"],
    ]
    return [
        [samples[place] for place in np.linspace(0, len(samples) - 1, min(PLACED, len(samples))).astype(int)]
        for samples in roles
    ]
