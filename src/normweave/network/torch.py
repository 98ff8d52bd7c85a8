"""The network in torch: frozen backbone, channel standardisation and head. Used while fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave import bundle, checks
from normweave.checks import Checks
from normweave.config import Config
from normweave.data.rows import Rows
from normweave.errors import BundleError, CheckError
from normweave.features import cache as feature_cache
from normweave.features.frozen import FrozenFeatures
from normweave.features.standardize import ChannelStandardizer
from normweave.heads.base import Head, TrainingStage
from normweave.network import OPENVINO, exchange, export, open_graph
from normweave.network.base import GraphNetwork, Network, Reader
from normweave.outcome.operating_point import Calibration
from normweave.references import bundle_files
from normweave.types import FeatureSource, FitData, PatchScores, Progress, RawOutput

CACHE_GIB = 20.0
PARITY_IMAGES = 32
"""Calibration images on which the exported graph must agree with torch."""
PARITY_IMAGES_OF_SIMILAR = 4
"""The same for a graph of which only tensors were exchanged: its operators were compared when it was exported."""


class FittedRows(NamedTuple):
    """The images that a network was fitted and calibrated on."""

    images: Rows
    fit: NDArray[np.int64]  # rows
    calibration: NDArray[np.int64]  # rows

    def tiles(self, chosen: NDArray[np.int64], *, at_most: int) -> list[NDArray[np.uint8]]:
        """Load the tiles, (n, 3, height, width) each, of images spread evenly over the chosen rows."""
        owners = np.unique(self.images.owner[chosen])
        some = owners[np.linspace(0, len(owners) - 1, min(at_most, len(owners))).astype(int)]
        return [
            np.stack([self.images.load(int(row)) for row in np.flatnonzero(self.images.owner == owner)])
            for owner in some
        ]


class TorchModule(nn.Module):
    """Prepared pixels (B, 3, H, W) uint8 to the outputs of the head, as one module to export.

    A head that can exclude also takes the subclass (B,) whose expert is left out, -1 = none, so that one graph serves
    prediction and the operating points for unseen subclasses.
    """

    def __init__(self, *, extractor: nn.Module, standard: nn.Module, head: Head) -> None:
        super().__init__()
        self.extractor = extractor
        self.standard = standard
        self.head = head
        self.can_exclude = head.can_exclude

    @property
    def growing(self) -> tuple[str, ...]:
        """`Head.growing`, with the names that the tensors have in this module."""
        return tuple(f"head.{name}" for name in self.head.growing)

    def outputs(self, pixels: Tensor, excluded: Tensor | None = None) -> dict[str, Tensor]:
        """Return the outputs by name."""
        features = self.standard(self.extractor(pixels))
        if excluded is not None and self.can_exclude:
            return named_outputs(self.head.score_excluding(features, excluded))
        return named_outputs(self.head(features))

    def forward(self, pixels: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the outputs in their order."""
        return tuple(self.outputs(pixels, excluded).values())


def named_outputs(patches: PatchScores) -> dict[str, Tensor]:
    """Return the fields that a head gives by name, those of the routing among them."""
    named = patches._asdict()
    routing = named.pop("routing")
    if routing is not None:
        named |= routing._asdict()
    return {name: value for name, value in named.items() if value is not None}


class TorchNetwork(Network):
    """A fitted network in torch.

    Args:
        cache_gib: largest size of the feature cache in GiB.
        rows: the images of the fit, from which the parity check takes some; None for a network read from a bundle.
        source: features of these images, where they are not in the cache of this machine.
        graph: the exported graph, if there is one already.
        similar: the graph of a network that has more or fewer added subclasses and is equal otherwise.
    """

    library = "torch"
    embeds = True

    def __init__(
        self,
        extractor: FrozenFeatures,
        standard: ChannelStandardizer,
        head: Head,
        *,
        config: Config,
        device: str = "cpu",
        cache_gib: float = CACHE_GIB,
        rows: FittedRows | None = None,
        source: FeatureSource | None = None,
        graph: bytes | None = None,
        similar: bytes | None = None,
    ) -> None:
        self.extractor = extractor.to(device)
        self.standard = standard.to(device).eval()
        self.head = head.to(device).eval()
        self.config = config
        self.rows = rows
        self.source = source
        self.device = device
        self.cache_gib = cache_gib
        self._graph = graph
        self._similar = similar
        self.can_exclude = head.can_exclude
        self.parameters = sum(
            each.numel()
            for part in (extractor, standard, head)
            for each in part.state_dict().values()
            if each.is_floating_point()
        )

    def __call__(self, pixels: NDArray[np.uint8], excluded: NDArray[np.int64] | None = None) -> RawOutput:
        """Return the raw outputs of (n, 3, height, width) prepared pixels."""
        return self.score_features(self.extractor.extract(torch.from_numpy(pixels)), excluded)

    @torch.inference_mode()
    def score_features(self, features: Tensor, excluded: NDArray[np.int64] | None = None) -> RawOutput:
        """Return the raw outputs of (n, D, h, w) features of the backbone."""
        standard = self.standard(features.to(self.device))
        if excluded is None:
            patches = self.head(standard)
        else:
            patches = self.head.score_excluding(standard, torch.from_numpy(excluded).to(self.device))
        return RawOutput(**{name: value.cpu().numpy() for name, value in named_outputs(patches).items()})

    def reader(self, images: Rows, *, cache: Path | None = None, progress: Progress | None = None) -> Reader:
        """Return a reader that takes features from the cache, and adds those that it lacks."""
        source = self.source
        if source is None or self.rows is None or images is not self.rows.images:
            source = feature_source(self.extractor, images, cache=cache, max_gib=self.cache_gib, progress=progress)
        return FeatureReader(self, images, source)

    def stored(self, cache: Path, keys: Sequence[str]) -> Sequence[bool]:
        """Return for each row key whether its features are in the cache."""
        return feature_cache.contains(cache, self.extractor.fingerprint, keys)

    def write(
        self, folder: Path, *, record: Mapping[str, Any], calibration: Calibration | None, overwrite: bool
    ) -> None:
        """Write a bundle with the exported graph and the weights."""
        bundle.write(
            folder,
            tensors=self.tensors(),
            record=record,
            files={bundle.GRAPH: self.exported(calibration)}
            | bundle_files(self.references)
            | checks.bundle_files(self.checks),
            overwrite=overwrite,
        )

    def exported(self, calibration: Calibration | None) -> bytes:
        """Return the ONNX graph, exported and compared with torch at the first call.

        Raises:
            CheckError: it cannot be exported, or does not give the scores of torch.
        """
        if self._graph is None:
            parts = (self.extractor, self.standard, self.head)
            size = (self.config.prepare.height, self.config.prepare.width)
            try:
                for part in parts:
                    part.to("cpu")
                module = TorchModule(extractor=self.extractor, standard=self.standard, head=self.head).eval()
                graph = self._exchanged(module, calibration)
                if graph is None:
                    graph = export.to_onnx(module, height=size[0], width=size[1], growing=module.growing)
                    images = self._parity_images(PARITY_IMAGES)
                    networks = self._networks(graph)
                    export.check_parity(module, networks, images, self.config, calibration)
                    if self.config.outcome.references and self.checks is None:
                        self.checks = Checks.compute(networks[0], some_tiles(images, at_most=checks.MOST))
            finally:
                for part in parts:
                    part.to(self.device)
            self._graph = graph
        return self._graph

    def _exchanged(self, module: TorchModule, calibration: Calibration | None) -> bytes | None:
        """Return the similar graph with the tensors of this network, which takes a third of the time of an export.

        Returns:
            None: there is none, or it is that of a network which differs in more, as one of an older version may.
        """
        if self._similar is None or not module.growing:
            return None
        buffers = dict(module.named_buffers())
        tensors = {name: buffers[name].numpy() for name in module.growing}
        graph = exchange.exchanged(self._similar, tensors, subclasses=len(self.head.subclass_names))
        if graph is None:
            return None
        try:
            images = self._parity_images(PARITY_IMAGES_OF_SIMILAR)
            export.check_parity(module, self._networks(graph), images, self.config, calibration)
        except (BundleError, CheckError):
            return None
        return graph

    def _networks(self, graph: bytes) -> list[GraphNetwork]:
        """Return the graph in each library that is installed."""
        size = (self.config.prepare.height, self.config.prepare.width)
        devices = ("cpu", *([OPENVINO] if find_spec("openvino") else []))
        return [open_graph(graph, where="The exported graph", size=size, device=device) for device in devices]

    def _parity_images(self, at_most: int) -> list[NDArray[np.uint8]]:
        """Return tiles (n, 3, height, width) of calibration images, or without those the images of the checks."""
        if self.rows is not None:
            return self.rows.tiles(self.rows.calibration, at_most=at_most)
        assert self.checks is not None  # a network from a bundle has its graph
        return [tile[None] for tile in some_tiles([self.checks.pixels], at_most=at_most)]

    @property
    def similar(self) -> bytes | None:
        """The graph of this network, or the similar one of its arguments if it was not exported."""
        return self._graph or self._similar

    def tensors(self) -> dict[str, Tensor]:
        """Return everything fitted by name, as a bundle holds it."""
        parts = {"features.": self.extractor, "standard.": self.standard, "head.": self.head}
        return {
            prefix + name: tensor.detach().cpu()
            for prefix, part in parts.items()
            for name, tensor in part.state_dict().items()
        }


def some_tiles(images: Sequence[NDArray[np.uint8]], *, at_most: int) -> NDArray[np.uint8]:
    """Return tiles (n, 3, height, width) spread evenly over those of all images."""
    tiles = np.concatenate(images)
    chosen: NDArray[np.uint8] = tiles[np.linspace(0, len(tiles) - 1, min(at_most, len(tiles))).astype(int)]
    return chosen


class FeatureReader(Reader):
    """Reads features of the backbone, and scores them with the head."""

    def __init__(self, network: TorchNetwork, images: Rows, source: FeatureSource) -> None:
        super().__init__(network, images)
        self.torch = network
        self.source = source

    def read(self, rows: NDArray[np.int64]) -> Tensor:
        """Return the features (n, D, h, w) of these rows."""
        return self.source.read(rows)

    def score(self, inputs: Tensor, excluded: NDArray[np.int64] | None = None) -> RawOutput:
        """Return the raw outputs of features that `read` returned."""
        return self.torch.score_features(inputs, excluded)

    @torch.inference_mode()
    def embed(self, inputs: Tensor) -> NDArray[np.float32] | None:
        """Return the embeddings (n, C) of the images, which separate the subclasses; None if the head has none."""
        embedding = self.torch.head.embed(self.torch.standard(inputs.to(self.torch.device)))
        return None if embedding is None else embedding.cpu().numpy()


def feature_source(
    extractor: FrozenFeatures, images: Rows, *, cache: Path | None, max_gib: float, progress: Progress | None
) -> FeatureSource:
    """Return the features of all rows: from the cache folder, or computed at each reading where there is none."""
    return feature_cache.source(extractor, images.keys, images.load, folder=cache, max_gib=max_gib, progress=progress)


class Sources(Protocol):
    """Finds or computes the features of the images of a fit, and trains heads, on other machines too."""

    machines: int
    """On which the last head was trained by gradient; 1: the machine that fits."""

    def __call__(
        self,
        extractor: FrozenFeatures,
        images: Rows,
        config: Config,
        *,
        cache: Path | None,
        max_gib: float,
        here: str | None,
        progress: Progress | None,
    ) -> FeatureSource:
        """Return a source of the features of all rows.

        Args:
            cache, max_gib: as in `fitting.fit`; cache None: the folder that is the default where features are computed.
            here: why they must be on this machine; None: `passes.over` may compute where they are.
        """
        ...

    def train(
        self,
        head: Head,
        stages: Sequence[TrainingStage],
        chosen: FittedRows,
        data: FitData,
        standard: ChannelStandardizer,
        *,
        device: str,
        progress: Progress | None,
    ) -> bool:
        """Train all stages of a head on several machines; return False if they are to be trained on this one.

        Args:
            chosen: images of the source of features that was returned last.
            data: of the fit rows.
        """
        ...
