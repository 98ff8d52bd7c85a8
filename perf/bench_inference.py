"""What the whole way from image file to verdict costs beside the bare backbone, and how it grows with the experts.

Each side beside its own backbone: torch beside torch, ONNX Runtime and OpenVINO beside a graph of the backbone alone.
int8 stands beside the float backbone, and beside the float bundle. anomalib's models are exported by anomalib, with the
same backbone, and walk the same way in ONNX Runtime: decode, then their whole graph.

Two ratios: of time on the clock, in which decoding hides behind the network where a second core is free, and of
processor time, in which it does not and other programs do not count.

python perf/bench_inference.py                                          # table, then one JSON line
python perf/bench_inference.py | tail -1                                # for a script
python perf/bench_inference.py --also openvino int8 patchcore padim     # more rows
"""

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import nn

from normweave import settings
from normweave.bundle import GRAPH
from normweave.config import Config
from normweave.detector import Detector
from normweave.network.export import to_onnx
from normweave.network.openvino import OpenVino
from normweave.scoring import WORKERS
from normweave.textiles import COLOURS, LIGHTINGS, WEAVES, Textile, make_textures

WARM_UPS, ROUNDS = 1, 5
IMAGES = 12  # of each kind
ROUND = 64  # images judged in a round: decoding runs ahead of the network from the second batch on


class Times(NamedTuple):
    """Of one side, a round each."""

    clock_ms: list[float]
    processor_ms: list[float]


def paired(first: Callable[[], object], second: Callable[[], object]) -> tuple[Times, Times]:
    """Times of both in turn, so that the machine's other load falls on both alike."""
    times = (Times([], []), Times([], []))
    for round_number in range(WARM_UPS + ROUNDS):
        for work, kept in ((first, times[0]), (second, times[1])):
            start, used = time.perf_counter(), time.process_time()
            work()
            if round_number >= WARM_UPS:
                kept.clock_ms.append((time.perf_counter() - start) * 1000)
                kept.processor_ms.append((time.process_time() - used) * 1000)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


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


def session(graph: bytes | str, threads: int) -> onnxruntime.InferenceSession:
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
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--also", nargs="+", default=[], choices=["openvino", "int8", "patchcore", "padim"], help="more rows"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rows = []
    mib: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        for experts in arguments.experts:
            folder = Path(name) / str(experts)
            make_kinds(folder, experts)
            for batch in arguments.batches:
                config = settings.override(Config(), [f"features.batch_images={batch}", *arguments.set])
                detector = fitted(folder, replace(config, seed=0))
                assert len(detector.head.subclass_names) == experts
                paths = [str(path) for path in sorted(folder.glob("cloth/*/train/good/*"))[:ROUND]]
                paths = (paths * ROUND)[:ROUND]
                pixels = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8)
                given = {"pixels": pixels.numpy()}
                bundle = detector.save(folder / f"{batch}.bundle")
                runtime = Detector.load(bundle, threads=arguments.threads, device="cpu")
                bare_graph = to_onnx(Bare(detector.extractor), height=256, width=256)
                backbone = session(bare_graph, arguments.threads)
                # A fast wrong answer is worth nothing: check before timing.
                for mine, other in zip(
                    detector.score(paths[:batch]), runtime.score(paths[:batch]), strict=True
                ):
                    assert mine.verdict == other.verdict
                    np.testing.assert_allclose(other.pred_score, mine.pred_score, rtol=1e-3, atol=1e-3)

                def whole(judge: Detector, paths: list[str] = paths) -> Callable[[], object]:
                    def work() -> None:
                        assert all(outcome.verdict is not None for outcome in judge.stream(paths))

                    return work

                def bare(extract: Callable[[], object], times: int = ROUND // batch) -> Callable[[], object]:
                    def work() -> None:
                        for _ in range(times):
                            extract()

                    return work

                on_onnx = bare(lambda b=backbone, g=given: b.run(None, g))
                on_torch = bare(lambda d=detector, p=pixels: d.extractor(p))
                sides = [
                    ("torch", "backbone", whole(detector), on_torch),
                    ("onnx", "backbone", whole(runtime), on_onnx),
                ]
                if "openvino" in arguments.also:
                    vino = Detector.load(bundle, threads=arguments.threads, device="openvino")
                    alone = openvino_model(bare_graph, arguments.threads)
                    sides.append(("openvino", "backbone", whole(vino), bare(lambda a=alone, g=given: a(g))))
                if "int8" in arguments.also:
                    other_detector = fitted(folder, replace(config, seed=0))
                    other_detector.quantize()
                    small = other_detector.save(folder / f"{batch}.int8.bundle")
                    int8 = Detector.load(small, threads=arguments.threads, device="cpu")
                    sides.append(("int8", "backbone", whole(int8), on_onnx))
                    sides.append(("int8", "float bundle", whole(int8), whole(runtime)))
                    mib.update(
                        {
                            name: (at / GRAPH).stat().st_size / 2**20
                            for name, at in (("float", bundle), ("int8", small))
                        }
                    )
                for peer in [name for name in arguments.also if name in ("patchcore", "padim")]:
                    walk = peer_work(peer, folder, paths, batch, arguments.threads)
                    sides.append((peer, "backbone", walk, on_onnx))
                for library, beside, walk, other in sides:
                    mine, theirs = paired(walk, other)
                    rows.append(
                        {
                            "library": library,
                            "experts": experts,
                            "batch": batch,
                            "whole_ms": statistics.median(mine.clock_ms) / ROUND,
                            "beside": beside,
                            "beside_ms": statistics.median(theirs.clock_ms) / ROUND,
                            "ratio": ratio(mine.clock_ms, theirs.clock_ms),
                            "processor_ratio": ratio(mine.processor_ms, theirs.processor_ms),
                            "worst_ms": max(mine.clock_ms) / ROUND,
                        }
                    )
                    print(
                        "{library:<9}  experts {experts:>3}  batch {batch:>2}  image to verdict {whole_ms:6.1f} ms  "
                        "{beside} {beside_ms:6.1f} ms  ratio {ratio:.3f}  of processor time "
                        "{processor_ratio:.3f}".format(**rows[-1]),
                        flush=True,
                    )
    machine = {
        "torch": torch.__version__,
        "onnxruntime": onnxruntime.__version__,
        "machine": platform.platform(),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(machine | {"graph_mib": mib, "rows": rows}))


def openvino_model(graph: bytes, threads: int) -> Callable[[dict[str, np.ndarray]], object]:
    engine = OpenVino(graph, where="backbone", threads=threads, plugin="CPU")
    return engine.run


def peer_work(name: str, folder: Path, paths: list[str], batch: int, threads: int) -> Callable[[], object]:
    """An anomalib model from image files to its labels, in ONNX Runtime.

    PatchCore's export holds one size of batch only, so it takes image after image.
    """
    import peers

    module = peers.fitted(name, tuple(sorted(set(paths))))
    size = 1 if name == "patchcore" else batch
    path = peers.onnx(module, folder / f"{name}-{batch}", batch=1 if size == 1 else None)
    graph = session(str(path), threads)
    (given,) = graph.get_inputs()
    # A fast wrong answer is worth nothing: check before timing.
    first = peers.pixels(paths[0])
    with torch.no_grad():
        expected = module(torch.from_numpy(first).expand(size, -1, -1, -1)).anomaly_map.numpy()
    got = graph.run(["anomaly_map"], {given.name: np.repeat(first, size, axis=0)})[0]
    # Of maps in 0..1. PaDiM's export was seen to differ by 0.012.
    np.testing.assert_allclose(got, expected, atol=0.03)

    def work() -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            opened = pool.map(peers.pixels, paths)  # ahead of the network, as our own way does it
            while several := list(itertools.islice(opened, size)):
                said = graph.run(None, {given.name: np.concatenate(several)})
                assert len(said[0]) == len(several)

    return work


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
