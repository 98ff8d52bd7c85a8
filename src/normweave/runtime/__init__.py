"""A bundle to outcomes on a line PC: numpy, Pillow and ONNX Runtime, no torch."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from normweave import bundle, scoring, settings
from normweave.data import rows
from normweave.data.images import ImageInput
from normweave.errors import ImageError
from normweave.network.onnx import Network
from normweave.outcome.operating_point import Calibration
from normweave.scoring import Judge, Opened, Scored, Summary
from normweave.types import Outcome, Progress


class Runtime:
    """A bundle, ready to judge images: the scores of training, to the rounding of another library.

    Args:
        folder: written by `normweave train`; every hash is checked, and that its graph is self-contained.
        threads: of the network; None: as many as there are processors.
        device: auto, cpu, cuda or cuda:N; openvino or openvino:GPU.

    Attributes:
        record: what it was trained on, as JSON holds it.
        refused: images that could not be read while calibrating.

    Raises:
        BundleError: damaged, foreign or of a newer format.
        MissingError: the device is not there.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, threads: int | None = None, device: str = "auto"
    ) -> None:
        path = Path(folder)
        record = bundle.read(path)
        self._folder = path
        self._judge = Judge.of(record, bundle_hash=bundle.bundle_hash(path), where=path)
        prepare = self._judge.config.prepare
        self._network = Network(
            bundle.read_file(path, bundle.GRAPH),
            where=f"{path}/{bundle.GRAPH}",
            size=(prepare.height, prepare.width),
            threads=threads,
            device=device,
        )
        self.record = {key: value for key, value in record.items() if key not in bundle.LINE}
        self.refused: tuple[rows.Refusal, ...] = ()

    @property
    def batch_images(self) -> int:
        """How many images go through the network together."""
        return self._judge.config.features.batch_images

    @property
    def model(self) -> str:
        """Kind of its head."""
        return self._judge.config.head.kind

    @property
    def bundle_hash(self) -> str | None:
        """What identifies the bundle."""
        return self._judge.bundle_hash

    @property
    def smoothing(self) -> float:
        """Of the anomaly maps, as `maps.upsample` takes it."""
        return self._judge.config.maps.smoothing

    @property
    def map_threshold(self) -> float | None:
        """Where boxes begin, in units of the map; None: at the image's own threshold."""
        return self._judge.line and self._judge.line.map_threshold

    @property
    def calibration(self) -> Calibration | None:
        """The held-out normals, and the lines drawn from them."""
        return self._judge.line and self._judge.line.calibration

    @overload
    def score(self, images: ImageInput, *, maps: bool = ...) -> Outcome: ...
    @overload
    def score(self, images: list[Any], *, maps: bool = ...) -> list[Outcome]: ...
    def score(self, images: Any, *, maps: bool = True) -> Outcome | list[Outcome]:
        """Judge one image, or a list of them: paths, bytes, arrays or PIL images.

        A single image that cannot be read raises; in a list it comes back with `error` set.
        """
        if isinstance(images, list):
            return list(self.stream(images, maps=maps))
        (outcome,) = self.stream([images], maps=maps)
        if outcome.error is not None:
            raise ImageError(outcome.error)
        return outcome

    def stream(
        self, images: Iterable[ImageInput], *, maps: bool = True, batch_images: int | None = None
    ) -> Iterator[Outcome]:
        """Judge images one after the other, in their order, however many there are.

        Args:
            maps: with anomaly maps at the size of each image, and the boxes found in them.
            batch_images: instead of the bundle's; with 1 no image waits for the next.
        """
        return self._judge.stream(
            images,
            self._scored,
            maps=maps,
            batch_images=batch_images,
        )

    # The way of `stream` in its three steps, for who runs them in threads of their own.

    def open(self, image: ImageInput) -> Opened:
        """Decode an image and prepare its tiles; one that cannot be read says why."""
        return self._judge.open(image)

    def scores(self, batch: Sequence[Opened]) -> list[Scored | None]:
        """What the network says of each image; None of the unreadable."""
        return self._judge.scores(batch, self._scored, size=self.batch_images)

    def outcome(self, image: Opened, scored: Scored | None, *, maps: bool = True) -> Outcome:
        """The outcome of an image from its scores.

        Raises:
            DataError: the network's answer is not finite.
        """
        return self._judge.outcome(image, scored, maps=maps)

    def with_rate(self, false_alarm_rate: float) -> Runtime:
        """The same network with the lines for another false-alarm rate, drawn from the same held-out normals.

        Boxes keep their line, since how high the maps of those normals rise is not in the bundle.

        Raises:
            CheckError: the held-out normals are too few for this rate.
        """
        other = copy(self)
        other._judge = self._judge.with_rate(false_alarm_rate)
        other.record = self.record | {"config": settings.as_dict(other._judge.config)}
        return other

    def _scored(self, pixels: NDArray[np.uint8]) -> Scored:
        return Scored.of(self._network(pixels), self._judge.config)

    def calibrate(
        self,
        data: scoring.Data,
        *,
        false_alarm_rate: float | None = None,
        layout: str | None = None,
        progress: Progress | None = None,
    ) -> None:
        """Draw the operating points anew from other normal images, none of which the fit has seen.

        Raises:
            DataError: an image was used for fitting, or none can be read.
            CheckError: too few images for the rate.
        """
        config = self._judge.config
        if false_alarm_rate is not None:
            config = replace(config, outcome=replace(config.outcome, false_alarm_rate=false_alarm_rate))
        scanned = scoring.calibration_rows(data, config, self.record, layout=layout, progress=progress)
        summaries = self._summaries(scanned, score_excluding=False, progress=progress)
        strangers = None
        if self._network.knows_strangers:
            strangers = self._summaries(scanned, score_excluding=True, progress=progress)
        line = scoring.draw_line(
            summaries,
            strangers,
            subclass_names=self._judge.subclass_names,
            kinds=self._judge.kinds,
            outcome=config.outcome,
        )
        self._judge = replace(self._judge, config=config, line=line)
        self.record = scoring.calibrated_record(self.record, config, scanned)
        self.refused = scanned.refused

    def _summaries(
        self, scanned: rows.Rows, *, score_excluding: bool, progress: Progress | None
    ) -> list[Summary]:
        def score(few: NDArray[np.int64]) -> Scored:
            def some(part: slice) -> Scored:
                pixels = np.stack([scanned.load(int(row)) for row in few[part]])
                said = self._network(pixels)
                if score_excluding:
                    said = self._network(pixels, said["subclass"])
                return Scored.of(said, self._judge.config)

            return scoring.in_passes(len(few), some, self.batch_images)

        walk = scoring.summaries(
            scanned, np.arange(len(scanned)), score, size=self.batch_images, progress=progress
        )
        return [summary for _, _, summary in walk]

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the bundle with its line as it is now; weights and graph are those it was loaded with.

        Raises:
            BundleError: the folder exists and `overwrite` is not set, or the bundle has changed on disk.
        """
        target = Path(folder)
        bundle.rewrite(
            self._folder,
            target,
            record=self.record | scoring.line_record(self._judge.line),
            overwrite=overwrite,
        )
        self._folder = target
        self._judge = replace(self._judge, bundle_hash=bundle.bundle_hash(target))
        return target
