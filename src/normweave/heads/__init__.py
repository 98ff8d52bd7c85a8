"""Frozen features to patch scores. Each head is one file; what all of them promise: `types.Head`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, assert_never

from normweave.config import (
    AdaptedMoEConfig,
    CNCConfig,
    DFMConfig,
    HeadConfig,
    MeanShiftConfig,
    MemoryBankConfig,
    MSFlowConfig,
    PyramidFlowConfig,
    SimpleNetConfig,
)

if TYPE_CHECKING:
    from normweave.heads.base import Head


def build(config: HeadConfig, *, shape: tuple[int, int, int], dims: Sequence[int] = ()) -> Head:
    """The head that `config` describes, not fitted yet, for features of `shape` (D, h, w).

    Args:
        dims: D_l of each level that the D channels consist of; empty = one level.
    """
    match config:
        case AdaptedMoEConfig():
            from normweave.heads.adapted_moe.head import AdaptedMoE

            return AdaptedMoE.of(config, shape=shape)
        case CNCConfig():
            from normweave.heads.cnc.head import CNC

            return CNC(config, shape=shape, dims=dims or shape[:1])
        case SimpleNetConfig():
            from normweave.heads.simplenet import SimpleNet

            return SimpleNet(
                shape=shape,
                hidden=config.hidden,
                noise=config.noise,
                margin=config.margin,
                epochs=config.epochs,
                batch_images=config.batch_images,
                learning_rate=config.learning_rate,
                patience=config.patience,
                border=config.border,
            )
        case MemoryBankConfig():
            from normweave.heads.memory_bank import MemoryBank

            return MemoryBank(
                shape=shape,
                share=config.share,
                max_patches=config.max_patches,
                max_pool=config.max_pool,
                projection=config.projection,
                border=config.border,
            )
        case DFMConfig():
            from normweave.heads.dfm import DFM

            return DFM(
                shape=shape, cells=config.cells, variance=config.variance, max_images=config.max_images
            )
        case MSFlowConfig():
            from normweave.heads.msflow import MSFlow

            return MSFlow(
                shape=shape,
                dims=dims or shape[:1],
                blocks=config.blocks,
                further_blocks=config.further_blocks,
                position=config.position,
                clamp=config.clamp,
                top=config.top,
                epochs=config.epochs,
                batch_images=config.batch_images,
                learning_rate=config.learning_rate,
                patience=config.patience,
                border=config.border,
            )
        case PyramidFlowConfig():
            from normweave.heads.pyramidflow import PyramidFlow

            return PyramidFlow(
                shape=shape,
                dims=dims or shape[:1],
                levels=config.levels,
                blocks=config.blocks,
                kernel=config.kernel,
                volume=config.volume,
                epochs=config.epochs,
                batch_images=config.batch_images,
                learning_rate=config.learning_rate,
                patience=config.patience,
                border=config.border,
            )
        case MeanShiftConfig():
            from normweave.heads.mean_shift import MeanShift

            return MeanShift(
                shape=shape,
                hidden=config.hidden,
                temperature=config.temperature,
                angular=config.angular,
                smallest_view=config.smallest_view,
                neighbours=config.neighbours,
                max_images=config.max_images,
                epochs=config.epochs,
                batch_images=config.batch_images,
                learning_rate=config.learning_rate,
                patience=config.patience,
            )
        case _:
            assert_never(config)
