"""What the whole way from image file to verdict costs beside the bare backbone, and how it grows with the experts.

python perf/bench_inference.py            # table, then one JSON line
python perf/bench_inference.py | tail -1  # for a script
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from normweave import settings
from normweave.config import Config
from normweave.data.textures import COLOURS, LIGHTINGS, WEAVES, Textile, make_textures
from normweave.detector import Detector

WARM_UPS, ROUNDS = 1, 5
IMAGES = 12  # of each kind
ROUND = 64  # images judged in a round: decoding runs ahead of the network from the second batch on


def paired_ms(first: Callable[[], object], second: Callable[[], object]) -> tuple[list[float], list[float]]:
    """Times of both in turn, so that the machine's other load falls on both alike."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(WARM_UPS + ROUNDS):
        for work, kept in ((first, times[0]), (second, times[1])):
            start = time.perf_counter()
            work()
            if round_number >= WARM_UPS:
                kept.append((time.perf_counter() - start) * 1000)
    return times


def fitted(folder: Path, config: Config) -> Detector:
    return Detector.fit(folder / "manifest.csv", config=config, cache=folder / "cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", action="append", default=[], help="settings a.b=c of the detector")
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16, 64])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        for experts in arguments.experts:
            folder = Path(name) / str(experts)
            make_kinds(folder, experts)
            for batch in (1, 16):
                config = settings.override(Config(), [f"features.batch_images={batch}", *arguments.set])
                detector = fitted(folder, replace(config, seed=0))
                assert len(detector.head.subclass_names) == experts
                paths = [str(path) for path in sorted(folder.glob("cloth/*/train/good/*"))[:ROUND]]
                paths = (paths * ROUND)[:ROUND]
                pixels = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8)

                def pipeline(detector: Detector = detector, paths: list[str] = paths) -> None:
                    outcomes = list(detector.stream(paths))
                    assert all(outcome.verdict is not None for outcome in outcomes)

                def backbone(
                    detector: Detector = detector, pixels: torch.Tensor = pixels, times: int = ROUND // batch
                ) -> None:
                    for _ in range(times):
                        detector.extractor(pixels)

                whole, bare = paired_ms(pipeline, backbone)
                rows.append(
                    {
                        "experts": experts,
                        "batch": batch,
                        "whole_ms": statistics.median(whole) / ROUND,
                        "backbone_ms": statistics.median(bare) / ROUND,
                        "ratio": statistics.median(a / b for a, b in zip(whole, bare, strict=True)),
                        "worst_ms": max(whole) / ROUND,
                    }
                )
                print(
                    "experts {experts:>3}  batch {batch:>2}  image to verdict {whole_ms:6.1f} ms  backbone "
                    "{backbone_ms:6.1f} ms  ratio {ratio:.3f}".format(**rows[-1])
                )
    machine = {"torch": torch.__version__, "machine": platform.platform(), "threads": torch.get_num_threads()}
    print(json.dumps(machine | {"rows": rows}))


def make_kinds(folder: Path, count: int) -> None:
    """Good images of `count` kinds of cloth."""
    kinds = itertools.islice(itertools.product(WEAVES, COLOURS, LIGHTINGS), count)
    make_textures(
        folder,
        train_images=IMAGES,
        test_images=0,
        defect_images=0,
        seen=tuple(Textile(*kind) for kind in kinds),
        unseen=(),
    )


if __name__ == "__main__":
    main()
