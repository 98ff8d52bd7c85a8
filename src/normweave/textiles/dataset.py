"""Data sets of textile images with defects and exact masks, for the demo, the tests and the examples.

    Textile -> weave_piece -> (defect) -> photograph -> image, mask

A mask is where the photograph of the fabric with a defect differs visibly from that of the same fabric without it, so
it is exact by construction.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from normweave.data.manifest import write_manifest
from normweave.errors import ConfigError, DataError, unknown
from normweave.textiles import camera
from normweave.textiles.camera import LIGHTINGS
from normweave.textiles.defects import ADD_DEFECT, DEFECTS
from normweave.textiles.weave import COLOURS, WEAVES, weave_piece
from normweave.types import Sample, Split

DEFECT_SHARE = (0.002, 0.05)  # smallest and largest share of the image that a defect may cover
ATTEMPTS = 20  # draws of a defect before the best size is accepted
GENERATOR = 2  # raised whenever the same seed would give other images


@dataclass(frozen=True)
class Textile:
    """A subclass: fabric of one weave and colour under one lighting. The fields are keys of the tables of that name."""

    weave: str
    colour: str
    lighting: str

    def __post_init__(self) -> None:
        for field, value, known, module in (
            ("weave", self.weave, WEAVES, "weave"),
            ("colour", self.colour, COLOURS, "weave"),
            ("lighting", self.lighting, LIGHTINGS, "camera"),
        ):
            if value not in known:
                raise unknown(field, value, known, f"They are in a table in normweave/textiles/{module}.py.")

    @property
    def name(self) -> str:
        """The subclass's name, as in folders and manifests."""
        return f"{self.weave}-{self.colour}-{self.lighting}"


SEEN = (
    Textile("plain", "ecru", "diffuse"),
    Textile("twill", "indigo", "raking"),
    Textile("satin", "burgundy", "warm"),
    Textile("herringbone", "charcoal", "cold"),
    Textile("basket", "sand", "raking"),
    Textile("plain", "teal", "dim"),
)
UNSEEN = (
    Textile("twill", "olive", "warm"),
    Textile("satin", "navy", "diffuse"),
    Textile("herringbone", "rust", "dim"),
    Textile("rib", "ecru", "cold"),
)


class Photograph(NamedTuple):
    """A photograph of a piece of fabric and the mask of its defect."""

    image: NDArray[np.uint8]  # (H, W, 3)
    mask: NDArray[np.bool_]  # (H, W), true = defect


class Piece(NamedTuple):
    """One row of the manifest, and what determines its image."""

    sample: Sample
    textile: Textile
    seed: int
    roll: int


def render(
    textile: Textile,
    *,
    seed: int,
    size: tuple[int, int] = (256, 256),
    defect: str | None = None,
    roll: int | None = None,
) -> Photograph:
    """Return a photograph of a piece of fabric. With the same seed, a defect changes pixels inside its mask only.

    `roll` is the seed of what all pieces of one roll share; None gives every piece its own roll.
    """
    if defect is not None and defect not in ADD_DEFECT:
        raise unknown("defect", defect, DEFECTS, "They are the functions in normweave/textiles/defects.py.")
    weave, dye, lighting = WEAVES[textile.weave], COLOURS[textile.colour], LIGHTINGS[textile.lighting]
    fabric = weave_piece(weave, dye, roll=seed if roll is None else roll, seed=seed, size=size)
    setup = camera.set_up(weave, lighting, seed=seed, size=size)
    tables = camera.tabulate(fabric)
    height, width = fabric.shape
    reflected = np.empty((3, height, width), np.float32)
    camera.render_window(reflected, (slice(0, height), slice(0, width)), fabric, tables, setup)
    light = camera.expose(reflected, fabric, setup)
    pixels = camera.grey_levels(light, setup)  # (3, H, W)
    mask = np.zeros(size, np.bool_)
    if defect is not None:
        # A defect that covers too little or too much of the image is drawn again; after ATTEMPTS, the best one is used.
        smallest, largest = DEFECT_SHARE
        before, best_miss = camera.grey_levels(light), np.inf
        for attempt in range(ATTEMPTS):
            key = (4, zlib.crc32(defect.encode()), attempt)
            random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
            defective = ADD_DEFECT[defect](fabric, random)
            changed = camera.tabulate(defective)
            window = camera.changed_window(fabric, defective, tables, changed)
            again = reflected.copy()
            camera.render_window(again, window, defective, changed, setup)
            defective_light = camera.expose(again, fabric, setup)
            visible = camera.visible_change(before, camera.grey_levels(defective_light))
            share = float(visible.mean())
            miss = max(smallest - share, share - largest, 0.0)
            if miss < best_miss:
                best_miss, light, mask = miss, defective_light, visible
            if miss == 0:
                break
        pixels = np.where(mask, camera.grey_levels(light, setup), pixels)
    return Photograph(np.rint(np.moveaxis(pixels, 0, 2)).astype(np.uint8), mask)


def make_textures(
    folder: Path,
    *,
    seed: int = 0,
    size: tuple[int, int] = (256, 256),
    train_images: int,
    test_images: int,
    defect_images: int,
    seen: Sequence[Textile] = SEEN,
    unseen: Sequence[Textile] = UNSEEN,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a data set of textiles as plain folders with a manifest, and return the manifest's path.

    Counts are per subclass: `train_images` and `test_images` normal, `defect_images` anomalous, divided evenly among
    the types of defect. Unseen subclasses get no training images. Image number i does not depend on the counts. A
    folder made before with the same settings is left unchanged. `progress` is called with (done, total).

    Raises:
        ConfigError: a size, count or textile is invalid.
        DataError: the folder contains other files, textures of other settings, or only part of the images.
    """
    _check_settings(size, (train_images, test_images, defect_images), [*seen, *unseen])
    settings = {
        "generator": GENERATOR,
        "seed": seed,
        "size": list(size),
        "train_images": train_images,
        "test_images": test_images,
        "defect_images": defect_images,
        "seen": [textile.name for textile in seen],
        "unseen": [textile.name for textile in unseen],
    }

    def pieces(home: Path) -> list[Piece]:
        counts = [(textile, train_images) for textile in seen] + [(textile, 0) for textile in unseen]
        return [
            piece for textile, train in counts for piece in cut(textile, home, seed, train, test_images, defect_images)
        ]

    folder = Path(folder)
    manifest, record = folder / "manifest.csv", folder / "textures.json"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if not record.is_file():
            raise DataError(f"{folder} exists and contains no {record.name}. Choose an empty or a new folder.")
        if json.loads(record.read_text("utf-8")) != settings:
            raise DataError(
                f"{folder} contains textures made with other settings, see {record}. "
                "Choose another folder, or delete this one."
            )
        files = [path for piece in pieces(folder) for path in _files(piece)]
        if missing := [path for path in files if not path.is_file()]:
            raise DataError(
                f"{folder} misses {len(missing)} of its {len(files)} images, first "
                f"{missing[0].relative_to(folder).as_posix()}. Delete the folder to have it made again."
            )
        return manifest

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = folder.parent / f".{folder.name}.{os.getpid()}.unfinished"
    made = pieces(unfinished)
    try:
        for done, (sample, textile, piece_seed, roll) in enumerate(made, start=1):
            photograph = render(textile, seed=piece_seed, size=size, defect=sample.defect, roll=roll)
            pixels = (photograph.image, photograph.mask.astype(np.uint8) * 255)
            for path, values in zip(_files(made[done - 1]), pixels, strict=False):
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
            if progress is not None:
                progress(done, len(made))
        write_manifest((piece.sample for piece in made), unfinished / manifest.name)
        (unfinished / record.name).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")
        if folder.exists():
            folder.rmdir()  # empty, as checked above; some systems do not rename onto a folder
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return manifest


def cut(textile: Textile, folder: Path, seed: int, train: int, test: int, defects: int) -> Iterator[Piece]:
    """Yield the pieces of one subclass. All test pieces come from the same rolls; training pieces have other rolls."""
    home = folder / "cloth" / textile.name
    plan: list[tuple[Split, str | None, int, int]] = [  # split, defect, number in its folder, number in its part
        *(("train", None, number, number) for number in range(train)),
        *(("test", None, number, number) for number in range(test)),
        *(("test", DEFECTS[n % len(DEFECTS)], n // len(DEFECTS), n) for n in range(defects)),
    ]
    rolls = {split: _cut_rolls(textile, seed, split, max(train, test, defects)) for split in ("train", "test")}
    for split, defect, file_number, number in plan:
        roll = rolls[split][number]
        name, part = (defect, "anomalous") if defect else ("good", "normal")
        sample = Sample(
            image_path=home / split / name / f"{file_number:03d}.png",
            category="cloth",
            subclass=textile.name,
            group=f"{textile.name}/{split}-roll-{roll:03d}",
            split=split,
            label="anomalous" if defect else "normal",
            defect=defect,
            mask_path=home / "ground_truth" / name / f"{file_number:03d}.png" if defect else None,
        )
        yield Piece(
            sample,
            textile,
            seed=_derive_seed(seed, textile.name, split, part, number),
            roll=_derive_seed(seed, textile.name, split, "roll", roll),
        )


def _files(piece: Piece) -> list[Path]:
    """Return the path of the image and, if the piece has a defect, of its mask."""
    return [path for path in (piece.sample.image_path, piece.sample.mask_path) if path]


def _check_settings(size: tuple[int, int], counts: tuple[int, int, int], textiles: Sequence[Textile]) -> None:
    """Raise ConfigError that lists all invalid settings."""
    wrong = []
    if min(size) < 64:
        wrong.append(f"size must be 64 x 64 or more, got {size[0]} x {size[1]}")
    for setting, count in zip(("train_images", "test_images", "defect_images"), counts, strict=True):
        if count < 0:
            wrong.append(f"{setting} must be 0 or more, got {count}")
    names = [textile.name for textile in textiles]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        wrong.append(f"a textile may be named once, got twice: {', '.join(twice)}")
    if wrong:
        raise ConfigError("textures: " + "; ".join(wrong))


def _cut_rolls(textile: Textile, seed: int, split: str, pieces: int) -> list[int]:
    """Return the roll of each piece: two to four pieces per roll."""
    random = np.random.default_rng(_derive_seed(seed, textile.name, split, "rolls", 0))
    rolls: list[int] = []
    roll = 0
    while len(rolls) < pieces:
        rolls += [roll] * int(random.integers(2, 5))
        roll += 1
    return rolls[:pieces]


def _derive_seed(seed: int, name: str, split: str, part: str, number: int) -> int:
    """Return a seed that is independent of the seeds of other arguments."""
    key = (zlib.crc32(name.encode()), zlib.crc32(split.encode()), zlib.crc32(part.encode()), number)
    return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1, np.uint64)[0])
