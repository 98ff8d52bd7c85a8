"""Save what the figures need beside the metrics of a run: scores of all test images, some maps, embeddings."""

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
from normweave.benchmark.protocols import Fold
from normweave.detector import Detector
from normweave.types import Sample

SHOWN = 7
"""How many maps are saved of each test set: one good image of each category, then one image of each defect."""
LONGEST = 160
"""Longest side of a saved map in pixels."""
EMBEDDED = 400
"""How many images of each role have their embedding saved, at most."""
ROLES = ("fit and calibration", "good test images", "defective test images")


@dataclass(frozen=True, kw_only=True)
class RunArtifacts:
    """What a run has saved.

    Args:
        scores: by test set, (n, 3) of the readable test images: whether anomalous, pred_score, threshold.
        maps: by test set, those of `shown`, (h, w) each; None where the image could not be read.
        embeddings: (n, C) embeddings of images, in which the subclasses are separated; None if the head has none.
        subclass_names: `Sample.subclass_name` of each of the embeddings.
        roles: (n,) indices into `ROLES`.
    """

    scores: dict[str, NDArray[np.float64]]
    maps: dict[str, list[NDArray[np.float32] | None]]
    embeddings: NDArray[np.float32] | None
    subclass_names: tuple[str, ...]
    roles: NDArray[np.int64]


def shown(tests: Sequence[Sample]) -> list[Sample]:
    """Select the images whose maps are saved, the same for every method and independent of any result.

    One good image of each category, then one of each defect, from different positions of the lists.
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
    for index in range(max(map(len, queues), default=0)):
        yield from (queue[index] for queue in queues if index < len(queue))


def save(
    path: Path, detector: Detector, fold: Fold, predictions: dict[str, list[dict[str, Any]]], *, cache: Path | None
) -> None:
    """Write what the figures need to `path`.

    Args:
        predictions: by test set, the rows of `measure`.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, NDArray[Any]] = {f"scores/{side}": _scores(rows) for side, rows in predictions.items()}
    for side, tests in fold.tests.items():
        if detector.image_level:
            break
        chosen = shown(tests)
        number = {sample: index for index, sample in enumerate(chosen)}
        for sample, outcome, *_ in detector.stream_samples(chosen, cache=cache):
            if outcome.anomaly_map is not None:
                tensors[f"maps/{side}/{number[sample]}"] = small(outcome.anomaly_map)
    names: list[str] = []
    roles, embeddings = [], []
    for role, samples in enumerate(_of_each_role(fold)):
        for sample, embedding in detector.stream_embeddings(samples, cache=cache):
            roles.append(role)
            embeddings.append(embedding)
            names.append(sample.subclass_name)
    if embeddings:
        tensors |= {"embeddings": np.stack(embeddings), "roles": np.array(roles, dtype=np.int64)}
    about = {"subclass_names": json.dumps(names)}
    write_atomically(path, lambda partial: save_file(tensors, partial, metadata=about))


def read(path: Path, fold: Fold) -> RunArtifacts:
    """Read what `save` wrote for this fold."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        about = file.metadata()
    return RunArtifacts(
        scores={side: tensors[f"scores/{side}"] for side in fold.tests},
        maps={
            side: [tensors.get(f"maps/{side}/{number}") for number in range(len(shown(tests)))]
            for side, tests in fold.tests.items()
        },
        embeddings=tensors.get("embeddings"),
        subclass_names=tuple(json.loads(about["subclass_names"])),
        roles=tensors.get("roles", np.empty(0, dtype=np.int64)),
    )


def _scores(rows: Sequence[dict[str, Any]]) -> NDArray[np.float64]:
    readable = [row for row in rows if row["error"] is None]
    return np.array(
        [(row["label"] == "anomalous", row["pred_score"], row["threshold"]) for row in readable], dtype=np.float64
    ).reshape(-1, 3)


def small(image: NDArray[Any]) -> NDArray[Any]:
    """Reduce a map or mask (h, w) or an image (h, w, 3) so that no side is longer than `LONGEST`."""
    height, width = image.shape[:2]
    scale = min(1.0, LONGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def _of_each_role(fold: Fold) -> list[list[Sample]]:
    """Return images spread evenly over each of `ROLES`."""
    tests = [sample for side in fold.tests.values() for sample in side]
    roles = [
        list(fold.samples),
        [sample for sample in tests if sample.label == "normal"],
        [sample for sample in tests if sample.label == "anomalous"],
    ]
    return [
        [samples[index] for index in np.linspace(0, len(samples) - 1, min(EMBEDDED, len(samples))).astype(int)]
        for samples in roles
    ]
