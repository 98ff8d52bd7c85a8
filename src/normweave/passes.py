"""One pass over the features of many images: statistics of each part of the images, merged.

The images of one machine are one part. Those of a cluster are many parts, each where its features are, so that
statistics pass between machines and features do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from normweave.types import FeatureSource

T = TypeVar("T")

Batches = Iterable[tuple[Any, ...]]
"""Features (B, D, h, w) of a few images at a time, then B rows of each aligned tensor."""
Statistics = Callable[[Batches], T]
"""What is computed from the images of a part. It and its arguments can be pickled."""
Merge = Callable[[Iterable[T]], T]
"""Parts, in the order of their images, to the statistics of all. It can be pickled."""
Tensors = tuple[Tensor, ...]

BATCH_IMAGES = 16
"""Images that are read at once."""


@runtime_checkable
class Passing(Protocol):
    """A feature source that is passed over where its features are, or that another one is behind."""

    def over(self, statistics: Statistics[T], merge: Merge[T], rows: NDArray[np.int64], aligned: Tensors) -> T:
        """Return the merged statistics of these images; see `over`."""
        ...


def over(
    source: FeatureSource,
    statistics: Statistics[T],
    *,
    merge: Merge[T],
    rows: NDArray[np.int64] | None = None,
    aligned: Tensors = (),
) -> T:
    """Return the merged statistics of all parts of the images; of one part if they are on this machine.

    Args:
        rows: (n,) images of the source; None = all.
        aligned: tensors (n, ...), one row for each of these images.
    """
    rows = np.arange(len(source)) if rows is None else rows
    if isinstance(source, Passing) and len(rows):
        return source.over(statistics, merge, rows, aligned)
    return merge([statistics(batches(source, rows, aligned))])


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of a feature source, as a source."""

    source: FeatureSource
    rows: NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(D, h, w) of one image."""
        return self.source.shape

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Sequence[int] | NDArray[np.int64]) -> Tensor:
        """Return the features of these images, numbered within the subset."""
        return self.source.read(self.rows[np.asarray(rows, dtype=np.int64)])

    def over(self, statistics: Statistics[T], merge: Merge[T], rows: NDArray[np.int64], aligned: Tensors) -> T:
        """Return the merged statistics of these images, numbered within the subset; see `over`."""
        return over(self.source, statistics, merge=merge, rows=self.rows[rows], aligned=aligned)


def batches(source: FeatureSource, rows: NDArray[np.int64], aligned: Tensors = ()) -> Iterator[tuple[Any, ...]]:
    """Yield features and aligned rows of a few images at a time, in the order of `rows`."""
    for start in range(0, len(rows), BATCH_IMAGES):
        batch = slice(start, start + BATCH_IMAGES)
        yield source.read(rows[batch]), *(each[batch] for each in aligned)


def by_part(rows: NDArray[np.int64], size: int, aligned: Tensors) -> Iterator[tuple[int, NDArray[np.int64], Tensors]]:
    """Yield the rows that follow each other in one part of `size` images, with the part's number and aligned rows."""
    end = 0
    for part, own in groupby(rows // size):
        start, end = end, end + len(list(own))
        # Copies: pickled, a slice would bring the whole tensor.
        yield int(part), rows[start:end], tuple(each[start:end].clone() for each in aligned)


def per_image(
    source: FeatureSource,
    function: Callable[..., Tensors],
    *,
    rows: NDArray[np.int64] | None = None,
    aligned: Tensors = (),
) -> Tensors:
    """Return what a function computes from batches of images, joined in the order of `rows`.

    Args:
        function: features (B, D, h, w) and rows of the aligned tensors to tensors whose first axis is that of the
            images.
        rows: (n,) images of the source, n >= 1; None = all.
        aligned: as in `over`.
    """
    return over(source, partial(_of_batches, function), merge=joined, rows=rows, aligned=aligned)


def _of_batches(function: Callable[..., Tensors], parts: Batches) -> Tensors:
    return joined(function(*each) for each in parts)


def joined(parts: Iterable[Tensors]) -> Tensors:
    """Join tensors of several parts along their first axis."""
    return tuple(own[0] if len(own) == 1 else torch.cat(own) for own in zip(*parts, strict=True))


def added(parts: Iterable[Tensors]) -> Tensors:
    """Add tensors of several parts."""
    rest = iter(parts)
    first = next(rest)
    for other in rest:
        first = tuple(one + more for one, more in zip(first, other, strict=True))
    return first


def present(count: Tensor, *sums: Tensor) -> Tensors:
    """Return which of the K rows of these sums have been counted (k,), and these rows of the count and each sum."""
    index = count.nonzero().squeeze(1)
    if len(index) == len(count):
        return index, count, *sums
    return index, *(each[index] for each in (count, *sums))


def added_rows(number: int, parts: Iterable[Tensors]) -> Tensors:
    """Add what `present` returned to all the rows (K, ...), K = `number`, and return them without the index."""
    total: Sequence[Tensor] = ()
    for index, *own in parts:
        if not total and len(index) == number:
            total = own
            continue
        total = total or [each.new_zeros(number, *each.shape[1:]) for each in own]
        for one, more in zip(total, own, strict=True):
            one.index_add_(0, index, more)
    return tuple(total)
