import numpy as np
import pytest
import torch

from builders import begun, normals, random
from normweave.config import DFMConfig
from normweave.heads.dfm import DFM, principal_components


def fitted(features, *, seed=0, **settings):
    data = normals(features, seed=seed)
    config = DFMConfig(**{"cells": 4, "variance": 0.9} | settings)
    return begun(DFM(config, shape=data.features.shape), data), data.features


def by_svd(rows, variance):
    """Mean and components by numpy's SVD of the centred rows in float64."""
    rows = rows.numpy().astype(np.float64)
    mean = rows.mean(0)
    _, singular, directions = np.linalg.svd(rows - mean, full_matrices=False)
    held = np.cumsum(singular**2) / np.sum(singular**2)
    count = next(number for number in range(1, len(held) + 1) if held[number - 1] >= variance)
    return mean, directions[:count].T


@pytest.mark.parametrize("size", [(12, 40), (40, 12), (20, 20), (3000, 5), (5, 3000)])
@pytest.mark.parametrize("variance", [0.5, 0.97])
def test_components_agree_with_the_singular_value_decomposition(size, variance):
    rows = random(size, seed=1) * torch.linspace(0.1, 3, size[1]) + 5
    mean, components = principal_components(rows, variance=variance)
    expected_mean, expected = by_svd(rows, variance)
    np.testing.assert_allclose(mean, expected_mean, rtol=1e-5)
    assert components.shape == expected.shape
    # The sign of a component is arbitrary, the projection onto all of them is not.
    projected = rows.double() @ components.double() @ components.T.double()
    np.testing.assert_allclose(projected, rows.numpy() @ expected @ expected.T, atol=2e-4)
    torch.testing.assert_close(components.T @ components, torch.eye(len(components.T)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 9), (9, 4)])
def test_equal_rows_have_no_components(size):
    mean, components = principal_components(torch.ones(size), variance=0.97)
    assert (mean == 1).all()
    assert components.shape == (size[1], 0)


def test_scores_are_the_residual_of_the_components():
    normal = random(10, 3, 8, 4, seed=2)
    head, _ = fitted(normal, cells=2)
    image = random(2, 3, 8, 4, seed=3)
    out = head(image)

    def cells(features):  # (B, 3, 8, 4) to (B, 3*2*2): means over windows of 4 x 2
        return features.view(-1, 3, 2, 4, 2, 2).mean((3, 5)).flatten(1)

    mean, components = by_svd(cells(normal), 0.9)
    for b in range(2):
        centred = cells(image)[b].numpy() - mean
        residual = (centred - components @ (components.T @ centred)).reshape(3, 2, 2)
        np.testing.assert_allclose(out.scores[b], np.sqrt((residual**2).sum(0)), rtol=1e-4)
        assert out.image_scores[b].item() == pytest.approx(np.linalg.norm(residual), rel=1e-4)


def test_combinations_of_normal_images_are_reconstructed():
    normal = random(5, 3, 4, 4, seed=4)
    head, _ = fitted(normal, variance=0.999999)
    mixed = 0.7 * normal[:1] + 0.5 * normal[1:2] - 0.2 * normal[2:3]
    assert head(mixed).image_scores.item() < 1e-4
    assert head(random(1, 3, 4, 4, seed=5)).image_scores.item() > 1


def test_a_grid_that_cells_do_not_divide_is_averaged_over_overlapping_windows():
    head, _ = fitted(random(4, 1, 5, 3, seed=6), cells=4)
    ramp = torch.arange(5.0).view(1, 1, 5, 1).expand(1, 1, 5, 3)
    # Rows floor(i * 5 / 4) to ceil((i + 1) * 5 / 4) of 0..4: (0, 1), (1, 2), (2, 3), (3, 4); three columns stay three.
    head.load_state({"mean": torch.zeros(12), "components": torch.zeros(12, 0)})  # the residual is the input
    assert head(ramp).scores[0].tolist() == [[0.5] * 3, [1.5] * 3, [2.5] * 3, [3.5] * 3]


def test_at_most_max_images_are_read_in_small_batches():
    _, source = fitted(torch.randn(90, 2, 4, 4), max_images=40)
    assert source.largest_read <= 16
    rows = np.concatenate(source.reads)
    assert len(np.unique(rows)) == len(rows) == 40


def test_the_drawn_images_depend_on_the_seed():
    normal = random(90, 2, 4, 4, seed=7)
    one, same, other = (fitted(normal, max_images=40, seed=seed)[1].reads for seed in (0, 0, 1))
    assert np.array_equal(np.concatenate(one), np.concatenate(same))
    assert not np.array_equal(np.concatenate(one), np.concatenate(other))
