"""Builders of inspections and reviews."""

import asyncio
import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from normweave.serve.records import Filter, Inspection, Review, StoredImage
from normweave.serve.service import Upload
from normweave.types import DefectBox, Outcome, Tile

NOON = datetime(2026, 3, 5, 12, 0, 0, 123456, tzinfo=UTC)  # a Thursday


ALL = Filter()


def stored_image(image="a", grids="b", *, image_bytes=1000, grids_bytes=100):
    return StoredImage(
        image_hash=image * 64,
        image_type="image/png",
        image_bytes=image_bytes,
        grids_hash=grids * 64,
        grids_bytes=grids_bytes,
        tiles=(Tile(0, 0, 300, 400), Tile(0, 380, 300, 400)),
        smoothing=0.1 + 0.2,
        map_threshold=0.7 + 0.1,
    )


def inspection(number=0, **changes):
    """Return an inspection with all fields set."""
    outcome = Outcome(
        image_path=None,
        verdict="anomalous",
        pred_score=0.1 + 0.2,
        p_value=1 / 3,
        threshold=5e-324,
        false_alarm_rate=0.01,
        category="cloth",
        subclass="twill",
        subclass_distance=1.7976931348623157e308,
        subclass_p_value=2 / 3,
        unseen=True,
        experts=(("cloth/twill", 0.1 + 0.7), ("cloth/päni\0\ud800", 0.2)),
        adapted=True,
        boxes=(DefectBox(1, 2, 3, 4, 0.1, "good/1.png", 9, 10, 3, 4), DefectBox(5, 6, 7, 8, 1e-17)),
        guarantee="conformal",
        brightness=0.1 + 0.2,
        contrast=1 / 7,
        warmth=-1e-17,
        tint=0.0,
        sharpness=-2.5,
        map_level=1e300,
        peak_x=0.25,
        peak_y=1.0,
        height=300,
        width=780,
        latency_ms=12.3,
        model="adapted-moe",
        bundle_hash="c" * 64,
    )
    made = Inspection(
        received_at=NOON + timedelta(seconds=number),
        name=f"part {number}.png",
        source="api",
        actor="camera 1",
        outcome=outcome,
        routed=3,
        image=stored_image(),
    )
    fields = {name: changes.pop(name) for name in tuple(changes) if hasattr(outcome, name)}
    return replace(made, outcome=replace(outcome, **fields), **changes)


def unreadable(**changes):
    outcome = Outcome(image_path="torn.png", error="The file ends in the middle.")
    return replace(inspection(), outcome=outcome, routed=None, image=None, **changes)


def accept(**changes):
    return replace(Review(at=NOON, decision="accept", reviewer="Ada", comment="a shadow"), **changes)


def many(count=80):
    """Return different inspections over some weeks, in random order of time."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        moment = NOON + timedelta(minutes=draw.randrange(-30_000, 30_000))
        some = {"received_at": moment, "source": draw.choice(["api", "page"]), "name": f"{number % 9}.png"}
        if draw.random() < 0.2:
            made.append(unreadable(**some))
            continue
        verdict = draw.choice(["normal", "anomalous", "unknown"])
        subclass = draw.choice(["twill", "Plain", None])
        bundle = draw.choice("cd") * 64
        p = draw.choice([0.01, 0.02, 0.5])
        category = draw.choice(["cloth", "wood"])
        some |= {
            "verdict": verdict,
            "subclass": subclass,
            "bundle_hash": bundle,
            "p_value": p,
            "category": category,
        }
        made.append(inspection(**some))
    return made


def inspect_files(service, *paths, names=None):
    """Return the inspections of image files."""
    uploads = [Upload(str(path), Path(path).read_bytes()) for path in paths]
    if names is not None:
        uploads = [upload._replace(name=name) for upload, name in zip(uploads, names, strict=True)]
    return asyncio.run(service.inspect(uploads, source="api", actor="test"))
