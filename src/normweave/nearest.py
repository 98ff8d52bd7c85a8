"""The stored patch with the largest product: one operator of PyTorch, and the ONNX operators that compute it.

As one operator it is one step of a trace, however many parts its products are divided into.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PATCHES = 64
"""Patches of an image that are compared at once: then the products of a batch stay in the processor's cache."""
MOST_PARTS = 16
"""Parts of an image, so that the graph stays small."""
BLOCK = 40
"""Products whose maximum is compared first: ONNX Runtime has a fast maximum, and a slow argmax."""


@torch.library.custom_op("normweave::largest_product", mutates_args=())
def largest_product(patches: Tensor, bank: Tensor, offset: Tensor) -> Tensor:
    """Return the row j of the bank with the largest x . m_j + o_j for each patch x, (B, P) int64.

    Args:
        patches: (B, P, r).
        bank: (M, r) m_j; M must be a multiple of `BLOCK` for the ONNX form.
        offset: (1 or B, M) o_j.
    """
    parts = torch.split(patches, part_size(patches.shape[1]), dim=1)
    return torch.cat([(part @ bank.T + offset[:, None]).argmax(dim=2) for part in parts], dim=1)


@largest_product.register_fake
def _(patches: Tensor, bank: Tensor, offset: Tensor) -> Tensor:
    return patches.new_empty(patches.shape[:2], dtype=torch.int64)


def part_size(patches: int) -> int:
    """Return how many of the patches of an image are compared at once."""
    return max(PATCHES, math.ceil(patches / MOST_PARTS))


def onnx_largest_product(onnx: Any, patches: Any, bank: Any, offset: Any) -> Any:
    """Return `largest_product` in ONNX operators.

    Args:
        onnx: an opset of onnxscript.
        patches, bank, offset: values of an ONNX graph; P is known, and M need not be.
    """
    P = patches.shape[1]
    size = part_size(P)

    def integers(*values: int) -> Any:
        return onnx.Constant(value_ints=list(values))

    stored, offset = onnx.Transpose(bank), onnx.Unsqueeze(offset, integers(1))
    across = onnx.Div(onnx.Shape(bank, start=0, end=1), integers(BLOCK))  # (1,) M / BLOCK
    in_blocks, by_block = integers(-1, BLOCK), onnx.Concat(integers(-1), across, axis=0)
    blocks, products, first = [], [], None
    for start in range(0, P, size):
        end = min(start + size, P)
        part = onnx.Slice(patches, integers(start), integers(end), integers(1))  # (B, p, r)
        values = onnx.Reshape(onnx.Add(onnx.MatMul(part, stored), offset), in_blocks)  # (B*p*M/BLOCK, BLOCK)
        highest = onnx.Reshape(onnx.ReduceMax(values, integers(1), keepdims=0), by_block)  # (B*p, M/BLOCK)
        block = onnx.ArgMax(highest, axis=1, keepdims=0)  # (B*p,)
        if first is None or end - start < size:  # first row of each patch in `values`
            number = onnx.Squeeze(onnx.Shape(block))
            zero, one = (onnx.Constant(value_int=each) for each in (0, 1))
            first = onnx.Mul(onnx.Range(zero, number, one), across)
        own = onnx.Gather(values, onnx.Add(first, block), axis=0)  # (B*p, BLOCK)
        blocks.append(onnx.Reshape(block, integers(-1, end - start)))
        products.append(onnx.Reshape(own, integers(-1, end - start, BLOCK)))
    block, product = (each[0] if len(each) == 1 else onnx.Concat(*each, axis=1) for each in (blocks, products))
    return onnx.Add(onnx.Mul(block, onnx.Constant(value_int=BLOCK)), onnx.ArgMax(product, axis=2, keepdims=0))
