import numpy as np
import pytest

from normweave.textiles.weave import (
    COLOURS,
    MARGIN,
    OVERSAMPLE,
    SAMPLES,
    WEAVES,
    Thread,
    interlacing,
    weave_piece,
)


def test_plain_is_a_checkerboard():
    over = interlacing(WEAVES["plain"], weft=7, warp=9)

    assert over.shape == (7, 9)
    rows, columns = np.indices(over.shape)
    np.testing.assert_array_equal(over, (rows + columns) % 2 == 0)


def test_twill_moves_one_warp_aside_with_every_weft():
    over = interlacing(WEAVES["twill"], weft=12, warp=12)

    np.testing.assert_array_equal(over[1:, 1:], over[:-1, :-1])
    assert over.mean() == 0.75  # three over, one under


def test_satin_binds_each_warp_once_and_never_beside_the_last():
    over = interlacing(WEAVES["satin"], weft=8, warp=8)

    np.testing.assert_array_equal((~over).sum(axis=0), 1)
    np.testing.assert_array_equal((~over).sum(axis=1), 1)
    positions = np.argmin(over, axis=1)
    steps = np.diff(np.append(positions, positions[0])) % 8
    assert not set(steps.tolist()) & {0, 1, 7}  # a step of one would be a twill


def test_herringbone_is_a_twill_that_turns_back():
    over = interlacing(WEAVES["herringbone"], weft=8, warp=16)

    np.testing.assert_array_equal(over[1:, 1:8], over[:-1, 0:7])
    np.testing.assert_array_equal(over[1:, 8:15], over[:-1, 9:16])
    np.testing.assert_array_equal(over[:, 8], ~over[:, 7])  # the clean cut between the stripes


@pytest.mark.parametrize(("weave", "block"), [("basket", (2, 2)), ("rib", (2, 1))])
def test_basket_and_rib_are_plain_with_yarns_taken_together(weave, block):
    over = interlacing(WEAVES[weave], weft=8, warp=8)

    np.testing.assert_array_equal(
        over, np.kron(interlacing(WEAVES["plain"], weft=8, warp=8), np.ones(block))[:8, :8] > 0
    )


@pytest.mark.parametrize("weave", WEAVES)
def test_every_yarn_of_a_draft_is_held(weave):
    """A yarn that is always over or always under would be loose on the fabric."""
    draft = WEAVES[weave].draft
    over = interlacing(WEAVES[weave], weft=len(draft), warp=len(draft[0]))

    for axis in (0, 1):
        assert over.any(axis=axis).all()
        assert not over.all(axis=axis).any()


def test_every_pixel_shows_a_yarn_of_the_piece():
    fabric = weave_piece(WEAVES["twill"], COLOURS["navy"], roll=1, seed=2, size=(64, 96))

    assert fabric.shape == (64 * OVERSAMPLE + 2 * MARGIN, 96 * OVERSAMPLE + 2 * MARGIN)
    for own, other in (("weft", "warp"), ("warp", "weft")):
        position, yarns = getattr(fabric, f"{own}_position"), getattr(fabric, own)
        assert 0 <= position.along.min() <= position.along.max() < yarns.width.shape[1]
        assert np.abs(position.across).max() <= 1.2
        assert len(yarns.width) == fabric.over.shape[own == "warp"]
        assert getattr(fabric, other).width.shape[0] * SAMPLES == yarns.width.shape[1]


def test_cropping_a_thread_keeps_the_part_inside_the_window():
    height = np.arange(12, dtype=np.float32).reshape(3, 4)
    thread = Thread((slice(10, 13), slice(20, 24)), height, (0.1, 0.2, 0.3))

    part = thread.crop((slice(11, 40), slice(0, 22)))

    assert part.window == (slice(0, 2), slice(20, 22))
    np.testing.assert_array_equal(part.height, height[1:, :2])
    assert thread.crop((slice(0, 10), slice(0, 40))) is None
