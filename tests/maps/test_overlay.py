import numpy as np

from normweave.maps.overlay import heat, overlay


def lightness(colours):
    """Of RGB in 0..255, roughly as the eye weighs them."""
    return colours[..., :3].astype(float) @ [0.2126, 0.7152, 0.0722]


def test_heat_has_the_threshold_in_its_middle_and_nothing_far_below():
    colours = heat(np.array([[0.0, 0.5, 1.0, 2.0, 9.0]], np.float32), threshold=1.0)[0]
    assert colours[0, 3] == 0
    assert colours[1, 3] == 0  # a quarter of the way up
    assert colours[2].tolist() == [186, 55, 84, 255]  # between the two colours in the middle
    assert (
        colours[3].tolist() == colours[4].tolist() == [252, 255, 164, 255]
    )  # as far above as the lowest is below


def test_heat_has_the_same_colours_whatever_the_scores_are_counted_in():
    scores = np.array([[0.0, 0.5, 1.0, 1.25, 2.0]], np.float32)
    np.testing.assert_array_equal(heat(8 * scores - 5, threshold=3.0), heat(scores, threshold=1.0))


def test_heat_grows_lighter_all_the_way_so_that_it_can_be_read_without_colours():
    colours = heat(np.linspace(0, 2, 200, dtype=np.float32)[None], threshold=1.0)[0]
    assert (np.diff(lightness(colours)) >= -1).all()  # but for rounding
    assert lightness(colours[-1]) - lightness(colours[100]) > 150
    assert (np.diff(colours[:, 3].astype(int)) >= 0).all()


def test_heat_of_a_map_without_height():
    assert heat(np.ones((2, 2), np.float32), threshold=1.0)[..., 3].max() == 255
    assert heat(np.zeros((2, 2), np.float32), threshold=1.0)[..., 3].max() == 0


def test_an_overlay_is_red_above_the_threshold_and_grey_elsewhere():
    image = np.full((2, 2, 3), (10, 20, 60), np.uint8)
    anomaly_map = np.array([[0, 1], [1.001, 2]], np.float32)
    picture = overlay(image, anomaly_map, threshold=1.0).astype(int)
    assert picture[0].tolist() == [[30, 30, 30], [30, 30, 30]]  # the threshold itself is normal
    assert picture[1, 0].tolist() == [142, 125, 15]  # half grey, half yellow
    assert picture[1, 1].tolist() == [142, 15, 15]  # as far above the threshold as the lowest lies below: red


def test_an_overlay_of_a_map_that_lies_wholly_above():
    picture = overlay(np.zeros((2, 2, 3), np.uint8), np.full((2, 2), 3, np.float32), threshold=1.0)
    assert picture.reshape(-1, 3).tolist() == [[128, 0, 0]] * 4
