import numpy as np
import pytest

from normweave.maps.overlay import (
    BLUE,
    CROP,
    THUMBNAIL,
    dimmed_outside,
    heat,
    inferno,
    outlined_crop,
    overlay,
    thumbnails,
    with_edge,
)


def lightness(colours):
    """Return the relative luminance of RGB in [0, 255]."""
    return colours[..., :3].astype(float) @ [0.2126, 0.7152, 0.0722]


def test_heat_has_the_threshold_in_the_middle_of_the_colours_and_is_transparent_far_below():
    colours = heat(np.array([[0.0, 0.5, 1.0, 2.0, 9.0]], np.float32), threshold=1.0)[0]
    assert colours[0, 3] == 0
    assert colours[1, 3] == 0  # at a quarter of the colours
    assert colours[2].tolist() == [186, 55, 84, 255]  # between the two colours in the middle
    assert colours[3].tolist() == colours[4].tolist() == [252, 255, 164, 255]  # as far above as the lowest is below


def test_heat_does_not_depend_on_the_unit_of_the_scores():
    scores = np.array([[0.0, 0.5, 1.0, 1.25, 2.0]], np.float32)
    np.testing.assert_array_equal(heat(8 * scores - 5, threshold=3.0), heat(scores, threshold=1.0))


def test_heat_grows_lighter_with_the_score():
    colours = heat(np.linspace(0, 2, 200, dtype=np.float32)[None], threshold=1.0)[0]
    assert (np.diff(lightness(colours)) >= -1).all()  # but for rounding
    assert lightness(colours[-1]) - lightness(colours[100]) > 150
    assert (np.diff(colours[:, 3].astype(int)) >= 0).all()


def test_heat_of_a_constant_map():
    assert heat(np.ones((2, 2), np.float32), threshold=1.0)[..., 3].max() == 255
    assert heat(np.zeros((2, 2), np.float32), threshold=1.0)[..., 3].max() == 0


def test_an_overlay_is_red_above_the_threshold_and_grey_elsewhere():
    image = np.full((2, 2, 3), (10, 20, 60), np.uint8)
    anomaly_map = np.array([[0, 1], [1.001, 2]], np.float32)
    made = overlay(image, anomaly_map, threshold=1.0).astype(int)
    assert made[0].tolist() == [[30, 30, 30], [30, 30, 30]]  # the threshold itself is normal
    assert made[1, 0].tolist() == [142, 125, 15]  # half grey, half yellow
    assert made[1, 1].tolist() == [
        142,
        15,
        15,
    ]  # as far above the threshold as the lowest score is below it: red


def test_an_overlay_of_a_map_above_the_threshold():
    made = overlay(np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 3, np.float32), threshold=1.0)
    assert made.reshape(-1, 3).tolist() == [[128, 0, 0]] * 4


def test_thumbnails_show_the_heat_and_the_marked_defect_at_their_positions():
    image = np.full((600, 900, 3), 120, dtype=np.uint8)
    anomaly_map = np.zeros((600, 900), dtype=np.float32)
    mask = np.zeros((600, 900), dtype=bool)
    anomaly_map[60:180, 600:780] = 2.0
    mask[300:420, 90:270] = True
    made = thumbnails(image, anomaly_map, mask, threshold=1.0)
    height, width = round(600 * THUMBNAIL / 900), THUMBNAIL
    assert list(made) == ["image", "heat map", "marked defect"]
    assert [thumbnail.shape for thumbnail in made.values()] == [(height, width, 3)] * 3
    assert (made["image"] == 120).all()
    light = made["heat map"].astype(int).sum(axis=2)
    scale = THUMBNAIL / 900
    inside = light[int(80 * scale) : int(160 * scale), int(620 * scale) : int(760 * scale)]
    outside = light[height // 2 :]
    assert inside.min() > outside.max() + 100
    marked = made["marked defect"]
    rows, columns = np.nonzero((marked != made["image"]).any(axis=2))
    assert rows.min() == pytest.approx(300 * scale, abs=4)
    assert columns.max() == pytest.approx(270 * scale, abs=4)
    assert (marked[int(360 * scale), int(180 * scale)] == 120).all()  # the defect itself stays visible


def test_only_pixels_above_the_threshold_are_outlined():
    image = np.full((100, 100, 3), 90, dtype=np.uint8)
    anomaly_map = np.zeros((100, 100), dtype=np.float32)
    anomaly_map[40:60, 40:60] = 1.0
    above = thumbnails(image, anomaly_map, None, threshold=0.5)
    below = thumbnails(image, anomaly_map, None, threshold=1.0)
    assert (above["heat map"] == 255).all(axis=2).any()
    assert not (below["heat map"] == 255).all(axis=2).any()
    assert list(above) == ["image", "heat map"]


def test_the_heat_map_grows_lighter_with_the_score():
    ramp = np.linspace(0, 1, 200, dtype=np.float32)
    made = thumbnails(np.full((20, 200, 3), 128, np.uint8), ramp[None].repeat(20, axis=0), None, threshold=1.0)
    assert (np.diff(lightness(made["heat map"][10])[::10]) > 0).all()
    np.testing.assert_array_equal(inferno(ramp)[[0, -1]], [[0, 0, 4], [252, 255, 164]])


def test_thumbnails_of_a_constant_map_and_an_empty_mask():
    image = np.zeros((1, 700, 3), dtype=np.uint8)
    made = thumbnails(image, np.ones((1, 700), np.float32), image[..., 0] > 0, threshold=1.0)
    assert made["heat map"].shape == (1, THUMBNAIL, 3)
    assert list(made) == ["image", "heat map"]


@pytest.mark.parametrize("shrunk", [1, 4])
@pytest.mark.parametrize("corner", [(0, 0), (60, 100), (116, 236)])
def test_a_crop_shows_the_region_in_its_surroundings_with_an_outline(corner, shrunk):
    top, left = corner
    image = np.full((120, 240, 3), 90, np.uint8)
    image[top : top + 4, left : left + 4] = (200, 10, 10)
    crop = outlined_crop(image[::shrunk, ::shrunk], (left, top, 4, 4), size=(120, 240))
    assert max(crop.shape) == CROP
    zoom = CROP / 60  # a quarter of the longer side
    red = np.argwhere((crop[..., 0] > 150) & (crop[..., 1] < 60))
    assert np.ptp(red, axis=0).tolist() == pytest.approx([4 * zoom, 4 * zoom], abs=zoom)
    white = np.argwhere((crop == 255).all(axis=2))
    assert (white.min(axis=0) <= red.min(axis=0)).all()
    assert (white.max(axis=0) >= red.max(axis=0)).all()


def test_a_crop_of_a_region_as_large_as_the_image_is_the_image():
    image = np.random.default_rng(0).integers(0, 255, (30, 50, 3)).astype(np.uint8)
    crop = outlined_crop(image, (0, 0, 50, 30), size=(30, 50))
    assert crop.shape == (120, 200, 3)


def test_the_edge_of_a_region_is_a_blue_line_inside_it():
    inside = np.zeros((20, 30), dtype=bool)
    inside[5:15, 8:20] = True
    image = np.full((20, 30, 3), 100, dtype=np.uint8)
    drawn = with_edge(image, inside)
    edge = (drawn == BLUE).all(axis=2)
    assert edge.sum() == 2 * 12 + 2 * 8
    assert not edge[~inside].any()
    assert (drawn[~edge] == 100).all()
    assert with_edge(image, None) is image
    large = np.zeros((20, 2000), dtype=bool)
    large[:, 10:] = True
    assert (with_edge(np.zeros((20, 2000, 3), dtype=np.uint8), large)[9] == BLUE).all(axis=1).sum() == 4


def test_a_map_and_an_overlay_show_the_edge():
    inside = np.zeros((8, 8), dtype=bool)
    inside[2:6, 2:6] = True
    scores = np.where(inside, np.float32(1), np.float32(-1))
    colours = heat(scores, threshold=0.5, inside=inside)
    assert (colours[2, 2] == (*BLUE, 255)).all()
    assert (colours[~inside, 3] == 0).all()
    image = np.full((8, 8, 3), 60, dtype=np.uint8)
    drawn = overlay(image, scores, threshold=0.5, inside=inside)
    assert (drawn[2, 2] == BLUE).all()
    assert (drawn[~inside] == 60).all()
    assert (drawn[3, 3] != 60).any()
    dimmed = dimmed_outside(image, inside)
    assert (dimmed[~inside] == 21).all()
    assert (dimmed[3, 3] == 60).all()
    shown = thumbnails(image, scores, None, threshold=0.5, inside=inside)
    assert (shown["heat map"] == BLUE).all(axis=2).any()
