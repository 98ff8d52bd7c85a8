"""Boxes refer to the good image, and the place in it, that the model found most similar."""

import json

import numpy as np
import pytest
from PIL import Image

from builders import head_config
from normweave import bundle, fitting, references
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig
from normweave.data import rows
from normweave.data.images import decode
from normweave.data.prepare import Preparation
from normweave.detector import Detector
from normweave.errors import BundleError
from normweave.references import GoodImage, References, seen
from normweave.types import DefectBox, Sample, Tile

BOX = DefectBox(x=10, y=20, width=8, height=4, peak=3.0)
ONE_TILE = (Tile(0, 0, 40, 80),)


def anomaly_map(y=22, x=15):
    """A map (40, 80) with the peak of `BOX` at this pixel."""
    made = np.zeros((40, 80), np.float32)
    made[y, x] = BOX.peak
    return made


def good(name="a.png", size=(40, 80), tile_size=None, picture=None):
    return GoodImage(name, size, tile_size or size, picture)


def marked(made, nearest, tiles=ONE_TILE, at=anomaly_map()):
    (box,) = made.mark([BOX], at, np.asarray(nearest), tiles)
    assert box[:5] == BOX[:5]
    return box[5:]


# ── which region of which image ──────────────────────────────────────────────────────────────────────────────────────


def test_the_patch_at_the_peak_selects_image_and_place():
    made = References((good("a.png"), good("b.png")), np.array([[0, 5, 5], [1, 30, 60], [0, 9, 9]]))
    nearest = np.zeros((1, 4, 8), np.int64)  # cells of 10 x 10 pixels
    nearest[0, 2, 1] = 1  # y 20..29, x 10..19
    # The peak is 2 pixels down and 5 to the right in the box; the stored patch is there in its reference.
    assert marked(made, nearest) == ("b.png", 55, 28, 8, 4)
    nearest[0, 2, 1] = 2
    assert marked(made, nearest) == ("a.png", 4, 7, 8, 4)


def test_a_higher_value_of_another_region_inside_the_box_is_not_its_peak():
    made = References((good("a.png"), good("b.png")), np.array([[0, 20, 20], [1, 20, 20]]))
    at = anomaly_map(y=20, x=10)
    at[23, 17] = 9
    nearest = np.arange(40 * 80).reshape(1, 40, 80) != 20 * 80 + 10
    assert marked(made, nearest.astype(np.int64), at=at)[0] == "a.png"


def test_the_reference_lies_inside_its_image():
    nearest = np.zeros((1, 1, 1), np.int64)
    for centre, corner in (((0, 0), (0, 0)), ((39, 79), (72, 36))):
        assert marked(References((good(),), np.array([[0, *centre]])), nearest) == ("a.png", *corner, 8, 4)
    small = good(size=(3, 5), tile_size=(40, 80))
    assert marked(References((small,), np.array([[0, 1, 1]])), nearest) == ("a.png", 0, 0, 5, 3)


def test_the_reference_has_the_scale_of_its_image():
    made = References((good(size=(400, 400), tile_size=(80, 240)),), np.array([[0, 200, 200]]))
    assert marked(made, np.zeros((1, 4, 8), np.int64)) == ("a.png", 200 - 3 * 5, 200 - 2 * 2, 24, 8)


def test_where_tiles_overlap_the_one_with_the_nearest_centre_counts():
    made = References((good("a.png"), good("b.png")), np.array([[0, 9, 9], [1, 9, 9]]))
    nearest = np.arange(2)[:, None, None].repeat(4, 1).repeat(4, 2)
    for left, name in ((13, "a.png"), (4, "b.png")):  # the second tile begins here; the peak is at 15
        assert marked(made, nearest, (Tile(0, 0, 40, 20), Tile(0, left, 40, 20)))[0] == name


@pytest.mark.parametrize("patch", [-1, 1])
def test_a_patch_that_is_not_listed(patch):
    with pytest.raises(BundleError, match=f"stored patch {patch}, but references\\.json lists 1"):
        marked(References((good(),), np.array([[0, 1, 1]])), np.full((1, 4, 8), patch))


# ── where stored patches come from ───────────────────────────────────────────────────────────────────────────────────


def images(folder, *names, size=(100, 50)):
    """Images of one grey each, 20 levels apart."""
    for number, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*size, 3), 20 * number, np.uint8)).save(path)
    samples = [Sample(image_path=folder / name) for name in names]
    return rows.scan(samples, Preparation(PrepareConfig(height=32, width=32, tile_beyond=2)))


def test_origins_become_pixels_of_the_good_image(tmp_path):
    scanned = images(tmp_path, "red/train/0.png", "red/train/1.png", "blue/train/0.png")
    assert scanned.tiles[:2] == (Tile(0, 0, 54, 50), Tile(46, 0, 54, 50))  # two for each image
    fit = np.array([2, 3, 4, 5])  # the second and third image
    origins = np.array([[0, 0, 0], [1, 3, 4], [3, 2, 0]])  # row of the fit data, grid row, grid column
    made = References.collect(origins, grid=(4, 5), images=scanned, fit=fit)
    assert [(each.name, each.size, each.tile_size) for each in made.images] == [
        ("red/train/1.png", (100, 50), (54, 50)),
        ("blue/train/0.png", (100, 50), (54, 50)),
    ]
    assert made.patches.tolist() == [[0, 6, 5], [0, 46 + 47, 45], [1, 46 + 33, 5]]


def test_images_of_one_folder_have_their_file_names(tmp_path):
    scanned = images(tmp_path, "train/0.png", size=(40, 40))
    made = References.collect(np.zeros((1, 3), np.int64), grid=(4, 4), images=scanned, fit=np.array([0]))
    assert made.images[0].name == "0.png"


# ── pictures ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def written(tmp_path):
    """References of three images, of which the last has most patches and the first has the fewest."""
    scanned = images(tmp_path, "0.png", "1.png", "2.png", size=(600, 300))
    origins = np.array([[number, 0, 0] for number in (0, 1, 1, 2, 2, 2)])
    chosen = rows.scan(scanned.samples, Preparation(PrepareConfig(height=32, width=32, tile_beyond=0)))
    return References.collect(origins, grid=(1, 1), images=chosen, fit=np.arange(3))


def test_references_come_back_with_small_pictures(written):
    back = References.from_bytes(written.to_bytes(), where="x")
    assert [each[:3] for each in back.images] == [each[:3] for each in written.images]
    assert np.array_equal(back.patches, written.patches)
    pictures = [decode(each.picture) for each in back.images]
    assert {picture.shape for picture in pictures} == {(256, 128, 3)}
    assert [round(picture.mean() / 20) for picture in pictures] == [0, 1, 2]
    assert back.to_bytes() == written.to_bytes()
    box = BOX._replace(reference="1.png", reference_x=0, reference_y=0, reference_width=300, reference_height=600)
    assert back.shows(box)
    assert round(back.expected(box).mean() / 20) == round(written.expected(box).mean() / 20) == 1
    assert not back.shows(BOX)
    assert not back.shows(BOX._replace(reference="other.png"))


@pytest.mark.parametrize("limit", ["MAX_PICTURES", "MAX_BYTES"])
def test_pictures_are_bounded_and_those_of_most_patches_are_kept(written, monkeypatch, limit):
    one = len(References.from_bytes(written.to_bytes(), where="x").images[2].picture)
    monkeypatch.setattr(references, limit, {"MAX_PICTURES": 2, "MAX_BYTES": int(2.5 * one)}[limit])
    back = References.from_bytes(written.to_bytes(), where="x")
    assert [each.picture is not None for each in back.images] == [False, True, True]
    assert back.images[0].name == "0.png"


@pytest.mark.parametrize(
    "change",
    [
        {"patches": [[3, 0, 0]]},
        {"patches": [[0, 0]]},
        {"patches": [["x", 0, 0]]},
        {"patches": None},
        {"images": [{"name": "a"}]},
        {"images": [{"name": "a", "size": [0, 1], "tile_size": [1, 1], "picture": None}]},
        {"images": [{"name": "a", "size": [1, 1], "tile_size": [1, 1], "picture": "?"}]},
    ],
)
def test_other_content_is_refused(change):
    record = {"images": [good()._asdict()], "patches": [[0, 1, 1]]}
    References.from_bytes(json.dumps(record).encode(), where="x")
    for content in (json.dumps(record | change).encode(), b"[]", b"\xff"):
        with pytest.raises(BundleError, match=r"x/references\.json does not list good images"):
            References.from_bytes(content, where="x/references.json")


# ── a detector and its bundle ────────────────────────────────────────────────────────────────────────────────────────


def fit(data, **outcome):
    return Detector.fit(
        data,
        config=Config(
            data=DataConfig(subclass_from="column"),
            prepare=PrepareConfig(height=64, width=64),
            features=TimmConfig(weights="random", strides=(8,), batch_images=4),
            head=head_config("memory_bank", share=1.0),
            outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1, **outcome),
        ),
        use_cache=False,
        device="cpu",
    )


@pytest.fixture(scope="module")
def fitted(cloth):
    return fit(cloth)


@pytest.fixture(scope="module")
def saved(fitted, tmp_path_factory):
    return fitted.save(tmp_path_factory.mktemp("references") / "cloth.bundle")


@pytest.fixture(scope="module", params=["fitted", "graph", "torch"])
def either(request, fitted, saved):
    return {"fitted": lambda: fitted, "graph": lambda: Detector.load(saved), "torch": lambda: fitting.load(saved)}[
        request.param
    ]()


def test_a_patch_of_a_fit_image_is_nearest_to_itself(either, fitted):
    scanned, rows_of_fit, _ = fitted.network.rows
    for row in rows_of_fit[[0, 7, -1]]:
        sample = scanned.samples[scanned.owner[row]]
        nearest = either.network(scanned.load(int(row))[None]).nearest[0]
        image, y, x = either.network.references.patches[nearest].transpose(2, 0, 1)
        names = {either.network.references.images[number].name for number in image.flat}
        assert names == {"/".join(sample.image_path.parts[-4:])}
        cells = np.indices(nearest.shape)
        assert np.array_equal([y, x], cells * 8 + 4)


def test_the_expected_region_is_that_of_the_good_image(either, fitted):
    scanned, rows_of_fit, _ = fitted.network.rows
    path = scanned.samples[scanned.owner[rows_of_fit[4]]].image_path
    outcomes = (either.score(with_hole(decode(path), side)) for side in range(2, 16))
    box = next(outcome.boxes[0] for outcome in outcomes if outcome.verdict == "anomalous")
    assert box.reference is not None
    assert either.network.references.shows(box)
    expected = either.network.references.expected(box)
    source = next(one for one in scanned.samples if str(one.image_path).endswith(box.reference))
    region = BOX._replace(x=box.reference_x, y=box.reference_y, width=box.reference_width, height=box.reference_height)
    np.testing.assert_allclose(
        expected.mean(axis=(0, 1)), seen(decode(source.image_path), region).mean(axis=(0, 1)), atol=3
    )


def with_hole(image, side):
    changed = image.copy()
    changed[32 - side : 32 + side, 32 - side : 32 + side] = 0
    return changed


def test_without_references_the_bundle_has_none(cloth, fitted, tmp_path):
    bare = fit(cloth, references=False)
    assert bare.network.references is None
    assert fitted.network.references is not None
    outcome = bare.score(with_hole(decode(fitted.network.rows.images.samples[0].image_path), 16))
    assert outcome.verdict == "anomalous"
    assert outcome.boxes[0].reference is None
    assert references.bundle_files(None) == {}
    assert references.bundle_files(fitted.network.references).keys() == {"references.json"}


def test_a_bundle_keeps_its_references(saved, tmp_path):
    for load in (Detector.load, fitting.load):
        copy = load(saved).save(tmp_path / load.__qualname__)
        assert bundle.read_file(copy, references.FILE) == bundle.read_file(saved, references.FILE)


def test_a_bundle_without_references(tmp_path):
    bundle.write(tmp_path / "b", tensors={}, record={})
    assert references.read(tmp_path / "b") is None
