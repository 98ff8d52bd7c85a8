"""Time from image file to verdict relative to the backbone alone, and its growth with the number of experts.

Each library is compared with the backbone in the same library: torch, and in ONNX Runtime and OpenVINO a graph of the
backbone. int8 is compared with the float backbone and with the float bundle. anomalib's models have the same backbone,
are exported by anomalib and run in ONNX Runtime: decoding, then their graph.

There are two ratios: of wall-clock time, in which decoding runs in parallel with the network if a second core is free,
and of processor time, which counts decoding and no other programs.

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

from normweave import fitting, settings
from normweave.bundle import GRAPH
from normweave.config import Config
from normweave.detector import WORKERS, Detector
from normweave.network.export import to_onnx
from normweave.textiles import COLOURS, LIGHTINGS, WEAVES, Textile, make_textures

WARM_UPS, ROUNDS = 1, 5
IMAGES = 12  # of each subclass
ROUND = 64  # images in a round: from the second batch on, decoding runs ahead of the network


class Times(NamedTuple):
    """Times of one side, one for each round."""

    wall_ms: list[float]
    processor_ms: list[float]


def paired(first: Callable[[], object], second: Callable[[], object]) -> tuple[Times, Times]:
    """Measure both alternately, so that other load of the machine affects both equally."""
    times = (Times([], []), Times([], []))
    for round_number in range(WARM_UPS + ROUNDS):
        for work, measured in ((first, times[0]), (second, times[1])):
            start, used = time.perf_counter(), time.process_time()
            work()
            if round_number >= WARM_UPS:
                measured.wall_ms.append((time.perf_counter() - start) * 1000)
                measured.processor_ms.append((time.process_time() - used) * 1000)
    return times


def ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


class Bare(nn.Module):
    """The backbone and its grid, to be exported like a complete network."""

    can_exclude = False

    def __init__(self, extractor: nn.Module) -> None:
        super().__init__()
        self.extractor = extractor

    def outputs(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the features by name."""
        return {"features": self.extractor(pixels)}

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the features."""
        return tuple(self.outputs(pixels).values())


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
            make_subclasses(folder, experts)
            for batch in arguments.batches:
                config = settings.override(Config(), [f"features.batch_images={batch}", *arguments.set])
                detector = fitted(folder, replace(config, seed=0))
                assert len(detector.subclass_names) == experts
                paths = [str(path) for path in sorted(folder.glob("cloth/*/train/good/*"))[:ROUND]]
                paths = (paths * ROUND)[:ROUND]
                pixels = torch.randint(0, 256, (batch, 3, 256, 256), dtype=torch.uint8)
                given = {"pixels": pixels.numpy()}
                bundle = detector.save(folder / f"{batch}.bundle")
                loaded = Detector.load(bundle, threads=arguments.threads, device="cpu")
                bare_graph = to_onnx(Bare(detector.network.extractor), height=256, width=256)
                backbone = session(bare_graph, arguments.threads)
                # Check the results before measuring the time.
                for mine, other in zip(detector.score(paths[:batch]), loaded.score(paths[:batch]), strict=True):
                    assert mine.verdict == other.verdict
                    np.testing.assert_allclose(other.pred_score, mine.pred_score, rtol=1e-3, atol=1e-3)

                def full(detector: Detector, paths: list[str] = paths) -> Callable[[], object]:
                    def work() -> None:
                        assert all(outcome.verdict is not None for outcome in detector.stream(paths))

                    return work

                def bare(extract: Callable[[], object], times: int = ROUND // batch) -> Callable[[], object]:
                    def work() -> None:
                        for _ in range(times):
                            extract()

                    return work

                on_onnx = bare(lambda b=backbone, g=given: b.run(None, g))
                on_torch = bare(lambda d=detector, p=pixels: d.network.extractor(p))
                sides = [
                    ("torch", "backbone", full(detector), on_torch),
                    ("onnx", "backbone", full(loaded), on_onnx),
                ]
                if "openvino" in arguments.also:
                    vino = Detector.load(bundle, threads=arguments.threads, device="openvino")
                    alone = openvino_model(bare_graph, arguments.threads)
                    sides.append(("openvino", "backbone", full(vino), bare(lambda a=alone, g=given: a(g))))
                if "int8" in arguments.also:
                    small = fitting.quantize(detector).save(folder / f"{batch}.int8.bundle")
                    int8 = Detector.load(small, threads=arguments.threads, device="cpu")
                    sides.append(("int8", "backbone", full(int8), on_onnx))
                    sides.append(("int8", "float bundle", full(int8), full(loaded)))
                    mib.update(
                        {name: (at / GRAPH).stat().st_size / 2**20 for name, at in (("float", bundle), ("int8", small))}
                    )
                for peer in [name for name in arguments.also if name in ("patchcore", "padim")]:
                    peer_side = peer_work(peer, folder, paths, batch, arguments.threads)
                    sides.append((peer, "backbone", peer_side, on_onnx))
                for library, reference, measured, other in sides:
                    ours, theirs = paired(measured, other)
                    rows.append(
                        {
                            "library": library,
                            "experts": experts,
                            "batch": batch,
                            "image_ms": statistics.median(ours.wall_ms) / ROUND,
                            "reference": reference,
                            "reference_ms": statistics.median(theirs.wall_ms) / ROUND,
                            "ratio": ratio(ours.wall_ms, theirs.wall_ms),
                            "processor_ratio": ratio(ours.processor_ms, theirs.processor_ms),
                            "worst_ms": max(ours.wall_ms) / ROUND,
                        }
                    )
                    print(
                        "{library:<9}  experts {experts:>3}  batch {batch:>2}  image to verdict {image_ms:6.1f} ms  "
                        "{reference} {reference_ms:6.1f} ms  ratio {ratio:.3f}  of processor time "
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
    import openvino

    core = openvino.Core()
    options = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": threads,
    }
    return core.compile_model(core.read_model(graph), "CPU", options).create_infer_request().infer


def peer_work(name: str, folder: Path, paths: list[str], batch: int, threads: int) -> Callable[[], object]:
    """Return a function that runs an anomalib model from image files to its labels, in ONNX Runtime.

    PatchCore's export has a fixed batch size of one.
    """
    import peers

    module = peers.fitted(name, tuple(sorted(set(paths))))
    size = 1 if name == "patchcore" else batch
    path = peers.onnx(module, folder / f"{name}-{batch}", batch=1 if size == 1 else None)
    graph = session(str(path), threads)
    (given,) = graph.get_inputs()
    # Check the results before measuring the time.
    first = peers.pixels(paths[0])
    with torch.no_grad():
        expected = module(torch.from_numpy(first).expand(size, -1, -1, -1)).anomaly_map.numpy()
    got = graph.run(["anomaly_map"], {given.name: np.repeat(first, size, axis=0)})[0]
    # Maps are in 0..1. PaDiM's export differs by up to 0.012.
    np.testing.assert_allclose(got, expected, atol=0.03)

    def work() -> None:
        with ThreadPoolExecutor(WORKERS) as pool:
            opened = pool.map(peers.pixels, paths)  # ahead of the network, as in Detector.stream
            while group := list(itertools.islice(opened, size)):
                outputs = graph.run(None, {given.name: np.concatenate(group)})
                assert len(outputs[0]) == len(group)

    return work


def make_subclasses(folder: Path, count: int) -> None:
    """Make good images of `count` subclasses of cloth."""
    subclasses = itertools.islice(itertools.product(WEAVES, COLOURS, LIGHTINGS), count)
    make_textures(
        folder,
        train_images=IMAGES,
        test_images=0,
        defect_images=0,
        seen=tuple(Textile(*subclass) for subclass in subclasses),
        unseen=(),
    )


if __name__ == "__main__":
    main()
