"""The record of a bundle (bundle.json) as the parts of a detector. No torch."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normweave import __version__, bundle, history, plugins, settings
from normweave.config import Config
from normweave.data import rows, splits
from normweave.data.prepare import Preparations
from normweave.errors import BundleError
from normweave.scoring import OperatingPoints

if TYPE_CHECKING:
    from normweave.network.torch import TorchNetwork


def parse_record(record: Mapping[str, Any], *, where: Path) -> dict[str, Any]:
    """Return the arguments of `Detector` that the record of a bundle holds.

    Raises:
        BundleError: something is missing or of the wrong form.
    """
    try:
        plugins.check(record, where=where)
        subclasses = {name: (pair[0], pair[1]) for name, pair in record["subclasses"].items()}
        names = tuple(record["subclass_names"])
        parts = {
            "config": settings.from_dict(record["config"]),
            "operating_points": OperatingPoints.from_dict(record),
            "subclasses": subclasses,
            "subclass_names": names,
            "record": {key: value for key, value in record.items() if key not in bundle.OPERATING_POINTS},
        }
        _check_images(record)
        _check_history(record)
    except KeyError as error:
        raise BundleError(
            f"{where}/bundle.json lacks or misplaces {error}. Copy the bundle again or retrain."
        ) from error
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise BundleError(
            f"{where}/bundle.json has a value that cannot be used: {error}. Copy the bundle again or retrain."
        ) from error
    if unknown := [name for name in names if name not in subclasses]:
        raise BundleError(
            f"{where}/bundle.json routes to {unknown[0]!r:.60}, which is none of its subclasses. Copy the bundle "
            "again or retrain."
        )
    return parts


def _check_images(record: Mapping[str, Any]) -> None:
    """Raise ValueError or KeyError if the hashes of the images, with which others are compared, are not texts."""
    for key in ("fit_hashes", "calibration_hashes"):
        if not isinstance(record[key], list) or not all(isinstance(text, str) for text in record[key]):
            raise ValueError(f"{key} must be a list of texts, got {record[key]!r:.60}")


def _check_history(record: Mapping[str, Any]) -> None:
    """Raise ValueError if the history is not of steps; a bundle of an earlier version has none."""
    steps = record.get(history.KEY, [])
    for step in steps if isinstance(steps, list) else [steps]:
        if not isinstance(step, dict) or not isinstance(step.get("action"), str):
            raise ValueError(f"a step of the history must have an action, got {step!r:.60}")


def trained_record(config: Config, network: TorchNetwork, division: splits.Division) -> dict[str, Any]:
    """Return the record of a detector that was just fitted."""
    assert network.rows is not None
    images = network.rows.images
    packages = ("torch", "timm", "numpy", "pillow", *config.features.packages)
    return {
        "model": config.model,
        "config": settings.as_dict(config),
        **plugins.recorded(config),
        "notes": network.head.notes(),
        "image_level": network.head.image_level,
        "feature_shape": list(network.extractor.shape),
        "feature_fingerprint": network.extractor.fingerprint,
        "preparation": Preparations(config.prepare, regions=config.regions).as_dict(),
        "precision": "float32",
        "seed": config.seed,
        **data_record(images, division),
        "refused": [[refusal.image_path, refusal.reason] for refusal in images.refused],
        "software": {"normweave": __version__, "python": platform.python_version()}
        | {name: version(name) for name in packages},
        history.KEY: [
            history.step(
                "trained", images=len(images.samples), parent=None, data_fingerprint=rows.fingerprint(images.hashes)
            )
        ],
    }


def data_record(images: rows.Rows, division: splits.Division) -> dict[str, Any]:
    """Return which images were used for what, as the record of a detector holds it."""
    content = dict(zip(images.samples, images.hashes, strict=True))
    return {
        "fit_images": len(division.fit),
        "calibration_images": len(division.calibration),
        "data_fingerprint": rows.fingerprint(images.hashes),
        "fit_hashes": [text[: rows.HASH_LETTERS] for text in sorted(content[each] for each in division.fit)],
        "calibration_hashes": [
            text[: rows.HASH_LETTERS] for text in sorted(content[each] for each in division.calibration)
        ],
    }
