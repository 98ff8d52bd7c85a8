from xml.etree import ElementTree

import numpy as np
import pytest

from normweave.report.figures import BINS, Series, bin_counts, bin_edges, score_histogram


def histogram(normal, anomalous, *, threshold, axis="score", **given):
    return score_histogram(
        Series("normal", normal, "good, accepted", "good, false alarms"),
        Series("anomalous", anomalous, "defective, missed", "defective, detected"),
        threshold=threshold,
        axis=axis,
        **given,
    )


def rectangles(svg):
    """Return classes, x, y and height of every bar."""
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


def threshold_x(svg, style="point"):
    return next(float(e.get("x1")) for e in ElementTree.fromstring(svg) if e.get("class") == style)


def test_bars_are_above_or_below_the_threshold():
    random = np.random.default_rng(0)
    normal, anomalous = random.normal(0, 1, 300), random.normal(2, 1, 200)
    svg = histogram(normal, anomalous, threshold=1.3)
    for (_, side), x, _, _ in rectangles(svg):
        assert side == ("above" if x + 1 > threshold_x(svg) else "below")
    assert f"good, false alarms: {(normal > 1.3).sum()}" in svg
    assert f"good, accepted: {(normal <= 1.3).sum()}" in svg
    assert f"defective, missed: {(anomalous <= 1.3).sum()}" in svg
    assert f"defective, detected: {(anomalous > 1.3).sum()}" in svg


def test_heights_are_counts_with_a_tooltip():
    svg = histogram([0.0] * 30 + [1.0] * 10, [], threshold=0.5)
    heights = sorted(height for _, _, _, height in rectangles(svg))
    assert heights[1] == pytest.approx(3 * heights[0], rel=0.01)
    titles = [element.find("title").text for element in ElementTree.fromstring(svg) if element.tag == "rect"]
    assert [title.split(" with scores from ")[0] for title in titles] == ["30", "10"]


def test_a_score_equal_to_the_threshold_is_not_above_it():
    for threshold in (0.1, 0.3, 1.7, -2.2, 1e6 + 0.1):
        svg = histogram([threshold], [threshold - 0.77, threshold + 1.13], threshold=threshold)
        (rectangle,) = (r for r in rectangles(svg) if "normal" in r[0])
        assert rectangle[0][1] == "below"
        assert rectangle[1] < threshold_x(svg)


def test_every_score_is_in_one_bin_and_the_threshold_is_an_edge():
    scores = np.append(np.random.default_rng(2).gamma(2, 0.4, 500), 1e6)
    edges = bin_edges(scores, 1.5, bins=20)
    counts = bin_counts(scores, edges)
    assert len(edges) == 21
    assert 1.5 in edges
    assert counts.sum() == len(scores)
    assert counts[edges[1:] > 1.5].sum() == (scores > 1.5).sum()


@pytest.mark.parametrize(
    ("normal", "anomalous", "threshold"),
    [
        ([], [], 0.0),
        ([1.0], [], 1.0),
        ([0.0, 1e9], [1e-9], 5.0),
        ([-3.0, -2.0], [-1.0], 40.0),
        ([2.0], [3.0], -7.0),
    ],
)
@pytest.mark.parametrize("proposed", [None, 12.0])
def test_extreme_scores_stay_inside_the_drawing(normal, anomalous, threshold, proposed):
    svg = histogram(normal, anomalous, threshold=threshold, axis="a < b", proposed=proposed)
    _, _, width, height = map(float, ElementTree.fromstring(svg).get("viewBox").split())
    for _, x, y, tall in rectangles(svg):
        assert 0 <= x <= width
        assert 0 <= y <= y + tall <= height
    assert 0 <= threshold_x(svg) <= width
    assert len(rectangles(svg)) <= 2 * BINS
    assert "a &lt; b" in svg


def test_one_extreme_score_does_not_compress_the_others():
    scores = np.append(np.random.default_rng(1).normal(size=1000), 1e6)
    assert len(rectangles(histogram(scores, [], threshold=2.0))) > 20


def test_a_proposed_threshold_is_a_second_line():
    svg = histogram([0.5, 1.0], [0.7], threshold=2.0, proposed=3.0)
    assert threshold_x(svg) < threshold_x(svg, "point proposed")
    assert "proposed" not in histogram([0.5, 1.0], [0.7], threshold=2.0)
