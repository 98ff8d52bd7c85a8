"""Fit the alignment of the offline pair and write alignment.safetensors: `python -m normweave.features.align`.

The image network and the text encoder share only the 1000 ImageNet classes: each class is a row of the image network's
classifier and a sentence, `tench, Tinca tinca: freshwater dace-like game fish ...`. Regularized canonical correlation
analysis (Vinod 1976, "Canonical ridge and econometrics of joint production", J. Econometrics 4) finds the directions in
which both correlate. The accuracy on held-out classes is printed.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from timm.data import ImageNetInfo  # type: ignore[attr-defined]

from normweave.atomic import write_atomically
from normweave.features import minilm, offline_pair, weights
from normweave.features.offline_pair import FILE, JOINT, VISION, Alignment

Matrix = NDArray[np.float64]

CLASSES = 1000
TEXT_RIDGE, IMAGE_RIDGE = 3.0, 10.0
"""la and lb. No other pair of 1, 3, 10 and 30 was clearly better by `cross_validate`."""
FOLDS = 10
BATCH_TEXTS = 25


class Projections(NamedTuple):
    """Projections of centred text embeddings and of image features into the joint space."""

    text_mean: Matrix  # (384,)
    text: Matrix  # (384, k)
    image: Matrix  # (1280, k)


def definitions() -> list[str]:
    """Return WordNet's name and definition of each ImageNet class, in the order of the classifier."""
    info = ImageNetInfo()
    return [info.index_to_description(index, detailed=True) for index in range(CLASSES)]


@torch.no_grad()
def embed(texts: list[str]) -> Matrix:
    """Return MiniLM's sentence embeddings (n, 384), unit vectors."""
    model = minilm.load()
    parts = [
        model.embed(model.embed_tokens(""), texts[start : start + BATCH_TEXTS])
        for start in range(0, len(texts), BATCH_TEXTS)
    ]
    return torch.cat(parts).double().numpy()


def classifier() -> Matrix:
    """Return the classifier weights of the image network, (1000, 1280)."""
    rows: Matrix = offline_pair.vision(random=False).classifier.weight.double().numpy()
    return rows


def align(
    text: Matrix,
    rows: Matrix,
    *,
    k: int = JOINT,
    text_ridge: float = TEXT_RIDGE,
    image_ridge: float = IMAGE_RIDGE,
) -> Projections:
    """Fit a regularized canonical correlation of texts and classifier rows of the same classes.

    With T the centred texts and W the centred rows scaled to length one,

        (T'T + la I)^-1/2 T'W (W'W + lb I)^-1/2 = U S V'
        P_text = (T'T + la I)^-1/2 U_k S_k,    P_image = (W'W + lb I)^-1/2 V_k S_k,

    so that the weight of a direction in a cosine is its correlation. The sign of each column is chosen so that the
    largest entry of the column of P_text is positive.

    Args:
        text: (n, 384), unit vectors.
        rows: (n, 1280).
    """
    mean = text.mean(0)
    centred = text - mean  # T
    images = directions(rows, rows.mean(0))  # W
    text_root = _inverse_root(centred.T @ centred, text_ridge)
    image_root = _inverse_root(images.T @ images, image_ridge)
    left, correlations, right = np.linalg.svd(text_root @ centred.T @ images @ image_root, full_matrices=False)
    text_projection = text_root @ (left[:, :k] * correlations[:k])
    image_projection = image_root @ (right[:k].T * correlations[:k])
    sign = np.sign(text_projection[np.abs(text_projection).argmax(0), np.arange(k)])
    return Projections(mean, text_projection * sign, image_projection * sign)


def directions(rows: Matrix, mean: Matrix) -> Matrix:
    """Return the classifier rows minus their mean, scaled to length one."""
    return _unit(rows - mean)


def _inverse_root(gram: Matrix, ridge: float) -> Matrix:
    """Return (gram + ridge I)^-1/2 of a symmetric matrix."""
    values, vectors = np.linalg.eigh(gram)
    root: Matrix = (vectors / np.sqrt(values + ridge)) @ vectors.T
    return root


class Accuracy(NamedTuple):
    """Share of held-out texts whose own class is the most similar one, or among the five most similar."""

    top1: float  # among the held-out classes, in [0, 1]
    top5: float
    top1_of_all: float  # among all classes
    top5_of_all: float


def cross_validate(text: Matrix, rows: Matrix, *, k: int, text_ridge: float, image_ridge: float) -> Accuracy:
    """Return the accuracy of a ten-fold cross-validation over the classes."""
    order = np.random.default_rng(0).permutation(len(text))
    hits = []
    for held_out in np.array_split(order, FOLDS):
        fit = np.setdiff1d(order, held_out)
        fitted = align(text[fit], rows[fit], k=k, text_ridge=text_ridge, image_ridge=image_ridge)
        queries = _unit((text[held_out] - fitted.text_mean) @ fitted.text)  # (held out, k)
        classes = _unit(directions(rows, rows[fit].mean(0)) @ fitted.image)  # (n, k)
        similarity = queries @ classes.T  # (held out, n)
        own = similarity[np.arange(len(held_out)), held_out][:, None]
        rank = (similarity[:, held_out] > own).sum(1)
        rank_of_all = (similarity > own).sum(1)
        hits.append([(rank < 1).mean(), (rank < 5).mean(), (rank_of_all < 1).mean(), (rank_of_all < 5).mean()])
    return Accuracy(*np.mean(hits, axis=0).tolist())


def _unit(rows: Matrix) -> Matrix:
    unit: Matrix = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def write(projections: Projections, path: Path) -> None:
    """Write an alignment file that `offline_pair.alignment` reads."""
    tensors = Alignment(*(torch.from_numpy(array).float().contiguous() for array in projections))
    package = weights.PACKAGES[VISION].pip_name
    provenance = {
        "made by": "python -m normweave.features.align",
        "k": projections.text.shape[1],
        "la": TEXT_RIDGE,
        "lb": IMAGE_RIDGE,
        "texts": "timm.data.ImageNetInfo().index_to_description(i, detailed=True), i = 0..999",
        "timm": version("timm"),
        package: version(package),
        minilm.PIP_NAME: version(minilm.PIP_NAME),
    }
    # One metadata entry: safetensors writes several in an order that changes from run to run.
    content = safetensors.torch.save(tensors._asdict(), metadata={"alignment": json.dumps(provenance)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def main() -> None:
    """Write the alignment file of this package and print its cross-validated accuracy."""
    text, rows = embed(definitions()), classifier()
    write(align(text, rows), FILE)
    control = np.random.default_rng(1).permutation(CLASSES)
    for name, texts in (("definitions", text), ("control: shuffled", text[control])):
        accuracy = cross_validate(texts, rows, k=JOINT, text_ridge=TEXT_RIDGE, image_ridge=IMAGE_RIDGE)
        sys.stdout.write(f"{name:>20}: " + ", ".join(f"{key} {value:.3f}" for key, value in accuracy._asdict().items()))
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
