import base64
import io
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from normweave.report.figures import BARS, THUMBNAIL, data_uri, panels, score_histogram


def rectangles(svg):
    return [
        (
            element.get("class").split(),
            float(element.get("x")),
            float(element.get("y")),
            float(element.get("height")),
        )
        for element in ElementTree.fromstring(svg)
        if element.tag == "rect"
    ]


def the_line(svg):
    return next(float(e.get("x1")) for e in ElementTree.fromstring(svg) if e.get("class") == "point")


def test_bars_stand_on_their_side_of_the_operating_point():
    random = np.random.default_rng(0)
    normal, anomalous = random.normal(0, 1, 300), random.normal(2, 1, 200)
    svg = score_histogram(normal, anomalous, line=1.3, axis="score")
    line = the_line(svg)
    for (label, side), x, _, _ in rectangles(svg):
        above = x + 1 > line
        assert side == ("wrong" if above == (label == "normal") else "right")
    assert f"good, false alarms: {(normal > 1.3).sum()}" in svg
    assert f"good, passed: {(normal <= 1.3).sum()}" in svg
    assert f"defective, missed: {(anomalous <= 1.3).sum()}" in svg
    assert f"defective, found: {(anomalous > 1.3).sum()}" in svg


def test_heights_are_counts():
    svg = score_histogram([0.0] * 30 + [1.0] * 10, [], line=0.5, axis="score")
    heights = sorted(height for _, _, _, height in rectangles(svg))
    assert heights[1] == pytest.approx(3 * heights[0], rel=0.01)


def test_a_score_that_equals_the_line_is_not_above_it():
    for line in (0.1, 0.3, 1.7, -2.2):
        svg = score_histogram([line], [line - 0.77, line + 1.13], line=line, axis="score")
        (rectangle,) = (r for r in rectangles(svg) if "normal" in r[0])
        assert rectangle[0][1] == "right"
        assert rectangle[1] < the_line(svg)


@pytest.mark.parametrize(
    ("normal", "anomalous", "line"),
    [
        ([], [], 0.0),
        ([1.0], [], 1.0),
        ([0.0, 1e9], [1e-9], 5.0),
        ([-3.0, -2.0], [-1.0], 40.0),
        ([2.0], [3.0], -7.0),
    ],
)
def test_odd_scores_stay_inside_the_drawing(normal, anomalous, line):
    svg = score_histogram(normal, anomalous, line=line, axis="a < b")
    root = ElementTree.fromstring(svg)
    _, _, width, height = map(float, root.get("viewBox").split())
    for _, x, y, tall in rectangles(svg):
        assert 0 <= x <= width
        assert 0 <= y <= y + tall <= height
    assert 0 <= the_line(svg) <= width
    assert len(rectangles(svg)) <= 2 * BARS
    assert "a &lt; b" in svg


def test_one_far_score_does_not_flatten_the_rest():
    scores = np.append(np.random.default_rng(1).normal(size=1000), 1e6)
    assert len(rectangles(score_histogram(scores, [], line=2.0, axis="score"))) > 20


def test_panels_are_thumbnails_with_the_defect_in_its_place():
    image = np.full((600, 900, 3), 120, dtype=np.uint8)
    anomaly_map = np.zeros((600, 900), dtype=np.float32)
    mask = np.zeros((600, 900), dtype=bool)
    anomaly_map[60:180, 600:780] = 2.0
    mask[300:420, 90:270] = True
    made = panels(image, anomaly_map, mask, lowest=0.0, highest=2.0, threshold=1.0)
    height, width = round(600 * THUMBNAIL / 900), THUMBNAIL
    assert [picture.shape for picture in made] == [(height, width, 3)] * 3
    assert (made.image == 120).all()
    light = made.heat.astype(int).sum(axis=2)
    scale = THUMBNAIL / 900
    inside = light[int(80 * scale) : int(160 * scale), int(620 * scale) : int(760 * scale)]
    outside = light[height // 2 :]
    assert inside.min() > outside.max() + 100
    rows, columns = np.nonzero((made.truth != made.image).any(axis=2))
    assert rows.min() == pytest.approx(300 * scale, abs=4)
    assert columns.max() == pytest.approx(270 * scale, abs=4)
    assert (made.truth[int(360 * scale), int(180 * scale)] == 120).all()  # the defect itself stays visible


def test_only_what_lies_above_the_operating_point_is_outlined():
    image = np.full((100, 100, 3), 90, dtype=np.uint8)
    anomaly_map = np.zeros((100, 100), dtype=np.float32)
    anomaly_map[40:60, 40:60] = 1.0
    above = panels(image, anomaly_map, None, lowest=0.0, highest=1.0, threshold=0.5)
    below = panels(image, anomaly_map, None, lowest=0.0, highest=1.0, threshold=1.0)
    assert (above.heat == 255).all(axis=2).any()
    assert not (below.heat == 255).all(axis=2).any()
    assert above.truth is None


def test_lightness_rises_with_the_score():
    """So that it can be read in grey, and by those who do not see red and green apart."""
    ramp = np.linspace(0, 1, 200, dtype=np.float32)[None].repeat(20, axis=0)
    heat = panels(
        np.full((20, 200, 3), 128, np.uint8), ramp, None, lowest=0.0, highest=1.0, threshold=9.0
    ).heat
    grey = heat[10] @ np.array([0.2126, 0.7152, 0.0722])
    assert (np.diff(grey[::10]) > 0).all()


def test_a_flat_map_and_a_mask_of_nothing():
    image = np.zeros((1, 700, 3), dtype=np.uint8)
    made = panels(
        image, np.ones((1, 700), np.float32), image[..., 0] > 0, lowest=1.0, highest=1.0, threshold=1.0
    )
    assert made.heat.shape == (1, THUMBNAIL, 3)
    assert made.truth is None


def test_pictures_go_into_the_page():
    image = np.full((30, 50, 3), (200, 100, 50), dtype=np.uint8)
    head, _, data = data_uri(image).partition(",")
    assert head == "data:image/jpeg;base64"
    again = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))
    np.testing.assert_allclose(again, image, atol=3)
