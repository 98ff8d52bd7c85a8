"""Add a subclass to a fitted detector from a few good images, or remove it; nothing else of the detector changes.

The new subclass gets an expert, scales and an operating point of its own. Images that are nearer to the other
subclasses keep every bit of their scores, which is checked on stored calibration images by the graphs of both.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from normweave import bundle, by_region, checks, fitting, history
from normweave.checks import Checks
from normweave.config import AdaptedMoEConfig, FusionExpertConfig, RegionConfig
from normweave.data import rows, splits
from normweave.data.alignment import Limits
from normweave.detector import Data, Detector, samples_of
from normweave.drift import reference
from normweave.errors import CheckError, ConfigError, DataError
from normweave.heads.adapted_moe.head import AdaptedMoE
from normweave.network import open_graph
from normweave.network.base import Network
from normweave.network.torch import FittedRows, TorchNetwork, some_tiles
from normweave.outcome.operating_point import Added, Calibration
from normweave.references import References
from normweave.subclass_fit import SubclassFit
from normweave.types import Progress, RawOutput, Sample

FEWEST_IMAGES = 5
FEWEST_GROUPS = 2
"""Groups of images: each must be scored by an expert that was fitted to others."""
KEY = "added"
"""What the record holds of each added subclass, by its name."""


def with_subclass(
    detector: Detector,
    data: Data,
    *,
    category: str | None = None,
    subclass: str | None = None,
    regions: Sequence[RegionConfig] = (),
    check: Data | None = None,
    layout: str | None = None,
    progress: Progress | None = None,
) -> Detector:
    """Return a detector that also knows a new subclass, or several; the given one does not change.

    The first addition exports the graph, which is most of its time; later ones exchange tensors of it.

    The good images of `data` are fitted to, and scored by experts that were fitted to the others of them, from which
    the operating point of the subclass is computed. Few images allow no low false-alarm rate: then the operating point
    is marked `uncalibrated`.

    Args:
        detector: of Adapted-MoE with the fusion of experts, just fitted or loaded from a bundle.
        data: 5 to about 50 good images of a subclass, none of which was used before.
        category, subclass: its names; the category may be new. Subclass None: a category without subclasses. Category
            None: every subclass that a manifest or samples name, one after another in the order of their first images.
            The graphs are compared once.
        regions: with the region of a new category; those of known ones must be as they are. Without one of its own, a
            category has that of all categories.
        check: further images, on which the scores are compared, too.

    Raises:
        ConfigError: the detector has another head or settings that this does not support, or knows the subclass.
        DataError: there are too few images or groups, an image was used before, they resemble a known subclass, or no
            subclass is named.
        CheckError: the score of an image that is routed as before has changed.
    """
    if category is None and subclass is not None:
        raise ConfigError(
            f"The subclass {subclass} needs its category. Give both, or neither: then the data names them."
        )
    new = (
        _named(detector, data, layout) if category is None else {(category, subclass): _samples(detector, data, layout)}
    )
    further = _scan(detector, check, layout)
    network, head = _network(detector)
    for names in new:
        _check_names(detector, head, *names)  # of all, before the first is fitted
    result, fitted, shown = detector, network, []
    refused: tuple[rows.Refusal, ...] = ()
    for names, samples in new.items():
        others = {each for each, _ in new} - {names[0]}
        own_regions = [each for each in regions if each.category not in others]
        result, images = _with_fitted(result, fitted, samples, names, own_regions, parent=detector, progress=progress)
        assert isinstance(result.network, TorchNetwork)
        fitted = result.network
        shown.append(some_tiles([images.load(row)[None] for row in range(len(images))], at_most=checks.OF_ADDED))
        refused = (*refused, *images.refused)
    if progress is not None:
        progress("writing the graph", 0, 1)
    kept = [*range(len(detector.subclass_names)), -1]
    proof, stored = _prove(detector, network, result, kept=kept, further=further, new=np.concatenate(shown))
    if stored is not None:
        fitted.checks = stored
    added = result.record[KEY]
    added_names = result.subclass_names[len(detector.subclass_names) :]
    result.record[KEY] = added | {each: added[each] | {"check": proof} for each in added_names}
    result.refused = refused
    if progress is not None:
        progress("writing the graph", 1, 1)
    return result


def _named(detector: Detector, data: Data, layout: str | None) -> dict[tuple[str, str | None], list[Sample]]:
    """Return the good images of each subclass that a manifest or samples name.

    Raises:
        DataError: none is named.
    """
    config = replace(detector.config.data, category=(), subclass=(), subclass_from="column")
    found: dict[tuple[str, str | None], list[Sample]] = {}
    for each in splits.good_images(samples_of(data, replace(detector.config, data=config), layout)):
        found.setdefault((each.category, each.subclass), []).append(each)
    if not any(subclass for _, subclass in found):
        raise DataError(
            "No good image of the data has a subclass. Give a manifest with the columns category and subclass, or name "
            "both (--category, --subclass)."
        )
    return found


def _check_names(detector: Detector, head: AdaptedMoE, category: str, subclass: str | None) -> None:
    """Raise ConfigError if a new subclass cannot have these names."""
    for what, text in (("category", category), ("subclass", subclass)):
        if text is not None and (not text.strip() or "/" in text or not text.isprintable()):
            raise ConfigError(f"A {what} must be a name of printable characters without /, got {text!r:.80}.")
    name = Sample(image_path=Path(), category=category, subclass=subclass).subclass_name
    if name in detector.subclass_names:
        removable = name in detector.subclass_names[head.first :]
        raise ConfigError(
            f"The detector knows the subclass {name} already. Known: {', '.join(detector.subclass_names)}. Choose "
            f"another name{', or remove it first (normweave remove-subclass)' if removable else ''}."
        )


def _with_fitted(
    detector: Detector,
    network: TorchNetwork,
    samples: Sequence[Sample],
    names: tuple[str, str | None],
    regions: Sequence[RegionConfig],
    *,
    parent: Detector,
    progress: Progress | None,
) -> tuple[Detector, rows.Rows]:
    """Return the detector with one subclass more, whose other scores were not compared, and the images of it.

    Args:
        network: that of the detector, in torch.
        names: category and subclass.
        regions: as of `with_subclass`.
        parent: the detector of the bundle, for the history.
    """
    category, subclass = names
    name = Sample(image_path=Path(), category=category, subclass=subclass).subclass_name
    head = network.head
    assert isinstance(head, AdaptedMoE)
    known_categories = {each for each, _ in detector.subclasses.values()}
    detector = detector.with_regions(by_region.extended(detector.config, regions, category, known_categories))
    images = _images(detector, samples, category=category, subclass=subclass, progress=progress)
    fit = SubclassFit(detector, network, head, images, name=name, progress=progress)
    added_head, held_out, routed, described = fit.fit()
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
        added = Added(drawn, category, fit.like is not None and calibration.unseen is not None)
        result.operating_points = points._replace(calibration=calibration.with_added([*calibration.added, added]))
    assert isinstance(result.network, TorchNetwork)
    if network.references is not None and added_head.origins is not None:
        everything = np.arange(len(images))
        own_references = References.collect(added_head.origins, grid=head.grid, images=images, fit=everything)
        result.network.references = network.references.joined(own_references, prefix=name)
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
    }
    step = history.step(
        "added",
        images=len(images.samples),
        parent=parent.bundle_hash,
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
    return result, images


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
    proof, stored = _prove(detector, network, result, kept=kept, further=further, removed=number)
    if stored is not None and network.checks is not None:
        own = network.checks.outputs.subclass
        assert own is not None
        result.network.checks = stored.kept(own != number)
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
    found: Sequence[Sample],
    *,
    category: str,
    subclass: str | None,
    progress: Progress | None,
) -> rows.Rows:
    """Read the good images, and check that they can be used."""
    named = [replace(each, category=category, subclass=subclass, split="train") for each in splits.good_images(found)]
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
        similar=network.similar,
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
    new: NDArray[np.uint8] | None = None,
    removed: int | None = None,
) -> tuple[dict[str, Any], Checks | None]:
    """Check by the graphs of both that images which are routed as before keep every bit of their scores.

    Args:
        network: of `detector`, in torch.
        kept: as of `checks.compare`.
        further: other images.
        new: tiles (n, 3, height, width) that are stored beside those of `network`; None: none.
        removed: index of the subclass that was removed.

    Returns:
        The number of tiles, that of the equal ones, and the images of the others, with the subclass before and now; and
        the stored images and the new ones with the outputs of the graph, None if none are stored.

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
        return {"tiles": 0, "equal": 0, "moved": []}, None
    tiles = np.concatenate(pixels)
    graph = _graph(result)
    now = checks.outputs(graph, tiles)
    recorded = None
    if network.checks is not None:
        recorded = Checks(tiles, now).kept(np.arange(len(tiles)) < len(network.checks.pixels))
        recorded = recorded if new is None else recorded.joined(Checks.compute(graph, new))
    compared = partial(_compared, detector, network, result, names, now=now, kept=kept, removed=removed)
    if network.checks is not None and further is None:
        with suppress(CheckError):  # recorded on another machine, whose scores have other bits
            return compared(network.checks.outputs), recorded
    before = copy(detector)
    before.network = network
    return compared(checks.outputs(_graph(before), tiles)), recorded


def _compared(
    detector: Detector,
    network: TorchNetwork,
    result: Detector,
    names: Sequence[str],
    old: RawOutput,
    *,
    now: RawOutput,
    kept: Sequence[int],
    removed: int | None,
) -> dict[str, Any]:
    """Return what `_prove` does of images with these names, and with these outputs of both graphs."""
    assert old.subclass is not None
    assert now.subclass is not None
    assert old.weights is not None
    affected = None
    if removed is not None:
        affected = old.weights[:, removed] > 0
        assert isinstance(network.head, AdaptedMoE)
        if old.nearest is not None and (owner := network.head.stored_by()) is not None:
            affected |= (owner[old.nearest] == removed).any(axis=(1, 2))
    found = checks.compare(old, now, kept=kept, affected=affected)
    moved = [
        [names[k], detector.subclass_names[old.subclass[k]], result.subclass_names[now.subclass[k]]]
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
