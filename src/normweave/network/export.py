"""Export a network from torch to one ONNX graph, and check that the graph gives the same scores.

The graph maps prepared pixels to patch scores and routing. Upsampling, smoothing and thresholds stay outside: they are
numpy, and the same for both (`scoring`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normweave.config import Config
from normweave.errors import CheckError, MissingError
from normweave.logs import quiet
from normweave.network.base import EXCLUDED, PIXELS, Network
from normweave.network.exchange import apart
from normweave.network.translate import translate
from normweave.outcome.operating_point import Calibration
from normweave.scoring import ImageScore, TileScores
from normweave.types import RawOutput

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnx_ir import Model

    from normweave.network.torch import TorchModule

OPSET = 18
"""Opset version of ONNX 1.13 (2022). From 19 on, ONNX Runtime's AveragePool takes ten times as long on a CPU."""
OPSET_WITH_GELU = 20
"""Opset version of ONNX 1.15 (2023), the first in which the activation of transformers is one operator; as parts of it,
a vision transformer takes 1.1 times as long."""
TOLERANCE = 1e-3
"""Largest relative difference of scores between torch and the library that runs the graph."""
CELLS = 0.99
"""Share of a map's cells that must agree: rounding may decide between two stored patches at the same distance."""
LOGGERS = ("torch", "torch.__trace", "onnxscript", "onnx_ir")


def to_onnx(module: TorchModule, *, height: int, width: int, growing: Sequence[str] = ()) -> bytes:
    """Export a network on the CPU: static names, dynamic batch, the same bytes for the same network.

    Args:
        growing: names of tensors that `exchange.exchanged` may replace in the graph.

    Raises:
        CheckError: ONNX has no operator for a part of it, or it has too many weights for one file.
        MissingError: onnx or onnxscript is not installed.
    """
    try:
        import onnxscript  # noqa: F401 - torch needs it, and its own message is less clear
    except ImportError as error:
        raise MissingError('Exporting a network needs onnx and onnxscript: pip install "normweave[train]"') from error
    each: Any  # not every module has this field
    for each in module.modules():
        if getattr(each, "inplace", False):
            each.inplace = False  # an operation in place takes torch.export several times as long to trace
    batch = torch.export.Dim("batch")
    # Two images: torch.export treats a size of one as a constant.
    inputs: tuple[Tensor, ...] = (torch.zeros(2, 3, height, width, dtype=torch.uint8),)
    names = [PIXELS]
    if module.can_exclude:
        inputs += (torch.full((2,), -1, dtype=torch.int64),)
        names.append(EXCLUDED)
    shapes = tuple({0: batch} for _ in inputs)
    with torch.no_grad(), quiet(*LOGGERS):
        outputs = list(module.outputs(*inputs))
        try:
            traced = torch.export.export(module, inputs, dynamic_shapes=shapes)
            gelu = any(node.target == torch.ops.aten.gelu.default for node in traced.graph.nodes)
            program = translate(
                traced,
                opset_version=OPSET_WITH_GELU if gelu else OPSET,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=shapes,  # for the names of the axes
            )
            with apart(program.model, growing):
                _shorten(program.model)
                program.optimize()
            content: bytes = bare(program.model_proto).SerializeToString(deterministic=True)
        except Exception as error:  # torch and protobuf raise many types, which all mean the same here
            raise CheckError(
                f"This network cannot be written as an ONNX graph, so no bundle is written: {type(error).__name__}: "
                f"{str(error)[:2000]} Choose another backbone or head."
            ) from error
    return content


def _shorten(model: Model) -> None:
    """Remove operators that compute constants or the same as another one.

    `optimize` of torch does so after it has compared each operator with each of its rules; for fewer it takes half the
    time.
    """
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants

    common.InlinePass()(model)
    fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)


def bare(model: ModelProto) -> ModelProto:
    """Remove the metadata, which holds source lines and paths of this machine."""
    for message in (model, model.graph, *model.graph.node, *model.graph.initializer):
        del message.metadata_props[:]
        message.ClearField("doc_string")
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]
    del model.graph.value_info[:]
    return model


def check_parity(
    module: TorchModule,
    networks: Sequence[Network],
    images: Sequence[NDArray[np.uint8]],
    config: Config,
    calibration: Calibration | None,
) -> None:
    """Compare torch with each library that runs the graph on real images.

    Scores may differ by `TOLERANCE` times the score, or times the mean absolute score where that is larger: scores of
    normal images are near 0. Verdicts must be equal, except where a score is within this tolerance of its threshold.

    Args:
        module: on the CPU, in eval mode.
        images: prepared pixels (n, 3, height, width) of the tiles of each image.
        calibration: the operating points; None compares scores only.

    Raises:
        CheckError: they do not agree.
    """
    pixels = np.concatenate(images)

    def scored(
        network: Callable[[NDArray[np.uint8], NDArray[np.int64] | None], RawOutput], excluded: NDArray[np.int64] | None
    ) -> TileScores:
        return TileScores.compute(network, pixels, config, excluded=excluded)

    def by_torch(pixels: NDArray[np.uint8], excluded: NDArray[np.int64] | None) -> RawOutput:
        with torch.inference_mode():
            left_out = None if excluded is None else torch.from_numpy(excluded)
            outputs = module.outputs(torch.from_numpy(pixels), left_out)
            return RawOutput(**{name: value.numpy() for name, value in outputs.items()})

    ours = scored(by_torch, None)
    own = ours.raw.subclass
    ours_excluding = scored(by_torch, own) if module.can_exclude else None
    for network in networks:
        theirs = scored(network, None)
        check_equal(ours, theirs, "", network.library)
        if ours_excluding is not None:
            check_equal(ours_excluding, scored(network, own), " for unseen subclasses", network.library)
        if calibration is not None:
            _check_verdicts(ours, theirs, images, calibration, network.library)


def _check_verdicts(
    ours: TileScores,
    theirs: TileScores,
    images: Sequence[NDArray[np.uint8]],
    calibration: Calibration,
    library: str,
) -> None:
    """Raise CheckError where the verdict of an image differs and rounding is not the reason."""
    done = 0
    for number, image in enumerate(images):
        both = [ImageScore.of(tiles.part(done, done + len(image))) for tiles in (ours, theirs)]
        done += len(image)
        mine, other = (
            calibration.decide(score=each.score, distance=each.distance, subclass=each.subclass) for each in both
        )
        allowed = TOLERANCE * max(abs(mine.threshold), float(np.abs(ours.scores).mean()))
        if mine.verdict != other.verdict and abs(both[0].score - mine.threshold) > allowed:
            raise CheckError(
                f"The verdict of {library} on calibration image {number + 1} is {other.verdict}, that of torch "
                f"{mine.verdict}, so no bundle is written. {_CURE}"
            )


_CURE = (
    "Update torch, onnxscript and the library that runs the graph (onnxruntime, openvino), or choose another "
    "backbone or head."
)


def check_equal(ours: TileScores, theirs: TileScores, what: str, library: str) -> None:
    """Raise CheckError where scores, distances, weights or maps differ by more than the tolerance.

    The nearest stored patches are not compared: rounding may decide between two at the same distance.
    """
    for name in RawOutput._fields:
        mine, other = getattr(ours.raw, name), getattr(theirs.raw, name)
        neither = mine is None and other is None
        if not neither and (mine is None or other is None or mine.shape != other.shape):
            raise CheckError(f"torch and {library} do not both return {name}{what} in the same form. {_CURE}")
    compared: dict[str, tuple[NDArray[Any] | None, NDArray[Any] | None]] = {
        "scores": (ours.scores, theirs.scores),
        "peaks": (ours.peaks, theirs.peaks),
        "distance": (ours.raw.distance, theirs.raw.distance),
        "weights": (ours.raw.weights, theirs.raw.weights),
    }
    for name, (mine, other) in compared.items():
        if mine is None or other is None:
            continue
        wrong = ~_close(mine, other).reshape(len(mine), -1).all(axis=1)  # (n,)
        if wrong.any():
            first = int(wrong.argmax())
            raise CheckError(
                f"{library} returns other {name}{what} than torch for {wrong.sum()} of {len(mine)} calibration images, "
                f"the first {other[first]} instead of {mine[first]}; a difference of {TOLERANCE:g} times the value is "
                f"allowed. So no bundle is written. {_CURE}"
            )
    share = float(_close(ours.raw.scores, theirs.raw.scores).mean())
    if share < CELLS:
        raise CheckError(
            f"{library} returns other maps{what} than torch: {share:.1%} of their cells agree to {TOLERANCE:g}, and "
            f"{CELLS:.0%} must. So no bundle is written. {_CURE}"
        )


def _close(mine: NDArray[Any], other: NDArray[Any]) -> NDArray[np.bool_]:
    """Return for each element whether it agrees; what is not finite never does."""
    typical = np.abs(mine).mean()
    with np.errstate(invalid="ignore"):  # infinity minus itself
        close: NDArray[np.bool_] = np.abs(mine - other) <= TOLERANCE * np.maximum(np.abs(mine), typical)
    return close
