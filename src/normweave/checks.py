"""Checks: prepared calibration images in a bundle with the raw outputs of its graph.

They show that a graph gives the same scores elsewhere, and that a changed bundle scores other images as before. A
bundle holds them in checks.json: the images as PNG, the outputs as bytes. It is JSON because the base install cannot
read safetensors.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave import bundle
from normweave.errors import BundleError, CheckError
from normweave.types import RawOutput

FILE = "checks.json"
MOST = 32
"""Tiles that are stored in the training, at most."""
OF_ADDED = 4
"""Tiles that are stored of each added subclass, at most."""
BATCH = 8
"""Tiles in a pass; always the same, so that a library computes them in the same way."""
TOLERANCE = 1e-3
"""Largest relative difference of scores on another machine, as between torch and a graph when a bundle is written."""
CELLS = 0.99
"""Share of a map's cells that must agree on another machine."""

Run = Callable[[NDArray[np.uint8]], RawOutput]
"""Computes the raw outputs of (n, 3, height, width) prepared pixels."""


@dataclass(frozen=True, eq=False)
class Checks:
    """Prepared images (n, 3, height, width) and the raw outputs of the graph."""

    pixels: NDArray[np.uint8]
    outputs: RawOutput

    @classmethod
    def compute(cls, network: Run, pixels: NDArray[np.uint8]) -> Checks:
        """Return the images with what the network gives for them."""
        return cls(pixels, outputs(network, pixels))

    def joined(self, other: Checks) -> Checks:
        """Return these images and those of `other`."""
        both = RawOutput.concatenate([self.outputs, other.outputs])
        return Checks(np.concatenate([self.pixels, other.pixels]), both)

    def kept(self, chosen: NDArray[np.bool_]) -> Checks:
        """Return some of the images (n,)."""
        return Checks(self.pixels[chosen], self.outputs.take(chosen))

    def to_bytes(self) -> bytes:
        """Return checks.json."""
        fields = {name: value for name, value in self.outputs._asdict().items() if value is not None}
        record = {
            "images": [base64.b64encode(_png(each)).decode() for each in self.pixels],
            "outputs": {
                name: {
                    "type": value.dtype.str,
                    "shape": list(value.shape),
                    "data": base64.b64encode(np.ascontiguousarray(value).tobytes()).decode(),
                }
                for name, value in fields.items()
            },
        }
        return json.dumps(record, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, content: bytes, *, where: str) -> Checks:
        """Read what `to_bytes` returned.

        Raises:
            BundleError: it is not that.
        """
        try:
            record = json.loads(content)
            pixels = np.stack([_pixels(base64.b64decode(each, validate=True)) for each in record["images"]])
            found = {
                name: np.frombuffer(base64.b64decode(each["data"], validate=True), dtype=_type(each["type"])).reshape(
                    each["shape"]
                )
                for name, each in record["outputs"].items()
            }
            output = RawOutput(**found)
            if any(len(value) != len(pixels) for value in found.values()):
                raise ValueError("not one output for each image")
        except (KeyError, TypeError, ValueError, OSError, RecursionError, Image.DecompressionBombError) as error:
            raise BundleError(
                f"{where} does not hold images and outputs: {error}. Copy the bundle again, or train it again."
            ) from error
        return cls(pixels, output)


def outputs(network: Run, pixels: NDArray[np.uint8]) -> RawOutput:
    """Return the raw outputs, computed in passes of `BATCH` tiles."""
    return RawOutput.concatenate([network(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])


def bundle_files(checks: Checks | None) -> dict[str, bytes]:
    """Return the file of a bundle that holds the checks, by name; none without checks."""
    return {} if checks is None else {FILE: checks.to_bytes()}


def read(folder: Path) -> Checks | None:
    """Return the checks of a bundle, or None if it has none.

    Raises:
        BundleError: the file is damaged.
    """
    if not bundle.lists(folder, FILE):
        return None
    return Checks.from_bytes(bundle.read_file(folder, FILE), where=f"{folder}/{FILE}")


class Comparison(NamedTuple):
    """Tiles scored by a bundle and by the bundle that was made of it."""

    tiles: int
    equal: int
    """Routed as before, and map and scores have the same bits."""
    moved: tuple[int, ...]
    """Tiles that are nearer to the new subclass, or used the removed one."""


def compare(
    old: RawOutput, new: RawOutput, *, kept: Sequence[int], affected: NDArray[np.bool_] | None = None
) -> Comparison:
    """Check that maps and scores have the same bits for all tiles that are routed as before.

    Args:
        kept: the index in the old bundle of each subclass of the new one; -1: it is new.
        affected: (n,) tiles whose scores may change though they are routed as before; None: none.

    Raises:
        CheckError: a map or score has other bits.
    """
    assert old.subclass is not None
    assert new.subclass is not None
    before = np.asarray(kept)[new.subclass]
    moved = before != old.subclass
    if affected is not None:
        moved |= affected
    for name in ("scores", "image_scores", "distance"):
        mine, other = getattr(old, name), getattr(new, name)
        if mine is None:
            continue
        wrong = (mine != other).reshape(len(mine), -1).any(axis=1) & ~moved
        if wrong.any():
            first = int(wrong.argmax())
            difference = float(np.abs(mine[first].astype(np.float64) - other[first]).max())
            raise CheckError(
                f"The {name} of {int(wrong.sum())} of {len(mine)} images that are routed as before have changed, by "
                f"up to {difference:.3g} in the first, and no bit may change. So no bundle is written. Use the version "
                "of normweave, torch and onnxscript that the bundle was trained with, or train it again with this one."
            )
    return Comparison(len(moved), int((~moved).sum()), tuple(np.flatnonzero(moved).tolist()))


def check_recorded(recorded: RawOutput, now: RawOutput) -> dict[str, Any]:
    """Compare the outputs of this machine with the recorded ones.

    Returns:
        The number of tiles, how many have the same bits, and the largest difference of a score from the recorded one,
        relative to the larger of this score and the mean absolute score.

    Raises:
        CheckError: they differ by more than another machine explains.
    """
    for name in RawOutput._fields:
        mine, other = getattr(recorded, name), getattr(now, name)
        neither = mine is None and other is None
        if not neither and (mine is None or other is None or mine.shape != other.shape):
            raise CheckError(f"The graph does not return {name} in the recorded form. Copy the bundle again.")
    same = np.ones(len(recorded.scores), dtype=np.bool_)
    largest = 0.0
    for name, share in (("scores", CELLS), ("image_scores", 1.0), ("distance", 1.0), ("weights", 1.0)):
        mine, other = getattr(recorded, name), getattr(now, name)
        if mine is None:
            continue
        same &= (mine == other).reshape(len(mine), -1).all(axis=1)
        difference = np.abs(mine - other) / np.maximum(np.maximum(np.abs(mine), np.abs(mine).mean()), 1e-12)
        if float((difference <= TOLERANCE).mean()) < share:
            raise CheckError(
                f"The {name} that the graph gives on this machine differ from the recorded ones by up to "
                f"{float(difference.max()):.3g} of the value, and {TOLERANCE:g} is allowed. Update onnxruntime, or "
                "copy the bundle again."
            )
        if name != "scores":
            largest = max(largest, float(difference.max()))
    return {"tiles": len(same), "same_bits": int(same.sum()), "largest_difference": largest}


def _png(pixels: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0))).save(content, "PNG")
    return content.getvalue()


def _pixels(content: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def _type(text: str) -> np.dtype[Any]:
    """Return a type of numbers; nothing else may be read from a file."""
    if text not in ("<f4", "<i8", "|b1"):
        raise ValueError(f"type {text!r:.20}")
    return np.dtype(text)
