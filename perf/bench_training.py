"""Time of a complete training relative to one pass of the images through the backbone.

python perf/bench_training.py            # table, then one JSON line
python perf/bench_training.py | tail -1  # for a script
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from normweave import settings
from normweave.config import Config
from normweave.data import layouts, rows
from normweave.data.prepare import Preparation
from normweave.detector import Detector
from normweave.features import build
from normweave.features.cache import streamed
from normweave.textiles import make_textures

ROUNDS = 3
IMAGES = 32  # of each of six subclasses


def feature_pass_s(config: Config, manifest: Path) -> float:
    """Return the time to read, prepare and extract every training image once."""
    extractor = build(config.features, height=config.prepare.height, width=config.prepare.width)
    samples = [sample for sample in layouts.read(manifest, config.data) if sample.split == "train"]
    scanned = rows.scan(samples, Preparation(config.prepare), known=lambda keys: [True] * len(keys))
    source = streamed(extractor, scanned.load, len(scanned))
    start = time.perf_counter()
    for first in range(0, len(source), 16):
        source.read(range(first, min(first + 16, len(source))))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", nargs="+", default=["adapted-moe", "simplenet", "patchcore", "dfm"])
    parser.add_argument("--set", action="append", default=[], help="settings a.b=c of every model")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        manifest = make_textures(folder / "data", train_images=IMAGES, test_images=0, defect_images=0, unseen=())
        for model in arguments.models:
            config = Config(head=settings.model_config(model))
            config = settings.override(config, arguments.set)
            ratios, seconds = [], []
            for number in range(ROUNDS):
                single = feature_pass_s(config, manifest)
                start = time.perf_counter()
                detector = Detector.fit(manifest, config=config, cache=folder / f"cache-{model}-{number}")
                seconds.append(time.perf_counter() - start)
                assert detector.calibration is not None
                ratios.append(seconds[-1] / single)
            results.append(
                {
                    "model": model,
                    "images": IMAGES * 6,
                    "training_s": statistics.median(seconds),
                    "ratio": statistics.median(ratios),
                    "worst_ratio": max(ratios),
                }
            )
            print(
                "{model:<12} {images} images  training {training_s:6.1f} s  ÷ one feature pass {ratio:.2f} "
                "(worst {worst_ratio:.2f})".format(**results[-1])
            )
    machine = {"torch": torch.__version__, "machine": platform.platform(), "threads": torch.get_num_threads()}
    print(json.dumps(machine | {"rows": results}))


if __name__ == "__main__":
    main()
