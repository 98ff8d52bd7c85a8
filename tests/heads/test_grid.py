import torch

from normweave.heads.grid import replace_border


def test_border_cells_take_the_score_of_their_nearest_inner_cell():
    scores = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(0))
    got = replace_border(scores, 2, grid=(5, 6))[0]
    for y in range(5):
        for x in range(6):
            assert got[y, x] == scores[0, min(max(y, 2), 2), min(max(x, 2), 3)]
    assert torch.equal(replace_border(scores, 0, grid=(5, 6)), scores)


def test_a_small_grid_keeps_one_inner_cell():
    assert replace_border(torch.zeros(1, 3, 2), 4, grid=(3, 2)).shape == (1, 3, 2)
