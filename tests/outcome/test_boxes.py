import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import ndimage

from normweave.outcome import boxes
from normweave.types import DefectBox


def by_scipy(anomaly_map, threshold):
    labels, _ = ndimage.label(anomaly_map > threshold, structure=np.ones((3, 3)))
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), start=1):
        peak = float(anomaly_map[labels == number].max())
        height, width = rows.stop - rows.start, columns.stop - columns.start
        found.append(DefectBox(columns.start, rows.start, width, height, peak))
    return sorted(found, key=lambda box: (-box.peak, box.y, box.x))


@settings(deadline=None, max_examples=300, derandomize=True)
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12),
        elements=st.integers(0, 4).map(float),
    )
)
def test_agrees_with_scipy(anomaly_map):
    assert list(boxes.find(anomaly_map, 1.0)) == by_scipy(anomaly_map, 1.0)[: boxes.MAX_BOXES]


@pytest.mark.parametrize("share", [0.02, 0.3, 0.41, 0.6])
def test_agrees_with_scipy_on_large_noise(share):
    """Around 0.41 regions percolate: long, tangled, the worst case for joining runs."""
    anomaly_map = np.random.default_rng(0).random((300, 280)).astype(np.float32)
    expected = by_scipy(anomaly_map, 1 - share)
    assert list(boxes.find(anomaly_map, 1 - share)) == expected[: boxes.MAX_BOXES]


def test_a_spiral_is_one_region():
    spiral = np.zeros((41, 41), dtype=np.float32)
    for ring in range(0, 20, 2):
        spiral[ring, ring : 41 - ring] = spiral[40 - ring, ring : 41 - ring] = 1
        spiral[ring : 41 - ring, 40 - ring] = spiral[ring + 2 : 41 - ring, ring] = 1
        spiral[ring + 2, ring : ring + 3] = 1
    assert boxes.find(spiral, 0.5) == (DefectBox(0, 0, 41, 41, 1.0),)


def test_corners_join_and_the_threshold_itself_is_not_above():
    anomaly_map = np.array([[2, 0, 0, 1], [0, 3, 0, 0], [0, 0, 0, 5]], dtype=np.float32)
    assert boxes.find(anomaly_map, 1.0) == (DefectBox(3, 2, 1, 1, 5.0), DefectBox(0, 0, 2, 2, 3.0))
    assert boxes.find(anomaly_map, 5.0) == ()


def test_runs_at_the_end_of_a_row_do_not_join_the_next_rows_start():
    anomaly_map = np.array([[0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
    assert len(boxes.find(anomaly_map, 0.5)) == 3


def test_the_hundred_highest_are_kept():
    anomaly_map = np.zeros((40, 40), dtype=np.float32)
    anomaly_map[::2, ::2] = np.arange(1, 401).reshape(20, 20)
    found = boxes.find(anomaly_map, 0.0)
    assert [box.peak for box in found] == [float(peak) for peak in range(400, 300, -1)]


def test_the_box_around_the_highest_value_is_above_the_middle_of_the_median_and_this_value():
    anomaly_map = np.zeros((5, 6), dtype=np.float32)
    anomaly_map[1, 1:3] = 4, 2.5
    anomaly_map[3, 4] = 3
    assert boxes.around_highest(anomaly_map, None) == (DefectBox(1, 1, 2, 1, 4.0),)
    inside = np.zeros((5, 6), dtype=np.bool_)
    inside[1, 1:4] = True  # its median is 2.5, so the middle is 3.25
    assert boxes.around_highest(anomaly_map, inside) == (DefectBox(1, 1, 1, 1, 4.0),)
    assert boxes.around_highest(np.ones((5, 6), dtype=np.float32), None) == ()
