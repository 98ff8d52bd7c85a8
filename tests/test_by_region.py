"""An image is scored under the region of the category that it is routed to."""

from pathlib import Path

import numpy as np
import pytest

from normweave.by_region import ByRegion, check_routing
from normweave.config import Config, PrepareConfig, RegionConfig, ShapesConfig
from normweave.data import rows
from normweave.data.prepare import Preparations
from normweave.errors import ConfigError
from normweave.scoring import PreparedImage, TileScores
from normweave.types import Outcome, RawOutput, Sample, Tile

CONFIG = Config(prepare=PrepareConfig(height=32, width=32))
LEFT, RIGHT = (ShapesConfig(rectangles=((x, 0.0, 0.5, 1.0),)) for x in (0.0, 0.5))
PREPARATIONS = Preparations(
    CONFIG.prepare, regions=(RegionConfig(category="bolt", include=LEFT), RegionConfig(category="nut", include=RIGHT))
)
BY_REGION = ByRegion.of(PREPARATIONS, {"bolt", "nut"}, ["bolt", "nut"])
BOLT, NUT = PREPARATIONS.of("bolt"), PREPARATIONS.of("nut")


def scored(subclasses, distances):
    """An image under both regions: the second subclass and distance are under that of nuts, in two tiles."""
    tiles = (Tile(0, 0, 32, 64), Tile(0, 0, 32, 64), Tile(0, 32, 32, 32))
    preparations = (BOLT, NUT, NUT)
    subclass = np.array([subclasses[0], subclasses[1], subclasses[1]])
    distance = np.array([distances[0], distances[1], distances[1]], dtype=np.float32)
    scores = np.arange(3 * 16, dtype=np.float32).reshape(3, 4, 4)
    raw = RawOutput(
        scores,
        weights=np.eye(2, dtype=np.float32)[subclass],
        subclass=subclass,
        distance=distance,
        adapted=np.zeros(3, dtype=bool),
    )
    image = PreparedImage("x.png", (32, 64), tiles, np.zeros((3, 3, 32, 32), dtype=np.uint8), None, preparations)
    return image, TileScores.of(raw, CONFIG)


@pytest.mark.parametrize(
    ("subclasses", "distances", "expected"),
    [
        ((0, 1), (1.0, 2.0), BOLT),  # both routed to their own category: the smaller distance
        ((0, 1), (2.0, 1.0), NUT),
        ((1, 1), (1.0, 2.0), NUT),  # under the region of bolts it is a nut: the region of nuts
        ((0, 0), (2.0, 1.0), BOLT),
        ((1, 0), (1.0, 2.0), BOLT),  # none: the smaller distance
        ((1, 0), (2.0, 1.0), NUT),
    ],
)
def test_the_region_is_that_of_the_category_with_the_smallest_distance(subclasses, distances, expected):
    image, tiles = BY_REGION.choose(*scored(subclasses, distances))
    assert set(image.preparations) == {expected}
    assert len(image.tiles) == len(tiles.scores) == len(image.pixels) == (1 if expected is BOLT else 2)
    again, _ = BY_REGION.choose(image, tiles)
    assert again.tiles == image.tiles


def test_one_region_for_all_categories_is_one_pass():
    one = ByRegion.of(Preparations(CONFIG.prepare, regions=(RegionConfig(include=LEFT),)), {"bolt", "nut"}, [])
    assert len(one.owned) == 1
    assert one.first.region.include == LEFT
    image, tiles = scored((0, 1), (1.0, 1.0))
    assert one.choose(image, tiles) == (image, tiles)
    assert BY_REGION.choose(image, None) == (image, None)


def test_an_outcome_has_the_region_of_its_category():
    inside = BY_REGION.inside(Outcome(image_path=None, category="nut", height=2, width=4))
    np.testing.assert_array_equal(inside, [[False, False, True, True]] * 2)
    whole = ByRegion.of(Preparations(CONFIG.prepare), {"nut"}, [])
    assert whole.inside(Outcome(image_path=None, category="nut", height=2, width=4)) is None


def test_a_head_without_routing_needs_one_region_for_all_categories(cloth):
    paths = sorted(cloth.parent.glob("cloth/*/test/*/*.png"))[:2]
    samples = [Sample(image_path=Path(path), category=name) for path, name in zip(paths, ("bolt", "nut"), strict=True)]
    scanned = rows.scan(samples, PREPARATIONS)
    check_routing(scanned, routes=True)
    check_routing(rows.scan(samples[:1], PREPARATIONS), routes=False)
    check_routing(rows.scan(samples, Preparations(CONFIG.prepare)), routes=False)
    with pytest.raises(ConfigError, match=r"bolt, nut have different regions, and this model does not route"):
        check_routing(scanned, routes=False)
