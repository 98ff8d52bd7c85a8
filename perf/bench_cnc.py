"""Time of CNC relative to the plain decoder: a training step of 8 images, and an image at test.

python perf/bench_cnc.py            # table, then one JSON line
python perf/bench_cnc.py | tail -1  # for a script

Features have the shape of the offline pair's. Ratios are to the plain decoder within one run, on one thread.
"""

import json
import os
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from normweave import features
from normweave.config import (
    CNCConfig,
    GatingConfig,
    GuideConfig,
    OfflinePairConfig,
    PromptsConfig,
    SyntheticConfig,
)
from normweave.heads import build
from normweave.heads.cnc.head import CNC
from normweave.types import FitData, SyntheticAnomalies

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from builders import InMemory

BATCH, IMAGES = 8, 32
WARM_UPS, ROUNDS = 2, 9
DIMS, GRID = (24, 40, 112, 320), 16  # of OfflinePairConfig at 256 pixels
PLAIN = CNCConfig(moe=False, prompts=PromptsConfig(text="off"), synthetic=SyntheticConfig(variants=0))
CONSTRAINT = CNCConfig(moe=False, synthetic=SyntheticConfig(variants=0))


def variants() -> dict[str, CNCConfig]:
    """Return the configurations by name, the plain decoder first."""
    named = {
        "plain decoder": PLAIN,
        "+ constraint": CONSTRAINT,
        "+ synthetic anomalies": replace(PLAIN, synthetic=SyntheticConfig(variants=1)),
        "CNC, our default": CNCConfig(),
        "CNC with the guide": CNCConfig(guide=GuideConfig(tokens="text")),
    }
    for experts in (1, 2, 5, 8, 16):
        named[f"plain + {experts} experts, top {min(2, experts)}"] = replace(
            PLAIN, moe=True, gating=GatingConfig(experts=experts, top_k=min(2, experts))
        )
    return named


def fitted(config: CNCConfig, data: FitData) -> CNC:
    """Return a head before training."""
    head = build(config, shape=data.features.shape, dims=DIMS)
    assert isinstance(head, CNC)
    head.begin(data)
    return head


def time_ms(work) -> list[float]:
    for _ in range(WARM_UPS):
        work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1000)
    return times


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    normals = InMemory(torch.randn(IMAGES, sum(DIMS), GRID, GRID))
    anomalous = InMemory(torch.randn(IMAGES, sum(DIMS), GRID, GRID))
    pair = features.pair(OfflinePairConfig())
    data = FitData(
        features=normals,
        subclasses=np.zeros(IMAGES, dtype=np.int64),
        names=("category",),
        groups=np.arange(IMAGES),
        holdout=np.arange(IMAGES) < BATCH,
        pair=pair,
        synthetic=SyntheticAnomalies(anomalous, lambda rows: torch.ones(len(rows), GRID, GRID)),
    )
    batch, subclasses = normals.read(range(BATCH)), torch.zeros(BATCH, dtype=torch.int64)
    rows = []
    for name, config in variants().items():
        head = fitted(config, data if config.synthetic.variants else replace(data, synthetic=None))
        stage = head.stages(data if config.synthetic.variants else replace(data, synthetic=None))[-1]
        optimiser = stage.optimiser()

        def step(stage=stage, optimiser=optimiser) -> None:
            generator = torch.Generator().manual_seed(0)
            optimiser.zero_grad()
            stage.loss(batch, subclasses, generator=generator, training=True)["loss"].backward()
            optimiser.step()

        steps = time_ms(step)
        head.finish(data)
        # Check the results before measuring the time: the score of an image must not depend on its batch.
        torch.testing.assert_close(head(batch)[0][:1], head(batch[:1])[0], rtol=1e-4, atol=1e-4)
        images = time_ms(lambda head=head: head(batch[:1]))
        rows.append(
            {
                "variant": name,
                "step_ms": statistics.median(steps),
                "step_worst_ms": max(steps),
                "image_ms": statistics.median(images),
                "image_worst_ms": max(images),
            }
        )
        rows[-1] |= {
            "step_ratio": rows[-1]["step_ms"] / rows[0]["step_ms"],
            "image_ratio": rows[-1]["image_ms"] / rows[0]["image_ms"],
        }
        print(
            "{variant:26} step {step_ms:7.1f} ms (worst {step_worst_ms:7.1f}) x {step_ratio:4.2f}   "
            "image {image_ms:6.1f} ms (worst {image_worst_ms:6.1f}) x {image_ratio:4.2f}".format(**rows[-1])
        )
    machine = {
        "torch": torch.__version__,
        "machine": platform.platform(),
        "cores": os.cpu_count(),
        "threads": 1,
    }
    print(json.dumps(machine | {"batch": BATCH, "rows": rows}))


if __name__ == "__main__":
    main()
