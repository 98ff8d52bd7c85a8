"""Layout experts: PCA residual of whole feature maps, for products whose parts have fixed positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from normweave.config import LayoutExpertConfig
from normweave.heads.adapted_moe.experts.base import Experts, Normals, fine_channels, to_cells, to_grid
from normweave.heads.adapted_moe.experts.gaussian import covariances
from normweave.heads.dfm import principal_components
from normweave.passes import Batches, Tensors, added_rows, present


class LayoutExperts(Experts):
    """PCA residual of the whole feature map, standardised for each expert.

    Not from a paper. As in `SubspaceExperts`, x is the feature map of an image, averaged to cells and flattened, and
    r = (x - m) - C C' (x - m). Here all experts use one subspace, fitted to the images of all subclasses, at two cell
    sizes. Each expert has its own variances of r, and its own mean and std of the scores (see `View`). They are
    measured on normal images of groups that were left out when the subspace was fitted.

    The first map uses all channels. It is the maximum over both cell sizes and over `Detail`, the residual at the full
    resolution of the features. The second map uses the channels of the coarsest stage and gives the image score.

    An added expert keeps the subspace of the first training and has a second one, of the residuals of its own images;
    see `View.add`. Images that are routed to it have the residual of both.
    """

    standardised = True
    distributed = True
    maps = 2
    default_adaption = "off"

    def __init__(self, config: LayoutExpertConfig, *, shape: tuple[int, int, int], unit: float = 1.0) -> None:
        super().__init__()
        self.config = config
        D, h, w = shape
        coarse = max(1, D - fine_channels(config.fine, D))
        self.views = nn.ModuleList(
            View(config, grid=(h, w), channels=(first, D), side=side, by_cells=by_cells)
            for first, by_cells in ((0, True), (D - coarse, False))
            for side in (config.cells, max(1, config.cells // 2))
        )
        self.detail = Detail(shape=shape, cells=self._views[0].cells, own=config.own)
        self._first: int | None = None  # experts of the first training; None: all

    @property
    def _views(self) -> list[View]:
        return [view for view in self.views if isinstance(view, View)]

    def fit(self, normals: Normals, *, generator: torch.Generator) -> None:
        """Fit each view on whole images, averaged to cells."""
        count = len(normals.rows)
        drawn = torch.randperm(count, generator=generator)[: self.config.max_images].sort().values.numpy()
        # Every expert needs an image among those drawn.
        missing = np.setdiff1d(normals.experts, normals.experts[drawn])
        first = [int(np.flatnonzero(normals.experts == expert)[0]) for expert in missing]
        drawn = np.concatenate([drawn, np.array(first, dtype=drawn.dtype)])
        sizes = [(view.channels, view.cells) for view in self._views]
        pooled = normals.per_image(partial(_pooled, sizes, self._views[0].grid), drawn)
        left_out = [
            view.fit(rows, normals.experts[drawn], normals.groups[drawn], generator=generator)
            for rows, view in zip(pooled, self._views, strict=True)
        ]
        self.detail.fit(normals, drawn, left_out[0])

    def add(self, normals: Normals, *, first: int, generator: torch.Generator) -> None:
        """Append an expert with a subspace of its own to each view."""
        drawn = np.arange(len(normals.rows))[: self.config.max_images]
        features = torch.cat([batch for _, batch in normals.batches(drawn)])  # (n, D, h, w)
        fold = _folds(normals.groups[drawn], View.folds, generator=generator)
        left_out = [view.add(features, fold, first=first) for view in self._views]
        self.detail.add(features, fold, left_out[0], first=first)

    def remove(self, expert: int, *, first: int) -> None:
        """Remove the subspace of an added expert."""
        for view in self._views:
            view.remove(expert - first)
        self.detail.remove(expert - first)

    def set_number(self, number: int, *, first: int) -> None:
        """Note the number of experts of the first training; make room for what the added ones have."""
        self._first = first if number > first else None
        for view in self._views:
            view.set_number(number - first)
        self.detail.set_number(number - first)

    def forward(self, features: Tensor, experts: Tensor) -> Tensor:
        """Return the map and the map of the image score, (B, T, 2, h, w)."""
        B, S, _, h, w = features.shape
        images = features.flatten(0, 1)  # (B*S, D, h, w)
        chosen = experts.reshape(B * S, experts.shape[1] // S)  # of each of these; S = 1 or T
        # The added subspace of each image, -1: none. An image is routed to the first of its experts.
        added = None if self._first is None else (chosen[:, 0] - self._first).clamp(min=-1)
        residuals = [view.residual(images, added) for view in self._views]
        fine, coarse, fine_last, coarse_last = (
            to_grid(view(residual, chosen), (h, w)) for view, residual in zip(self._views, residuals, strict=True)
        )
        maps = torch.maximum(torch.maximum(fine, coarse), self.detail(images, residuals[0], chosen, added))
        both = torch.stack([maps, 0.5 * (fine_last + coarse_last)], dim=2)  # (B*S, T/S, 2, h, w)
        return both.view(*experts.shape, 2, h, w)


class View(nn.Module):
    """One cell size and range of channels of `LayoutExperts`.

    The distance d of a cell with the residual r (D',) is

        by_cells:  d^2 = sum over channels of r^2 / (0.5 s_cell^2 + 0.5 s^2)
        otherwise: d^2 = r' (0.5 S + 0.5 v I)^-1 r / q

    where s_cell^2 is the mean square of a channel at this cell, s^2 that over all cells, S the second moment of the
    channels over all cells, v the mean of its diagonal, and q the mean of the numerator at this cell. The score is
    (d - mean(d)) / std(d). All of these are measured on images left out of the fit.

    Args:
        grid: (h, w).
        channels: the first, and the last plus one.
        side: the grid is averaged to at most side x side cells.
    """

    mean: Tensor  # (F,)
    components: Tensor  # (F, r)
    weights: Tensor  # by_cells: (K, D', cells, cells) 1 / mean squares
    whitener: Tensor  # otherwise: (K, D', D')
    usual: Tensor  # otherwise: (K, cells, cells) root mean square of |whitener r|
    centre: Tensor  # (K,)
    std: Tensor  # (K,)
    added_mean: Tensor  # (A, F) of each added expert; only if there are any
    added_components: Tensor  # (A, F, most_added)

    grows = ("added_mean", "added_components")
    folds = 4
    most_added = 24
    """Components of an added subspace, at most; with fewer the others are zero, so that all have one size."""

    def __init__(
        self,
        config: LayoutExpertConfig,
        *,
        grid: tuple[int, int],
        channels: tuple[int, int],
        side: int,
        by_cells: bool,
    ) -> None:
        super().__init__()
        self.config = config
        self.grid = grid
        self.channels = channels
        self.cells = (min(side, grid[0]), min(side, grid[1]))
        self.by_cells = by_cells
        width = channels[1] - channels[0]
        numbers = width * self.cells[0] * self.cells[1]
        self.register_buffer("mean", torch.zeros(numbers))
        self.register_buffer("components", torch.zeros(numbers, 1))
        if by_cells:
            self.by_subclass: tuple[str, ...] = ("weights", "centre", "std")
            self.register_buffer("weights", torch.ones(1, width, *self.cells))
        else:
            self.by_subclass = ("whitener", "usual", "centre", "std")
            self.register_buffer("whitener", torch.eye(width)[None])
            self.register_buffer("usual", torch.ones(1, *self.cells))
        self.register_buffer("centre", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))

    def pool(self, features: Tensor) -> Tensor:
        """Average (n, D, h, w) to cells and flatten to (n, F)."""
        (pooled,) = _pooled([(self.channels, self.cells)], self.grid, features)
        return pooled

    def fit(
        self,
        pooled: Tensor,
        experts: NDArray[np.int64],
        groups: NDArray[np.int64],
        *,
        generator: torch.Generator,
    ) -> Tensor:
        """Fit on (n, F) pooled images with the expert (n,) and the group (n,) of each.

        Returns:
            (n, D', cells, cells) residuals of each image by a subspace that was not fitted on its group.
        """
        fold = _folds(groups, self.folds, generator=generator)
        residual = torch.empty_like(pooled)
        for part in range(int(fold.max()) + 1):
            out = torch.from_numpy(fold == part)
            # One group only: nothing can be left out, and the residuals come out too small.
            mean, components = self._components(pooled if out.all() else pooled[~out])
            residual[out] = _residual(pooled[out], mean, components)
        self.mean, self.components = self._components(pooled)
        left_out = residual.view(len(pooled), -1, *self.cells)
        self._measure(left_out, torch.from_numpy(experts))
        return left_out

    def add(self, features: Tensor, fold: NDArray[np.int64], *, first: int) -> Tensor:
        """Append an expert that is fitted to the features (n, D, h, w) of its images.

        The variances are mixed with the mean of those of the first training, which follow from its weights.

        Args:
            fold: (n,) in which each image is left out of the fit of its subspace.
            first: number of experts of the first training.

        Returns:
            (n, D', cells, cells) residuals of each image by a subspace that was not fitted on its fold.
        """
        self.set_number(1)
        rest = _residual(self.pool(features), self.mean, self.components)  # (n, F)
        residual = torch.empty_like(rest)
        for part in range(int(fold.max()) + 1):
            out = torch.from_numpy(fold == part)
            mean, components = self._added_components(rest if out.all() else rest[~out])
            residual[out] = _residual(rest[out], mean, components)
        mean, components = self._added_components(rest)
        self.added_mean = torch.cat([self.added_mean, mean[None]])
        self.added_components = torch.cat([self.added_components, components[None]])
        left_out = residual.view(len(rest), -1, *self.cells)
        own, tiny, expert = self.config.own, 1e-6, len(self.centre)
        if self.by_cells:
            square = left_out.square().mean(dim=0)  # (D', cells, cells)
            square = 0.5 * square + 0.5 * square.mean(dim=(1, 2), keepdim=True) + tiny
            together = (1 / self.weights[:first]).mean(dim=0)
            self.weights = torch.cat([self.weights, (1 / (own * square + (1 - own) * together))[None]])
        else:
            covariance = _second_moment(left_out).double()
            identity = torch.eye(len(covariance), dtype=torch.float64)
            shrunk = 0.5 * covariance + 0.5 * (covariance.diagonal().mean() + tiny) * identity
            together = covariances(self.whitener[:first]).mean(dim=0)
            factor = torch.linalg.cholesky(own * shrunk + (1 - own) * together)
            whitener = torch.linalg.solve_triangular(factor, identity, upper=False).float()
            self.whitener = torch.cat([self.whitener, whitener[None]])
            self.usual = torch.cat([self.usual, torch.ones(1, *self.cells)])
            square = self._by(left_out, expert).square().mean(dim=0)  # (cells, cells)
            usual = own * square + (1 - own) * self.usual[:first].square().mean(dim=0)
            self.usual = torch.cat([self.usual[:expert], usual.sqrt()[None] + tiny])
        scores = self._by(left_out, expert)
        self.centre = torch.cat([self.centre, scores.mean()[None]])
        self.std = torch.cat([self.std, scores.std(correction=0)[None] + tiny])
        return left_out

    def _added_components(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (F,) and components (F, `most_added`) of the residuals (n, F) of an added expert's images."""
        mean, found = self._components(rows)
        components = found.new_zeros(len(mean), self.most_added)
        components[:, : found.shape[1]] = found[:, : self.most_added]
        return mean, components

    def remove(self, number: int) -> None:
        """Remove an added subspace."""
        self.added_mean, self.added_components = (
            _without(self.added_mean, number),
            _without(self.added_components, number),
        )

    def set_number(self, added: int) -> None:
        """Make room for this many added subspaces if there is none yet; without any the buffers are removed."""
        _room(self, added, added_mean=tuple(self.mean.shape), added_components=(len(self.mean), self.most_added))

    def _components(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean, components = principal_components(rows, variance=self.config.variance)
        return mean, components[:, : self.config.components].contiguous()

    def _measure(self, residual: Tensor, experts: Tensor) -> None:
        """Measure the scales of each expert on residuals (n, D', cells, cells) of images left out of the fit."""
        owned = [residual[experts == expert] for expert in range(int(experts.max()) + 1)]

        def mixed(measure: Callable[[Tensor, int], Tensor]) -> Tensor:
            """Return own * measure(images of the expert) + (1 - own) * measure(all images), a row for each expert."""
            return torch.stack(
                [
                    self.config.own * measure(rows, expert) + (1 - self.config.own) * measure(residual, expert)
                    for expert, rows in enumerate(owned)
                ]
            )

        tiny = 1e-6
        if self.by_cells:
            square = mixed(lambda rows, _: rows.square().mean(dim=0))  # (K, D', cells, cells)
            self.weights = 1 / (0.5 * square + 0.5 * square.mean(dim=(2, 3), keepdim=True) + tiny)
        else:
            covariance = mixed(lambda rows, _: _second_moment(rows))  # (K, D', D')
            variance = covariance.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None] + tiny  # (K, 1, 1)
            shrunk = 0.5 * covariance + 0.5 * variance * torch.eye(covariance.shape[1])
            factor = torch.linalg.cholesky(shrunk.double())
            # Not inv: batched, of 432 channels, MKL's LU fails or never ends.
            identity = torch.eye(factor.shape[1], dtype=factor.dtype).expand_as(factor)
            self.whitener = torch.linalg.solve_triangular(factor, identity, upper=False).float()
            self.usual = torch.ones(len(owned), *self.cells)
            self.usual = (
                mixed(lambda rows, expert: self._by(rows, expert).square().mean(dim=0)).sqrt() + tiny
            )  # (K, cells, cells)
        scores = [self._by(rows, expert) for expert, rows in enumerate(owned)]
        self.centre = torch.stack([each.mean() for each in scores])
        self.std = torch.stack([each.std(correction=0) for each in scores]) + tiny

    def _by(self, residual: Tensor, expert: int) -> Tensor:
        """Return the distances (N, cells, cells) by one expert."""
        return self._distance(residual, torch.full((len(residual), 1), expert))[:, 0]

    def _distance(self, residual: Tensor, experts: Tensor) -> Tensor:
        """Return the distances (N, T, cells, cells) of residuals (N, D', cells, cells) by experts (N, T)."""
        if self.by_cells:
            return _weighted(residual.square(), self.weights, experts).sqrt()
        N, T = experts.shape
        whitened = torch.bmm(self.whitener[experts].flatten(1, 2), residual.flatten(2))  # (N, T*D', P)
        square = whitened.view(N, T, *residual.shape[1:]).square().sum(dim=2)
        return square.sqrt() / self.usual[experts]

    def residual(self, features: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the residuals (N, D', cells, cells) of features (N, D, h, w).

        Args:
            added: (N,) the added subspace of each, -1 = none; None = those of none.
        """
        pooled = self.pool(features)
        width = self.channels[1] - self.channels[0]
        rest = _residual(pooled, self.mean, self.components)
        if added is not None:
            number = added.clamp(min=0)
            centred = rest - self.added_mean[number]
            components = self.added_components[number]  # (N, F, r)
            explained = components @ (components.mT @ centred[..., None])  # (N, F, 1)
            rest = torch.where((added >= 0)[:, None], centred - explained[..., 0], rest)
        return rest.view(pooled.shape[0], width, *self.cells)

    def forward(self, residual: Tensor, experts: Tensor) -> Tensor:
        """Return standardised scores (N, T, cells, cells) by the experts (N, T)."""
        distance = self._distance(residual, experts)
        return (distance - self.centre[experts][..., None, None]) / self.std[experts][..., None, None]


class Detail(nn.Module):
    """Residual at the full resolution of the features, after the reconstructed layout is subtracted.

    g = x - up(pool(x) - r) with r the residual of the finest view: the features minus the reconstructed layout, at the
    size of the grid. The score of a cell is that of `View` with `by_cells`, with g - m instead of r. m is the mean of
    g. It and the variances are measured on images left out of the fit.

    Args:
        cells: the cells of the finest view, (rows, columns).
        own: weight of the expert's own s^2 against that of all images, in [0, 1].
    """

    mean: Tensor  # (D, h, w)
    weights: Tensor  # (K, D, h, w)
    centre: Tensor  # (K,)
    std: Tensor  # (K,)
    added_mean: Tensor  # (A, D, h, w) of each added expert, instead of `mean`; only if there are any
    up: Tensor  # (cells^2, h*w) `to_grid` as a matrix, which is faster; not saved, since it follows from the sizes

    by_subclass = ("weights", "centre", "std")
    grows = ("added_mean",)

    def __init__(self, *, shape: tuple[int, int, int], cells: tuple[int, int], own: float) -> None:
        super().__init__()
        self.grid = shape[1:]
        self.cells = cells
        self.own = own
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("weights", torch.ones(1, *shape))
        self.register_buffer("centre", torch.zeros(1))
        self.register_buffer("std", torch.ones(1))
        each = torch.eye(cells[0] * cells[1]).view(-1, 1, *cells)
        self.register_buffer("up", to_grid(each, self.grid).flatten(1), persistent=False)

    def fit(self, normals: Normals, chosen: NDArray[np.int64], left_out: Tensor) -> None:
        """Fit on the chosen (n,) normals and their residuals (n, D, cells, cells) in the view, in two passes."""
        tiny = 1e-6
        K = normals.number
        over = partial(
            normals.over,
            merge=partial(added_rows, K),
            chosen=chosen,
            aligned=(torch.from_numpy(normals.experts[chosen]), left_out),
        )
        counts, sums, squares = over(partial(self._sums, K))
        mean = sums.sum(dim=0) / counts.sum()
        # Of each expert's own images, around the mean of all: E (g - m)^2 = E g^2 - 2 m E g + m^2.
        each = (squares - 2 * mean * sums) / counts[:, None, None, None] + mean.square()
        overall = squares.sum(dim=0) / counts.sum() - mean.square()
        square = self.own * each + (1 - self.own) * overall
        self.mean = mean.float()
        self.weights = (1 / (0.5 * square + 0.5 * square.mean(dim=(2, 3), keepdim=True) + tiny)).float()
        _, moments = over(partial(self._score_sums, K))
        first, second = (moments / counts[:, None]).unbind(dim=1)
        self.centre = first.float()
        self.std = (second - first.square()).clamp_min(0).sqrt().float() + tiny

    def add(self, features: Tensor, fold: NDArray[np.int64], left_out: Tensor, *, first: int) -> None:
        """Append an expert with a mean of its own; arguments and variances as in `View.add`.

        Args:
            left_out: (n, D, cells, cells) that the view returned.
        """
        self.set_number(1)
        rest = self._rest(features, left_out)  # (n, D, h, w)
        mean, tiny = rest.mean(dim=0), 1e-6
        centred = torch.empty_like(rest)
        for part in range(int(fold.max()) + 1):
            out = torch.from_numpy(fold == part)
            centred[out] = rest[out] - (mean if out.all() else rest[~out].mean(dim=0))
        square = centred.square().mean(dim=0)
        square = 0.5 * square + 0.5 * square.mean(dim=(1, 2), keepdim=True) + tiny
        together = (1 / self.weights[:first]).mean(dim=0)
        self.weights = torch.cat([self.weights, (1 / (self.own * square + (1 - self.own) * together))[None]])
        self.added_mean = torch.cat([self.added_mean, mean[None]])
        expert = torch.full((len(rest), 1), len(self.weights) - 1)
        scores = _weighted(centred.square(), self.weights, expert).sqrt()
        self.centre = torch.cat([self.centre, scores.mean()[None]])
        self.std = torch.cat([self.std, scores.std(correction=0)[None] + tiny])

    def remove(self, number: int) -> None:
        """Remove the mean of an added expert."""
        self.added_mean = _without(self.added_mean, number)

    def set_number(self, added: int) -> None:
        """As in `View`."""
        _room(self, added, added_mean=tuple(self.mean.shape))

    def _sums(self, number: int, batches: Batches) -> Tensors:
        """Return the number of images (K,), sum of g and of its squares (K, D, h, w) of each expert, in float64."""
        counts = torch.zeros(number, dtype=torch.float64)
        sums = torch.zeros(number, *self.mean.shape, dtype=torch.float64)
        squares = torch.zeros_like(sums)
        for features, experts, left_out in batches:
            rest = self._rest(features, left_out).double()
            counts += experts.bincount(minlength=number)
            sums.index_add_(0, experts, rest)
            squares.index_add_(0, experts, rest.square())
        return present(counts, sums, squares)

    def _score_sums(self, number: int, batches: Batches) -> Tensors:
        """Return the number of images (K,), and the sums of their mean score and mean squared score (K, 2)."""
        counts = torch.zeros(number, dtype=torch.float64)
        moments = torch.zeros(number, 2, dtype=torch.float64)
        for features, experts, left_out in batches:
            own = self._distance(self._rest(features, left_out), experts[:, None]).double().flatten(1)  # (B, P)
            counts += experts.bincount(minlength=number)
            moments.index_add_(0, experts, torch.stack([own.mean(dim=1), own.square().mean(dim=1)], dim=1))
        return present(counts, moments)

    def _rest(self, features: Tensor, residual: Tensor) -> Tensor:
        explained = to_cells(features, self.cells, grid=self.grid) - residual
        rows = features.flatten(0, 1).flatten(1)  # (N*D, h*w)
        return torch.addmm(rows, explained.flatten(0, 1).flatten(1), self.up, alpha=-1).view(features.shape)

    def _distance(self, rest: Tensor, experts: Tensor, added: Tensor | None = None) -> Tensor:
        """Return the distances (N, T, h, w) of (N, D, h, w) by the experts (N, T)."""
        mean = self.mean
        if added is not None:
            mean = torch.where((added >= 0)[:, None, None, None], self.added_mean[added.clamp(min=0)], mean)
        centred = rest - mean
        return _weighted(centred * centred, self.weights, experts).sqrt()

    def forward(self, features: Tensor, residual: Tensor, experts: Tensor, added: Tensor | None = None) -> Tensor:
        """Return standardised scores (N, T, h, w) of features (N, D, h, w) with their residual in the view.

        Args:
            added: as of `View.residual`.
        """
        distance = self._distance(self._rest(features, residual), experts, added)
        return (distance - self.centre[experts][..., None, None]) / self.std[experts][..., None, None]


def _pooled(
    sizes: Sequence[tuple[tuple[int, int], tuple[int, int]]], grid: tuple[int, int], features: Tensor
) -> Tensors:
    """Return (n, D, h, w) averaged to cells and flattened, (n, F), for the channels and cells of each view."""
    return tuple(to_cells(features[:, first:last], cells, grid=grid).flatten(1) for (first, last), cells in sizes)


def _room(module: nn.Module, added: int, **shapes: tuple[int, ...]) -> None:
    """Register empty buffers of these shapes for added experts if there are none yet; remove them if none is added."""
    for name, shape in shapes.items():
        if added == 0:
            module._buffers.pop(name, None)
        elif name not in module._buffers:
            module.register_buffer(name, torch.empty(0, *shape))


def _without(tensor: Tensor, number: int) -> Tensor:
    """Return the tensor without one row."""
    return torch.cat([tensor[:number], tensor[number + 1 :]])


def _weighted(squares: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
    """Sum squares (N, D, y, x) over D with the weights (K, D, y, x) of the experts (N, T); return (N, T, y, x).

    One expert at a time: the gathered weights of all would be T times as large as the features.
    """
    N, D, y, x = squares.shape
    ones = squares.new_ones(N, 1, D)  # ONNX Runtime sums the rows of an image five times as fast by a product
    sums = [ones @ (squares * weights[each]).flatten(2) for each in experts.unbind(dim=1)]  # (N, 1, P) each
    return torch.cat(sums, dim=1).view(*experts.shape, y, x)


def _residual(rows: Tensor, mean: Tensor, components: Tensor) -> Tensor:
    """Return the residual of (n, F) after its projection on orthonormal columns (F, r)."""
    centred = rows - mean
    return torch.addmm(centred, centred @ components, components.T, alpha=-1)


def _second_moment(residual: Tensor) -> Tensor:
    """Return the mean of r r' over the cells of (n, D, y, x), (D, D)."""
    rows = residual.permute(0, 2, 3, 1).flatten(0, 2)  # (n*y*x, D)
    return rows.T @ rows / len(rows)


def _folds(groups: NDArray[np.int64], most: int, *, generator: torch.Generator) -> NDArray[np.int64]:
    """Split whole groups into at most `most` folds at random; return the fold (n,) of each."""
    names, members = np.unique(groups, return_inverse=True)
    fold = torch.randperm(len(names), generator=generator).numpy() % most
    return np.asarray(fold[members], dtype=np.int64)
