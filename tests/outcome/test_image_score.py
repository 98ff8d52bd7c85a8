import numpy as np

from normweave.outcome import image_score


def test_one_hot_pixel_decides():
    maps = np.random.default_rng(0).random((3, 20, 30)).astype(np.float32)
    maps[1, 19, 29] = 7
    scores = image_score.from_maps(maps)
    assert scores.tolist() == [float(maps[0].max()), 7.0, float(maps[2].max())]
    assert scores.dtype == np.float32
