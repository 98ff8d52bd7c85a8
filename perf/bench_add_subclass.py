"""Compare a subclass that is added from 20 good images with training on everything.

    python perf/bench_add_subclass.py ../shared/data/paper --left-out 2

For each of the first subclasses in turn: train without it, add it with 20 of its training images, spread over its
groups, and print image AUROC and AUPRO of its test images beside those of full training and of training without it,
and the time of adding (with the export and the comparison of the graphs).
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from normweave import settings
from normweave.benchmark.evaluate import measure
from normweave.config import Config
from normweave.data import layouts, splits
from normweave.detector import Detector
from normweave.fitting import cache_folder


def spread(samples, number):
    """Return this many samples, spread over the list, which is sorted by group."""
    ordered = sorted(samples, key=lambda each: (each.group or "", str(each.image_path)))
    return [ordered[k] for k in np.unique(np.linspace(0, len(ordered) - 1, min(number, len(ordered))).astype(int))]


def row(what, detector, tests):
    """Print the metrics of one detector."""
    metrics, predictions = measure(detector, tests, cache=cache_folder())
    pooled = metrics["pooled"]
    good = [each for each in predictions if each["label"] == "normal"]
    rejected = np.mean([each["verdict"] != "normal" for each in good])
    print(
        f"  {what:10s} image AUROC {100 * pooled['image_auroc']:.1f}  AUPRO {100 * pooled['aupro']:.1f}  "
        f"good rejected {100 * rejected:.0f} % of {len(good)}",
        flush=True,
    )


def main():
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--layout")
    parser.add_argument("--left-out", type=int, default=2)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--set", action="append", default=[])
    arguments = parser.parse_args()
    config = settings.override(Config(), ["data.subclass_from=column", *arguments.set])
    if arguments.layout:
        config = settings.override(config, ["data.subclass_from=folder", *arguments.set])
    samples = splits.complete(layouts.read(arguments.data, config.data, layout=arguments.layout), seed=0)
    names = sorted({each.subclass_name for each in samples if each.split == "train"})
    print(f"{arguments.data.name}: {len(samples)} images, {len(names)} subclasses", flush=True)
    full = Detector.fit(samples, config=config)
    for name in names[:: max(1, len(names) // arguments.left_out)][: arguments.left_out]:
        own = [each for each in samples if each.subclass_name == name]
        tests = [each for each in own if each.split == "test"]
        few = spread([each for each in own if each.split != "test"], arguments.images)
        print(f" {name}: {len(few)} images, {len(tests)} test images", flush=True)
        row("full", full, tests)
        base = Detector.fit([each for each in samples if each.subclass_name != name], config=config)
        row("without", base, tests)
        base.network.exported(base.calibration)
        start, cpu = time.perf_counter(), time.process_time()
        taught = base.with_subclass(
            [replace(each, split=None) for each in few], category=few[0].category, subclass=few[0].subclass
        )
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
        row("added", taught, tests)
        check = taught.record["added"][name]["check"]
        print(
            f"  added in {seconds:.0f} s ({cpu:.0f} s of CPU); {check['equal']} of {check['tiles']} stored images the "
            f"same, {len(check['moved'])} nearer to it; not used: "
            f"{len(taught.record['added'][name]['routed_to_others'])}",
            flush=True,
        )


if __name__ == "__main__":
    main()
