"""Time and memory of CLIP on a CPU: patch tokens of an image, text, training steps. Linux only.

The weights are random, in a file of the real size: time and memory do not depend on their values. Each part runs in its
own process. All resident memory counts, including pages of the mapped weights file, which the file system can reclaim.

python perf/bench_clip.py            # table, then one JSON line
python perf/bench_clip.py | tail -1  # for a script
"""

import argparse
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import open_clip
import torch
from safetensors.torch import save_file

from normweave import features, settings
from normweave.config import OpenClipConfig
from normweave.heads import build
from normweave.types import FitData

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from builders import InMemory

CONFIG = Path(__file__).parents[1] / "configs" / "cnc.yaml"
BATCH = 8
WARM_UPS, ROUNDS = 1, 5
CONTEXT = 8  # learnable tokens of the prompts
STATES = ("normal flawless surface", "damaged surface with a defect")


def write(model: str, path: Path) -> None:
    """Write random weights under open_clip's names."""
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**open_clip.get_model_config(model)).state_dict(), path)


def times_ms(work) -> list[float]:
    for _ in range(WARM_UPS):
        work()
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        work()
        times.append((time.perf_counter() - start) * 1000)
    return times


def row(part: str, load_s: float, times: list[float]) -> dict[str, float | str]:
    return {
        "part": part,
        "load_s": load_s,
        "median_ms": statistics.median(times),
        "worst_ms": max(times),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def image(config: OpenClipConfig, size: int, threads: int) -> dict[str, float | str]:
    """One image through the vision tower, all layers of the configuration."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    extractor = features.build(config, height=size, width=size)
    load_s = time.perf_counter() - start
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8)
    assert extractor.extract(pixels).isfinite().all()
    return row("one image", load_s, times_ms(lambda: extractor.extract(pixels, fill=False)))


def text(config: OpenClipConfig, size: int, threads: int) -> dict[str, float | str]:
    """Two prompts through the text tower, and the gradient back to their learnable tokens."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    pair = features.pair(config)
    load_s = time.perf_counter() - start
    context = torch.randn(CONTEXT, pair.text.embedding_dim).requires_grad_()

    def step():
        context.grad = None
        normal, anomalous = pair.text.encode_prompts(context, STATES)
        (normal @ anomalous).backward()

    step()
    assert context.grad.abs().sum() > 0
    return row("text of one step", load_s, times_ms(step))


def training(config: OpenClipConfig, size: int, threads: int) -> dict[str, float | str]:
    """One step of the decoder on eight images, and of the prompts, with the settings of configs/cnc.yaml."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    pair = features.pair(config)
    head_config = settings.read(CONFIG).head
    visual = open_clip.get_model_config(config.model)["vision_cfg"]
    width, side = visual["width"], size // visual["patch_size"]
    dims = (width,) * len(config.layers)
    torch.manual_seed(0)
    data = FitData(
        features=InMemory(torch.randn(2 * BATCH, sum(dims), side, side)),
        subclasses=torch.zeros(2 * BATCH, dtype=torch.int64).numpy(),
        names=("category",),
        groups=torch.arange(2 * BATCH).numpy(),
        holdout=(torch.arange(2 * BATCH) < 1).numpy(),
        pair=pair,
    )
    head = build(head_config, shape=data.features.shape, dims=dims)
    head.begin(data)
    load_s = time.perf_counter() - start
    batch, subclasses = data.features.read(range(BATCH)), torch.zeros(BATCH, dtype=torch.int64)
    times = []
    for stage in head.stages(data):
        optimiser = stage.optimiser()

        def step(stage=stage, optimiser=optimiser):
            optimiser.zero_grad()
            generator = torch.Generator().manual_seed(0)
            loss = stage.loss(batch, subclasses, generator=generator, training=True)["loss"]
            loss.backward()
            optimiser.step()

        times.append(times_ms(step))
    prompts, decoder = times
    return row("decoder step", load_s, decoder) | {"prompt_step_ms": statistics.median(prompts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default=OpenClipConfig.model)
    parser.add_argument("--size", type=int, default=336)
    parser.add_argument("--layers", type=int, nargs="+", default=OpenClipConfig.layers)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        config = OpenClipConfig(
            model=arguments.model, weights=str(path), layers=tuple(arguments.layers), batch_images=1
        )
        fresh = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=fresh) as one:
            one.submit(write, arguments.model, path).result()
        for part in (image, text, training):
            with ProcessPoolExecutor(1, mp_context=fresh) as one:
                rows.append(one.submit(part, config, arguments.size, arguments.threads).result())
            print(
                "{part:<17} load {load_s:5.1f} s   median {median_ms:7.0f} ms   worst {worst_ms:7.0f} ms   "
                "peak {peak_mib:5.0f} MiB".format(**rows[-1])
            )
        size_mib = path.stat().st_size / 2**20
    machine = {"torch": torch.__version__, "machine": platform.platform(), "threads": arguments.threads}
    print(json.dumps(machine | {"model": arguments.model, "file_mib": size_mib, "rows": rows}))


if __name__ == "__main__":
    main()
