import json

import numpy as np
import pytest

from normweave import checks
from normweave.checks import Checks
from normweave.errors import BundleError, CheckError
from normweave.types import RawOutput


def network(pixels):
    """Raw outputs that depend on each image only; it is routed to 0 or 1 by its first pixel."""
    values = pixels.reshape(len(pixels), -1).astype(np.float32).mean(axis=1)
    return RawOutput(
        scores=np.stack([values, values + 1], axis=1)[:, None],
        image_scores=values + 1,
        weights=np.stack([values, 1 - values], axis=1),
        subclass=(pixels[:, 0, 0, 0] > 127).astype(np.int64),
        distance=values,
        adapted=values > 100,
        nearest=np.zeros((len(pixels), 1, 2), dtype=np.int64),
    )


@pytest.fixture
def stored():
    return Checks.compute(network, np.random.default_rng(0).integers(0, 256, (11, 3, 6, 5), dtype=np.uint8))


def test_images_and_outputs_are_read_back_in_every_bit(stored):
    again = Checks.from_bytes(stored.to_bytes(), where="here")

    assert (again.pixels == stored.pixels).all()
    for name, value in stored.outputs._asdict().items():
        other = getattr(again.outputs, name)
        assert (value is None) == (other is None)
        if value is not None:
            assert other.dtype == value.dtype
            assert (other == value).all()
    assert checks.bundle_files(None) == {}
    assert checks.bundle_files(stored) == {"checks.json": stored.to_bytes()}


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("images"),
        lambda record: record["images"].pop(),
        lambda record: record["images"].__setitem__(0, "AAAA"),
        lambda record: record["outputs"]["scores"].update(type="|O"),
        lambda record: record["outputs"]["scores"].update(shape=[7]),
        lambda record: record["outputs"].update(other=record["outputs"]["scores"]),
    ],
)
def test_another_file_is_refused(stored, change):
    record = json.loads(stored.to_bytes())
    change(record)

    with pytest.raises(BundleError, match=r"here does not hold images and outputs.*Copy the bundle again"):
        Checks.from_bytes(json.dumps(record).encode(), where="here")


def test_a_bit_may_change_only_where_the_routing_does(stored):
    old = stored.outputs
    moved = old.subclass.copy()
    moved[3] = 2
    scores = old.scores.copy()
    scores[3] += 1
    new = old._replace(subclass=moved, scores=scores)

    assert checks.compare(old, new, kept=[0, 1, -1]) == (11, 10, (3,))
    scores[5, 0, 1] = np.nextafter(scores[5, 0, 1], np.float32(np.inf))
    with pytest.raises(CheckError, match=r"scores of 1 of 11 images that are routed as before have changed"):
        checks.compare(old, new, kept=[0, 1, -1])
    affected = np.arange(11) == 5
    assert checks.compare(old, new, kept=[0, 1, -1], affected=affected) == (11, 9, (3, 5))


def test_another_machine_may_round_differently(stored):
    recorded = stored.outputs
    near = recorded._replace(image_scores=recorded.image_scores * np.float32(1 + 1e-5))
    far = recorded._replace(image_scores=recorded.image_scores * np.float32(1.01))

    assert checks.check_recorded(recorded, recorded) == {"tiles": 11, "same_bits": 11, "largest_difference": 0.0}
    found = checks.check_recorded(recorded, near)
    assert found["same_bits"] < 11
    assert 0 < found["largest_difference"] < 1e-4
    with pytest.raises(CheckError, match="image_scores that the graph gives on this machine differ"):
        checks.check_recorded(recorded, far)
    with pytest.raises(CheckError, match="does not return nearest"):
        checks.check_recorded(recorded, recorded._replace(nearest=None))
