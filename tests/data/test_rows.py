import hashlib

import numpy as np
import pytest
from PIL import Image

from normweave.config import PrepareConfig
from normweave.data import rows
from normweave.data.images import content_hash
from normweave.data.prepare import Preparation
from normweave.errors import DataError
from normweave.types import Sample

PREPARATION = Preparation(PrepareConfig(height=32, width=32, tile_beyond=1.5, tile_overlap=0.25))


@pytest.fixture
def samples(tmp_path):
    """A tiled image, an unreadable one, a small one, and a copy of the small one."""
    random = np.random.default_rng(0)
    for name, size in (("wide", (40, 100)), ("small", (40, 40))):
        Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "copy.png").write_bytes((tmp_path / "small.png").read_bytes())
    return [Sample(image_path=tmp_path / f"{name}.png") for name in ("wide", "broken", "small", "copy")]


def test_readable_images_are_cut_into_rows_and_others_are_refused(samples):
    scanned = rows.scan(samples, PREPARATION)

    assert scanned.samples == (samples[0], samples[2], samples[3])
    assert scanned.sizes == ((40, 100), (40, 40), (40, 40))
    assert scanned.hashes == tuple(content_hash(sample.image_path) for sample in scanned.samples)
    assert scanned.owner.tolist() == [0, 0, 0, 1, 2]
    assert scanned.tiles[:3] == PREPARATION.tiles(40, 100)
    assert len(scanned) == 5
    assert [refusal.image_path for refusal in scanned.refused] == [str(samples[1].image_path)]
    assert "not an image" in scanned.refused[0].reason


def test_rows_are_prepared_tiles(samples):
    scanned = rows.scan(samples, PREPARATION)

    image = np.asarray(Image.open(samples[0].image_path))
    for row in range(3):
        np.testing.assert_array_equal(scanned.load(row), PREPARATION.apply(image, scanned.tiles[row]))


def test_keys_depend_on_content_preparation_and_tile_only(samples):
    scanned = rows.scan(samples, PREPARATION)
    other = rows.scan(samples, Preparation(PrepareConfig(height=64, width=32, tile_beyond=1.5)))

    assert scanned.keys[3] == scanned.keys[4]  # a copy
    assert len(set(scanned.keys)) == 4
    assert not set(scanned.keys) & set(other.keys)


def test_keys_do_not_change_between_versions(samples):
    """Cached features are found by these keys."""
    settings = '{"height": 32, "tile_beyond": 1.5, "tile_overlap": 0.25, "width": 32}'
    content = f"{content_hash(samples[2].image_path)} {settings} (0, 0, 40, 40)"

    assert rows.scan(samples[2:3], PREPARATION).keys == (hashlib.sha256(content.encode()).hexdigest(),)


def test_stored_features_of_tiff_are_those_of_this_way_to_read_it(tmp_path):
    """Some layouts were misread before; features of those pixels must not be found again."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "part.tif")
    sample = Sample(image_path=tmp_path / "part.tif")
    settings = '{"height": 32, "tile_beyond": 1.5, "tile_overlap": 0.25, "width": 32}'
    content = f"{content_hash(sample.image_path)} {settings} (0, 0, 40, 40) tiff 2"

    assert rows.scan([sample], PREPARATION).keys == (hashlib.sha256(content.encode()).hexdigest(),)


def test_images_with_stored_features_are_not_decoded(samples, monkeypatch):
    decoded = []
    decode = rows.decode
    monkeypatch.setattr(rows, "decode", lambda path: decoded.append(path.stem) or decode(path))
    stored = rows.scan(samples[:1], PREPARATION).keys
    decoded.clear()

    scanned = rows.scan(samples, PREPARATION, known=lambda keys: [key in stored for key in keys])

    assert "wide" not in decoded
    assert len(scanned) == 5


def test_tiles_of_an_image_decode_it_once(samples, monkeypatch):
    scanned = rows.scan(samples[:1], PREPARATION)
    decoded = []
    decode = rows.decode
    monkeypatch.setattr(rows, "decode", lambda path: decoded.append(path) or decode(path))

    for row in range(len(scanned)):
        scanned.load(row)

    assert len(decoded) == 1


def test_progress_counts_the_images_that_can_be_read(samples):
    calls = []
    rows.scan(samples, PREPARATION, progress=lambda *call: calls.append(call))

    assert calls == [("reading images", number, 4) for number in (1, 3, 4)]


def test_the_fingerprint_does_not_depend_on_the_order():
    assert rows.fingerprint(["a", "b"]) == rows.fingerprint(["b", "a"]) != rows.fingerprint(["a", "c"])


@pytest.mark.parametrize("step", ["training", "calibration"])
def test_an_image_that_was_used_is_refused_with_the_step_that_used_it(samples, step):
    scanned = rows.scan(samples[:1], PREPARATION)
    own = [scanned.hashes[0][: rows.HASH_LETTERS]]
    record = {"fit_hashes": own * (step == "training"), "calibration_hashes": own * (step == "calibration")}
    with pytest.raises(DataError, match=f"was used in {step}, so it cannot be used for test: .* that {step} has not"):
        rows.refuse_used(scanned, record, "test")
