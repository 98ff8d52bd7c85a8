"""What a bundle holds, what differs between two, and whether one gives the scores that it recorded. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normweave import bundle, checks, history, plugins
from normweave.checks import outputs
from normweave.data import regions
from normweave.detector import Detector
from normweave.record import parse_record

DATA = ("fit_images", "calibration_images", "data_fingerprint", "calibrated_on")
TEXTS = ("model", "precision", "seed", "feature_shape", "software")


def describe(folder: Path) -> dict[str, Any]:
    """Return what a bundle holds, as JSON values. The hash of every file is compared.

    Raises:
        BundleError: damaged, not a bundle, or of another format version.
    """
    record = bundle.read(folder)
    parts = parse_record(record, where=folder)
    points = parts["operating_points"]
    files = bundle.files(folder)
    return {
        "bundle": str(folder),
        "bundle_hash": bundle.bundle_hash(folder),
        **{key: record.get(key) for key in (*TEXTS, *DATA)},
        "subclasses": list(record["subclass_names"]),
        "operating_points": points.calibration.table(record["subclass_names"]),
        "regions": regions.described(parts["config"].regions),
        "guarantee": points.calibration.guarantee,
        "plugins": record.get(plugins.KEY, []),
        "history": record.get(history.KEY, []),
        "files": {
            name: {"sha256": digest, "bytes": (folder / name).stat().st_size} for name, digest in sorted(files.items())
        },
    }


def differences(first: Path, second: Path) -> dict[str, Any]:
    """Return what differs between two bundles, as JSON values; what is equal is left out.

    Raises:
        BundleError: as of `describe`.
    """
    old, new = describe(first), describe(second)
    records = bundle.read(first), bundle.read(second)
    settings = _changed(*(_flat({**record["config"], "regions": None}) for record in records))
    thresholds = _changed(
        *({_name(point): _limits(point) for point in each["operating_points"]} for each in (old, new))
    )
    hashes = [{*record.get("fit_hashes", ()), *record.get("calibration_hashes", ())} for record in records]
    files = _changed(*({name: file["sha256"] for name, file in each["files"].items()} for each in (old, new)))
    parts = {
        "settings": settings,
        "regions": _changed(old["regions"], new["regions"]),
        "subclasses": _changed(*(dict.fromkeys(each["subclasses"], True) for each in (old, new))),
        "operating_points": thresholds,
        "data": _changed(*({key: each[key] for key in (*TEXTS, *DATA)} for each in (old, new))),
        "images": {"only_first": len(hashes[0] - hashes[1]), "only_second": len(hashes[1] - hashes[0])},
        "files": files,
        "history": [step for step in new["history"] if step not in old["history"]],
        "history_only_first": [step for step in old["history"] if step not in new["history"]],
    }
    found = {key: value for key, value in parts.items() if value and value != {"only_first": 0, "only_second": 0}}
    if not found and old["bundle_hash"] != new["bundle_hash"]:  # something that people seldom look for
        keys = [key for key in dict.fromkeys([*records[0], *records[1]]) if records[0].get(key) != records[1].get(key)]
        return {"record": keys}
    return found


def verify(folder: Path, *, threads: int | None = None, device: str = "auto") -> dict[str, Any]:
    """Compare the hash of every file, and the outputs of the graph for the stored images with the recorded ones.

    Raises:
        BundleError: damaged.
        CheckError: the outputs differ by more than another machine explains.
    """
    detector = Detector.load(folder, threads=threads, device=device)
    stored = checks.read(folder)
    result = {"bundle": str(folder), "bundle_hash": detector.bundle_hash, "files": len(bundle.files(folder))}
    if stored is None:
        return result | {"check": None}
    return result | {"check": checks.check_recorded(stored.outputs, outputs(detector.network, stored.pixels))}


def _name(point: Mapping[str, Any]) -> str:
    return str(point["subclass"] or point.get("category") or "all together")


def _limits(point: Mapping[str, Any]) -> dict[str, Any]:
    return {key: point[key] for key in ("threshold", "false_alarm_rate", "unknown_beyond")}


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {f"{above}{key}": value}
    return found


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return [old, new] of each key whose values differ; None where a side has no such key."""
    return {key: [old.get(key), new.get(key)] for key in dict.fromkeys([*old, *new]) if old.get(key) != new.get(key)}
