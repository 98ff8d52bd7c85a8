"""torch to one ONNX graph, and the gate that it passes before anyone relies on it.

Prepared pixels go in, a grid of patch scores and the routing come out. Upsampling, smoothing, thresholds stay outside:
they are numpy, and the same for both (`scoring`).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.errors import CheckError, MissingError
from normweave.heads.base import Head
from normweave.network.onnx import EXCLUDED, PIXELS, Network
from normweave.scoring import Judge, Scored, in_passes, summarise
from normweave.types import PatchScores

if TYPE_CHECKING:
    from onnx import ModelProto

OPSET = 20
"""Of ONNX 1.15 (2023); ONNX Runtime 1.17 and later know it."""
TOLERANCE = 1e-3
"""Relative difference that scores may show between torch and the library that runs the graph."""
CELLS = 0.99
"""Share of a map's cells that must agree: two stored patches may be equally near but for rounding."""


def answers(patches: PatchScores) -> dict[str, Tensor]:
    """What a head says by name: the fields that it gives, those of the routing among them."""
    named = patches._asdict()
    routing = named.pop("routing")
    if routing is not None:
        named |= routing._asdict()
    return {name: value for name, value in named.items() if value is not None}


class Whole(nn.Module):
    """The whole network: prepared pixels (B, 3, H, W) uint8 to the answers of the head.

    A head that knows strangers is also given the subclass (B,) whose expert it may not ask, -1 = none: so one graph
    serves both, prediction and the line for kinds never seen.
    """

    def __init__(self, *, extractor: nn.Module, standard: nn.Module, head: Head) -> None:
        super().__init__()
        self.extractor = extractor
        self.standard = standard
        self.head = head
        self.knows_strangers = head.can_exclude

    def says(self, pixels: Tensor, excluded: Tensor | None = None) -> dict[str, Tensor]:
        """The answers by name."""
        features = self.standard(self.extractor(pixels))
        if excluded is not None and self.knows_strangers:
            return answers(self.head.score_excluding(features, excluded))
        return answers(self.head(features))

    def forward(self, pixels: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, ...]:
        """The answers in their order."""
        return tuple(self.says(pixels, excluded).values())


def to_onnx(whole: Whole, *, height: int, width: int) -> bytes:
    """The graph of a network on the CPU: static names, any number of images, the same network to the same bytes.

    Raises:
        CheckError: it holds something that ONNX has no word for, or too many weights for one file.
        MissingError: onnx or onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401 - torch asks for it, and says less clearly that it is missing
    except ImportError as error:
        raise MissingError(
            'The graph for the line PC needs onnx and onnxscript: pip install "normweave[train]"'
        ) from error
    batch = torch.export.Dim("batch")
    # Two: torch.export takes a size of one for a constant.
    given: tuple[Tensor, ...] = (torch.zeros(2, 3, height, width, dtype=torch.uint8),)
    names = [PIXELS]
    if whole.knows_strangers:
        given += (torch.full((2,), -1, dtype=torch.int64),)
        names.append(EXCLUDED)
    with torch.no_grad(), _quietly():
        outputs = list(whole.says(*given))
        try:
            program = torch.onnx.export(
                whole,
                given,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=tuple({0: batch} for _ in given),
                verbose=False,
            )
            assert program is not None  # without a file to write to, it comes back
            content: bytes = bare(program.model_proto).SerializeToString(deterministic=True)
        except Exception as error:  # torch and protobuf have many kinds, and all mean the same here
            raise CheckError(
                f"This network cannot be written as an ONNX graph, so no bundle is written: {type(error).__name__}: "
                f"{str(error)[:2000]} Choose another backbone or head."
            ) from error
    return content


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's remarks on its own working."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.__trace", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def bare(model: ModelProto) -> ModelProto:
    """Without remarks: they hold lines of source and paths of the machine."""
    for message in (model, model.graph, *model.graph.node, *model.graph.initializer):
        del message.metadata_props[:]
        message.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.value_info[:]
    return model


def gate(whole: Whole, network: Network, images: Sequence[NDArray[np.uint8]], judge: Judge) -> None:
    """Compare torch with the library that runs the network on real images.

    Scores may differ by `TOLERANCE` of the score, or of the usual size of a score where that is more: scores of normal
    images lie around 0. Verdicts must be equal, but where a score lies so near its threshold that this much decides.

    Args:
        whole: on the CPU, in eval mode.
        images: prepared pixels (n, 3, height, width) of the tiles of each.

    Raises:
        CheckError: they do not agree.
    """
    pixels = np.concatenate(images)

    def scored(says: Callable[..., dict[str, NDArray[Any]]], excluded: NDArray[np.int64] | None) -> Scored:
        def some(rows: slice) -> Scored:
            return Scored.of(says(pixels[rows], None if excluded is None else excluded[rows]), judge.config)

        return in_passes(len(pixels), some, judge.config.features.batch_images)

    def by_torch(pixels: NDArray[np.uint8], excluded: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            kinds = None if excluded is None else torch.from_numpy(excluded)
            return {name: said.numpy() for name, said in whole.says(torch.from_numpy(pixels), kinds).items()}

    ours, theirs = scored(by_torch, None), scored(network, None)
    _agree(ours, theirs, "", network.library)
    if whole.knows_strangers:
        strangers = scored(by_torch, ours.subclass)
        _agree(strangers, scored(network, ours.subclass), " as strangers", network.library)
    if judge.line is None:
        return
    done = 0
    for number, image in enumerate(images):
        both = [summarise(scored.part(done, done + len(image))) for scored in (ours, theirs)]
        done += len(image)
        mine, other = (
            judge.line.calibration.decide(score=each.score, distance=each.distance, subclass=each.subclass)
            for each in both
        )
        allowed = TOLERANCE * max(abs(mine.threshold), float(np.abs(ours.scores).mean()))
        if mine.verdict != other.verdict and abs(both[0].score - mine.threshold) > allowed:
            raise CheckError(
                f"{network.library} calls calibration image {number + 1} {other.verdict} where torch calls it "
                f"{mine.verdict}, so no bundle is written. {_CURE}"
            )


_CURE = "Update torch, onnxscript and what runs the graph (onnxruntime, openvino), or choose another backbone or head."


def _agree(ours: Scored, theirs: Scored, how: str, library: str) -> None:
    for name, mine, other in zip(Scored._fields, ours, theirs, strict=True):
        neither = mine is None and other is None
        if not neither and (mine is None or other is None or mine.shape != other.shape):
            raise CheckError(f"torch and {library} do not both give {name}{how}, or not alike. {_CURE}")
    for name in ("scores", "peaks", "distance", "weights"):
        mine, other = getattr(ours, name), getattr(theirs, name)
        if mine is None:
            continue
        wrong = ~_close(mine, other).reshape(len(mine), -1).all(axis=1)  # (n,)
        if wrong.any():
            first = int(wrong.argmax())
            raise CheckError(
                f"{library} gives other {name}{how} than torch for {wrong.sum()} of {len(mine)} calibration images, "
                f"first {other[first]} for {mine[first]}; {TOLERANCE:g} of it is allowed. So no bundle is written. "
                f"{_CURE}"
            )
    share = float(_close(ours.grids, theirs.grids).mean())
    if share < CELLS:
        raise CheckError(
            f"{library} gives other maps{how} than torch: {share:.1%} of their cells agree to {TOLERANCE:g}, and "
            f"{CELLS:.0%} must. So no bundle is written. {_CURE}"
        )


def _close(mine: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Element by element; what is not finite agrees with nothing."""
    usual = np.abs(mine).mean()
    with np.errstate(invalid="ignore"):  # infinity less itself
        close: NDArray[np.bool_] = np.abs(mine - other) <= TOLERANCE * np.maximum(np.abs(mine), usual)
    return close
