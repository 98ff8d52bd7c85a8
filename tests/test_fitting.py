"""Fitting: synthetic anomalies are made for a head from the fit images."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from builders import InMemory
from normweave import features, fitting
from normweave.config import Config, PrepareConfig, TimmConfig
from normweave.data import rows, synthetic
from normweave.data.prepare import Preparation
from normweave.errors import DataError
from normweave.features.standardize import ChannelStandardizer
from normweave.network.torch import FittedRows
from normweave.types import FitData, Sample

IMAGES, VARIANTS = 12, 3
HOLDOUT = np.arange(IMAGES) % 4 == 0


@pytest.fixture
def scanned(tmp_path):
    """Images of one grey each, twenty levels apart, so that a pixel shows which image it is from."""
    samples = []
    for number in range(IMAGES):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.full((32, 32, 3), 20 * number, dtype=np.uint8)).save(path)
        samples.append(Sample(image_path=path))
    return rows.scan(samples, Preparation(PrepareConfig(height=32, width=32)))


def made(scanned, cache=None, seed=0):
    extractor = features.build(
        TimmConfig(backbone="resnet18", strides=(4, 8), weights="random", batch_images=4), height=32, width=32
    )
    everything = np.arange(IMAGES)
    data = FitData(
        features=InMemory(torch.zeros(IMAGES, *extractor.shape)),
        subclasses=np.zeros(IMAGES, dtype=np.int64),
        names=("cloth",),
        groups=everything,
        holdout=HOLDOUT,
        seed=seed,
    )
    return fitting.synthetic_anomalies(
        FittedRows(scanned, everything, everything[:0]),
        extractor,
        ChannelStandardizer(channels=extractor.shape[0]),
        data,
        variants=VARIANTS,
        cache=cache,
    )


def test_pieces_come_from_the_same_side_of_the_holdout(scanned, monkeypatch):
    seen = []

    def add_defect(pixels, other, *, rng):
        seen.append((pixels[0, 0, 0] // 20, other[0, 0, 0] // 20))
        return pixels, np.ones((32, 32), dtype=bool)

    monkeypatch.setattr(synthetic, "add_defect", add_defect)
    found = made(scanned)
    assert len(found.features) == IMAGES * VARIANTS
    found.coverage(np.arange(IMAGES * VARIANTS))
    assert [own for own, _ in seen] == [*range(IMAGES)] * VARIANTS
    assert all(HOLDOUT[own] == HOLDOUT[other] for own, other in seen)
    assert len({other for own, other in seen if not HOLDOUT[own]}) > 3


def test_cached_and_streamed_are_the_same_and_follow_the_seed(scanned, tmp_path):
    few = np.array([0, 5, 17, 35])
    cached, again, streamed, other = (
        made(scanned, tmp_path / "cache"),
        made(scanned, tmp_path / "cache"),
        made(scanned),
        made(scanned, seed=1),
    )
    wanted = streamed.features.read(few)
    for found in (cached, again):
        torch.testing.assert_close(found.features.read(few), wanted, rtol=0, atol=0)
        torch.testing.assert_close(found.coverage(few), streamed.coverage(few), rtol=0, atol=0)
    assert (other.features.read(few) != wanted).any()
    assert 0 < streamed.coverage(few).mean() < 1


def test_a_defect_is_drawn_once_for_its_features_and_its_coverage(scanned, tmp_path, monkeypatch):
    calls, add_defect = [], synthetic.add_defect

    def counted(pixels, other, *, rng):
        calls.append(pixels)
        return add_defect(pixels, other, rng=rng)

    monkeypatch.setattr(synthetic, "add_defect", counted)
    for fits in (1, 2):  # the second finds the features in the cache
        made(scanned, tmp_path / "cache").coverage(np.arange(IMAGES * VARIANTS))
        assert len(calls) == fits * IMAGES * VARIANTS


def defects(scanned, monkeypatch, *, fit, wanted, seed=0):
    """Synthetic defects as (number of the image, number of the image that fills it, random draw)."""
    seen = []

    def add_defect(pixels, other, *, rng):
        seen.append((int(pixels[0, 0, 0]) // 20, int(other[0, 0, 0]) // 20, rng.random()))
        mask = np.zeros((32, 32), dtype=bool)
        mask[:, :16] = True
        return pixels, mask

    monkeypatch.setattr(synthetic, "add_defect", add_defect)
    extractor = features.build(
        TimmConfig(backbone="resnet18", strides=(4, 8), weights="random", batch_images=4), height=32, width=32
    )
    data = FitData(
        features=InMemory(torch.zeros(len(fit), *extractor.shape)),
        subclasses=np.zeros(len(fit), dtype=np.int64),
        names=("cloth",),
        groups=fit,
        holdout=np.zeros(len(fit), dtype=bool),
        seed=seed,
        category_names=("even", "odd"),
        given_categories=fit % 2,
    )
    standard = ChannelStandardizer(channels=extractor.shape[0])
    found = fitting.synthetic_defects(
        FittedRows(scanned, fit, fit[:0]), extractor, standard, data, wanted=wanted, cache=None
    )
    found.features.read(np.arange(len(wanted)))
    covered = found.coverage(np.arange(len(wanted)))
    assert (covered[:, :, :2] == 1).all()
    assert (covered[:, :, 2:] == 0).all()
    assert (found.images == wanted).all()
    return sorted(seen)  # threads read ahead


def test_defects_are_filled_from_the_same_category_and_do_not_depend_on_other_fit_images(scanned, monkeypatch):
    everything = np.arange(IMAGES)
    wanted = np.array([1, 1, 1, 4, 4])
    seen = defects(scanned, monkeypatch, fit=everything, wanted=wanted)
    assert [own for own, _, _ in seen] == [1, 1, 1, 4, 4]
    assert all(own % 2 == other % 2 for own, other, _ in seen)
    assert len({draw for _, _, draw in seen}) == 5
    assert defects(scanned, monkeypatch, fit=everything, wanted=wanted) == seen
    assert defects(scanned, monkeypatch, fit=everything, wanted=wanted, seed=1) != seen
    without = np.setdiff1d(everything, [0])  # all numbers of the fit images move by one
    again = defects(scanned, monkeypatch, fit=without, wanted=wanted - 1)
    assert {draw for _, _, draw in again} == {draw for _, _, draw in seen}
    assert set(again) >= {each for each in seen if each[1] != 0}


def test_images_that_are_all_marked_for_something_else_are_counted():
    samples = [Sample(image_path=Path(f"{number}.png"), split="test") for number in range(3)]
    samples[0] = replace(samples[0], split="calibration")
    text = r"No image to fit on\. Good images: 1 marked calibration, 2 marked test\. Mark some train, or leave"
    with pytest.raises(DataError, match=text):
        fitting.divide(samples, Config())


def test_too_few_images_are_named_with_those_that_were_left_out(tmp_path):
    good, broken = tmp_path / "good.png", tmp_path / "broken.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(good)
    broken.write_bytes(b"no image")
    samples = [Sample(image_path=good), Sample(image_path=broken)]
    with pytest.raises(DataError, match=r"1 images were left out. The first, .*broken\.png: ") as raised:
        fitting.divide(samples, Config(prepare=PrepareConfig(height=32, width=32)))
    assert str(raised.value).count(str(broken)) == 1
    with pytest.raises(DataError) as error:
        fitting.divide(samples[:1], Config(prepare=PrepareConfig(height=32, width=32)))
    assert "left out" not in str(error.value)


def test_lightning_is_imported_for_a_training_by_gradient_only():
    """It takes longer to import than all the rest of a fit in closed form, or of a subclass that is added."""
    code = "import sys, normweave.subclasses; sys.exit('lightning' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
