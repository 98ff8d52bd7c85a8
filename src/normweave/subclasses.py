"""Add a subclass to a fitted detector from a few good images, or remove it; nothing else of the detector changes.

The new subclass gets an expert, scales and an operating point of its own. Images that are nearer to the other
subclasses keep every bit of their scores, which is checked on stored calibration images by the graphs of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy, deepcopy
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave import bundle, by_region, checks, fitting, history
from normweave.checks import Checks
from normweave.config import AdaptedMoEConfig, FusionExpertConfig, RegionConfig
from normweave.data import rows, splits
from normweave.data.alignment import Limits
from normweave.detector import Data, Detector, samples_of
from normweave.drift import reference
from normweave.drift.reference import Described
from normweave.errors import ConfigError, DataError
from normweave.features.standardize import StandardizedFeatures
from normweave.heads.adapted_moe.fusion import FEWEST_OF_CATEGORY, Defective, HeldOut, defects_per_image
from normweave.heads.adapted_moe.head import AdaptedMoE
from normweave.network import open_graph
from normweave.network.base import Network
from normweave.network.torch import FittedRows, TorchNetwork, feature_source, named_outputs, some_tiles
from normweave.outcome.operating_point import Added, Calibration
from normweave.references import References
from normweave.scoring import ImageScore, TileScores
from normweave.types import FitData, Progress, RawOutput, Sample

FEWEST_IMAGES = 5
FEWEST_GROUPS = 2
"""Groups of images: each must be scored by an expert that was fitted to others."""
KEY = "added"
"""What the record holds of each added subclass, by its name."""


def with_subclass(
    detector: Detector,
    data: Data,
    *,
    category: str,
    subclass: str | None,
    regions: Sequence[RegionConfig] = (),
    check: Data | None = None,
    layout: str | None = None,
    progress: Progress | None = None,
) -> Detector:
    """Return a detector that also knows a new subclass; the given one does not change.

    The good images of `data` are fitted to, and scored by experts that were fitted to the others of them, from which
    the operating point of the subclass is computed. Few images allow no low false-alarm rate: then the operating point
    is marked `uncalibrated`.

    Args:
        detector: of Adapted-MoE with the fusion of experts, just fitted or loaded from a bundle.
        data: 5 to about 50 good images of the subclass, none of which was used before.
        category, subclass: its names; the category may be new. Subclass None: a category without subclasses.
        regions: with the region of a new category; those of known ones must be as they are. Without one of its own, a
            category has that of all categories.
        check: further images, on which the scores are compared, too.

    Raises:
        ConfigError: the detector has another head or settings that this does not support, or knows the subclass.
        DataError: there are too few images or groups, an image was used before, or they resemble a known subclass.
        CheckError: the score of an image that is routed as before has changed.
    """
    for what, text in (("category", category), ("subclass", subclass)):
        if text is not None and (not text.strip() or "/" in text or not text.isprintable()):
            raise ConfigError(f"A {what} must be a name of printable characters without /, got {text!r:.80}.")
    name = Sample(image_path=Path(), category=category, subclass=subclass).subclass_name
    network, head = _network(detector)
    if name in detector.subclass_names:
        removable = name in detector.subclass_names[head.first :]
        raise ConfigError(
            f"The detector knows the subclass {name} already. Known: {', '.join(detector.subclass_names)}. Choose "
            f"another name{', or remove it first (normweave remove-subclass)' if removable else ''}."
        )
    known_categories = {each for each, _ in detector.subclasses.values()}
    detector = detector.with_regions(by_region.extended(detector.config, regions, category, known_categories))
    images = _images(detector, data, category=category, subclass=subclass, layout=layout, progress=progress)
    teaching = _Teaching(detector, network, head, images, name=name, progress=progress)
    added_head, held_out, routed, described = teaching.fit()
    known = teaching.like is not None
    if progress is not None:
        progress("writing the graph", 0, 1)
    result = _changed(detector, network, added_head, images)
    result.subclasses[name] = (category, subclass)
    own = [each for each, is_own in zip(held_out, routed, strict=True) if is_own]
    calibration, points = detector.calibration, detector.operating_points
    groups = splits.independent_groups(images.samples, images.hashes)
    if calibration is not None and points is not None:
        drawn = Calibration(
            scores=[each.score for each in own],
            distances=[each.distance for each in own if each.distance is not None],
            groups=[group for group, is_own in zip(groups, routed, strict=True) if is_own],
            cross_validated=True,
            attainable=True,
            false_alarm_rate=calibration.false_alarm_rate,
            unknown_rate=calibration.unknown_rate,
        )
        added = Added(drawn, category, known and calibration.unseen is not None)
        result.operating_points = points._replace(calibration=calibration.with_added([*calibration.added, added]))
    assert isinstance(result.network, TorchNetwork)
    if network.references is not None and added_head.origins is not None:
        everything = np.arange(len(images))
        own_references = References.collect(added_head.origins, grid=head.grid, images=images, fit=everything)
        result.network.references = network.references.joined(own_references, prefix=name)
    proof = _prove(
        detector,
        network,
        result,
        kept=[*range(len(detector.subclass_names)), -1],
        further=_scan(detector, check, layout),
    )
    if network.checks is not None and result.network.checks is not None:
        shown = some_tiles([images.load(row)[None] for row in range(len(images))], at_most=checks.OF_ADDED)
        result.network.checks = Checks.compute(_graph(result), np.concatenate([result.network.checks.pixels, shown]))
    taught = {
        "images": len(images.samples),
        "groups": len(set(groups)),
        "routed_to_others": [
            [str(sample.image_path), detector.subclass_names[each.subclass]]
            for sample, each, is_own in zip(images.samples, held_out, routed, strict=True)
            if not is_own and each.subclass is not None
        ],
        "held_out_scores": [
            [str(sample.image_path), each.score] for sample, each in zip(images.samples, held_out, strict=True)
        ],
        "check": proof,
    }
    step = history.step(
        "added",
        images=len(images.samples),
        parent=detector.bundle_hash,
        data_fingerprint=rows.fingerprint(images.hashes),
        subclass=name,
        hashes=sorted(text[: rows.HASH_LETTERS] for text in images.hashes),
    )
    notes = dict(detector.record.get("notes", {}))
    notes["fusion"] = [*(notes.get("fusion") or []), *(added_head.fusion.record if added_head.fusion else [])]
    result.record |= bundle.subclass_record(result.subclasses, result.subclass_names) | {
        "notes": notes,
        "fit_images": detector.record["fit_images"] + len(images.samples),
        "fit_hashes": sorted([*detector.record["fit_hashes"], *step["hashes"]]),
        KEY: detector.record.get(KEY, {}) | {name: taught},
        history.KEY: history.extended(detector.record, step),
    }
    if reference.KEY in detector.record:
        line = [
            reference.CalibrationImage((category, subclass), group, each.score, each.distance, statistics)
            for each, group, statistics, is_own in zip(held_out, groups, described, routed, strict=True)
            if is_own
        ]
        result.record[reference.KEY] = reference.joined(detector.record[reference.KEY], line)
    placements = [each for each in images.placements if each is not None]
    if placements and category not in known_categories and category in {each.category for each in regions}:
        result.set_limits({category: Limits.of(placements)})
    if progress is not None:
        progress("writing the graph", 1, 1)
    return result


def without_subclass(
    detector: Detector,
    *,
    category: str,
    subclass: str | None,
    check: Data | None = None,
    layout: str | None = None,
) -> Detector:
    """Return a detector without a subclass that was added; the given one does not change.

    Images that are routed to the others keep every bit of their scores, except those of subclasses that were added
    later and used the expert or a stored patch of the removed one.

    Args:
        check: further images, on which the scores are compared, too; a bundle without stored images needs some.

    Raises:
        ConfigError: the subclass is not known, or is one of the first training.
        CheckError: the score of another image has changed.
    """
    name = Sample(image_path=Path(), category=category, subclass=subclass).subclass_name
    network, head = _network(detector)
    removable = detector.subclass_names[head.first :]
    if name not in removable:
        known = f"is one of the first training ({', '.join(detector.subclass_names[: head.first])})"
        raise ConfigError(
            f"The subclass {name} {known if name in detector.subclass_names else 'is not known'}. Only added ones can "
            f"be removed: {', '.join(removable) or 'there is none'}. Train again without it, or give one of these."
        )
    number = detector.subclass_names.index(name)
    if network.checks is None and check is None:
        raise ConfigError(
            "The bundle holds no images to check that the other scores stay as they are. Give some good images with "
            "--check."
        )
    other = deepcopy(head)
    owner = head.stored_by()
    other.remove(number)
    further = _scan(detector, check, layout)
    result = _changed(detector, network, other, further if network.checks is None else None)
    del result.subclasses[name]
    if category not in {each for each, _ in result.subclasses.values()}:
        others = tuple(each for each in detector.config.regions if each.category != category)
        result = result.with_regions(replace(detector.config, regions=others))
    calibration, points = detector.calibration, detector.operating_points
    if calibration is not None and points is not None and calibration.added:
        place = number - len(calibration.subclass_names)
        left = [each for each, kept in enumerate(calibration.added) if each != place]
        result.operating_points = points._replace(
            calibration=calibration.with_added([calibration.added[each] for each in left])
        )
    assert isinstance(result.network, TorchNetwork)
    if network.references is not None and owner is not None:
        result.network.references = network.references.kept(owner != number)
    kept = [k for k in range(len(detector.subclass_names)) if k != number]
    proof = _prove(detector, network, result, kept=kept, further=further, removed=number)
    if network.checks is not None:
        own = network.checks.outputs.subclass
        assert own is not None
        result.network.checks = Checks.compute(_graph(result), network.checks.pixels[own != number])
    steps = detector.record.get(history.KEY, [])
    used = next((each for each in reversed(steps) if each.get("subclass") == name and "hashes" in each), None)
    step = history.step(
        "removed", images=0, parent=detector.bundle_hash, data_fingerprint=None, subclass=name, check=proof
    )
    forgotten = set(used["hashes"] if used else ())
    notes = dict(detector.record.get("notes", {}))
    if category not in {pair[0] for pair in result.subclasses.values()}:
        notes["fusion"] = [each for each in notes.get("fusion") or [] if each["category"] != category]
    result.record |= bundle.subclass_record(result.subclasses, result.subclass_names) | {
        "notes": notes,
        "fit_images": detector.record["fit_images"] - (used["images"] if used else 0),
        "fit_hashes": [text for text in detector.record["fit_hashes"] if text not in forgotten],
        KEY: {key: value for key, value in detector.record.get(KEY, {}).items() if key != name},
        history.KEY: history.extended(detector.record, step),
    }
    if reference.KEY in detector.record:
        result.record[reference.KEY] = reference.without(detector.record[reference.KEY], (category, subclass))
    return result


class _Teaching:
    """Fits a new subclass: held-out scores first, then the expert of all images.

    Args:
        head: is not changed.
        images: good images of the subclass.
        name: of the subclass.
    """

    def __init__(
        self,
        detector: Detector,
        network: TorchNetwork,
        head: AdaptedMoE,
        images: rows.Rows,
        *,
        name: str,
        progress: Progress | None,
    ) -> None:
        self.detector = detector
        self.network = network
        self.head = head
        self.images = images
        self.progress = progress
        category = images.samples[0].category
        same = [k for k, each in enumerate(detector.subclass_names) if detector.subclasses[each][0] == category]
        self.like = same[0] if same else None
        """A subclass of the same category; None: the category is new."""
        config = detector.config
        everything = np.arange(len(images))
        self.chosen = FittedRows(images, everything, everything)
        source = feature_source(network.extractor, images, cache=None, max_gib=0, progress=progress)
        standard = StandardizedFeatures(source, network.standard)
        features = torch.cat([standard.read(everything[start : start + 8]) for start in range(0, len(images), 8)])
        groups = np.array(splits.independent_groups(images.samples, images.hashes), dtype=np.int64)[images.owner]
        self.data = FitData(
            features=_Stored(features),
            given_categories=np.zeros(len(images), dtype=np.int64),
            category_names=(category,),
            subclasses=np.zeros(len(images), dtype=np.int64),
            names=(name,),
            groups=groups,
            holdout=np.zeros(len(images), dtype=np.bool_),
            seed=config.seed,
            mean=network.standard.mean,
            std=network.standard.std,
        )
        order = np.random.default_rng(config.seed).permutation(len(np.unique(groups)))
        members = np.unique(groups, return_inverse=True)[1]
        self.fold = order[members] % min(config.data.folds, len(order))  # (n,)

    def fit(self) -> tuple[AdaptedMoE, list[ImageScore], list[bool], list[Described]]:
        """Return the head with the new subclass, and of each image when it is held out.

        That is its score, whether it was routed to the new subclass, and its statistics for `normweave drift`.

        Raises:
            DataError: too few of the images are nearest to the new subclass.
        """
        new = len(self.detector.subclass_names)
        data = self.data
        parts = [np.flatnonzero(self.fold == part) for part in range(int(self.fold.max()) + 1)]
        heads = []
        for number, part in enumerate(parts):
            head = deepcopy(self.head)
            head.add(_subset(data, np.setdiff1d(np.arange(len(data)), part)))
            heads.append(head)
            if self.progress is not None:
                self.progress("scoring held-out images", number, len(parts))
        normal, found = zip(*(head.held_out(data, part) for head, part in zip(heads, parts, strict=True)), strict=True)
        routed = np.concatenate(found) == new  # in the order of `parts`
        if routed.sum() < FEWEST_OF_CATEGORY:
            counts = np.bincount(np.concatenate(found), minlength=new)
            raise DataError(
                f"Only {int(routed.sum())} of {len(data)} images of {data.names[0]} are nearest to it when they are "
                f"held out, and at least {FEWEST_OF_CATEGORY} must be; of the others most are nearest to "
                f"{self.detector.subclass_names[int(counts[:new].argmax())]}. The detector knows such images already, "
                "or give more images that resemble each other."
            )
        final = deepcopy(self.head)
        final.add(data)
        fusions = [head.fusion for head in (*heads, final) if head.fusion is not None]
        if self.like is not None:
            for fusion in fusions:
                fusion.append_like(self.like)
        else:
            held_out = HeldOut(*(np.concatenate(each)[routed] for each in zip(*normal, strict=True)))
            defective, depth = self._defective(heads, new), self._depth()
            for fusion in fusions:
                fusion.append(held_out, defective, category=data.category_names[0], depth=depth)
        scored: dict[int, RawOutput] = {}
        with torch.inference_mode():
            for head, part in zip(heads, parts, strict=True):
                for row in part:
                    output = named_outputs(head(data.features.read([int(row)])))
                    scored[int(row)] = RawOutput(**{name: value.numpy() for name, value in output.items()})
        config = self.detector.config
        tiles = TileScores.concatenate(
            [TileScores.of(scored[row], config, [self.images.part_inside(row)]) for row in range(len(data))]
        )
        bounds = np.searchsorted(self.images.owner, np.arange(len(self.images.samples) + 1))
        images = [ImageScore.of(tiles.part(int(start), int(end))) for start, end in pairwise(bounds)]
        own = [each.subclass == new for each in images]
        if not any(own):
            raise DataError(
                f"No image of {data.names[0]} is nearest to it when it is held out. Give more images that resemble "
                "each other."
            )
        described = [
            reference.describe(self.images, number, tiles.raw.scores[start:end], vary=number < reference.VARIED_IMAGES)
            for number, (start, end) in enumerate(pairwise(bounds.tolist()))
        ]
        return final, images, own, described

    def _defective(self, heads: Sequence[AdaptedMoE], new: int) -> Defective | None:
        """Return the maps of held-out images with synthetic defects that are routed to the new subclass."""
        data = self.data
        wanted = np.repeat(np.arange(len(data)), defects_per_image(len(data)))
        network = self.network
        defects = fitting.synthetic_defects(
            self.chosen, network.extractor, network.standard, data, wanted=wanted, cache=None, progress=self.progress
        )
        if defects is None:
            return None
        found = []
        for number, head in enumerate(heads):
            part = np.flatnonzero(self.fold[defects.images] == number)
            defective, routed = head.held_out_defects(data, defects, part)
            found.append(Defective(*(each[routed == new] for each in defective)))
        return Defective(*(np.concatenate(each) for each in zip(*found, strict=True)))

    def _depth(self) -> float | None:
        """Return the common depth of the maps, as `Fusion` has it; None if the bundle does not hold it."""
        depths = {each["category"]: each.get("depth") for each in self.detector.record["notes"].get("fusion") or []}
        first = self.detector.subclass_names[: self.head.first]
        found = [depths.get(self.detector.subclasses[name][0]) for name in first]
        known = [each for each in found if each is not None]
        return float(np.median(known)) if len(known) == len(found) else None


class _Stored:
    """Features (n, D, h, w) in memory."""

    def __init__(self, features: Tensor) -> None:
        self.features = features
        D, h, w = features.shape[1:]
        self.shape = (D, h, w)

    def __len__(self) -> int:
        return len(self.features)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        return self.features[torch.as_tensor(np.asarray(rows))]


def _subset(data: FitData, chosen: NDArray[np.int64]) -> FitData:
    assert data.given_categories is not None
    return replace(
        data,
        features=_Stored(data.features.read(chosen)),
        given_categories=data.given_categories[chosen],
        subclasses=data.subclasses[chosen],
        groups=data.groups[chosen],
        holdout=data.holdout[chosen],
    )


def _network(detector: Detector) -> tuple[TorchNetwork, AdaptedMoE]:
    """Return the network in torch and its head, if subclasses can be added to it.

    Raises:
        ConfigError: they cannot.
    """
    config = detector.config.head
    if not isinstance(config, AdaptedMoEConfig) or not isinstance(config.expert, FusionExpertConfig):
        raise ConfigError(
            f"Subclasses can be added to the default Adapted-MoE (the fusion of experts) only, and this is "
            f"{detector.model}. Train it again with all images, or train the default model."
        )
    if detector.record.get("precision") == "int8":
        raise ConfigError(
            "Subclasses can be added to float32 bundles only, and this one is int8. Add it to the bundle from before "
            "the quantization, or train again with --int8."
        )
    allowed: list[tuple[str, object, object]] = [
        ("head.moe", config.moe, True),
        ("head.routing.method", config.routing.method, "statistics"),
        ("head.expert.memory.shared", config.expert.memory.shared, True),
    ]
    for key, got, needed in allowed:
        if got != needed:
            raise ConfigError(
                f"Subclasses can be added with {key}={needed} only, and this detector has {got}. Train it again with "
                "all images, or with the default settings."
            )
    if config.adaption.method == "paper":
        raise ConfigError(
            "Subclasses cannot be added with head.adaption.method=paper; auto, off, full and guarded are possible. "
            "Train it again with all images, or with the default settings."
        )
    network = detector.network
    if isinstance(network, TorchNetwork) and network.device != "cpu":
        raise ConfigError(
            "Subclasses can be added on the CPU only, and this detector is on "
            + network.device
            + ". Save it, and load "
            "the bundle."
        )
    if not isinstance(network, TorchNetwork):
        folder = getattr(network, "bundle", None)
        if folder is None:
            raise ConfigError("Subclasses can be added to a detector that was fitted or loaded from a bundle only.")
        loaded = fitting.load(folder, device="cpu").network
        assert isinstance(loaded, TorchNetwork)
        network = loaded
    assert isinstance(network.head, AdaptedMoE)
    return network, network.head


def _images(
    detector: Detector,
    data: Data,
    *,
    category: str,
    subclass: str | None,
    layout: str | None,
    progress: Progress | None,
) -> rows.Rows:
    """Read the good images, and check that they can be used."""
    found = _samples(detector, data, layout)
    normals = [each for each in found if each.label == "normal" and each.split != "test"]
    named = [replace(each, category=category, subclass=subclass, split="train") for each in normals]
    images = rows.scan(named, detector.preparation, progress=progress)
    used = {*detector.record["fit_hashes"], *detector.record["calibration_hashes"]}
    for sample, content in zip(images.samples, images.hashes, strict=True):
        if content[: rows.HASH_LETTERS] in used:
            raise DataError(
                f"{sample.image_path} was used in training already. Give images that it has not seen (the same content "
                "counts as the same file)."
            )
    if len(images.samples) < FEWEST_IMAGES:
        raise DataError(
            f"A subclass needs at least {FEWEST_IMAGES} good images, got {len(images.samples)} readable ones of "
            f"{len(found)} images. Give 20 or more, of as many parts as you can."
        )
    if (groups := len(set(splits.independent_groups(images.samples, images.hashes)))) < FEWEST_GROUPS:
        raise DataError(
            f"A subclass needs images of at least {FEWEST_GROUPS} groups (parts, lots or sessions), got {groups}: "
            "images of one group cannot tell how much others differ. Give images of other groups."
        )
    return images


def _changed(detector: Detector, network: TorchNetwork, head: AdaptedMoE, images: rows.Rows | None) -> Detector:
    """Return the detector with another head, and with the checks and references of the old one."""
    everything = np.arange(0 if images is None else len(images))
    changed = TorchNetwork(
        network.extractor,
        network.standard,
        head,
        config=detector.config,
        rows=None if images is None else FittedRows(images, everything, everything),
    )
    changed.checks, changed.references = network.checks, network.references
    result = copy(detector)
    result.network = changed
    result.subclass_names = head.subclass_names
    result.subclasses = dict(detector.subclasses)
    result.record = dict(detector.record)
    result.bundle_hash = None
    result.refused = () if images is None else images.refused
    return result


def _graph(detector: Detector) -> Network:
    """Return the exported graph of a detector in ONNX Runtime."""
    network, prepare = detector.network, detector.config.prepare
    assert isinstance(network, TorchNetwork)
    content = network.exported(detector.calibration)
    return open_graph(content, where="The exported graph", size=(prepare.height, prepare.width), device="cpu")


def _prove(
    detector: Detector,
    network: TorchNetwork,
    result: Detector,
    *,
    kept: Sequence[int],
    further: rows.Rows | None,
    removed: int | None = None,
) -> dict[str, Any]:
    """Check by the graphs of both that images which are routed as before keep every bit of their scores.

    Args:
        network: of `detector`, in torch.
        kept: as of `checks.compare`.
        further: other images.
        removed: index of the subclass that was removed.

    Returns:
        The number of tiles, that of the equal ones, and the images of the others, with the subclass before and now.

    Raises:
        CheckError: the score of such an image has changed.
    """
    names, pixels = [], []
    if network.checks is not None:
        names = [f"stored image {number + 1}" for number in range(len(network.checks.pixels))]
        pixels = [network.checks.pixels]
    if further is not None and len(further):
        names += [str(further.samples[owner].image_path) for owner in further.owner]
        pixels.append(np.stack([further.load(row) for row in range(len(further))]))
    if not names:
        return {"tiles": 0, "equal": 0, "moved": []}
    tiles = np.concatenate(pixels)
    before = copy(detector)
    before.network = network
    old, new = checks.outputs(_graph(before), tiles), checks.outputs(_graph(result), tiles)
    assert old.subclass is not None
    assert new.subclass is not None
    assert old.weights is not None
    affected = None
    if removed is not None:
        affected = old.weights[:, removed] > 0
        assert isinstance(network.head, AdaptedMoE)
        if old.nearest is not None and (owner := network.head.stored_by()) is not None:
            affected |= (owner[old.nearest] == removed).any(axis=(1, 2))
    found = checks.compare(old, new, kept=kept, affected=affected)
    moved = [
        [names[k], detector.subclass_names[old.subclass[k]], result.subclass_names[new.subclass[k]]]
        for k in found.moved
    ]
    return {"tiles": found.tiles, "equal": found.equal, "moved": moved}


def _scan(detector: Detector, data: Data | None, layout: str | None) -> rows.Rows | None:
    """Read images on which scores are compared."""
    if data is None:
        return None
    return rows.scan(_samples(detector, data, layout), detector.preparation)


def _samples(detector: Detector, data: Data, layout: str | None) -> list[Sample]:
    """Return the samples whatever their labels, which the subclasses of the training do not select."""
    everything = replace(detector.config.data, category=(), subclass=(), subclass_from="none")
    return samples_of(data, replace(detector.config, data=everything), layout)
