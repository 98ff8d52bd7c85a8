"""Compare a subclass that is added from 20 good images with training on everything.

    python perf/bench_add_subclass.py ../shared/data/paper --left-out 2

For each of the first subclasses in turn: train without it, add it with 20 of its training images, spread over its
groups, and print image AUROC and AUPRO of its test images beside those of full training and of training without it,
and the time of adding (with the export and the comparison of the graphs).

    python perf/bench_add_subclass.py --one-by-one 10

Add this many subclasses of made-up cloth one after another to a detector of one, then all at once, and compare with one
training on all: metrics, and processor time with features, export and the comparison of the graphs in each.
"""

import argparse
import itertools
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from normweave import settings
from normweave.benchmark.evaluate import measure
from normweave.config import Config
from normweave.data import layouts, splits
from normweave.detector import Detector
from normweave.features.cache import default_folder
from normweave.textiles import COLOURS, LIGHTINGS, WEAVES, Textile, make_textures


def spread(samples, number):
    """Return this many samples, spread over the list, which is sorted by group."""
    ordered = sorted(samples, key=lambda each: (each.group or "", str(each.image_path)))
    return [ordered[k] for k in np.unique(np.linspace(0, len(ordered) - 1, min(number, len(ordered))).astype(int))]


def row(what, detector, tests):
    """Print the metrics of one detector."""
    metrics, predictions = measure(detector, tests, cache=default_folder())
    pooled = metrics["pooled"]
    good = [each for each in predictions if each["label"] == "normal"]
    rejected = np.mean([each["verdict"] != "normal" for each in good])
    print(
        f"  {what:13s} image AUROC {100 * pooled['image_auroc']:.1f}  AUPRO {100 * pooled['aupro']:.1f}  "
        f"good rejected {100 * rejected:.0f} % of {len(good)}",
        flush=True,
    )


def one_by_one(number):
    """Add subclasses of made-up cloth one after another, and print the times and the metrics."""
    cloth = [Textile(*each) for each in itertools.islice(itertools.product(WEAVES, COLOURS, LIGHTINGS), number + 1)]
    with tempfile.TemporaryDirectory() as folder:
        manifest = make_textures(
            Path(folder) / "cloth", train_images=20, test_images=10, defect_images=10, seen=cloth, unseen=()
        )
        config = settings.override(Config(), ["data.subclass_from=column"])
        samples = splits.complete(layouts.read(manifest, config.data), seed=0)
        names = sorted({each.subclass_name for each in samples})
        tests = [each for each in samples if each.split == "test"]
        processor = {}

        def timed(what, function, *arguments, **options):
            start = time.process_time()
            detector = function(*arguments, **options)
            detector.network.exported(detector.calibration)
            processor[what] = time.process_time() - start
            print(f" {what}: {processor[what]:.1f} s of processor time", flush=True)
            return detector

        first = [each for each in samples if each.subclass_name == names[0]]
        timed("warm-up, one subclass", Detector.fit, first, config=config, cache=Path(folder) / "a")
        full = timed("one training on all", Detector.fit, samples, config=config, cache=Path(folder) / "b")
        extended = timed("one subclass", Detector.fit, first, config=config, cache=Path(folder) / "c")
        for name in names[1:]:
            own = [each for each in samples if each.subclass_name == name and each.split != "test"]
            few = [replace(each, split=None) for each in own]
            extended = timed(
                f"added {name}", extended.with_subclass, few, category=few[0].category, subclass=few[0].subclass
            )
        few = [replace(each, split=None) for each in samples if each.split != "test" and each.subclass_name != names[0]]
        base = timed("one subclass again", Detector.fit, first, config=config, cache=Path(folder) / "d")
        at_once = timed("all at once", base.with_subclass, few)
        added = [seconds for what, seconds in processor.items() if what.startswith("added")]
        print(f" {len(added)} additions: {sum(added):.1f} s; full training {processor['one training on all']:.1f} s")
        for what, detector in (("full", full), ("added", extended), ("at once", at_once)):
            row(f"{what}, first", detector, [each for each in tests if each.subclass_name == names[0]])
            row(f"{what}, others", detector, [each for each in tests if each.subclass_name != names[0]])


def main():
    """Run the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--layout")
    parser.add_argument("--left-out", type=int, default=2)
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--one-by-one", type=int, metavar="N")
    arguments = parser.parse_args()
    if (arguments.data is None) == (arguments.one_by_one is None):
        parser.error("give a data set or --one-by-one")
    if arguments.one_by_one is not None:
        one_by_one(arguments.one_by_one)
        return
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
