"""What the whole way from image file to verdict costs beside the bare backbone, and how it grows with the experts.

Each side beside its own backbone: torch beside torch, and ONNX Runtime beside a graph of the backbone alone.

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

import numpy as np
import onnxruntime
import torch
from torch import nn

from normweave import settings
from normweave.config import Config
from normweave.data.textures import COLOURS, LIGHTINGS, WEAVES, Textile, make_textures
from normweave.detector import Detector
from normweave.export import to_onnx
from normweave.runtime import Runtime

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


class Bare(nn.Module):
    """The backbone and its grid alone, to be exported like a whole network."""

    knows_strangers = False

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def says(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features by name."""
        return {"features": self.extractor(pixels)}

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features."""
        return tuple(self.says(pixels).values())


def session(graph: bytes, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


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
                given = {"pixels": pixels.numpy()}
                bundle = detector.save(folder / f"{batch}.bundle")
                runtime = Runtime(bundle, threads=arguments.threads, device="cpu")
                backbone = session(
                    to_onnx(Bare(detector.extractor), height=256, width=256), arguments.threads
                )
                # A fast wrong answer is worth nothing: check before timing.
                for mine, other in zip(
                    detector.score(paths[:batch]), runtime.score(paths[:batch]), strict=True
                ):
                    assert mine.verdict == other.verdict
                    np.testing.assert_allclose(other.pred_score, mine.pred_score, rtol=1e-3, atol=1e-3)

                def whole(judge: Detector | Runtime, paths: list[str] = paths) -> Callable[[], object]:
                    def work() -> None:
                        assert all(outcome.verdict is not None for outcome in judge.stream(paths))

                    return work

                def bare(extract: Callable[[], object], times: int = ROUND // batch) -> Callable[[], object]:
                    def work() -> None:
                        for _ in range(times):
                            extract()

                    return work

                sides = (
                    ("torch", detector, lambda d=detector, p=pixels: d.extractor(p)),
                    ("onnx", runtime, lambda b=backbone, g=given: b.run(None, g)),
                )
                for library, judge, extract in sides:
                    pipeline, alone = paired_ms(whole(judge), bare(extract))
                    rows.append(
                        {
                            "library": library,
                            "experts": experts,
                            "batch": batch,
                            "whole_ms": statistics.median(pipeline) / ROUND,
                            "backbone_ms": statistics.median(alone) / ROUND,
                            "ratio": statistics.median(a / b for a, b in zip(pipeline, alone, strict=True)),
                            "worst_ms": max(pipeline) / ROUND,
                        }
                    )
                    print(
                        "{library:<5}  experts {experts:>3}  batch {batch:>2}  image to verdict {whole_ms:6.1f} ms  "
                        "backbone {backbone_ms:6.1f} ms  ratio {ratio:.3f}".format(**rows[-1]),
                        flush=True,
                    )
    machine = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
    }
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
