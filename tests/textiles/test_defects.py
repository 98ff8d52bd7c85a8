import numpy as np
import pytest

from normweave.textiles import UNSEEN, WEAVES, Textile, camera, render
from normweave.textiles.camera import LIGHTINGS, VISIBLE
from normweave.textiles.dataset import DEFECT_SHARE
from normweave.textiles.defects import ADD_DEFECT, DEFECTS
from normweave.textiles.weave import COLOURS, MARGIN, weave_piece


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("weave", WEAVES)
def test_the_mask_is_where_the_image_changed(weave, defect):
    textile = Textile(weave, "sand", "raking")
    good, bad = render(textile, seed=5), render(textile, seed=5, defect=defect)
    change = np.abs(bad.image.astype(int) - good.image).max(axis=2)

    assert DEFECT_SHARE[0] <= bad.mask.mean() <= DEFECT_SHARE[1]
    assert not change[~bad.mask].any()
    assert (change[bad.mask] > 2).mean() > 0.6  # the edges of a soft stain are faint, its mask is closed
    assert change[bad.mask].mean() > VISIBLE


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("textile", UNSEEN, ids=lambda textile: textile.name)
def test_no_visible_change_is_outside_the_mask(textile, defect, monkeypatch):
    """Outside the mask, the image with the defect already looks like the good one before its pixels are copied."""
    outside = {}
    original = camera.visible_change

    def watch(before, after):
        mask = original(before, after)
        outside["change"] = np.abs(after - before).max(axis=0)[~mask]
        return mask

    monkeypatch.setattr(camera, "visible_change", watch)
    render(textile, seed=6, defect=defect)

    assert outside["change"].mean() < 0.2  # grey levels
    assert (outside["change"] > 4 * VISIBLE).mean() < 0.001


@pytest.mark.parametrize("add_defect", ADD_DEFECT.values(), ids=ADD_DEFECT)
def test_rendering_the_changed_window_equals_rendering_the_whole_image(add_defect):
    weave, dye, size = WEAVES["twill"], COLOURS["olive"], (128, 128)
    fabric = weave_piece(weave, dye, roll=1, seed=1, size=size)
    setup = camera.set_up(weave, LIGHTINGS["raking"], seed=1, size=size)
    tables = camera.tabulate(fabric)
    everything = tuple(slice(0, length) for length in fabric.shape)
    good = np.empty((3, *fabric.shape), np.float32)
    camera.render_window(good, everything, fabric, tables, setup)
    defective = add_defect(fabric, np.random.default_rng(2))
    changed = camera.tabulate(defective)
    window = camera.changed_window(fabric, defective, tables, changed)

    part, all_of_it = good.copy(), good.copy()
    camera.render_window(part, window, defective, changed, setup)
    camera.render_window(all_of_it, everything, defective, changed, setup)

    kept = slice(MARGIN, -MARGIN)
    assert np.abs(part - all_of_it)[:, kept, kept].max() < 0.02  # of white


def test_defects_are_at_random_positions():
    centres = [np.argwhere(render(UNSEEN[0], seed=seed, defect="knot").mask).mean(axis=0) for seed in range(8)]

    assert np.std(centres, axis=0).min() > 20  # pixels


def test_defects_run_from_subtle_to_clear():
    textile = Textile("plain", "ecru", "diffuse")
    strengths = []
    for seed in range(12):
        good, bad = render(textile, seed=seed), render(textile, seed=seed, defect="stain")
        strengths.append(np.abs(bad.image.astype(int) - good.image)[bad.mask].mean())

    assert max(strengths) > 1.8 * min(strengths)
