"""Make the package file alignment.safetensors: `python -m normweave.features.align`.

Joins two networks that have nothing in common but the 1000 ImageNet classes: each class is a row of the image network's
classifier and a sentence, `tench, Tinca tinca: freshwater dace-like game fish ...`. Regularised canonical correlation
analysis (Vinod 1976, "Canonical ridge and econometrics of joint production", J. Econometrics 4) finds the directions in
which both agree. How well they agree on classes that were left out is written out along with it.
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
from normweave.features import carried, minilm, offline_pair
from normweave.features.offline_pair import FILE, JOINT, VISION, Alignment

Matrix = NDArray[np.float64]

CLASSES = 1000
TEXT_RIDGE, IMAGE_RIDGE = 3.0, 10.0
"""la and lb. Of the pairs out of 1, 3, 10 and 30 tried with `held_out` none was clearly better."""
FOLDS = 10
BATCH_TEXTS = 25


class Ways(NamedTuple):
    """From centred text embeddings and from image features to the joint space."""

    text_mean: Matrix  # (384,)
    text: Matrix  # (384, k)
    image: Matrix  # (1280, k)


def definitions() -> list[str]:
    """What each ImageNet class is called and means, by WordNet, in the order of the classifier."""
    info = ImageNetInfo()
    return [info.index_to_description(index, detailed=True) for index in range(CLASSES)]


@torch.no_grad()
def embed(texts: list[str]) -> Matrix:
    """MiniLM's sentence embeddings, (n, 384), each of length one."""
    model = minilm.load()
    parts = [
        model.embed(model.words(""), texts[start : start + BATCH_TEXTS])
        for start in range(0, len(texts), BATCH_TEXTS)
    ]
    return torch.cat(parts).double().numpy()


def classifier() -> Matrix:
    """What the image network looks for in each class, (1000, 1280)."""
    rows: Matrix = offline_pair.vision(random=False).classifier.weight.double().numpy()
    return rows


def align(
    text: Matrix,
    rows: Matrix,
    *,
    k: int = JOINT,
    text_ridge: float = TEXT_RIDGE,
    image_ridge: float = IMAGE_RIDGE,
) -> Ways:
    """Regularised canonical correlation of texts and classifier rows of the same classes.

    With T the centred texts and W the centred rows at length one,

        (T'T + la I)^-1/2 T'W (W'W + lb I)^-1/2 = U S V'
        P_text = (T'T + la I)^-1/2 U_k S_k,    P_image = (W'W + lb I)^-1/2 V_k S_k,

    so that a direction counts in a cosine by how well it is shared. Signs are free; the largest entry of each column of
    P_text is positive.

    Args:
        text: (n, 384), each of length one.
        rows: (n, 1280).
    """
    mean = text.mean(0)
    centred = text - mean  # T
    images = directions(rows, rows.mean(0))  # W
    text_root = _inverse_root(centred.T @ centred, text_ridge)
    image_root = _inverse_root(images.T @ images, image_ridge)
    left, shared, right = np.linalg.svd(text_root @ centred.T @ images @ image_root, full_matrices=False)
    text_way = text_root @ (left[:, :k] * shared[:k])
    image_way = image_root @ (right[:k].T * shared[:k])
    sign = np.sign(text_way[np.abs(text_way).argmax(0), np.arange(k)])
    return Ways(mean, text_way * sign, image_way * sign)


def directions(rows: Matrix, mean: Matrix) -> Matrix:
    """Rows of a classifier less what all have in common, at length one."""
    return _unit(rows - mean)


def _inverse_root(gram: Matrix, ridge: float) -> Matrix:
    """(gram + ridge I)^-1/2 of a symmetric matrix."""
    values, vectors = np.linalg.eigh(gram)
    root: Matrix = (vectors / np.sqrt(values + ridge)) @ vectors.T
    return root


class Found(NamedTuple):
    """How often a text that the alignment has not seen finds its class, first or among the first five."""

    top1: float  # among the classes left out, in [0, 1]
    top5: float
    top1_of_all: float  # among all classes
    top5_of_all: float


def held_out(text: Matrix, rows: Matrix, *, k: int, text_ridge: float, image_ridge: float) -> Found:
    """Cross-validation over the classes: align on nine tenths, look up the texts of the last tenth among the rows."""
    order = np.random.default_rng(0).permutation(len(text))
    hits = []
    for left_out in np.array_split(order, FOLDS):
        fit = np.setdiff1d(order, left_out)
        ways = align(text[fit], rows[fit], k=k, text_ridge=text_ridge, image_ridge=image_ridge)
        asked = _unit((text[left_out] - ways.text_mean) @ ways.text)  # (left out, k)
        known = _unit(directions(rows, rows[fit].mean(0)) @ ways.image)  # (n, k)
        alike = asked @ known.T  # (left out, n)
        right = alike[np.arange(len(left_out)), left_out][:, None]
        rank = (alike[:, left_out] > right).sum(1)
        rank_of_all = (alike > right).sum(1)
        hits.append(
            [(rank < 1).mean(), (rank < 5).mean(), (rank_of_all < 1).mean(), (rank_of_all < 5).mean()]
        )
    return Found(*np.mean(hits, axis=0).tolist())


def _unit(rows: Matrix) -> Matrix:
    unit: Matrix = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def write(ways: Ways, path: Path) -> None:
    """Put an alignment into a file that `offline_pair.alignment` reads."""
    tensors = Alignment(*(torch.from_numpy(array).float().contiguous() for array in ways))
    package = carried.CARRIED[VISION].pip_name
    made = {
        "made by": "python -m normweave.features.align",
        "k": ways.text.shape[1],
        "la": TEXT_RIDGE,
        "lb": IMAGE_RIDGE,
        "texts": "timm.data.ImageNetInfo().index_to_description(i, detailed=True), i = 0..999",
        "timm": version("timm"),
        package: version(package),
        minilm.PIP_NAME: version(minilm.PIP_NAME),
    }
    # One metadata entry: safetensors writes several in an order that changes from run to run.
    content = safetensors.torch.save(tensors._asdict(), metadata={"alignment": json.dumps(made)})
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def main() -> None:
    """Make the package file anew and say how good it is."""
    text, rows = embed(definitions()), classifier()
    write(align(text, rows), FILE)
    control = np.random.default_rng(1).permutation(CLASSES)
    for name, texts in (("definitions", text), ("control: shuffled", text[control])):
        found = held_out(texts, rows, k=JOINT, text_ridge=TEXT_RIDGE, image_ridge=IMAGE_RIDGE)
        sys.stdout.write(
            f"{name:>20}: " + ", ".join(f"{key} {value:.3f}" for key, value in found._asdict().items())
        )
        sys.stdout.write("\n")


if __name__ == "__main__":
    main()
