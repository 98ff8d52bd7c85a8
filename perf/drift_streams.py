"""Simulated streams: is the cause of drift named rightly, how late is the alarm, and is a quiet line quiet?

    python perf/drift_streams.py --pool cloth.bundle DATA --pool tiles.bundle DATA --work runs/drift

Each good image that the bundle was not fitted on is scored once under each condition; this is the pool of a set. A
stream draws its calibration images and its images from the same pool at random, so that they are exchangeable before
the change, and all images after the change from the pools of one or two conditions. `new` are good images of
subclasses that the bundle does not know.
"""

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from normweave.config import DataConfig
from normweave.data import layouts, rows, synthetic, variations
from normweave.data.images import decode
from normweave.data.rows import HASH_LETTERS
from normweave.detector import Detector
from normweave.drift.causes import findings
from normweave.drift.monitor import Monitor
from normweave.drift.reference import Reference, numbers_of, read
from normweave.drift.stream import image_of as stream_image

MOST_IMAGES = 100
"""Images of a set that are scored under each condition."""
CHANGE, AFTER = 600, 300
"""Images of a stream before and after the change."""
LIGHTS = ("gain-low", "gain-high", "gamma", "warm")
EXPECTED = {
    **dict.fromkeys(LIGHTS, "lighting or camera"),
    "blur": "focus or dirt",
    "dirt": "focus or dirt",
    "defects": "more defects",
    "new": "new subclass",
}
DEFECT_SHARE, NEW_SHARE = 0.3, 0.3
"""Share of defective images, and of images of the new subclass, after the change."""


def conditions(image, other, rng):
    """Yield each condition with the image (3, H, W) under it."""
    light = np.arange(256) / 255
    yield "clean", image
    damaged = synthetic.add_defect(image, other, rng=rng)[0]
    yield "defects", damaged
    low = np.rint(255 * 0.85 * light).astype(np.uint8)
    yield "gain-low+defects", low[damaged]
    yield "blur+defects", blurred(damaged)
    yield "dirt", with_spot(image)
    yield "dirt+defects", with_spot(damaged)
    yield "gain-low", low[image]
    yield "blur", blurred(image)
    for name, table in (
        ("gain-high", np.minimum(1.15 * light, 1)),
        ("gamma", light**1.2),
    ):
        yield name, np.rint(255 * table).astype(np.uint8)[image]
    if "warmer" in variations.applicable(image):
        gains = np.array([1.05, 1.0, 0.94])[:, None, None]
        yield "warm", np.rint(np.clip(image * gains, 0, 255)).astype(np.uint8)


def blurred(image):
    """The image as of a lens out of focus: a Gaussian of 1.4 pixels at 256 x 256."""
    return variations.vary(variations.vary(image, variation="blurred"), variation="blurred")


def with_spot(image):
    """The image with a dark spot at a fixed place, as of dirt on the lens."""
    _, height, width = image.shape
    y, x = np.mgrid[:height, :width]
    r = np.hypot((y - 0.3 * height), (x - 0.6 * width)) / min(height, width)
    cover = 0.6 * np.clip((0.06 - r) / 0.02, 0, 1)
    return np.rint(image * (1 - cover)).astype(np.uint8)


def pool(bundle, data, work):
    """Return condition -> outcomes of the set, scored once and kept in the work folder."""
    path = work / f"{bundle.stem}.jsonl"
    if not path.exists():
        score(bundle, data, path)
    found = {}
    for line in path.read_text().splitlines():
        one = json.loads(line)
        found.setdefault(one["condition"], []).append(one)
    return found


def score(bundle, data, path):
    detector = Detector.load(bundle, threads=1, device="cpu")
    known = set(detector.subclasses.values())
    samples = [one for one in layouts.read(data, DataConfig(subclass_from="column")) if one.label == "normal"]
    scanned = rows.scan(samples, detector.preparation)
    used = set(detector.record["fit_hashes"])
    unused = [
        sample for sample, text in zip(scanned.samples, scanned.hashes, strict=True) if text[:HASH_LETTERS] not in used
    ]
    rng = np.random.default_rng(0)
    unused = [unused[index] for index in rng.permutation(len(unused))]
    seen = [one for one in unused if (one.category, one.subclass) in known][:MOST_IMAGES]
    new = [one for one in unused if (one.category, one.subclass) not in known][:MOST_IMAGES]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def write(condition, sample, pixels):
            outcome = replace(
                detector.score(np.ascontiguousarray(pixels.transpose(1, 2, 0))), anomaly_map=None
            ).as_dict()
            own = {"condition": condition, "image_path": sample.image_path.name, "group": sample.group}
            file.write(json.dumps(outcome | own) + "\n")

        images = [np.ascontiguousarray(decode(one.image_path).transpose(2, 0, 1)) for one in seen]
        for number, (sample, image) in enumerate(zip(seen, images, strict=True)):
            same = [other for other in images if other.shape == image.shape]
            for condition, pixels in conditions(image, same[number % len(same)], rng):
                write(condition, sample, pixels)
            print(f"{path.stem}: {number + 1} of {len(seen)}", end="\r", file=sys.stderr)
        for sample in new:
            image = np.ascontiguousarray(decode(sample.image_path).transpose(2, 0, 1))
            write("new", sample, image)
            write("gain-low+new", sample, np.rint(0.85 * image).astype(np.uint8))
            write("blur+new", sample, blurred(image))


def image_of(outcome, number):
    """The outcome as an image of the stream."""
    return stream_image(outcome, name=f"{number}:{outcome['image_path']}", at=f"{number}", window=f"{number // 100}")


class Line:
    """Draws streams from the pool of a set."""

    def __init__(self, bundle, pools):
        self.name = bundle.stem
        self.pools = pools
        self.references = read(json.loads((bundle / "bundle.json").read_text()), where=bundle)

    def begin(self, rng):
        """Return a monitor; its calibration images are drawn with replacement from the clean pool, as the stream is.

        If the pool were divided between them, the two parts would differ by chance, which is a change.
        """
        drawn = [self.pools["clean"][index] for index in rng.integers(0, len(self.pools["clean"]), 200)]
        references = []
        for one in self.references:
            values = np.array(
                [numbers_of(each) for each in drawn if (each["category"], each["subclass"]) == one.product]
            )
            if len(values):
                references.append(Reference(one.product, values, np.arange(len(values)), one.shifts, False))
        return Monitor(references, seed=int(rng.integers(2**31)))

    def draw(self, wanted, rng):
        """Return an outcome under one condition or two; some images have a defect or are of a new subclass."""
        name = "+".join(wanted) or "clean"
        share = {"defects": DEFECT_SHARE, "new": NEW_SHARE}.get(name.rpartition("+")[2], 1)
        if rng.random() > share:
            name = name.rpartition("+")[0] or "clean"
        return self.pools[name][rng.integers(len(self.pools[name]))]


def stream(line, wanted, rng, *, before=CHANGE, after=AFTER):
    """Run one stream; return the monitor, and the delay until its first alarm (None: no alarm)."""
    monitor, delay = line.begin(rng), None
    for number in range(before + after):
        outcome = line.draw(wanted if number >= before else (), rng)
        monitor.add(image_of(outcome, number))
        if delay is None and monitor.alarms:
            delay = number - before + 1
    return monitor, delay


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pool", nargs=2, type=Path, action="append", required=True, metavar=("BUNDLE", "DATA"))
    parser.add_argument("--work", type=Path, default=Path("runs/drift"))
    parser.add_argument("--streams", type=int, default=3, help="of each set and cause")
    parser.add_argument("--quiet", type=int, default=100)
    parser.add_argument("--length", type=int, default=5000, help="images of a quiet stream")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    chosen = parser.parse_args()
    lines = [Line(bundle, pool(bundle, data, chosen.work)) for bundle, data in chosen.pool]
    rng = np.random.default_rng(chosen.seed)
    start = time.perf_counter()
    print(
        "| set | condition | streams | right causes | alarm after (median, largest) |\n| --- | --- | --- | --- | --- |"
    )
    totals = Counter()
    for line in lines:
        single = [(name,) for name in EXPECTED if name in line.pools]
        for wanted in [*single, *(tuple(name.split("+")) for name in line.pools if "+" in name)]:
            right, delays = 0, []
            for _ in range(chosen.streams):
                monitor, delay = stream(line, wanted, rng)
                found = {one.cause for one in findings(monitor) if one.alarm}
                good = found == {EXPECTED[name] for name in wanted} and (delay or 0) > 0
                right += good
                delays.append(delay)
                if chosen.verbose and not good:
                    print(
                        line.name,
                        wanted,
                        delay,
                        sorted(found),
                        [(a.statistic, a.sign, a.since) for a in monitor.alarms],
                    )
            totals.update(right=right, streams=chosen.streams)
            late = [delay for delay in delays if delay is not None]
            shown = f"{np.median(late):.0f}, {max(late)}" if late else "none"
            print(f"| {line.name} | {' and '.join(wanted)} | {chosen.streams} | {right} | {shown} |", flush=True)
    print(f"\nright: {totals['right']} of {totals['streams']}, {time.perf_counter() - start:.0f} s")
    alarms = [
        bool(stream(lines[number % len(lines)], (), rng, before=chosen.length, after=0)[0].alarms)
        for number in range(chosen.quiet)
    ]
    print(f"quiet streams of {chosen.length:,} images with an alarm: {sum(alarms)} of {chosen.quiet}")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
