"""Reviewed images as a manifest: the last decision counts, labels are right, files remain."""

import csv
import json
import re
from dataclasses import replace
from datetime import timedelta

import pytest

from inspections import NOON, accept, inspect_files, inspection
from normweave.data.manifest import check, read_manifest
from normweave.errors import ConfigError, DataError
from normweave.serve.files import MissingFileError
from normweave.serve.records import Filter
from normweave.serve.reviews import ServerSource, StoreSource, defect_names, export


@pytest.fixture
def reviewed(service, photos):
    """A service that inspected ten photos one after another, and their inspections in the order of storage."""
    names = (f"part{n // 2}_{n % 2}.png" for n in range(10))
    return service, [
        one for photo, name in zip(photos, names, strict=False) for one in inspect_files(service, photo, names=[name])
    ]


def decide(service, one, decision, *, reviewer="Ada", minutes=0, **fields):
    at = NOON + timedelta(minutes=minutes)
    service.store.review(one.id, accept(at=at, decision=decision, reviewer=reviewer, **fields))


def source_of(service):
    return StoreSource(service.store, service.files.read)


def rows_of(manifest):
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def test_labels_names_and_files(reviewed, tmp_path):
    service, found = reviewed
    decide(service, found[0], "accept", comment="=1+1")
    decide(service, found[1], "reject", defect="hole", comment="at the edge")
    decide(service, found[2], "reject")
    manifest = tmp_path / "out" / "reviewed.csv"
    exported = export(source_of(service), manifest)
    samples = read_manifest(manifest)
    assert samples == list(exported.samples)
    assert [(one.label, one.split, one.defect) for one in samples] == [
        ("normal", "train", None),
        ("anomalous", "test", "hole"),
        ("anomalous", "test", None),
    ]
    assert [one.image_path.read_bytes() for one in samples] == [
        service.files.read(one.image.image_hash) for one in found[:3]
    ]
    assert all(one.image_path.parent == tmp_path / "out" / "reviewed_images" for one in samples)
    assert samples[0].category == found[0].outcome.category
    assert check(samples) == []
    rows = rows_of(manifest)
    assert [row["comment"] for row in rows] == ["'=1+1", "at the edge", "a shadow"]  # no formula in a spreadsheet
    assert [row["name"] for row in rows] == ["part0_0.png", "part0_1.png", "part1_0.png"]
    assert rows[0]["reviewer"] == "Ada"
    boxes = [box._asdict() for box in found[1].outcome.boxes]
    assert (json.loads(rows[1]["boxes"]) if boxes else []) == boxes


def test_the_last_review_of_an_image_counts(reviewed, photos, tmp_path):
    service, found = reviewed
    (again,) = inspect_files(service, photos[0], names=["again.png"])
    decide(service, again, "reject", minutes=1)
    decide(service, found[0], "accept", minutes=2, reviewer="Bob")
    decide(service, found[1], "accept", minutes=3)
    decide(service, found[1], "reject", minutes=4)  # changed by the same person
    decide(service, found[2], "accept", minutes=5)
    decide(service, found[2], "undo", minutes=6)
    exported = export(source_of(service), tmp_path / "m.csv")
    assert [(one.label, one.split) for one in exported.samples] == [("normal", "train"), ("anomalous", "test")]
    assert [one[:2] for one in exported.contradictions] == [("part0_0.png", found[0].id)]
    assert exported.contradictions[0].decisions == {"Ada": "reject", "Bob": "accept"}


def test_decisions_before_an_undo_do_not_contradict(reviewed, tmp_path):
    service, found = reviewed
    decide(service, found[0], "reject", reviewer="Bob")
    decide(service, found[0], "undo", reviewer="Bob", minutes=1)
    decide(service, found[0], "accept", minutes=2)
    assert export(source_of(service), tmp_path / "m.csv").contradictions == ()


def test_images_of_a_part_are_one_group(reviewed, tmp_path):
    service, found = reviewed
    for one in found[:4]:
        decide(service, one, "accept")
    decide(service, found[1], "reject", minutes=1)
    samples = export(source_of(service), tmp_path / "m.csv", part=re.compile(r"^(.+)_\d")).samples
    assert [(one.group, one.label, one.split) for one in samples] == [
        ("part0", "normal", "test"),  # its other image is defective
        ("part0", "anomalous", "test"),
        ("part1", "normal", "train"),
        ("part1", "normal", "train"),
    ]
    assert check(samples) == []
    with pytest.raises(ConfigError, match="has no group in brackets"):
        export(source_of(service), tmp_path / "m.csv", part=re.compile("part"))


def test_an_unknown_product_has_no_subclass(store, tmp_path):
    kept = store.add([inspection(verdict="unknown", unseen=False), inspection(unseen=True), inspection(unseen=False)])
    for one, content in zip(kept, "abc", strict=True):
        store.review(one.id, accept())
        assert one.image.image_hash  # all three are the same content
        del content

    class Source(StoreSource):
        def reviewed(self):
            for number, one in enumerate(super().reviewed()):
                yield replace(one, image_hash=f"{number}" * 64)

        def content(self, _):
            return b"\x89PNG"

    samples = export(Source(store, tmp_path), tmp_path / "m.csv").samples
    assert [one.subclass for one in samples] == [None, None, "twill"]
    assert {one.category for one in samples} == {"cloth"}


def test_the_data_set_remains_when_retention_removes_images(reviewed, tmp_path):
    service, found = reviewed
    decide(service, found[0], "accept")
    decide(service, found[1], "accept")
    samples = export(source_of(service), tmp_path / "m.csv").samples
    for digest in service.store.shrink(max_bytes=0):
        service.files.remove(digest)
    assert check(samples) == []
    with pytest.raises(DataError, match="Retention has removed all 2 reviewed images"):
        export(source_of(service), tmp_path / "again.csv")


def test_an_image_that_was_removed_is_counted(reviewed, tmp_path):
    service, found = reviewed
    decide(service, found[0], "accept")
    decide(service, found[1], "accept")
    service.files.remove(found[0].image.image_hash)
    exported = export(source_of(service), tmp_path / "m.csv")
    assert (len(exported.samples), exported.removed) == (1, 1)


def test_nothing_is_reviewed(service, tmp_path):
    with pytest.raises(DataError, match="No image is reviewed"):
        export(source_of(service), tmp_path / "m.csv")


def test_a_running_server_gives_the_same_manifest(reviewed, live, keys, tmp_path, monkeypatch):
    monkeypatch.setattr("normweave.serve.reviews.PAGE", 2)  # several pages
    service, found = reviewed
    for number, one in enumerate(found[:5]):
        decide(service, one, "reject" if number % 2 else "accept", defect="hole" if number == 3 else "")
    decide(service, found[0], "reject", reviewer="Bob", minutes=1)
    here = export(source_of(service), tmp_path / "here" / "m.csv")
    there = export(ServerSource(live, keys["operator"]), tmp_path / "there" / "m.csv")
    assert (tmp_path / "here" / "m.csv").read_text() == (tmp_path / "there" / "m.csv").read_text()
    assert here.contradictions == there.contradictions
    assert len(here.contradictions) == 1
    assert [one.image_path.read_bytes() for one in here.samples] == [
        one.image_path.read_bytes() for one in there.samples
    ]


def test_what_a_server_refuses(reviewed, live, keys, tmp_path):
    service, found = reviewed
    with pytest.raises(DataError, match=r"answered 401 .*Give a valid token"):
        export(ServerSource(live, "wrong"), tmp_path / "m.csv")
    with pytest.raises(DataError, match="does not answer"):
        export(ServerSource("http://127.0.0.1:9"), tmp_path / "m.csv")
    with pytest.raises(DataError, match="did not answer with JSON"):
        ServerSource(live, keys["operator"]).read("/metrics")
    source = ServerSource(live, keys["operator"])
    decide(service, found[0], "accept")
    (one,) = source.reviewed()
    with pytest.raises(DataError, match="arrived damaged"):
        source.content(replace(one, image_hash="0" * 64))
    for digest in service.store.shrink(max_bytes=0):
        service.files.remove(digest)
    with pytest.raises(MissingFileError):
        source.content(one)


def test_names_of_defects_are_proposed(store):
    kept = store.add([inspection(number) for number in range(3)])
    for one, name in zip(kept, ("stain", "", "hole"), strict=True):
        store.review(one.id, accept(decision="reject", defect=name))
    store.review(kept[0].id, accept(decision="reject", defect="stain"))
    assert defect_names(store) == ["hole", "stain"]
    assert store.inspections(Filter(decision="reject"), limit=1)[0].review.defect == "hole"
