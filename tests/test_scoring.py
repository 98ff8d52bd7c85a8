"""Scores of tiles become scores of images, maps and operating points."""

import numpy as np
import pytest

from normweave.config import Config, MapsConfig, OutcomeConfig, PrepareConfig
from normweave.errors import CheckError
from normweave.maps import upsample
from normweave.scoring import HeldOut, ImageScore, OperatingPoints, TileScores, anomaly_map
from normweave.types import RawOutput, Tile

CONFIG = Config(prepare=PrepareConfig(height=32, width=48), maps=MapsConfig(smoothing=0))


def raw(scores, *, subclasses=None, distances=None, adapted=None, image_scores=None):
    """Raw outputs with the routing of some subclasses; grids hold one value."""
    n = len(scores)
    grids = np.repeat(np.asarray(scores, dtype=np.float32)[:, None, None], 4, axis=1).repeat(6, axis=2)
    if image_scores is not None:
        image_scores = np.asarray(image_scores, dtype=np.float32)
    if subclasses is None:
        return RawOutput(grids, image_scores)
    subclass = np.asarray(subclasses, dtype=np.int64)
    return RawOutput(
        grids,
        image_scores,
        weights=np.eye(3, dtype=np.float32)[subclass],
        subclass=subclass,
        distance=np.asarray(distances or [1.0] * n, dtype=np.float32),
        adapted=np.asarray(adapted or [False] * n),
    )


def test_the_score_of_a_tile_is_the_maximum_of_its_map():
    grids = np.random.default_rng(0).random((2, 4, 6), dtype=np.float32)
    tiles = TileScores.of(RawOutput(grids), CONFIG)
    expected = upsample(grids, 32, 48, smoothing=0).max(axis=(1, 2))
    np.testing.assert_allclose(tiles.peaks, expected)
    np.testing.assert_array_equal(tiles.scores, tiles.peaks)


def test_an_image_score_of_the_head_is_used_instead_of_the_maximum():
    tiles = TileScores.of(raw([1, 2], image_scores=[30, 20]), CONFIG)
    assert tiles.scores.tolist() == [30, 20]
    np.testing.assert_allclose(tiles.peaks, [1, 2])


def test_joined_batches_are_divided_again():
    batches = [
        TileScores.of(raw([1, 2], subclasses=[0, 1]), CONFIG),
        TileScores.of(raw([3], subclasses=[2]), CONFIG),
    ]
    joined = TileScores.concatenate(batches)
    assert joined.raw.subclass.tolist() == [0, 1, 2]
    assert joined.raw.reconstruction is None
    for part, expected in ((joined.part(0, 2), batches[0]), (joined.part(2, 3), batches[1])):
        np.testing.assert_array_equal(part.scores, expected.scores)
        np.testing.assert_array_equal(part.peaks, expected.peaks)
        np.testing.assert_array_equal(part.raw.weights, expected.raw.weights)


def test_an_image_has_the_largest_score_the_most_frequent_subclass_and_the_median_distance():
    image = ImageScore.of(
        TileScores.of(raw([1, 5, 2], subclasses=[2, 0, 2], distances=[1, 9, 3], adapted=[False, True, False]), CONFIG)
    )
    assert (image.score, image.peak, image.subclass, image.distance) == pytest.approx((5, 5, 2, 3))
    assert image.adapted is True
    np.testing.assert_allclose(image.weights, [1 / 3, 0, 2 / 3])


def test_without_routing_an_image_has_scores_only():
    image = ImageScore.of(TileScores.of(raw([1, 5], image_scores=[7, 6]), CONFIG))
    assert (image.score, image.peak) == pytest.approx((7, 5))
    assert (image.weights, image.subclass, image.distance, image.adapted) == (None, None, None, False)


def test_a_map_has_the_size_of_the_image():
    grid = np.random.default_rng(1).random((1, 4, 6), dtype=np.float32)
    found = anomaly_map(grid, [Tile(0, 0, 20, 30)], (20, 30), smoothing=0)
    np.testing.assert_array_equal(found, upsample(grid, 20, 30, smoothing=0)[0])


def test_tiles_are_put_where_they_were_cut():
    grids = np.stack([np.zeros((4, 6), np.float32), np.ones((4, 6), np.float32)])
    found = anomaly_map(grids, [Tile(0, 0, 20, 30), Tile(0, 20, 20, 30)], (20, 50), smoothing=0)
    assert found.shape == (20, 50)
    np.testing.assert_allclose(found[:, :20], 0, atol=1e-6)
    np.testing.assert_allclose(found[:, 30:], 1, atol=1e-6)
    overlap = found[10, 20:30]
    assert (np.diff(overlap) > 0).all()


NAMES = ("cloth/a", "cloth/b", "board")
SUBCLASSES = {"cloth/a": ("cloth", "a"), "cloth/b": ("cloth", "b"), "board": ("board", None)}


def images(scores, subclass, *, peak=None):
    return [
        ImageScore(float(score), float(score if peak is None else peak), np.eye(3)[subclass], subclass, 1.0, False)
        for score in scores
    ]


def draw(scores, unseen, rate=0.1, groups=None, **given):
    """Each image is a group of its own by default."""
    held_out = [
        HeldOut(number, groups[number] if groups else number, own, unseen[number] if unseen else None)
        for number, own in enumerate(scores)
    ]
    return OperatingPoints.draw(
        held_out,
        subclass_names=NAMES,
        subclasses=SUBCLASSES,
        outcome=OutcomeConfig(false_alarm_rate=rate, unknown_rate=0.1),
        **given,
    )


def test_thresholds_come_from_the_scores_of_the_held_out_images():
    points = draw(images(range(30), 0), [])
    assert points.calibration.scores.tolist() == list(range(30))
    assert points.calibration.subclass_categories == ("cloth", "cloth", "board")
    assert points.calibration.point().threshold == 27  # the ceil(31 * 0.9)-th smallest
    assert points.calibration.unseen is None
    assert points.map_threshold is None


def test_boxes_have_a_threshold_of_their_own_where_scores_are_not_maxima():
    scores = [each for k in range(30) for each in images([100 + k], 0, peak=k)]
    points = draw(scores, [])
    assert points.calibration.point().threshold == 127
    assert points.map_threshold == 27


def test_unseen_scores_count_only_within_the_category():
    own = images(range(30), 0)
    unseen = images(range(100, 120), 1) + images(range(500, 510), 2)  # ten are routed to the board
    points = draw(own, unseen)
    assert points.calibration.unseen.scores.tolist() == list(range(100, 120))
    assert draw(own, images(range(30), 2)).calibration.unseen is None


def test_variations_stand_for_unseen_subclasses_of_a_category_with_one_subclass():
    """The board is one subclass; cloth has two, so that its variations do not count."""
    held_out = [
        HeldOut(number, number, own, None, varied=tuple(images([100 + number, 200 + number], own.subclass)))
        for number, own in enumerate(images(range(20), 2) + images(range(20, 30), 0))
    ]
    points = OperatingPoints.draw(
        held_out, subclass_names=NAMES, subclasses=SUBCLASSES, outcome=OutcomeConfig(false_alarm_rate=0.1)
    )
    assert points.calibration.unseen.scores.tolist() == [*range(100, 120), *range(200, 220)]
    assert points.calibration.unseen.independent_groups == 20


def test_boxes_of_unseen_subclasses_have_the_threshold_of_unseen_peaks():
    own = [each for k in range(30) for each in images([100 + k], 0, peak=k)]
    unseen = [each for k in range(30) for each in images([200 + k], 1, peak=50 + k)]
    points = draw(own, unseen)
    assert points.box_threshold(threshold=127, unseen=False) == 27
    assert points.box_threshold(threshold=227, unseen=True) == 77
    assert OperatingPoints.from_dict(points.as_dict()).unseen_map_threshold == 77
    assert draw(own, []).box_threshold(threshold=227, unseen=True) == 27
    assert draw(images(range(30), 0), []).box_threshold(threshold=12.5, unseen=True) == 12.5


def test_too_few_images_for_the_rate():
    with pytest.raises(CheckError, match=r"0\.01"):
        draw(images(range(30), 0), [], rate=0.01)


def test_groups_are_counted_for_known_and_unseen_subclasses_and_boxes():
    own = images(range(30), 0)
    points = draw(own, images(range(100, 130), 1), groups=[number // 3 for number in range(30)])
    assert points.calibration.independent_groups == points.calibration.unseen.independent_groups == 10
    assert points.calibration.point().threshold == 29  # 27 if each image were a group
    few = draw(own, images(range(100, 130), 1), groups=[number // 10 for number in range(30)], attainable=True)
    assert few.calibration.guarantee == "uncalibrated"
    assert few.calibration.point().threshold == 29
    assert few.calibration.unseen is None  # three groups of leave-one-subclass-out scores are too few for the rate
    peaks = [each for k in range(30) for each in images([100 + k], 0, peak=k)]
    assert draw(peaks, [], groups=[number // 3 for number in range(30)]).map_threshold == 29
    assert draw(peaks, [], rate=0.01, attainable=True).map_threshold == 29


def test_few_unseen_groups_give_an_uncalibrated_verdict():
    """Six groups allow one false alarm in seven; the rate asks for one in ten."""
    groups = [number // 5 for number in range(30)]
    points = draw(images(range(30), 0), images(range(100, 130), 1), groups=groups, attainable=True)
    decision = points.calibration.decide(score=129.5, distance=2.0, subclass=0)
    assert decision.verdict == "unknown"
    near = points.calibration.unseen.decide(score=129.5, distance=1.0)
    assert (near.verdict, near.guarantee) == ("anomalous", "uncalibrated")
    assert near.false_alarm_rate == pytest.approx(1 / 7)
    lower = points.calibration.with_rate(0.01, attainable=True)
    assert lower.unseen.guarantee == "uncalibrated"
    assert draw(images(range(30), 0), images(range(100, 130), 1), rate=0.05).calibration.unseen is not None


def test_operating_points_come_back_from_a_record():
    points = draw([each for k in range(30) for each in images([100 + k], 0, peak=k)], [])
    again = OperatingPoints.from_dict(points.as_dict())
    assert again.map_threshold == points.map_threshold
    assert again.calibration.as_dict() == points.calibration.as_dict()
    with pytest.raises(KeyError):
        OperatingPoints.from_dict({"calibration": points.calibration.as_dict()})
