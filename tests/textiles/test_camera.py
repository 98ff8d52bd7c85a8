from dataclasses import replace

import numpy as np
import pytest

from normweave.textiles import LIGHTINGS, SEEN, UNSEEN, WEAVES, Textile, render


@pytest.mark.parametrize("textile", SEEN + UNSEEN, ids=lambda textile: textile.name)
def test_images_are_neither_black_nor_overexposed(textile):
    image = render(textile, seed=2).image

    assert 25 < image.mean() < 225
    assert (image.max(axis=2) == 255).mean() < 0.01
    assert (image.max(axis=2) == 0).mean() < 0.01


def test_yarns_repeat_at_the_pitch_of_the_weave():
    """The strongest frequency down the image is that of two weft yarns, the repeat of plain weave, or of one."""
    image = render(Textile("plain", "ecru", "raking"), seed=4, size=(256, 256)).image.mean(axis=2)
    spectrum = np.abs(np.fft.rfft(image - image.mean(axis=0), axis=0)).mean(axis=1)
    period = len(image) / (5 + spectrum[5:].argmax())  # the first five are light and waves

    pitch = WEAVES["plain"].pitch[0]
    assert min(abs(period / pitch - 1), abs(period / pitch - 2)) < 0.12, (period, pitch)


def test_light_comes_from_the_lamp(monkeypatch):
    """Left slopes of the warp are bright with the lamp on the left, right slopes with the lamp on the right."""
    centred = {}
    for side, azimuth in (("left", 180.0), ("right", 0.0)):
        monkeypatch.setitem(LIGHTINGS, "raking", replace(LIGHTINGS["raking"], azimuth=azimuth))
        grey = render(Textile("rib", "ecru", "raking"), seed=4).image.mean(axis=2)
        centred[side] = grey - grey.mean()
    # Both images show the same yarns, so one is the other shifted by less than half a yarn towards the lamp.
    agreement = [np.mean(centred["left"] * np.roll(centred["right"], shift, axis=1)) for shift in range(-3, 4)]
    assert int(np.argmax(agreement)) - 3 < 0, agreement


def test_pieces_of_a_roll_share_its_dye_lot():
    """The hue, which the lamp's brightness does not change, varies from roll to roll and hardly within one."""
    hues = np.empty((6, 3))
    for roll, piece in np.ndindex(6, 3):
        image = render(SEEN[0], seed=10 * roll + piece, size=(96, 128), roll=roll).image
        red, _, blue = image.mean(axis=(0, 1))
        hues[roll, piece] = red / blue

    assert hues.std(axis=1).mean() < 0.2 * hues.mean(axis=1).std()
