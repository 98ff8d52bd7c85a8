"""Differences of a fit on a Ray cluster to that of one machine, and those of a coreset of coresets to a coreset.

    python perf/bench_ray_fit.py [--data manifest.csv] [--nodes 2 4] [--size 128] [--test-images 60] [--seeds 0 1 2]
        [--epochs 10] [--models NAME …]

Without --data: synthetic cloth. Each node is processes of its own with one CPU; all use one folder of features. The fit
on one machine reads its own. Models that are trained by gradient are fitted with each seed, since the numbers that they
draw differ. The time of an epoch is that of nodes which share the cores of one machine. Needs `[scale]`.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from bench_ray import nodes
from normweave import settings
from normweave.bridges import ray_features, ray_fit
from normweave.config import Config, DataConfig, PrepareConfig
from normweave.data import layouts, splits
from normweave.detector import Detector
from normweave.heads.memory_bank import coreset, nearest, project
from normweave.report.metrics import image_metrics
from normweave.textiles import SEEN, make_textures
from normweave.types import Sample

MODELS: dict[str, list[str]] = {
    "Adapted-MoE (fusion)": [],
    "Gaussian experts": ["head.expert.kind=gaussian"],
    "layout experts": ["head.expert.kind=layout"],
    "memory bank experts": ["head.expert.kind=memory"],
    "calibrated memory bank experts": ["head.expert.kind=memory", "head.expert.calibrated=true"],
    "subspace experts": ["head.expert.kind=subspace"],
    "DFM": ["head.kind=dfm"],
    "PatchCore": ["head.kind=memory_bank"],
}

GRADIENT: dict[str, list[str]] = {
    "SimpleNet": ["head.kind=simplenet"],
    "Adapted-MoE (discriminators)": ["head.expert.kind=discriminator"],
    "CNC": ["head.kind=cnc"],
    "MSFlow": ["head.kind=msflow"],
    "PyramidFlow": ["head.kind=pyramidflow"],
}
"""Models that are trained by gradient."""
TRAINING = dict.fromkeys(GRADIENT, "head.training.epochs") | {
    "Adapted-MoE (discriminators)": "head.expert.training.epochs"
}


def difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, fusion: bool) -> float:
    """Return the largest difference of a weight, relative to the largest one of its tensor.

    Args:
        fusion: of the scales and weights of the fusion, or of everything else.
    """
    assert one.keys() == other.keys()
    worst = 0.0
    for name, tensor in one.items():
        if name.startswith("head.fusion.") != fusion or not tensor.numel():
            continue
        a, b = tensor.double(), other[name].double()
        kept = torch.isfinite(a)
        assert torch.equal(kept, torch.isfinite(b))
        if kept.any():
            size = a[kept].abs().max().clamp_min(1e-12)
            worst = max(worst, float((a - b)[kept].abs().max() / size))
    return worst


def scored(detector: Detector, samples: Sequence[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores of the images, and whether each is anomalous."""
    found = [outcome.pred_score for outcome in detector.stream([str(each.image_path) for each in samples])]
    return np.array(found), np.array([each.label == "anomalous" for each in samples])


def thresholds(detector: Detector) -> np.ndarray:
    """Return all thresholds."""
    return np.array([row["threshold"] for row in detector.calibration.table(detector.subclass_names)])


def auroc(scores: np.ndarray, anomalous: np.ndarray) -> float:
    """Return the image AUROC."""
    return float(image_metrics(anomalous, scores)[0]["image_auroc"])


def coresets(far: Detector, samples: Sequence[Sample], *, parts: int, folder: Path) -> None:
    """Print the covering radius and the AUROC of a coreset and of a coreset of the coresets of some parts."""
    network = far.network
    source = network.reader(network.rows.images, cache=folder).source
    standard = network.standard
    rows = network.rows.fit
    pool = torch.cat(
        [standard(source.read(rows[k : k + 16])).permute(0, 2, 3, 1).flatten(0, 2) for k in range(0, len(rows), 16)]
    )
    generator = torch.Generator().manual_seed(0)
    points = project(pool, 64, generator=generator)
    keep = max(1, len(pool) // 100)
    plain = coreset(points, keep, generator=generator)
    some = torch.tensor_split(torch.arange(len(pool)), parts)
    first = [own[coreset(points[own], keep, generator=generator)] for own in some]
    union = torch.cat(first)
    merged = union[coreset(points[union], keep, generator=generator)]
    radii = [float(nearest(points, points[chosen])[0].max()) for chosen in (plain, merged)]
    bound = max(
        float(nearest(points[own], points[chosen])[0].max()) for own, chosen in zip(some, first, strict=True)
    ) + float(nearest(points[union], points[merged])[0].max())
    assert radii[1] <= bound
    values = []
    for chosen in (plain, merged):
        network.head.bank = pool[chosen]
        network.head.origins = None
        values.append(auroc(*scored(far, samples)))
    print(
        f"coreset of {keep} of {len(pool)} patches: radius {radii[0]:.3f}, AUROC {values[0]:.4f}; of {parts} coresets: "
        f"radius {radii[1]:.3f} (bound {bound:.3f}), AUROC {values[1]:.4f}",
        flush=True,
    )


class Epochs:
    """Notes the time after each epoch of the last stage of a fit."""

    def __init__(self) -> None:
        self.stage = ""
        self.times: list[tuple[int, float]] = []  # epochs that are done, and when

    def __call__(self, step: str, done: int, total: int) -> None:
        """Receive progress."""
        if not step.startswith("train "):
            return
        if step != self.stage:
            self.stage, self.times = step, []
        self.times.append((done, time.perf_counter()))

    def seconds(self) -> float:
        """Return the mean time of an epoch between the first and the last that were reported."""
        (first, start), (last, end) = self.times[0], self.times[-1]
        return (end - start) / max(last - first, 1)


def gradient(
    samples: Sequence[Sample], test: Sequence[Sample], base: Config, folder: Path, *, names: Sequence[str], given
) -> None:
    """Print image AUROC and time of an epoch of models that are trained by gradient, with each seed."""
    values: dict[tuple[str, int], list[float]] = {}

    def fitted(name: str, machines: int, sources=None) -> None:
        for seed in given.seeds:
            config = settings.override(base, [*GRADIENT[name], f"seed={seed}", f"{TRAINING[name]}={given.epochs}"])
            epochs, start = Epochs(), time.perf_counter()
            detector = Detector.fit(
                samples, config=config, cache=folder / "gradient", device="cpu", sources=sources, progress=epochs
            )
            if sources is not None:
                assert sources.machines == machines
            value = auroc(*scored(detector, test))
            values.setdefault((name, machines), []).append(value)
            print(
                f"| {name} | {machines} | {seed} | {value:.4f} | {epochs.seconds():.2f} | "
                f"{time.perf_counter() - start:.0f} |",
                flush=True,
            )

    print("| model | machines | seed | image AUROC | seconds an epoch | seconds of the fit |")
    for name in names:
        fitted(name, 1)
    for count in given.nodes:
        with nodes(count, tied=False) as running, ray_fit.sources(running.address) as sources:
            for name in names:
                fitted(name, count, sources)
    for (name, machines), found in values.items():
        print(f"{name}, {machines} machines: mean {np.mean(found):.4f}, from {min(found):.4f} to {max(found):.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--nodes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--test-images", type=int, default=60)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=[*MODELS, *GRADIENT])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10)
    given = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    ray_features.TASK_ROWS = 24
    base = Config(
        data=DataConfig(subclass_from="column", calibration="split"),
        prepare=PrepareConfig(height=given.size, width=given.size),
    )
    base = replace(base, outcome=replace(base.outcome, false_alarm_rate=0.1, unknown_rate=0.1, references=False))
    try:
        data = given.data or make_textures(
            folder / "cloth",
            size=(given.size, given.size),
            train_images=24,
            test_images=6,
            defect_images=6,
            seen=SEEN[:3],
        )
        samples = layouts.read(data, base.data)
        test = [each for each in splits.complete(samples, seed=0) if each.split == "test"]
        drawn = np.random.default_rng(0).permutation(len(test))[: given.test_images]
        test = [test[number] for number in sorted(drawn)]
        print(f"{data}: {sum(each.split == 'train' for each in samples)} train images, {len(test)} test images")
        if names := [name for name in given.models if name in GRADIENT]:
            gradient(samples, test, base, folder, names=names, given=given)
        given.models = [name for name in given.models if name in MODELS]
        near = {}
        for name in given.models:
            config = settings.override(base, MODELS[name])
            near[name] = Detector.fit(samples, config=config, cache=folder / "near", device="cpu")
        weights: dict[str, list] = {name: [] for name in given.models}
        for count in given.nodes if near else []:
            with nodes(count, tied=False) as running, ray_fit.sources(running.address) as sources:
                for name in given.models:
                    one = near[name]
                    far = Detector.fit(
                        samples, config=one.config, cache=folder / f"far-{count}", device="cpu", sources=sources
                    )
                    assert sources.summary == "fitted on the machines of the cluster"
                    weights[name].append(far.network.tensors())
                    (scores, anomalous), (others, _) = scored(one, test), scored(far, test)
                    tensors = one.network.tensors(), far.network.tensors()
                    print(
                        f"| {name} | {count} | {difference(*tensors, fusion=False):.1e} | "
                        f"{difference(*tensors, fusion=True):.1e} | {np.abs(scores - others).max():.1e} | "
                        f"{np.abs(thresholds(far) / thresholds(one) - 1).max():.1e} | {auroc(scores, anomalous):.4f} | "
                        f"{auroc(others, anomalous):.4f} |",
                        flush=True,
                    )
        for name, found in weights.items():
            equal = all(torch.equal(each[key], tensor) for each in found for key, tensor in found[0].items())
            print(f"{name}: every number of nodes gives the same weights to the last bit: {equal}")
        if "PatchCore" in near:
            coresets(near["PatchCore"], test, parts=4, folder=folder / "near")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
