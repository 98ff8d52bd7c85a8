"""Memory does not grow with the number of images."""

import numpy as np
import psutil

from normweave.cli.results import ResultWriter
from normweave.detector import Detector

WARM = 150
IMAGES = 1000
SIDE = 128
"""A map has 64 KiB: those of all images would need 53 MiB."""
MOST_MIB = 16


def grown_mib(bundle, table):
    """Mebibytes by which the resident memory grows while images are scored and written, after the first ones."""
    detector = Detector.load(bundle, threads=1, device="cpu")
    process, resident = psutil.Process(), []
    images = np.random.default_rng(0).integers(0, 256, (7, SIDE, SIDE, 3), dtype=np.uint8)

    def feed():
        for number in range(IMAGES):
            if number in (WARM, IMAGES - 1):
                resident.append(process.memory_info().rss)
            yield images[number % 7].copy()

    with ResultWriter(table, resume=False, bundle_hashes=(detector.bundle_hash,)) as writer:
        for number, outcome in enumerate(detector.stream(feed())):
            assert outcome.anomaly_map.shape == (SIDE, SIDE)
            writer.write(outcome.as_dict() | {"image_path": f"{number}.png"})
    return (resident[1] - resident[0]) / 2**20


def test_scoring_a_thousand_images_needs_the_memory_of_a_few(bundle, tmp_path):
    assert grown_mib(bundle, tmp_path / "out.jsonl") < MOST_MIB
