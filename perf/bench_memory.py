"""Peak memory of training and scoring with 1x, 4x and 16x as many images. Linux only.

Only anonymous memory (RssAnon) counts: the file system can reclaim the pages of the memory-mapped feature cache.

python perf/bench_memory.py            # table, then one JSON line
python perf/bench_memory.py | tail -1  # for a script
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from normweave.textiles import make_textures

WORK = """
import sys
from pathlib import Path

import torch

from normweave import settings
from normweave.config import Config
from normweave.detector import Detector

torch.set_num_threads(1)
manifest, cache, model = sys.argv[1:]
detector = Detector.fit(manifest, config=Config(head=settings.model_config(model)), cache=Path(cache))
paths = sorted(Path(manifest).parent.glob("cloth/*/train/good/*"))
assert sum(outcome.error is None for outcome in detector.stream(paths)) == len(paths)
"""


def peak_mib(command: list[str]) -> float:
    """Return the peak anonymous memory of a command, sampled every 10 ms."""
    child = subprocess.Popen(command)
    peak = 0
    while child.poll() is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except FileNotFoundError:
            break
        for line in status.splitlines():
            if line.startswith("RssAnon:"):
                peak = max(peak, int(line.split()[1]))
        time.sleep(0.01)
    if child.wait() != 0:
        raise SystemExit(f"{command[:2]} failed with exit code {child.returncode}")
    return peak / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["adapted-moe"])
    parser.add_argument("--base", type=int, default=8, help="images of each of six subclasses at 1x")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for times in (1, 4, 16):
            count = arguments.base * times
            manifest = make_textures(folder / str(times), train_images=count, test_images=0, defect_images=0, unseen=())
            for model in arguments.models:
                cache = folder / f"cache-{model}-{times}"
                peak = peak_mib([sys.executable, "-c", WORK, str(manifest), str(cache), model])
                rows.append({"model": model, "times": times, "images": count * 6, "peak_mib": peak})
                print("{model:<12} {times:>2}x  {images:>4} images  peak {peak_mib:7.0f} MiB".format(**rows[-1]))
    print(json.dumps({"machine": platform.platform(), "rows": rows}))


if __name__ == "__main__":
    main()
