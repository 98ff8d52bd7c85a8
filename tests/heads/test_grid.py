"""The edge of a grid takes the score of its nearest inner cell."""

import torch

from normweave.heads.grid import replace_border


def test_border_takes_its_inner_neighbours():
    scores = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    got = replace_border(scores, 2, grid=(5, 6))[0]
    for y in range(5):
        for x in range(6):
            assert got[y, x] == scores[0, min(max(y, 2), 2), min(max(x, 2), 3)]
    assert torch.equal(replace_border(scores, 0, grid=(5, 6)), scores)


def test_on_a_small_grid_one_cell_is_inner():
    assert replace_border(torch.zeros(1, 3, 2), 4, grid=(3, 2)).shape == (1, 3, 2)
