"""Score every good image by a head that was fitted without its group, so that all images both fit and calibrate.

Barber, Candès, Ramdas and Tibshirani 2021, "Predictive inference with the jackknife+" (arXiv 1905.02928), section 3:
the scores of a K-fold cross-validation. CV+ there scores a new image by all K heads, and its error rate is at most
about twice the requested one. A detector has one head, fitted to all images, for which this bound is not proved: the
rate is approximate. No torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normweave.data import rows
from normweave.detector import VARIED, Detector
from normweave.scoring import HeldOut, ImageScore
from normweave.types import Progress

FAR = 6.0
"""Robust standard deviations (1.4826 MAD) above the median from which a training image is a suspect."""
MOST = 0.1
"""Largest share of the training images that are suspects."""
FEWEST = 5
"""Smallest number of images of a subclass whose median is meaningful."""

FitPart = Callable[[NDArray[np.int64], NDArray[np.int64]], Detector]
"""Fits a detector to the first rows; the second rows are held out."""


def held_out_scores(
    final: Detector,
    images: rows.Rows,
    folds: Sequence[NDArray[np.int64]],
    fit: FitPart,
    *,
    cache: Path | None = None,
    progress: Progress | None = None,
) -> list[HeldOut]:
    """Return the scores of the images of all folds, each by a head that is fitted to the other folds.

    The subclass of an image is an index into the subclasses of `final`. An image whose labelled subclass is in its fold
    only is scored as an image of an unseen subclass, which it is for that head: its score is also its
    leave-one-subclass-out score. A head that knows the subclass gives a lower score, so that the threshold is too high
    rather than too low.

    Args:
        final: fitted to the rows of all folds.
        images: the rows that the folds divide.
        folds: rows of each fold.
    """
    everything = np.concatenate(folds)
    most_varied = VARIED // len(folds)
    result = []
    for fold in folds:
        others = np.setdiff1d(everything, fold)
        detector = fit(others, fold)
        index = _matching_subclasses(detector, final, images, others, cache=cache)

        def renamed(image: ImageScore, index: Sequence[int] = index) -> ImageScore:
            return image if image.subclass is None else image._replace(subclass=index[image.subclass])

        for each in detector.held_out_scores(images, fold, most_varied=most_varied, cache=cache, progress=progress):
            own, unseen = renamed(each.own), each.unseen and renamed(each.unseen)
            varied = tuple(renamed(image) for image in each.varied)
            label = images.samples[each.number].subclass_name
            if label in final.subclass_names and label not in detector.subclass_names:
                unseen = own
                own = own._replace(subclass=final.subclass_names.index(label))
            result.append(each._replace(own=own, unseen=unseen if final.network.can_exclude else None, varied=varied))
    return result


def suspects(held_out: Sequence[HeldOut], images: rows.Rows) -> list[tuple[str, float]]:
    """Return path and score of the training images that may be defective, highest above their subclass first.

    Their held-out score is more than `FAR` robust standard deviations above the median of their labelled subclass, and
    they are at most the share `MOST` of all images. The standard deviation is that of all differences from the medians.
    """
    members: dict[str, list[int]] = {}
    for index, each in enumerate(held_out):
        members.setdefault(images.samples[each.number].subclass_name, []).append(index)
    scores = np.array([each.own.score for each in held_out])
    above: dict[int, float] = {}
    for own in members.values():
        if len(own) >= FEWEST:
            above |= zip(own, (scores[own] - np.median(scores[own])).tolist(), strict=True)
    if not above:
        return []
    spread = 1.4826 * float(np.median(np.abs(list(above.values()))))
    far = sorted((index for index in above if above[index] > FAR * spread), key=lambda index: -above[index])
    chosen = far[: int(MOST * len(held_out))] if spread > 0 else []
    return [(str(images.samples[held_out[index].number].image_path), float(scores[index])) for index in chosen]


def record(held_out: Sequence[HeldOut], images: rows.Rows) -> dict[str, Any]:
    """Return the held-out score of every training image and the suspects, as the record of a detector holds them.

    `held_out_scores` lists path, score and leave-one-subclass-out score, or None where there is none.
    """
    return {
        "held_out_scores": [
            [str(images.samples[each.number].image_path), each.own.score, each.unseen and each.unseen.score]
            for each in held_out
        ],
        "suspects": [list(each) for each in suspects(held_out, images)],
    }


def _matching_subclasses(
    detector: Detector, final: Detector, images: rows.Rows, fitted: NDArray[np.int64], *, cache: Path | None
) -> list[int]:
    """Return for each subclass of a detector the subclass of `final` with the same name.

    The names of discovered subclasses are numbers in an order of their own: there it is the subclass to which `final`
    routes most of the images.
    """
    names = final.subclass_names
    if len(names) == 1:
        return [0] * len(detector.subclass_names)
    if set(detector.subclass_names) <= {sample.subclass_name for sample in images.samples}:
        return [names.index(name) for name in detector.subclass_names]
    own, theirs = (
        [ImageScore.of(one.own).subclass for one in each.score_rows(images, fitted, cache=cache)]
        for each in (detector, final)
    )
    votes: list[Counter[int]] = [Counter() for _ in detector.subclass_names]
    for subclass, wanted in zip(own, theirs, strict=True):
        if subclass is not None and wanted is not None:
            votes[subclass][wanted] += 1
    return [count.most_common(1)[0][0] if count else 0 for count in votes]
