"""Which bundle of a library inspects, and which one is in the shadow: start, stop, promote, roll back."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from normweave.detector import Detector
from normweave.errors import ConfigError, NormweaveError, unknown
from normweave.serve.library import Library, LibraryBundle, ModelError, warm_up
from normweave.serve.model_store import Activation, Actor, Comparison, ModelStore, ShadowRun
from normweave.serve.records import Inspection
from normweave.serve.shadow import Shadow
from normweave.serve.store import Store

if TYPE_CHECKING:
    from normweave.serve.service import InspectionService

log = logging.getLogger(__name__)
ModelState = Literal["active", "candidate", "ready", "failed", "damaged"]
"""State of a bundle. failed: it was the last candidate, and the server switched it off."""


@dataclass(frozen=True, kw_only=True)
class ModelsState:
    """The models of a line."""

    bundles: list[LibraryBundle]
    active: Activation
    back_to: Activation | None
    """What a roll back returns to."""
    shadow: ShadowRun | None
    """The last run, which may have ended."""
    waiting: int
    """Images that wait for the candidate."""

    @property
    def candidate(self) -> str | None:
        """Hash of the candidate in the shadow."""
        return None if self.shadow is None or self.shadow.ended_at is not None else self.shadow.bundle_hash

    def state(self, bundle: LibraryBundle) -> ModelState:
        """Return the state of a bundle."""
        whole = any(one.bundle_hash == bundle.bundle_hash and one.damage is None for one in self.bundles)
        if bundle.damage is not None and whole:  # an incomplete copy of another one
            return "damaged"
        if bundle.bundle_hash == self.active.bundle_hash:
            return "active"
        if bundle.damage is not None:
            return "damaged"
        if bundle.bundle_hash == self.candidate:
            return "candidate"
        run = self.shadow
        failed = run is not None and run.failure is not None and run.bundle_hash == bundle.bundle_hash
        return "failed" if failed else "ready"

    def reason(self, bundle: LibraryBundle) -> str | None:
        """Return why a bundle is damaged, or has failed."""
        if bundle.damage is None and self.shadow is not None and self.state(bundle) == "failed":
            return self.shadow.failure
        return bundle.damage

    def name(self, bundle_hash: str) -> str:
        """Return the name of a bundle, or the start of its hash if it is no longer in the folder."""
        return next((one.name for one in self.bundles if one.bundle_hash == bundle_hash), bundle_hash[:12])


def choose_active(library: Library, store: Store, *, name: str | None) -> LibraryBundle:
    """Return the bundle that inspects on this line at the start of the server, and store this choice.

    Args:
        name: name of its folder; None: the one that was active before, or the only one.

    Raises:
        ConfigError: there is no such bundle, or the choice is not clear.
        ModelError: it is damaged.
    """
    records = ModelStore(store)
    usable = [one for one in library.scan() if one.damage is None]
    active = records.active()
    if name is None and active is not None:
        try:
            return library.find(active.bundle_hash)
        except ModelError as error:
            raise ConfigError(
                f"The active bundle of this line ({active.bundle_hash[:12]}…) cannot be loaded from {library.folder}: "
                f"{error} Put it back, or choose another one with --active NAME."
            ) from error
    names = [one.name for one in usable]
    if name is None and not usable:
        reasons = " ".join(f"{one.name} cannot be used: {one.damage}" for one in library.scan())
        raise ConfigError(
            f"{library.folder} has no usable bundle. Put one into it, or train one: normweave train GOOD_IMAGES -o "
            f"{library.folder}/NAME. {reasons}".rstrip()
        )
    if name is None and len(usable) != 1:
        listed = ", ".join(names) or "none"
        raise ConfigError(
            f"{library.folder} has {len(usable)} usable bundles, and none is active on this line yet. Choose one with "
            f"--active NAME. Usable: {listed}."
        )
    chosen = next((one for one in usable if name is None or one.name == name), None)
    if chosen is None:
        damaged = {one.name: one.damage for one in library.scan() if one.damage is not None}
        if name in damaged:
            raise ConfigError(f"The bundle {name} cannot be used: {damaged[str(name)]}")
        raise unknown("bundle", str(name), names, f"It is the name of a folder in {library.folder}.")
    assert chosen.bundle_hash is not None  # it was read
    if active is None or active.bundle_hash != chosen.bundle_hash:
        records.choose(chosen.bundle_hash)
    return chosen


class Models:
    """The models of a server with a library. Methods are thread-safe; those that change something wait for each other.

    Args:
        service: inspects with the active bundle, and gets a new detector when this changes.
        load: returns the detector of a bundle, for the service.
        device: of the candidate.

    Attributes:
        library: the folder of bundles.
        records: what is stored of the models of this line.
    """

    def __init__(
        self, library: Library, *, service: InspectionService, load: Callable[[Path], Detector], device: str
    ) -> None:
        self.library = library
        self.records = ModelStore(service.store)
        self._service, self._load, self._device = service, load, device
        self._lock = threading.RLock()
        self._shadow: Shadow | None = None

    def resume(self) -> None:
        """Start the candidate that was in the shadow when the server stopped."""
        run = self.records.shadow()
        if run is None:
            return
        try:
            self._run(run, self.library.find(run.bundle_hash).path)
        except NormweaveError as error:
            self.records.fail_shadow(run.id, str(error))

    def state(self) -> ModelsState:
        """Return all bundles, and which of them are active and in the shadow."""
        bundles = self.library.scan()
        active = self._active()
        shadow = self._shadow
        return ModelsState(
            bundles=bundles,
            active=active,
            back_to=self.records.before(active),
            shadow=self.records.last_shadow(),
            waiting=0 if shadow is None else shadow.waiting,
        )

    def _active(self) -> Activation:
        active = self.records.active()
        assert active is not None  # `choose_active` has stored one
        return active

    def offer(self, inspections: Sequence[Inspection]) -> None:
        """Give inspections that were answered to the candidate, if there is one; returns at once."""
        shadow = self._shadow
        if shadow is not None:
            shadow.offer(inspections)

    def comparison(
        self, *, since: datetime | None = None, category: str | None = None, subclass: str | None = None
    ) -> tuple[ShadowRun, Comparison]:
        """Return the last run, and what it is compared with: the active bundle, or after its end that of its start.

        Raises:
            ModelError: no bundle was in the shadow on this line.
        """
        run = self.records.last_shadow()
        if run is None:
            raise ModelError(
                "No bundle was in the shadow on this line yet, so there is nothing to compare. Start one there first.",
                code="no_candidate",
            )
        active = run.active_hash if run.ended_at is not None else self._active().bundle_hash
        bundles = {"active": active, "candidate": run.bundle_hash}
        return run, Comparison(**bundles, since=since, category=category, subclass=subclass)

    # ── actions of an engineer ───────────────────────────────────────────────────────────────────────────────────────

    def start_shadow(self, bundle_hash: str, actor: Actor, *, any_preparation: bool = False) -> None:
        """Put a bundle in the shadow, in place of an earlier candidate.

        Args:
            any_preparation: also if it prepares images in another way than the active bundle.

        Raises:
            ModelError: the bundle is unknown, damaged, active already, or prepares images in another way.
        """
        with self._lock:
            found = self.library.find(bundle_hash)
            active = self._service.detector
            if bundle_hash == active.bundle_hash:
                raise ModelError(
                    f"The bundle {found.name} is active, so it cannot be its own candidate.", code="already_active"
                )
            changed = changed_preparation(active.record["preparation"], found.preparation)
            if changed and not any_preparation:
                raise ModelError(
                    f"The bundle {found.name} prepares images in another way than the active one: {changed}. Its maps "
                    "and scores are of other pixels. Set any_preparation to compare them all the same.",
                    code="other_preparation",
                )
            shadow = self._shadow
            if shadow is not None and shadow.running and shadow.run.bundle_hash == bundle_hash:
                return
            run = self.records.start_shadow(bundle_hash, active_hash=str(active.bundle_hash), actor=actor)
            self._end_shadow()
            self._run(run, found.path)

    def stop_shadow(self, bundle_hash: str, actor: Actor) -> None:
        """Stop the candidate.

        Raises:
            ModelError: this bundle is not the candidate.
        """
        with self._lock:
            run = self.records.shadow()
            if run is None or run.bundle_hash != bundle_hash:
                self._check_candidate(bundle_hash)
            self._end_shadow()
            self.records.stop_shadow(actor)

    def promote(self, bundle_hash: str, actor: Actor) -> None:
        """Inspect with the candidate from now on.

        Raises:
            ModelError: this bundle is not the candidate, or it is damaged.
            NormweaveError: it cannot be loaded.
        """
        with self._lock:
            self._check_candidate(bundle_hash)
            detector = self._detector(bundle_hash)
            self.records.promote(bundle_hash, actor)
            self._service.detectors.swap(detector)
            self._end_shadow()

    def roll_back(self, actor: Actor) -> None:
        """Inspect again with the bundle that was active before the present one.

        Raises:
            ModelError: there is none, or it is no longer in the library, or damaged.
            NormweaveError: it cannot be loaded.
        """
        with self._lock:
            back_to = self.records.before(self._active())
            if back_to is None:
                raise ModelError(
                    "No other bundle was active before the present one on this line.", code="nothing_to_roll_back_to"
                )
            detector = self._detector(back_to.bundle_hash)
            self.records.roll_back(back_to, actor)
            self._service.detectors.swap(detector)
            if self._shadow is not None and self._shadow.run.bundle_hash == back_to.bundle_hash:
                self._end_shadow()

    def follow(self) -> None:
        """Take over what another server of the line has promoted, rolled back, or put in the shadow.

        While the active bundle cannot be loaded here, this server refuses images.

        Raises:
            NormweaveError: a bundle cannot be loaded, or the database failed.
        """
        with self._lock:
            active = self._active().bundle_hash
            if active != self._service.detector.bundle_hash:
                try:
                    self._service.detectors.swap(self._detector(active))
                except NormweaveError as error:
                    self._service.refusal = f"The active bundle of the line cannot be loaded on this server: {error}"
                    raise
                log.info("The bundle %s is active now, as another server has decided.", active[:12])
            self._service.refusal = None
            run, shadow = self.records.shadow(), self._shadow
            if shadow is not None and (run is None or run.id != shadow.run.id):
                self._end_shadow()
            if run is not None and self._shadow is None:
                self._run(run, self.library.find(run.bundle_hash).path)

    def stop(self) -> None:
        """Stop the candidate until the next start of the server."""
        with self._lock:
            self._end_shadow()

    # ── parts of them ────────────────────────────────────────────────────────────────────────────────────────────────

    def _check_candidate(self, bundle_hash: str) -> None:
        self.library.find(bundle_hash)
        run = self.records.shadow()
        if run is None or run.bundle_hash != bundle_hash:
            raise ModelError(
                f"The bundle {bundle_hash[:12]}… is not the candidate in the shadow. Start it there first.",
                code="not_candidate",
            )

    def _detector(self, bundle_hash: str) -> Detector:
        """Load a bundle, compare its files with their hashes again, and let it score once."""
        found = self.library.find(bundle_hash)
        try:
            detector = self._load(found.path)
        except NormweaveError as error:
            raise ModelError(f"The bundle {found.name} cannot be used: {error}", code="bundle_damaged") from error
        if detector.bundle_hash != bundle_hash:
            raise ModelError(f"The bundle {found.name} has just been replaced. Try again.", code="bundle_damaged")
        return warm_up(self._service.detectors.with_last_rate(detector))

    def _run(self, run: ShadowRun, path: Path) -> None:
        config = self._service.config
        self._shadow = Shadow(
            run,
            path,
            store=self.records,
            files=self._service.files,
            metrics=self._service.metrics,
            device=self._device,
            share=config.shadow_share,
            waiting=config.shadow_waiting,
            failed=lambda reason: self._failed(run, reason),
        )

    def _failed(self, run: ShadowRun, reason: str) -> None:
        """Store why a candidate was switched off. Called from its thread, for which others wait with the lock."""
        try:
            self.records.fail_shadow(run.id, reason)
        except NormweaveError as error:
            log.warning("The failure of the candidate is not stored: %s", error)

    def _end_shadow(self) -> None:
        shadow, self._shadow = self._shadow, None
        if shadow is not None:
            shadow.stop()


def changed_preparation(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return which settings of the preparation differ, in words; an empty string if none does."""
    names = sorted({*old, *new})
    return ", ".join(f"{name} {old.get(name)} → {new.get(name)}" for name in names if old.get(name) != new.get(name))
