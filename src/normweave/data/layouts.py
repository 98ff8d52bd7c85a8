"""How data sets lie on disk: a row each where folders say it all, else a function. All become samples."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from normweave.config import DataConfig
from normweave.data.manifest import ENDINGS, read_manifest
from normweave.errors import ConfigError, DataError, unknown
from normweave.types import Sample, Split

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
GOOD = ("good", "ok", "normal")
MASKS = "ground_truth"
SPLITS: dict[str, Split] = {"train": "train", "test": "test"}
MASK_FOLDERS = ("ground_truth", "gt", "mask", "masks")
VISA_TABLE = Path("split_csv") / "1cls.csv"
TILE_SPAN = 90
"""Magnetic tiles: shots of one tile have numbers at most this far from the next."""


@dataclass(frozen=True)
class Folders:
    """`category[/subclass]/{train,test}/{good,DEFECT}/STEM.*`; masks in `ground_truth/DEFECT/` beside train and test.

    Without train and test the splits are to be drawn. The root may itself be the category. Folders named good, ok or
    normal hold normal images, all others the defect that they are named after.
    """

    masks: tuple[str, ...]
    """Names that a mask may have; {stem} is its image's name without the ending."""
    source: str


def read_manifest_folder(root: Path) -> list[Sample]:
    """A folder with manifest.csv or manifest.parquet in it."""
    for ending in ENDINGS:
        if (root / f"manifest{ending}").is_file():
            return read_manifest(root / f"manifest{ending}")
    raise DataError(
        f"{root}: no manifest{' or manifest'.join(ENDINGS)} in it. Name the table itself, or another layout."
    )


def read_magnetic_tiles(root: Path) -> list[Sample]:
    """Huang, Qiu, Yuan 2020, "Surface defect saliency of magnetic tile", The Visual Computer.

    `MT_{Free,DEFECT}/expN_num_NUMBER.jpg` with a mask `.png` of the same stem. The subclass is expN, the imaging
    condition; the group is the tile: as `groups.csv` says, else shots whose numbers follow each other within 90.
    """
    images = [
        image for folder in _folders(root) for image in _images(folder) if image.suffix.lower() == ".jpg"
    ]
    names = {image: re.fullmatch(r"(exp\d+)_num_(\d+)", image.stem) for image in images}
    if odd := [image for image, name in names.items() if name is None]:
        raise DataError(f"{odd[0]}: a magnetic tile is named expN_num_NUMBER.jpg. Move other images away.")
    shots = {image: (name[1], int(name[2])) for image, name in names.items() if name is not None}
    tiles = _tiles_from_table(root) if (root / "groups.csv").is_file() else _tiles_from_numbers(root, shots)
    samples = []
    for image, (condition, _) in shots.items():
        key = image.relative_to(root).as_posix()
        if key not in tiles:
            raise DataError(
                f"{root / 'groups.csv'}: no row for {key}. Add it, or remove the table to group by number."
            )
        free = image.parent.name == "MT_Free"
        samples.append(
            Sample(
                image_path=image,
                category="magnetic_tiles",
                subclass=condition,
                group=tiles[key],
                label="normal" if free else "anomalous",
                defect=None if free else image.parent.name.removeprefix("MT_").lower(),
                mask_path=None if free else image.with_suffix(".png"),
            )
        )
    return samples


def _tiles_from_table(root: Path) -> dict[str, str]:
    with (root / "groups.csv").open(newline="", encoding="utf-8") as file:
        return {row["image"]: row["group"] for row in csv.DictReader(file)}


def _tiles_from_numbers(root: Path, shots: dict[Path, tuple[str, int]]) -> dict[str, str]:
    tiles = {}
    tile, last = 0, None
    for image, (_, number) in sorted(shots.items(), key=lambda shot: shot[1][1]):
        tile += last is not None and number - last > TILE_SPAN
        last = number
        tiles[image.relative_to(root).as_posix()] = f"tile{tile}"
    return tiles


def read_deep_pcb(root: Path) -> list[Sample]:
    """Tang et al. 2019, "Online PCB defect detector on a new PCB defect dataset", arXiv 1902.06197.

    `FAMILY/NAME_temp.jpg` is the template without defects, `NAME_test.jpg` the board, `NAME.txt` its boxes, which serve
    as the mask. Both show the same circuit, so NAME is the group, and the split is fixed: in each family the templates
    of the first half of the names train, without their boards; templates and boards of the others test.
    """
    samples = []
    for family in _folders(root):
        templates = [image for image in _images(family) if image.stem.endswith("_temp")]
        for number, template in enumerate(templates):
            name = template.stem.removesuffix("_temp")
            train = 2 * number < len(templates)
            board = Sample(
                image_path=template,
                category="deep_pcb",
                subclass=family.name,
                group=f"{family.name}/{name}",
                split="train" if train else "test",
            )
            samples.append(board)
            tested = template.with_name(f"{name}_test{template.suffix}")
            if not train and tested.is_file():
                mask = template.with_name(f"{name}.txt")
                samples.append(replace(board, image_path=tested, label="anomalous", mask_path=mask))
    return samples


def read_good_images(root: Path) -> list[Sample]:
    """A bare folder of good images, or of folders of good images, each of which is a subclass."""
    here = _images(root)
    folders = [folder for folder in _folders(root) if _images(folder)]
    if here and folders:
        raise DataError(
            f"{root} holds images ({here[0].name}) and folders of images ({folders[0].name}). A bare folder holds "
            "either good images or one folder a subclass: move the ones or the others away, or write a manifest."
        )
    category = _name(root)
    samples = [Sample(image_path=image, category=category) for image in here]
    for folder in folders:
        samples += [
            Sample(image_path=image, category=category, subclass=folder.name) for image in _images(folder)
        ]
    return samples


def read_visa(root: Path) -> list[Sample]:
    """Zou et al. 2022, "SPot-the-Difference self-supervised pre-training for anomaly detection", arXiv 2207.14315.

    As downloaded: `split_csv/1cls.csv` (object,split,label,image,mask; paths relative to the root) says what each image
    is. Or as the authors' `prepare_data.py` rewrites it: `[1cls/]OBJECT/{train,test}/{good,bad}/` and masks in
    `OBJECT/ground_truth/bad/`. The two-class tables are refused: they train on anomalous images.
    """
    table = root / VISA_TABLE
    if not table.is_file():
        home = root / "1cls"
        return list(
            _read_folders(home if home.is_dir() else root, Folders(("{stem}.png",), "VisA, prepared"))
        )
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{table}: cannot be read as CSV ({error}). Unpack the data set again.") from error
    columns = ["object", "split", "label", "image", "mask"]
    if reader.fieldnames != columns:
        raise DataError(
            f"{table}: columns are {', '.join(reader.fieldnames or ())}. VisA's are {', '.join(columns)}: unpack the "
            "data set again."
        )
    samples = []
    for number, row in enumerate(rows, start=2):
        split = SPLITS.get(row["split"] or "")
        if split is None or row["label"] not in ("normal", "anomaly") or not row["image"]:
            raise DataError(
                f"{table}, row {number}: split {row['split']!r}, label {row['label']!r}, image {row['image']!r}. "
                "Allowed: train or test, normal or anomaly, and a path: unpack the data set again."
            )
        samples.append(
            Sample(
                image_path=root / row["image"],
                category=row["object"],
                split=split,
                label="normal" if row["label"] == "normal" else "anomalous",
                mask_path=root / row["mask"] if row["mask"] else None,
            )
        )
    return samples


def read_texture_ad(root: Path) -> list[Sample]:
    """Lei et al. 2024, "Texture-AD: an anomaly detection dataset and benchmark", arXiv 2409.06367.

    A category (cloth, wafer, metal) a folder, a subclass (one product) a folder in it. Neither the paper nor the data
    card says how images lie below that, so it is read by the names of the folders above each image, in any order: train
    or test says the split, a word of `MASK_FOLDERS` makes it a mask, the innermost of the others is good or the defect,
    those before it are category and subclass. A mask has the stem of its image (or `STEM_mask`) and the same names
    above it, the defect's or not. The root may itself be a category. `normweave data check` says what was found.
    """
    found: list[tuple[Path, list[str], Split | None]] = []
    masks: dict[tuple[str, ...], Path] = {}
    masked: set[tuple[str, ...]] = set()
    for image in _below(root):
        folders = list(image.relative_to(root).parts[:-1])
        splits = {SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
        mask = any(name.lower() in MASK_FOLDERS for name in folders)
        names = [name for name in folders if name.lower() not in (*SPLITS, *MASK_FOLDERS)]
        if mask:
            masks[*names, image.stem.removesuffix("_mask")] = image
            masked.add(tuple(names[:2]))
            continue
        if len(names) not in (2, 3) or len(splits) > 1:
            raise DataError(
                f"{image}: folders {'/'.join(folders) or '(none)'}. Texture-AD is read as "
                "CATEGORY/SUBCLASS[/{train,test}]/{good,DEFECT}, train and test at any place and masks in a folder "
                f"named {', '.join(MASK_FOLDERS)}. Move other images away, or write a manifest."
            )
        found.append((image, names, next(iter(splits), None)))
    samples = []
    for image, names, split in found:
        category, subclass, kind = names if len(names) == 3 else (_name(root), *names)
        good = kind.lower() in GOOD
        place = tuple(names[:-1])
        mask_path = None
        if not good and any(home[: len(place)] == place for home in masked):
            mask_path = masks.get((*names, image.stem)) or masks.get((*place, image.stem))
            mask_path = mask_path or root.joinpath(*place, MASKS, kind, f"{image.stem}.png")
        samples.append(
            Sample(
                image_path=image,
                category=category,
                subclass=subclass,
                split=split,
                label="normal" if good else "anomalous",
                defect=None if good else kind,
                mask_path=mask_path,
            )
        )
    return samples


Reader = Callable[[Path], list[Sample]]

LAYOUTS: dict[str, Folders | Reader] = {
    "manifest": read_manifest_folder,
    "magnetic_tiles": read_magnetic_tiles,
    "deep_pcb": read_deep_pcb,
    "visa": read_visa,
    "texture_ad": read_texture_ad,
    "mvtec_ad": Folders(("{stem}_mask.png",), "Bergmann et al. 2019, MVTec AD, CVPR"),
    "mpdd": Folders(("{stem}_mask.png",), "Jezek et al. 2021, Deep learning-based defect detection, ICUMT"),
    "btad": Folders(("{stem}.png", "{stem}.bmp"), "Mishra et al. 2021, VT-ADL, arXiv 2104.10036"),
    "folders": Folders(("{stem}.png", "{stem}_mask.png", "{stem}.bmp"), "plain folders"),
    "good_images": read_good_images,
}


def read(root: str | os.PathLike[str], config: DataConfig, *, layout: str | None = None) -> list[Sample]:
    """The samples that `config` chooses from a manifest file, or from a folder in one of `LAYOUTS`.

    Without `layout` the folder is recognised (MVTec AD, MPDD and BTAD as `folders`, whose rules contain theirs).
    Subclasses are as the layout has them (`folder`), the manifest's (`column`), cut from the file's stem
    (`filename-regex`), or None (`auto`, `none`: the detector tells these apart); they are chosen by name before `auto`
    and `none` forget them.

    Raises:
        DataError: nothing there, nothing recognised, nothing good in it, or files that do not fit the layout.
        ConfigError: a layout, category or subclass of this name does not exist.
    """
    root = Path(root)
    if layout is not None and layout not in LAYOUTS:
        raise unknown(
            "layout", layout, LAYOUTS, "Other data sets: write a manifest (normweave data manifest)."
        )
    if root.is_file():
        samples = read_manifest(root)
    elif root.is_dir():
        samples = _read_folder(root, layout or recognise(root))
    else:
        raise DataError(
            f"{root}: no such file or folder. Give a folder of images, or a manifest (.csv, .parquet)."
        )
    samples = _with_subclasses(samples, config, root)
    samples = choose(samples, config)
    if config.subclass_from in ("auto", "none"):
        samples = [replace(sample, subclass=None) for sample in samples]
    return samples


def recognise(root: Path) -> str:
    """The name of the layout that a folder has; raises DataError where it has none."""
    if any((root / f"manifest{ending}").is_file() for ending in ENDINGS):
        return "manifest"
    if (root / "MT_Free").is_dir():
        return "magnetic_tiles"
    if (root / VISA_TABLE).is_file():
        return "visa"
    folders = _folders(root)
    if any(image.stem.endswith("_temp") for folder in folders for image in _images(folder)):
        return "deep_pcb"
    if any(_homes(root)):
        return "folders"
    if _images(root) or any(_images(folder) for folder in folders):
        return "good_images"
    found = ", ".join(entry.name for entry in _entries(root)[:5]) or "nothing"
    raise DataError(
        f"{root}: no images where a known layout has them; found {found}. Known: {', '.join(LAYOUTS)}. Folders are "
        "read as category[/subclass]/{train,test}/{good,DEFECT} or as a bare folder of good images. Name the layout if "
        "it is another (--layout), or write a manifest (normweave data manifest)."
    )


def _read_folder(root: Path, name: str) -> list[Sample]:
    layout = LAYOUTS[name]
    samples = list(_read_folders(root, layout)) if isinstance(layout, Folders) else layout(root)
    if not samples:
        raise DataError(f"{root}: no images in the layout {name}. Allowed endings: {', '.join(IMAGES)}.")
    if all(sample.label == "anomalous" for sample in samples):
        raise DataError(
            f"{root}: {len(samples)} anomalous images and no good one. Good images lie in folders named good, ok or "
            "normal."
        )
    return samples


def _read_folders(root: Path, layout: Folders) -> Iterator[Sample]:
    for home, category, subclass in _homes(root):
        parts: list[tuple[Split | None, Path]] = [
            (SPLITS[folder.name.lower()], folder)
            for folder in _folders(home)
            if folder.name.lower() in SPLITS
        ]
        for split, part in parts or [(None, home)]:
            if stray := _images(part):
                raise DataError(
                    f"{stray[0]}: lies in {part.name} itself. Put it into {part.name}/good, or into {part.name}/DEFECT."
                )
            for folder in _folders(part):
                if folder.name == MASKS:
                    continue
                if deep := [image for inner in _folders(folder) for image in _images(inner)]:
                    raise DataError(f"{deep[0]}: lies too deep. Put it into {folder}, or write a manifest.")
                good = _is_good(folder)
                for image in _images(folder):
                    yield Sample(
                        image_path=image,
                        category=category,
                        subclass=subclass,
                        split=split,
                        label="normal" if good else "anomalous",
                        defect=None if good else folder.name,
                        mask_path=None if good else _mask(home / MASKS, folder.name, image.stem, layout),
                    )


def _mask(masks: Path, defect: str, stem: str, layout: Folders) -> Path | None:
    """Where the mask is, or where it ought to be; None where the category has no masks."""
    if not masks.is_dir():
        return None
    paths = [masks / defect / name.format(stem=stem) for name in layout.masks]
    return next((path for path in paths if path.is_file()), paths[0])


def _homes(root: Path) -> Iterator[tuple[Path, str, str | None]]:
    """(folder, category, subclass) of every folder that holds train or test, or good images in a folder named so."""
    if _is_home(root):
        yield root, _name(root), None
        return
    for category in _folders(root):
        if _is_home(category):
            yield category, category.name, None
            continue
        for subclass in _folders(category):
            if _is_home(subclass):
                yield subclass, category.name, subclass.name


def _is_home(folder: Path) -> bool:
    return any(inner.name.lower() in SPLITS or _is_good(inner) for inner in _folders(folder))


def _is_good(folder: Path) -> bool:
    return folder.name.lower() in GOOD


def _with_subclasses(samples: list[Sample], config: DataConfig, root: Path) -> list[Sample]:
    if config.subclass_from == "column" and all(sample.subclass is None for sample in samples):
        raise DataError(
            f"{root}: subclass_from=column, but no row names a subclass. Fill the manifest's column subclass, or "
            "choose folder, filename-regex, auto or none."
        )
    if config.subclass_from != "filename-regex":
        return samples
    try:
        pattern = re.compile(config.subclass_regex)
    except re.error as error:
        raise ConfigError(
            f"data: subclass_regex {config.subclass_regex!r} is no regular expression: {error}."
        ) from error
    if pattern.groups < 1:
        raise ConfigError(
            f"data: subclass_regex {config.subclass_regex!r} has no group. Put the part that is the subclass in round "
            "brackets, for example '^(exp[0-9])_'."
        )
    named = []
    for sample in samples:
        match = pattern.search(sample.image_path.stem)
        if match is None or not match[1]:
            raise DataError(
                f"{sample.image_path}: subclass_regex {config.subclass_regex!r} finds no subclass in "
                f"{sample.image_path.stem!r}. Widen it, or move the image away."
            )
        named.append(replace(sample, subclass=match[1]))
    return named


def choose(samples: list[Sample], config: DataConfig) -> list[Sample]:
    """The samples of the categories and subclasses that `config` names; raises ConfigError where there is none."""
    return _chosen(_chosen(samples, "category", config.category), "subclass", config.subclass)


def _chosen(samples: list[Sample], field: str, names: Sequence[str]) -> list[Sample]:
    if not names or "all" in names:
        return samples
    known = {value for sample in samples if (value := getattr(sample, field)) is not None}
    for name in names:
        if name not in known:
            raise unknown(field, name, known, "Choose among these, or leave it out to use all.")
    return [sample for sample in samples if getattr(sample, field) in names]


def _name(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _images(folder: Path) -> list[Path]:
    return [entry for entry in _entries(folder) if entry.suffix.lower() in IMAGES and entry.is_file()]


def _below(folder: Path) -> Iterator[Path]:
    """Every image at any depth, in a stable order."""
    yield from _images(folder)
    for inner in _folders(folder):
        yield from _below(inner)
