import numpy as np
import pytest
import torch

from builders import InMemory, normals, seeded
from normweave.heads.cnc.synthetic import SyntheticSampler
from normweave.types import SyntheticAnomalies

COUNT, VARIANTS, GRID = 7, 3, (2, 3)
HELD_OUT = np.array([False, True, False, False, True, False, False])


def sampler(*, covered=0.25):
    """Channel 0 is the number of the image, channel 1 the number of its synthetic anomaly, 0 for none."""
    clean = torch.zeros(COUNT, 2, *GRID)
    clean[:, 0] = torch.arange(COUNT)[:, None, None]
    anomalies = clean.repeat(VARIANTS, 1, 1, 1)
    anomalies[:, 1] = 1 + torch.arange(COUNT * VARIANTS)[:, None, None] // COUNT
    shares = torch.rand(COUNT * VARIANTS, *GRID, generator=seeded())
    shares[0] = covered
    synthetic = SyntheticAnomalies(InMemory(anomalies), lambda rows: shares[torch.from_numpy(rows)])
    return SyntheticSampler(normals(clean, holdout=HELD_OUT), synthetic, covered=covered), shares


def draw(source, count=400, *, held_out=False, seed=0):
    return source.draw(count, held_out=held_out, generator=seeded(seed))


def image_number(features):
    return features[:, 0, 0, 0].long()


def test_each_synthetic_anomaly_comes_with_its_clean_image():
    source, _ = sampler()
    batch = draw(source)
    assert torch.equal(image_number(batch.features), image_number(batch.clean))
    assert (batch.features[:, 1] > 0).all()
    assert (batch.clean[:, 1] == 0).all()


@pytest.mark.parametrize("held_out", [False, True])
def test_draws_all_synthetic_anomalies_of_the_selected_images_only(held_out):
    source, _ = sampler()
    batch = draw(source, held_out=held_out)
    found = {tuple(pair) for pair in batch.features[:, :, 0, 0].long().tolist()}
    selected = np.flatnonzero(held_out == HELD_OUT).tolist()
    assert found == {(image, variant) for image in selected for variant in (1, 2, 3)}
    for read in (source.data.features, source.synthetic.features):  # the others are not even read
        assert {row % COUNT for rows in read.reads for row in rows.tolist()} == set(selected)


def test_a_cell_is_anomalous_above_the_covered_share():
    source, shares = sampler(covered=0.25)
    batch = draw(source)
    for row in range(400):
        number, variant = batch.features[row, :, 0, 0].long().tolist()
        share = shares[(variant - 1) * COUNT + number].flatten().tolist()
        assert batch.anomalous[row].tolist() == [x > 0.25 for x in share]  # not at exactly that share


def test_the_same_generator_draws_the_same():
    source, _ = sampler()
    for one, other in zip(draw(source), draw(source), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(draw(source, seed=1).features, draw(source).features)


def test_an_empty_batch():
    source, _ = sampler()
    batch = draw(source, 0)
    assert batch.features.shape == batch.clean.shape == (0, 2, *GRID)
    assert batch.anomalous.shape == (0, 6)
