"""Hard synthetic defects: what each type changes, the exact mask, where they lie, and reproducibility."""

import numpy as np
import pytest
from PIL import Image

from normweave.data import hard_defects
from normweave.data.hard_defects import TYPES, add_hard_defect
from normweave.data.synthetic import seeded


def cloth(seed: int, height: int = 64, width: int = 64, *, channels: int = 3) -> np.ndarray:
    """A texture with a grain of a few pixels, in colours or grey."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(30, 226, (height // 4, width // 4, channels), dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(coarse, (*coarse.shape[:2], 3)).copy())
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).transpose(2, 0, 1).copy()


def change(defective: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    return np.abs(defective.astype(int) - pixels).max(axis=0)


@pytest.mark.parametrize(("height", "width"), [(96, 96), (32, 32), (40, 160), (131, 48)])
def test_the_mask_is_exactly_the_changed_pixels(height: int, width: int) -> None:
    for index in range(60):
        pixels, other = cloth(index, height, width), cloth(index + 1000, height, width)
        before = pixels.copy(), other.copy()

        defective, mask, name = add_hard_defect(pixels, other, rng=seeded(0, 0, index))

        assert name in TYPES
        assert (defective.dtype, defective.shape) == (np.uint8, pixels.shape)
        assert (mask.dtype, mask.shape) == (np.bool_, (height, width))
        np.testing.assert_array_equal(mask, (defective != pixels).any(axis=0))
        assert change(defective, pixels).max() >= hard_defects.LEAST_CHANGE
        assert mask.mean() < 0.35
        np.testing.assert_array_equal(before[0], pixels)
        np.testing.assert_array_equal(before[1], other)


def test_every_type_is_drawn() -> None:
    pixels, other = cloth(0), cloth(1)
    assert {add_hard_defect(pixels, other, rng=seeded(0, 0, index))[2] for index in range(80)} == set(TYPES)


@pytest.mark.parametrize("level", [0, 128, 255])
def test_a_uniform_image_gets_a_visible_defect(level: int) -> None:
    """Nothing can be moved, blurred or copied there: these types are drawn again."""
    pixels = np.full((3, 64, 64), level, dtype=np.uint8)
    names = set()
    for index in range(60):
        defective, mask, name = add_hard_defect(pixels, pixels, rng=seeded(0, 0, index))
        assert change(defective, pixels).max() >= hard_defects.LEAST_CHANGE
        assert mask.any()
        names.add(name)
    assert names == {"spots", "pit", "faint_region", "faint_scratch"}


def test_a_change_that_nobody_can_see_is_drawn_again() -> None:
    """Blurring noise of one grey level changes many pixels, but less than `LEAST_CHANGE`."""
    pixels = np.random.default_rng(0).integers(128, 130, (3, 64, 64)).astype(np.uint8)
    names = {add_hard_defect(pixels, pixels, rng=seeded(0, 0, index))[2] for index in range(60)}
    assert names == {"spots", "pit", "faint_region", "faint_scratch"}


def test_a_pit_is_drawn_after_all_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = cloth(0)
    pit, drawn = TYPES["pit"], []

    def nothing(*inputs: object) -> np.ndarray:
        drawn.append(None)
        return pixels if len(drawn) <= hard_defects.ATTEMPTS else pit(*inputs)

    monkeypatch.setattr(hard_defects, "TYPES", dict.fromkeys(TYPES, nothing))
    _, mask, name = add_hard_defect(pixels, pixels, rng=seeded(0, 0, 0))

    assert name == "pit"
    assert mask.any()
    assert len(drawn) == hard_defects.ATTEMPTS + 1


def test_contrast_is_higher_where_texture_would_hide_it() -> None:
    plain = np.full((3, 64, 64), 128, dtype=np.uint8)
    textured = np.random.default_rng(0).integers(88, 168, (1, 64, 64)).repeat(3, axis=0).astype(np.uint8)
    means = [
        np.mean([change(TYPES["faint_region"](image, image, seeded(0, 0, i)), image).max() for i in range(30)])
        for image in (plain, textured)
    ]
    assert 3 < means[1] / means[0] <= hard_defects.MOST_GAIN + 0.1


def test_grey_images_stay_grey_even_beside_a_coloured_one() -> None:
    for index in range(80):
        defective, _, _ = add_hard_defect(cloth(1, channels=1), cloth(2), rng=seeded(0, 0, index))
        np.testing.assert_array_equal(defective, np.broadcast_to(defective[:1], defective.shape))


def test_the_same_draws_give_the_same_defect() -> None:
    pixels, other = cloth(0), cloth(1)
    first, again, different = (add_hard_defect(pixels, other, rng=seeded(7, 0, index)) for index in (3, 3, 4))

    assert first[2] == again[2]
    np.testing.assert_array_equal(first[0], again[0])
    assert (first[0] != different[0]).any()


@pytest.mark.parametrize(
    ("name", "least", "most"), [("spots", 25, 128), ("pit", 20, 128), ("faint_region", 4, 15), ("faint_scratch", 6, 60)]
)
def test_strength_is_within_its_range_and_spread(name: str, least: float, most: float) -> None:
    pixels = np.full((3, 256, 256), 128, dtype=np.uint8)
    largest = [change(TYPES[name](pixels, pixels, seeded(0, 0, index)), pixels).max() for index in range(60)]

    assert least <= min(largest) < 1.7 * least + 2
    assert 0.7 * most < max(largest) <= most


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("name", ["spots", "pit", "faint_region", "faint_scratch"])
def test_black_is_made_lighter_and_white_darker(level: int, name: str) -> None:
    pixels = np.full((3, 64, 64), level, dtype=np.uint8)
    for index in range(20):
        assert (TYPES[name](pixels, pixels, seeded(0, 0, index)) != pixels).any()


def test_spots_and_pits_are_a_few_pixels() -> None:
    pixels = np.full((3, 256, 256), 128, dtype=np.uint8)
    for index in range(60):
        for name, most in (("spots", 4 * 80), ("pit", 320)):
            assert 2 <= (TYPES[name](pixels, pixels, seeded(0, 0, index)) != pixels).any(axis=0).sum() <= most


def test_half_of_the_defects_seek_structure_or_its_absence() -> None:
    """Structure covers a quarter of the image. Drawn anywhere, half of the defects would not prefer it or avoid it."""
    pixels = np.full((3, 128, 128), 128, dtype=np.uint8)
    pixels[:, :64, :64] = cloth(0)
    places = []
    for index in range(300):
        mask = (TYPES["pit"](pixels, pixels, seeded(0, 0, index)) != pixels).any(axis=0)
        places.append(mask[:64, :64].any())
    # Half anywhere: 1/8; a quarter with most variance: almost all of it, 1/4; a quarter with the least: almost none.
    assert 0.3 < np.mean(places) < 0.48


def test_a_missing_part_is_replaced_by_what_surrounds_it() -> None:
    pixels = np.full((3, 256, 256), 200, dtype=np.uint8)
    pixels[:, 100:108, 100:108] = 20
    covered = [(TYPES["missing_part"](pixels, pixels, seeded(0, 0, index))) for index in range(40)]

    assert all(((defective >= 20) & (defective <= 200)).all() for defective in covered)
    assert max((defective[0] > 150).mean() for defective in covered) == 1  # in some images the whole part is gone
    assert not any((change(defective, pixels)[:40]).any() for defective in covered)  # nothing was missing there


def test_a_moved_part_is_seen_at_another_position() -> None:
    pixels = np.full((3, 256, 256), 200, dtype=np.uint8)
    pixels[:, 120:124, 120:124] = 20
    distances, numbers = [], []
    for index in range(100):
        rows, columns = np.nonzero(TYPES["moved_part"](pixels, pixels, seeded(0, 0, index))[0] < 40)
        numbers.append(rows.size)
        if rows.size == 16 and (np.ptp(rows), np.ptp(columns)) == (3, 3):  # the whole part
            distances.append(np.hypot(rows[0] - 120, columns[0] - 120))
    moved = [distance for distance in distances if distance]

    assert len(moved) > 5
    assert np.mean(np.array(numbers) > 16) < 0.05  # at both positions: only a part on the outline of the region
    assert 7 <= min(moved) < max(moved) <= 52
    assert max(moved) > 25


def test_a_part_at_the_border_is_not_filled_with_itself() -> None:
    pixels = cloth(0, 32, 32)
    for index in range(100):
        assert (TYPES["missing_part"](pixels, pixels, seeded(0, 0, index)) != pixels).any()


def test_a_part_is_turned_in_three_ways_or_mirrored() -> None:
    """Red grows to the right and green downwards: how they grow inside the disc names the transform."""
    ramp = np.broadcast_to(np.arange(128, dtype=np.uint8), (128, 128))
    pixels = np.stack([ramp, ramp.T, np.zeros_like(ramp)])
    ways = set()
    for index in range(40):
        turned = TYPES["turned_part"](pixels, pixels, seeded(0, 0, index)).astype(int)
        rows, columns = np.nonzero((turned != pixels).any(axis=0))
        assert abs(int(np.ptp(rows)) - int(np.ptp(columns))) <= 4  # a disc
        row, column = (int(lines.min() + lines.max()) // 2 for lines in (rows, columns))
        red, green = (turned[channel, row - 1 : row + 2, column - 1 : column + 2] for channel in (0, 1))
        steps = (red[2, 1] - red[0, 1], red[1, 2] - red[1, 0], green[2, 1] - green[0, 1])
        ways.add(tuple(int(step) for step in np.sign(steps)))

    assert ways == {(0, -1, 1), (0, -1, -1), (1, 0, 0), (-1, 0, 0)}  # mirrored, by 180, by 90 and by 270 degrees


@pytest.mark.parametrize("name", ["local_blur", "missing_print"])
def test_fine_structure_fades(name: str) -> None:
    pixels = np.full((3, 128, 128), 200, dtype=np.uint8)
    pixels[:, :, ::6] = 20  # lines
    for index in range(20):
        faded = TYPES[name](pixels, pixels, seeded(0, 0, index))
        assert ((faded >= 20) & (faded <= 200)).all()
        assert faded[0, :, ::6].mean() > 20  # lines are lighter
        assert faded.astype(float).std() < pixels.astype(float).std()


def test_a_copied_patch_has_the_pixels_of_one_of_the_images() -> None:
    pixels = np.zeros((3, 64, 64), dtype=np.uint8)
    pixels[0] = np.arange(64, dtype=np.uint8)  # red
    other = np.zeros_like(pixels)
    other[2] = 200  # blue, which `pixels` is not
    blue = [TYPES["copied_patch"](pixels, other, seeded(0, 0, index))[2].any() for index in range(90)]

    assert 0.35 < np.mean(blue) < 0.65
