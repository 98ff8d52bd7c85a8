import numpy as np
import pytest
import torch

from builders import InMemory
from normweave.heads.cnc.synthetic import Damaged
from normweave.types import FitData, SyntheticAnomalies

COUNT, VARIANTS, GRID = 7, 3, (2, 3)
HELD_OUT = np.array([False, True, False, False, True, False, False])


def damaged(*, covered=0.25):
    """Images that say who they are: channel 0 the image, channel 1 which of its damages, 0 for none."""
    clean = torch.zeros(COUNT, 2, *GRID)
    clean[:, 0] = torch.arange(COUNT)[:, None, None]
    broken = clean.repeat(VARIANTS, 1, 1, 1)
    broken[:, 1] = 1 + torch.arange(COUNT * VARIANTS)[:, None, None] // COUNT
    shares = torch.rand(COUNT * VARIANTS, *GRID, generator=torch.Generator().manual_seed(0))
    shares[0] = covered
    data = FitData(
        features=InMemory(clean),
        subclasses=np.zeros(COUNT, dtype=np.int64),
        names=("a",),
        groups=np.arange(COUNT),
        holdout=HELD_OUT,
    )
    pseudo = SyntheticAnomalies(InMemory(broken), lambda rows: shares[torch.from_numpy(rows)])
    return Damaged(data, pseudo, covered=covered), shares


def draw(source, count=400, *, held_out=False, seed=0):
    return source.draw(count, held_out=held_out, generator=torch.Generator().manual_seed(seed))


def who(features):
    return features[:, 0, 0, 0].long()


def test_each_damaged_image_comes_with_itself_undamaged():
    source, _ = damaged()
    drawn = draw(source)
    assert torch.equal(who(drawn.features), who(drawn.clean))
    assert (drawn.features[:, 1] > 0).all()
    assert (drawn.clean[:, 1] == 0).all()


@pytest.mark.parametrize("held_out", [False, True])
def test_draws_every_damage_of_its_own_images_and_none_of_the_others(held_out):
    source, _ = damaged()
    drawn = draw(source, held_out=held_out)
    found = {tuple(pair) for pair in drawn.features[:, :, 0, 0].long().tolist()}
    own = np.flatnonzero(held_out == HELD_OUT).tolist()
    assert found == {(image, variant) for image in own for variant in (1, 2, 3)}
    for read in (source.data.features, source.synthetic.features):  # nor are they so much as read
        assert {row % COUNT for rows in read.reads for row in rows.tolist()} == set(own)


def test_shows_where_more_than_enough_of_a_cell_is_damaged():
    source, shares = damaged(covered=0.25)
    drawn = draw(source)
    for row in range(400):
        number, variant = drawn.features[row, :, 0, 0].long().tolist()
        share = shares[(variant - 1) * COUNT + number].flatten().tolist()
        assert drawn.shows[row].tolist() == [x > 0.25 for x in share]  # exactly that much is not enough


def test_the_same_generator_draws_the_same():
    source, _ = damaged()
    for one, other in zip(draw(source), draw(source), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(draw(source, seed=1).features, draw(source).features)


def test_none_may_be_asked_for():
    source, _ = damaged()
    drawn = draw(source, 0)
    assert drawn.features.shape == drawn.clean.shape == (0, 2, *GRID)
    assert drawn.shows.shape == (0, 6)
