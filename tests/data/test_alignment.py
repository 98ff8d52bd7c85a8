"""The part of a reference image is found in images in which it is moved and turned; pixels are moved both ways."""

import base64
import io
import sys

import cv2
import numpy as np
import pytest
from PIL import Image

from normweave.config import RegionConfig, ShapesConfig
from normweave.data import alignment, images, regions
from normweave.data.alignment import Aligner, Limits, Placement
from normweave.data.regions import Region
from normweave.errors import ConfigError, ImageError, MissingError

CENTRE = ShapesConfig(rectangles=((0.2, 0.2, 0.6, 0.6),))


def printed(size=(150, 200), *, seed=0):
    """An image (H, W, 3) of soft blobs."""
    rng = np.random.default_rng(seed)
    small = rng.uniform(20, 235, (size[0] // 8, size[1] // 8)).astype(np.float32)
    grey = cv2.resize(small, size[::-1], interpolation=cv2.INTER_CUBIC).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def moved(pixels, right, down, degrees):
    """The image after its part was moved and turned clockwise around the centre, and the transform of its points."""
    height, width = pixels.shape[:2]
    matrix = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), -degrees, 1)
    matrix[:, 2] += [right, down]
    return cv2.warpAffine(pixels, matrix, (width, height), borderMode=cv2.BORDER_REFLECT), matrix


def region(align, reference, include=CENTRE, ignore=None):
    return Region(include, ignore or ShapesConfig(), align, alignment.encode_reference(reference))


def off(placement, expected, size):
    """Largest distance in pixels between where two transforms move points of the part."""
    height, width = size
    points = np.array([[x * width, y * height, 1] for x in (0.2, 0.5, 0.8) for y in (0.2, 0.5, 0.8)]).T
    return np.abs(placement.matrix(height, width) @ points - expected[:2] @ points).max()


@pytest.mark.parametrize(
    ("align", "right", "down", "degrees"),
    [("translation", 20.5, -14.25, 0), ("translation", 0, 0, 0), ("rigid", -12.25, 9.5, 11), ("rigid", 8, 3, -28)],
)
def test_a_part_is_found_where_it_was_moved_to(align, right, down, degrees):
    reference = printed()
    image, expected = moved(reference, right, down, degrees)
    dark = (0.6 * image + 15).astype(np.uint8)  # other light
    placement = regions.aligner(region(align, reference)).place(dark)
    assert off(placement, expected, (150, 200)) < 0.5
    assert placement.rotation == pytest.approx(degrees, abs=0.3)
    assert (placement.shift_x, placement.shift_y) == (pytest.approx(right, abs=0.5), pytest.approx(down, abs=0.5))
    assert placement.correlation > 0.9
    assert placement.overlap > 0.85
    again = regions.aligner(region(align, reference)).place(dark)
    assert again == placement  # every bit


@pytest.mark.data
@pytest.mark.parametrize(("name", "align"), [("woodscrews", "rigid"), ("spindle", "rigid"), ("spindle", "translation")])
def test_real_images_that_are_moved_by_known_amounts(data_root, name, align):
    """The place found in an image and in the same image after it was moved differ by the move: 1 pixel, 0.5 degrees."""
    paths = sorted((data_root / name / "images").glob("frame2-good/*" if name == "spindle" else "good/*"))[:4]
    first, *others = (images.decode(path) for path in paths)
    aligner = regions.aligner(region(align, first))
    rng = np.random.default_rng(1)
    for image in others:
        size = image.shape[:2]
        own = aligner.place(image)
        shift = rng.uniform(-0.06, 0.06, 2) * size[::-1]
        degrees = rng.uniform(-8, 8) if align == "rigid" else 0.0
        shown, matrix = moved(image, *shift, degrees)
        found = aligner.place(shown)
        expected = np.vstack([matrix, [0, 0, 1]]) @ np.vstack([own.matrix(*size), [0, 0, 1]])
        assert off(found, expected, size) < 1.0
        assert found.rotation - own.rotation == pytest.approx(degrees, abs=0.5)


def test_what_lies_outside_moves_the_part_by_less_than_a_pixel():
    reference = printed()
    image, _ = moved(reference, 9, -6, 5)
    aligner = regions.aligner(region("rigid", reference))
    placement = aligner.place(image)
    inside = alignment.to_image(regions.mask(region("rigid", reference), 150, 200), placement)
    noise = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    other = aligner.place(np.where(inside[..., None], image, noise))
    assert off(other, placement.matrix(150, 200), (150, 200)) < 0.5


def test_images_that_do_not_show_the_part_are_refused_with_the_reason():
    reference = printed()
    aligner = regions.aligner(region("rigid", reference))
    limits = Limits.of([Placement(0, 0, 0, 0.9, 1.0), Placement(0, 0, 0, 0.8, 0.97)])
    assert limits == (0.4, pytest.approx(0.92), 2, 1.0)
    with pytest.raises(
        ImageError, match=r"no position was found|in another place|at least 0\.40 is needed, from 2 held-out normal"
    ):
        limits.check(aligner.place(printed(seed=5)))
    with pytest.raises(ImageError, match=r"shows 60% of its region of interest, at least 92% is needed"):
        limits.check(Placement(0, 0, 0, 0.9, 0.6))
    with pytest.raises(ImageError, match="no position was found"):
        aligner.place(np.full_like(reference, 128))
    with pytest.raises(ImageError, match=r"other proportions than the reference image of its region: 200 x 150 pixels"):
        aligner.place(np.ascontiguousarray(reference.swapaxes(0, 1)))
    out, _ = moved(reference, 70, 0, 0)
    assert aligner.place(np.ascontiguousarray(out)).overlap == pytest.approx(0.75, abs=0.03)
    assert Limits.of([Placement(0, 0, 0, 0.1, 0.1)]) == (alignment.LEAST_CORRELATION, alignment.LEAST_OVERLAP, 1, 1.0)


def biscuit(*, seed):
    """A round part whose edge is that of all others, and whose grain is its own."""
    rows, columns = np.mgrid[:150, :150] - np.array([75, 75])[:, None, None]
    grain = printed((150, 150), seed=seed)[..., 0]
    inside = np.hypot(rows, columns) < 50
    grey = np.where(inside, 120 + (grain - 128.0) * 0.5, 30).clip(0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=2)


def test_a_round_part_of_any_rotation_is_refused_and_not_placed_wrongly():
    include = ShapesConfig(rectangles=((0.1, 0.1, 0.8, 0.8),))
    aligner = regions.aligner(region("rigid", biscuit(seed=0), include))
    assert aligner.place(biscuit(seed=0)).rotation == pytest.approx(0, abs=0.3)
    other = aligner.place(biscuit(seed=1))
    with pytest.raises(ImageError, match=r"almost as well in another place \(.*, at most 80% .* needs align=none"):
        alignment.FEWEST.check(other)


def test_a_part_with_one_place_in_each_held_out_image_is_not_refused_for_another():
    clear, unclear = Placement(0, 0, 0, 0.9, 1.0, 0.5), Placement(0, 0, 0, 0.9, 1.0, 0.7)
    assert [Limits.of(each).rival for each in ([clear, clear], [clear, unclear])] == [1.0, alignment.MOST_RIVAL]
    Limits.of([clear]).check(clear._replace(rival=0.99))


@pytest.mark.data
@pytest.mark.parametrize("align", ["rigid", "translation"])
def test_real_biscuits_are_refused_and_not_placed_far_from_where_they_are(data_root, align):
    """All of them lie within a tenth of the image of each other; rotations mean nothing, so nearly all are refused."""
    first, *paths = sorted((data_root / "cookie" / "images" / "good").glob("*"))
    aligner = regions.aligner(region(align, images.decode(first)))
    placed = []
    for path in paths[:16]:
        image = images.decode(path)
        try:
            place = aligner.place(image)
            alignment.FEWEST.check(place)
        except ImageError:
            continue
        placed.append(max(abs(place.shift_x), abs(place.shift_y)) / max(image.shape))
    assert len(placed) < {"rigid": 4, "translation": 12}[align]
    assert max(placed) < 0.1


def test_an_image_that_opencv_cannot_move_is_refused():
    long = np.random.default_rng(0).integers(0, 256, (10, 33_000, 3), dtype=np.uint8)
    reference = alignment.decode_reference(alignment.encode_reference(long))
    with pytest.raises(ImageError, match=r"too long to be aligned: 10 x 33000 pixels.*32,766 a side"):
        Aligner(reference, np.ones(reference.shape, dtype=bool), rigid=False).place(long)


def test_a_reference_without_structure_is_refused():
    flat = RegionConfig(
        include=CENTRE, align="rigid", reference=alignment.encode_reference(np.full((90, 90, 3), 99, "u1"))
    )
    with pytest.raises(
        ConfigError, match=r"region of all categories: The region shows too little structure.*align=none"
    ):
        regions.check([flat])
    regions.check([RegionConfig(include=CENTRE, align="rigid", reference=alignment.encode_reference(printed()))])


def png(side):
    content = io.BytesIO()
    Image.new("L", (side, 1)).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()


@pytest.mark.parametrize(
    ("text", "words"), [("no base64!", "must be a PNG image as base64"), (png(300), "300 x 1 pixels")]
)
def test_references_that_cannot_be_used_are_refused(text, words):
    with pytest.raises(ConfigError) as caught:
        alignment.decode_reference(text)
    assert words in str(caught.value)
    assert "data roi IMAGE -o regions.json --align" in str(caught.value)


def test_a_reference_is_a_small_grey_image():
    stored = alignment.decode_reference(alignment.encode_reference(printed((600, 1000))))
    assert stored.shape == (154, 256)
    np.testing.assert_array_equal(
        alignment.decode_reference(alignment.encode_reference(printed((40, 30))))[:2],
        np.asarray(Image.fromarray(printed((40, 30))).convert("L"))[:2],
    )


def test_pixels_are_moved_to_the_reference_and_back():
    reference = printed()
    image, _ = moved(reference, 10, -5, 7)
    placement = Placement(10, -5, 7, 1, 1)
    inner = np.s_[40:110, 60:140]
    back = alignment.to_reference(image, placement)
    assert np.abs(back[inner].astype(int) - reference[inner]).mean() < 4
    values = reference[..., 0].astype(np.float32)
    shown = alignment.to_image(values, placement)
    assert np.abs(shown[inner] - image[..., 0][inner]).mean() < 2
    mask = np.zeros((150, 200), dtype=bool)
    mask[60:90, 80:120] = True
    there = alignment.to_image(mask, placement)
    assert there.dtype == bool
    assert there.sum() == pytest.approx(1200, rel=0.03)
    rows, columns = np.nonzero(there)
    x, y = placement.to_reference(columns.mean(), rows.mean(), mask.shape)
    assert (x, y) == (pytest.approx(99.5, abs=0.6), pytest.approx(74.5, abs=0.6))
    assert not alignment.to_image(np.ones((150, 200), dtype=bool), placement).all()  # beyond the edge of the reference
    assert alignment.to_image(mask, None) is mask
    assert alignment.to_reference(image, None) is image


def test_a_placement_fits_a_shrunk_image():
    small = Placement(10, -5, 7, 1, 1).resized((150, 200), (75, 100))
    assert small == Placement(5, -2.5, 7, 1, 1)


def test_without_opencv_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(MissingError, match=r'needs OpenCV, which is not installed: pip install "normweave\[align\]"'):
        alignment.library()
