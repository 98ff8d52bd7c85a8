"""Layouts of data sets on disk: one row of the table `LAYOUTS` each. All are read as samples."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from normweave import plugins
from normweave.config import DataConfig
from normweave.data.manifest import ENDINGS, read_manifest
from normweave.data.tables import read_csv
from normweave.errors import ConfigError, DataError, unknown
from normweave.types import Sample, Split

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
GOOD = ("good", "ok", "normal")
SPLITS: dict[str, Split] = {"train": "train", "test": "test"}
MASK_FOLDERS = ("ground_truth", "groundtruth", "gt", "mask", "masks")
"""Lower case; `-` and spaces count as `_`."""
MASK_SUFFIX = re.compile(r"[-_ .](mask|gt|ground[-_ ]?truth)$", re.IGNORECASE)
"""What the name of a mask may have after its image's name."""
VISA_TABLE = Path("split_csv") / "1cls.csv"
TILE_SPAN = 90
"""Magnetic tiles: the numbers of consecutive images of one tile differ by at most this."""


@dataclass(frozen=True)
class Layout:
    """How a data set is stored."""

    read: Callable[[Path], list[Sample]]
    """Reads the samples of a folder; raises DataError if files do not fit the layout."""
    matches: Callable[[Path], bool] | None = None
    """Whether a folder has this layout; None: the layout is only used by name."""


def read_manifest_folder(root: Path) -> list[Sample]:
    """Read a folder that contains manifest.csv or manifest.parquet."""
    for ending in ENDINGS:
        if (root / f"manifest{ending}").is_file():
            return read_manifest(root / f"manifest{ending}")
    raise DataError(
        f"{root}: no manifest{' or manifest'.join(ENDINGS)} in it. Give the path of the table, or another layout."
    )


def read_magnetic_tiles(root: Path) -> list[Sample]:
    """Read Huang, Qiu, Yuan 2020, "Surface defect saliency of magnetic tile", The Visual Computer.

    `MT_{Free,DEFECT}/expN_num_NUMBER.jpg` with a mask `.png` of the same stem. The subclass is expN, the imaging
    condition. The group is the tile, from `groups.csv` if it exists, else images with numbers at most 90 apart.
    """
    shots: list[tuple[Path, str, int]] = []  # image, condition, number
    for image in (image for folder in _folders(root) for image in _images(folder)):
        if image.suffix.lower() == ".jpg":
            name = re.fullmatch(r"(exp\d+)_num_(\d+)", image.stem)
            if name is None:
                raise DataError(f"{image}: magnetic tiles are named expN_num_NUMBER.jpg. Remove other images.")
            shots.append((image, name[1], int(name[2])))
    table = root / "groups.csv"
    tiles: dict[Path, str] = {}
    if table.is_file():
        for number, row in read_csv(table, required=("image", "group"))[1]:
            if not row["image"] or not row["group"]:
                raise DataError(f"{table}, row {number}: image or group is empty. Fill both, or remove the row.")
            if tiles.setdefault(root / row["image"], row["group"]) != row["group"]:
                raise DataError(f"{table}, row {number}: {row['image']} has another group above. Keep one of the rows.")
    else:
        tile, last = 0, None
        for image, _, number in sorted(shots, key=lambda shot: shot[2]):
            tile += last is not None and number - last > TILE_SPAN
            last = number
            tiles[image] = f"tile{tile}"
    if missing := [image for image, _, _ in shots if image not in tiles]:
        key = missing[0].relative_to(root).as_posix()
        raise DataError(f"{table}: no row for {key}. Add it, or remove the table to group by number.")
    samples = []
    for image, condition, _ in shots:
        sample = Sample(image_path=image, category="magnetic_tiles", subclass=condition, group=tiles[image])
        if image.parent.name != "MT_Free":
            defect = image.parent.name.removeprefix("MT_").lower()
            sample = _anomalous(sample, defect, image.with_suffix(".png"))
        samples.append(sample)
    return samples


def read_deep_pcb(root: Path) -> list[Sample]:
    """Read Tang et al. 2019, "Online PCB defect detector on a new PCB defect dataset", arXiv 1902.06197.

    `FAMILY/NAME_temp.jpg` is the template without defects, `NAME_test.jpg` the board, `NAME.txt` its boxes, which serve
    as the mask. Both show the same circuit, so NAME is the group, and the split is fixed: in each family the templates
    of the first half of the names are in train, without their boards; templates and boards of the others in test.
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
                boxes = template.with_name(f"{name}.txt")
                samples.append(_anomalous(replace(board, image_path=tested), None, boxes))
    return samples


def read_good_images(root: Path) -> list[Sample]:
    """Read a folder of good images, or a folder with one folder of good images per subclass."""
    here = _images(root)
    folders = [folder for folder in _folders(root) if _images(folder)]
    for folder in folders:
        if _is_mask_folder(folder.name):
            raise DataError(
                f"{root} contains masks ({folder.name}), which mark defects, but no folder named good, ok or normal. "
                "Put good images into one of these, and others into a folder named by their defect."
            )
    if here and folders:
        raise DataError(
            f"{root} contains images ({here[0].name}) and folders of images ({folders[0].name}). Allowed: either good "
            "images, or one folder per subclass. Remove one of them, or write a manifest."
        )
    category = _name(root)
    return [Sample(image_path=image, category=category) for image in here] + [
        Sample(image_path=image, category=category, subclass=folder.name)
        for folder in folders
        for image in _images(folder)
    ]


def read_visa(root: Path) -> list[Sample]:
    """Read Zou et al. 2022, "SPot-the-Difference self-supervised pre-training for anomaly detection", arXiv 2207.14315.

    Either as downloaded: `split_csv/1cls.csv` (object,split,label,image,mask; paths relative to the root) lists all
    images. Or as the authors' `prepare_data.py` rewrites it: `[1cls/]OBJECT/{train,test}/{good,bad}/` and masks in
    `OBJECT/ground_truth/bad/`. The two-class tables are refused: they train on anomalous images.
    """
    table = root / VISA_TABLE
    if not table.is_file():
        prepared = root / "1cls"
        return read_folders(prepared if prepared.is_dir() else root, masks=("{stem}.png",))
    header, rows = read_csv(table)
    columns = ["object", "split", "label", "image", "mask"]
    if header != columns:
        raise DataError(
            f"{table}: columns are {', '.join(header) or '(none)'}. VisA's are {', '.join(columns)}: unpack the "
            "data set again."
        )
    samples = []
    for number, row in rows:
        split = SPLITS.get(row["split"] or "")
        if split is None or row["label"] not in ("normal", "anomaly") or not row["image"] or not row["object"]:
            raise DataError(
                f"{table}, row {number}: object {row['object']!r}, split {row['split']!r}, label {row['label']!r}, "
                f"image {row['image']!r}. "
                "Allowed: a name, train or test, normal or anomaly, and a path: unpack the data set again."
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
    """Read Lei et al. 2024, "Texture-AD: an anomaly detection dataset and benchmark", arXiv 2409.06367.

    One folder per category (cloth, wafer, metal), and in it one per subclass (product). Neither the paper nor the data
    card describes the folders below, so images are read by the names of the folders above them, in any order: train or
    test is the split, a name of `MASK_FOLDERS` marks a mask, the innermost of the others is good or the defect, those
    before it are category and subclass. A mask has the stem of its image (or `STEM_mask`, or another `MASK_SUFFIX`) and
    the same category and subclass; its defect folder is optional. The root may itself be a category. `normweave data
    check` counts the images that were found.
    """
    found: list[tuple[Path, list[str], Split | None]] = []
    masks: dict[tuple[str, ...], Path] = {}
    masked: set[tuple[str, ...]] = set()
    for image in images_below(root):
        folders = list(image.relative_to(root).parts[:-1])
        splits = {SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
        names = [name for name in folders if name.lower() not in SPLITS and not _is_mask_folder(name)]
        if any(map(_is_mask_folder, folders)):
            masks[*names, MASK_SUFFIX.sub("", image.stem)] = image
            masked.add(tuple(names[:2]))
            continue
        if len(names) not in (2, 3) or len(splits) > 1:
            raise DataError(
                f"{image}: folders {'/'.join(folders) or '(none)'}. Texture-AD is read as "
                "CATEGORY/SUBCLASS[/{train,test}]/{good,DEFECT}, train and test at any level and masks in a folder "
                f"named {', '.join(MASK_FOLDERS)}. Remove other images, or write a manifest."
            )
        found.append((image, names, next(iter(splits), None)))
    samples = []
    for image, names, split in found:
        category, subclass, defect = names if len(names) == 3 else (_name(root), *names)
        sample = Sample(image_path=image, category=category, subclass=subclass, split=split)
        if not _is_good(defect):
            parents = tuple(names[:-1])
            mask_path = None
            if any(marked[: len(parents)] == parents for marked in masked):
                mask_path = masks.get((*names, image.stem)) or masks.get((*parents, image.stem))
                mask_path = mask_path or root.joinpath(*parents, MASK_FOLDERS[0], defect, f"{image.stem}.png")
            sample = _anomalous(sample, defect, mask_path)
        samples.append(sample)
    return samples


def read_folders(root: Path, *, masks: Sequence[str]) -> list[Sample]:
    """Read `category[/subclass]/{train,test}/{good,DEFECT}/STEM.*`; masks are in `ground_truth/DEFECT/` beside train.

    Without train and test the samples have no split. The root may itself be the category. Folders named good, ok or
    normal contain normal images, those named in `MASK_FOLDERS` masks, all others the defect of their name. `masks` are
    the names that the layout gives a mask; {stem} is its image's name without the ending. Others are found as
    `_MaskFiles` describes.
    """
    samples: list[Sample] = []
    for home, category, subclass in _subclass_folders(root):
        parts: list[tuple[Split | None, Path]] = [
            (SPLITS[folder.name.lower()], folder) for folder in _folders(home) if folder.name.lower() in SPLITS
        ]
        begun = len(samples)
        files = _MaskFiles(home, masks)
        for split, part in parts or [(None, home)]:
            files.add_below(part)
            if stray := _images(part):
                raise DataError(
                    f"{stray[0]}: is in {part.name} itself. Put it into {part.name}/good, or into {part.name}/DEFECT."
                )
            for folder in _folders(part):
                if _is_mask_folder(folder.name):
                    continue
                inner = [each for each in _folders(folder) if not _is_mask_folder(each.name)]
                if deep := [image for each in inner for image in _images(each)]:
                    raise DataError(f"{deep[0]}: is too deep. Put it into {folder}, or write a manifest.")
                files.add_below(folder, defect=folder.name)
                for image in _images(folder):
                    sample = Sample(image_path=image, category=category, subclass=subclass, split=split)
                    samples.append(sample if _is_good(folder.name) else _anomalous(sample, folder.name, None))
        samples[begun:] = files.assigned(samples[begun:])
    return samples


def _anomalous(sample: Sample, defect: str | None, mask: Path | None) -> Sample:
    return replace(sample, label="anomalous", defect=defect, mask_path=mask)


class _MaskFiles:
    """The files in the mask folders of a category or subclass, beside train and test, in them, or beside its images.

    A mask has the stem or the name of its image, with or without a `MASK_SUFFIX`, and any ending of `IMAGES`; letter
    case does not count. It is in a folder named by the defect, or in none if no other anomalous image has its stem.
    """

    def __init__(self, home: Path, names: Sequence[str]) -> None:
        self._names = names  # as the layout names masks; {stem} is the image's
        self._folders: list[Path] = []
        self._files: dict[tuple[str, str], list[Path]] = {}  # defect (or "") and stem, in lower case
        self.add_below(home)

    def add_below(self, folder: Path, *, defect: str = "") -> None:
        """Add the masks in all mask folders of a folder; `defect`: of the masks that no folder names one for."""
        for masks in _folders(folder):
            if not _is_mask_folder(masks.name) or masks in self._folders:
                continue
            self._folders.append(masks)
            for path in images_below(masks):
                names = [name for name in path.relative_to(masks).parts[:-1] if name.lower() not in SPLITS]
                if len(names) <= 1:
                    key = "".join(names) or defect
                    for stem in {path.stem.lower(), MASK_SUFFIX.sub("", path.stem).lower()}:
                        self._files.setdefault((key.lower(), stem), []).append(path)

    def assigned(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples of the folder with their masks; a mask that is missing has its expected path."""
        stems = Counter(sample.image_path.stem.lower() for sample in samples if sample.label == "anomalous")
        return [
            replace(sample, mask_path=self._find(sample, is_alone=stems[sample.image_path.stem.lower()] == 1))
            if sample.label == "anomalous" and self._folders
            else sample
            for sample in samples
        ]

    def _find(self, sample: Sample, *, is_alone: bool) -> Path:
        image, defect = sample.image_path, sample.defect or ""
        expected = [folder / defect / name.format(stem=image.stem) for folder in self._folders for name in self._names]
        for path in expected:
            if path.is_file():
                return path
        for key in (defect.lower(), "") if is_alone else (defect.lower(),):
            for stem in (image.stem.lower(), image.name.lower()):
                if found := self._files.get((key, stem)):
                    return min(found, key=lambda path: (path.stem != image.stem, path))
        return expected[0]


def _is_mask_folder(name: str) -> bool:
    return re.sub("[- ]", "_", name.lower()) in MASK_FOLDERS


def unused(root: str | os.PathLike[str], samples: Sequence[Sample]) -> list[Path]:
    """Return the images below a folder that are neither an image nor a mask of the samples; none for a manifest."""
    root = Path(root)
    if not root.is_dir() or _has_manifest(root):
        return []
    used = {path for sample in samples for path in (sample.image_path, sample.mask_path)}
    return [path for path in images_below(root) if path not in used]


def _subclass_folders(root: Path) -> Iterator[tuple[Path, str, str | None]]:
    """Yield (folder, category, subclass) of every folder that contains train or test, or a folder of good images."""
    if _has_images(root):
        yield root, _name(root), None
        return
    for category in (folder for folder in _folders(root) if not _is_mask_folder(folder.name)):
        if _has_images(category):
            yield category, category.name, None
            continue
        for subclass in (folder for folder in _folders(category) if not _is_mask_folder(folder.name)):
            if _has_images(subclass):
                yield subclass, category.name, subclass.name


def _has_images(folder: Path) -> bool:
    return any(inner.name.lower() in SPLITS or _is_good(inner.name) for inner in _folders(folder))


def _is_good(name: str) -> bool:
    return name.lower() in GOOD


def _has_manifest(root: Path) -> bool:
    return any((root / f"manifest{ending}").is_file() for ending in ENDINGS)


def _has_templates(root: Path) -> bool:
    return any(image.stem.endswith("_temp") for folder in _folders(root) for image in _images(folder))


LAYOUTS: dict[str, Layout] = {
    # The first that matches is used.
    "manifest": Layout(read_manifest_folder, _has_manifest),
    "magnetic_tiles": Layout(read_magnetic_tiles, lambda root: (root / "MT_Free").is_dir()),
    "visa": Layout(read_visa, lambda root: (root / VISA_TABLE).is_file()),
    "deep_pcb": Layout(read_deep_pcb, _has_templates),
    "folders": Layout(
        partial(read_folders, masks=("{stem}.png", "{stem}_mask.png", "{stem}.bmp")),
        lambda root: any(_subclass_folders(root)),
    ),
    "good_images": Layout(
        read_good_images,
        lambda root: bool(_images(root)) or any(_images(folder) for folder in _folders(root)),
    ),
    "texture_ad": Layout(read_texture_ad),
    # Bergmann et al. 2019, MVTec AD, CVPR
    "mvtec_ad": Layout(partial(read_folders, masks=("{stem}_mask.png",))),
    # Jezek et al. 2021, Deep learning-based defect detection, ICUMT
    "mpdd": Layout(partial(read_folders, masks=("{stem}_mask.png",))),
    # Mishra et al. 2021, VT-ADL, arXiv 2104.10036
    "btad": Layout(partial(read_folders, masks=("{stem}.png", "{stem}.bmp"))),
}
LAYOUTS |= plugins.usable("layouts", known=tuple(LAYOUTS), of=Layout)


def read(root: str | os.PathLike[str], config: DataConfig, *, layout: str | None = None) -> list[Sample]:
    """Return the samples that `config` selects from a manifest file, or from a folder in one of `LAYOUTS`.

    Without `layout` the folder's layout is recognised (MVTec AD, MPDD and BTAD as `folders`, which includes them).
    `config.subclass_from`: the subclass of the layout (`folder`), of the manifest (`column`), or from the file's stem
    (`filename-regex`). With `auto` and `none` subclasses are selected by their name first and set to None afterwards.

    Raises:
        DataError: the path does not exist, no layout matches, no image is good, or files do not fit the layout.
        ConfigError: the layout, a category or a subclass is unknown.
    """
    root = Path(root)
    if layout is not None and layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS, "For others, write a manifest (normweave data manifest).")
    if root.is_file():
        samples = read_manifest(root)
    elif root.is_dir():
        samples = _read_folder(root, layout or recognise(root))
    else:
        raise DataError(
            f"{root}: no such file or folder. Give a folder of images or a manifest (.csv, .parquet) of this machine."
        )
    samples = choose(_with_subclasses(samples, config, root), config)
    if config.subclass_from in ("auto", "none"):
        samples = [replace(sample, subclass=None) for sample in samples]
    return samples


def recognise(root: Path) -> str:
    """Return the name of the first layout that matches a folder; raises DataError if none does."""
    for name, layout in LAYOUTS.items():
        if layout.matches is not None and layout.matches(root):
            return name
    found = ", ".join(entry.name for entry in _entries(root)[:5]) or "nothing"
    raise DataError(
        f"{root}: no known layout; found {found}. Known: {', '.join(LAYOUTS)}. Folders are read as "
        "category[/subclass]/{train,test}/{good,DEFECT} or as a folder of good images. Name another layout with "
        "--layout, or write a manifest (normweave data manifest)."
    )


def _read_folder(root: Path, name: str) -> list[Sample]:
    samples = LAYOUTS[name].read(root)
    if not samples:
        raise DataError(f"{root}: no images in the layout {name}. Allowed endings: {', '.join(IMAGES)}.")
    if all(sample.label == "anomalous" for sample in samples):
        raise DataError(
            f"{root}: {len(samples)} anomalous images and no good one. Put good images into a folder named good, ok or "
            "normal."
        )
    return samples


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
            f"data: subclass_regex {config.subclass_regex!r} is not a regular expression: {error}. Correct it."
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
                f"{sample.image_path.stem!r}. Change the expression, or remove the image."
            )
        named.append(replace(sample, subclass=match[1]))
    return named


def choose(samples: list[Sample], config: DataConfig) -> list[Sample]:
    """Return the samples of the categories and subclasses in `config`; raises ConfigError for unknown names."""
    for field, names in (("category", config.category), ("subclass", config.subclass)):
        if not names or "all" in names:
            continue
        known = {value for sample in samples if (value := getattr(sample, field)) is not None}
        for name in names:
            if name not in known:
                raise unknown(field, name, known, "Choose one of these, or omit it to use all.")
        samples = [sample for sample in samples if getattr(sample, field) in names]
    return samples


def _name(folder: Path) -> str:
    return Path(os.path.abspath(folder)).name


def _entries(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))


def _folders(folder: Path) -> list[Path]:
    """Return the folders in a folder and the links to folders, except to one above: it would contain itself.

    Raises:
        DataError: a link leads nowhere.
    """
    entries = _entries(folder)
    for entry in entries:
        if entry.is_symlink() and not entry.exists() and entry.suffix.lower() not in IMAGES:
            raise DataError(f"{entry}: is a link to {os.readlink(entry)}, which does not exist. Correct or remove it.")
    above = {os.path.realpath(each) for each in (folder, *folder.absolute().parents)}
    return [entry for entry in entries if entry.is_dir() and os.path.realpath(entry) not in above]


def _images(folder: Path) -> list[Path]:
    """Return what has the name of an image, also if it cannot be read, so that it is reported."""
    return [entry for entry in _entries(folder) if entry.suffix.lower() in IMAGES and not entry.is_dir()]


def images_below(folder: Path) -> Iterator[Path]:
    """Yield the images of a folder at any depth, in a stable order, without hidden files and folders."""
    yield from _images(folder)
    for inner in _folders(folder):
        yield from images_below(inner)
