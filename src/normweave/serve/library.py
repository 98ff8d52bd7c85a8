"""A folder of bundles, from which a server takes the one that inspects and the one in the shadow."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from normweave import bundle, references
from normweave.detector import Detector
from normweave.errors import ConfigError, NormweaveError
from normweave.record import parse_record
from normweave.references import References

log = logging.getLogger(__name__)
WARM_UP_IMAGES = 2
"""Images that a new detector scores before it inspects."""


class ModelError(NormweaveError):
    """The library does not allow this.

    Args:
        code: for programs; it does not change.
        status: of the answer of the REST interface.
    """

    def __init__(self, detail: str, *, code: str, status: int = 409) -> None:
        super().__init__(detail)
        self.code = code
        self.status = status


@dataclass(frozen=True, kw_only=True)
class LibraryBundle:
    """A bundle of the folder."""

    name: str
    """Name of its folder."""
    path: Path
    bundle_hash: str | None
    """None: it cannot be read."""
    model: str = ""
    categories: Mapping[str, Sequence[str]]
    """The subclasses of each category."""
    preparation: Mapping[str, Any]
    written_at: datetime | None = None
    """Time of the last change of its record (UTC)."""
    damage: str | None = None
    """Why it cannot be used; None: every file has the hash of the record."""


class Library:
    """The bundles in a folder. A bundle that is added, changed or removed is noticed by the next `scan`.

    Methods are thread-safe.

    Args:
        folder: each folder in it that has a bundle.json is a bundle.

    Raises:
        ConfigError: the folder does not exist.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise ConfigError(f"The library {folder} is not a folder. Create it, and put bundles into it.")
        self.folder = folder
        self._lock = threading.Lock()
        self._checked: dict[Path, tuple[object, LibraryBundle]] = {}
        self._references: dict[str, References | None] = {}

    def scan(self) -> list[LibraryBundle]:
        """Return all bundles by name. The files of a bundle are compared with their hashes if they have changed."""
        with self._lock:
            checked = {}
            try:
                paths = sorted(path for path in self.folder.iterdir() if (path / bundle.RECORD).is_file())
            except OSError as error:
                raise ModelError(
                    f"The library {self.folder} cannot be read: {error}. Correct its permissions.",
                    code="library_unreadable",
                    status=503,
                ) from error
            for path in paths:
                if ".partial-" in path.name or ".replaced-" in path.name:  # `bundle.write` is at work
                    continue
                signature = _signature(path)
                known = self._checked.get(path)
                checked[path] = known if known and known[0] == signature else (signature, check(path))
            self._checked = checked
            return [found for _, found in checked.values()]

    def known(self) -> list[LibraryBundle]:
        """Return the bundles of the last scan, at once."""
        return [one for _, one in self._checked.values()]

    def find(self, bundle_hash: str) -> LibraryBundle:
        """Return the bundle with this hash.

        Raises:
            ModelError: there is none (unknown_model), or it is damaged (bundle_damaged).
        """
        same = [one for one in self.scan() if one.bundle_hash == bundle_hash]
        if not same:
            raise ModelError(
                f"The library has no bundle {bundle_hash:.64}. Put it into the folder, or choose one that is there.",
                code="unknown_model",
                status=404,
            )
        usable = [one for one in same if one.damage is None]
        if not usable:
            raise ModelError(f"The bundle {same[0].name} cannot be used: {same[0].damage}", code="bundle_damaged")
        return usable[0]

    def references(self, bundle_hash: str) -> References | None:
        """Return the good images of a bundle of the last scan; None if it has none, or is damaged."""
        known = [one for one in self.known() if one.bundle_hash == bundle_hash and one.damage is None]
        if not known:
            return None
        if bundle_hash not in self._references:
            try:
                self._references[bundle_hash] = references.read(known[0].path)
            except NormweaveError as error:
                log.warning("The good images of bundle %s are not shown: %s", bundle_hash[:12], error)
                return None
        return self._references[bundle_hash]


def check(path: Path) -> LibraryBundle:
    """Read a bundle, and compare every file with its hash; `damage` has the reason why it cannot be used."""
    damage, record, digest, written_at = None, dict[str, Any](), None, None
    try:
        digest = bundle.bundle_hash(path)
        written_at = datetime.fromtimestamp((path / bundle.RECORD).stat().st_mtime, UTC)
        record = bundle.read(path)
        if parse_record(record, where=path)["operating_points"] is None:
            damage = "it has no operating points. Calibrate it: normweave calibrate."
    except (NormweaveError, OSError) as error:
        reason = str(error).replace(f"{path.parent}{os.sep}", "")  # pages show no path of the server
        damage = reason.removeprefix(f"{path.name}: ")  # they show the name beside it
    if damage is not None:
        record = {}
    return LibraryBundle(
        name=path.name,
        path=path,
        bundle_hash=digest,
        model=str(record.get("model", "")),
        categories=record.get("categories", {}),
        preparation=record.get("preparation", {}),
        written_at=written_at,
        damage=damage,
    )


def _signature(path: Path) -> object:
    try:
        states = [(one.name, one.stat()) for one in path.iterdir()]
    except OSError:
        return None
    return sorted((name, state.st_mtime_ns, state.st_size, state.st_ino) for name, state in states)


def warm_up(detector: Detector) -> Detector:
    """Score black images, so that the first real one is not delayed, and return the detector."""
    prepare = detector.config.prepare
    black = np.zeros((prepare.height, prepare.width, 3), dtype=np.uint8)
    for _ in range(WARM_UP_IMAGES):
        opened = detector.open(black)
        (scored,) = detector.scores([opened])
        detector.outcome(opened, scored, maps=True)
    return detector
