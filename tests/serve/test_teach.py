"""A new product is taught in a process of its own; nothing half-written remains, whatever ends it."""

import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from normweave.errors import MissingError
from normweave.serve.library import ModelError
from normweave.serve.model_store import Actor
from normweave.serve.service import Upload
from normweave.serve.teach import TeachError, Teaching

ADA = Actor("Ada", 1)
PROGRAM = """
import json, os, pathlib, sys, time
command, *rest = sys.argv[1:]
named = dict(zip(rest, rest[1:]))
folder = pathlib.Path(rest[1])
names = sorted(path.name for path in folder.iterdir())
if command == "add-subclass":
    time.sleep(float(os.environ.get("TEACH_SECONDS", 0)))
    if "TEACH_FAILS" in os.environ:
        print(json.dumps({"error": "They are all black.", "exit_code": 2}))
        sys.exit(2)
    made = pathlib.Path(named["-o"])
    made.mkdir()
    record = {"images": names, "nice": os.nice(0), "base": rest[0], "subclass": named["--subclass"]}
    (made / "bundle.json").write_text(json.dumps(record))
    print(json.dumps({"bundle_hash": "f" * 64, "operating_point": {"promise": "At most 5 % false alarms."}}))
else:
    maps = pathlib.Path(named["--maps"])
    maps.mkdir()
    for number, name in enumerate(names):
        (maps / f"{number:06d}-{name}").write_bytes(b"map of " + name.encode())
        row = {"verdict": "normal", "pred_score": 1.5, "threshold": 2.0, "subclass": "new"}
        row["error"] = os.environ.get("TEACH_UNREADABLE")
        print(json.dumps(row))
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return (sys.executable, str(path))


@pytest.fixture
def uploads(photos):
    return [Upload(f"part {n}.png", Path(path).read_bytes()) for n, path in enumerate(photos[:10])]


@pytest.fixture
def teaching(service, program):
    found = Teaching(service, program=program)
    yield found
    found.stop()


def ended(teaching):
    end = time.monotonic() + 60
    while teaching.job is not None and teaching.job.state == "training":
        assert time.monotonic() < end
        time.sleep(0.02)
    return teaching.job


def begin(teaching, uploads, **names):
    return teaching.start(uploads, **{"category": "cloth", "subclass": "new"} | names, actor=ADA)


def test_every_fifth_image_is_held_out_and_scored(teaching, uploads, service):
    job = begin(teaching, [*uploads, uploads[3]])  # the same image once more
    assert (job.state, job.images) == ("training", 8)
    job = ended(teaching)
    assert (job.state, job.error, job.bundle_hash, job.promise) == ("done", None, "f" * 64, "At most 5 % false alarms.")
    assert [one[:4] for one in job.held_out] == [("part 0.png", "normal", 1.5, 2.0), ("part 5.png", "normal", 1.5, 2.0)]
    folder = teaching.folder / str(job.id)
    record = json.loads((folder / "bundle" / "bundle.json").read_text())
    assert record["base"] == str(service.detector.network.bundle)
    assert record["subclass"] == "new"
    assert len(record["images"]) == 8
    held_out = [path.read_bytes() for path in sorted((folder / "held_out").iterdir())]
    assert held_out == [uploads[0].content, uploads[5].content]
    assert teaching.held_out_map(job.id, 1).read_bytes() == b"map of 001.png"
    with pytest.raises(TeachError, match="no map of image 2"):
        teaching.held_out_map(job.id, 2)


@pytest.mark.skipif(sys.platform == "win32", reason="nice is of POSIX")
def test_it_has_the_lowest_priority(teaching, uploads):
    job = begin(teaching, uploads)
    ended(teaching)
    record = json.loads((teaching.folder / str(job.id) / "bundle" / "bundle.json").read_text())
    assert record["nice"] == 19
    assert os.nice(0) < 19


def test_one_at_a_time(teaching, uploads, monkeypatch):
    monkeypatch.setenv("TEACH_SECONDS", "30")
    first = begin(teaching, uploads)
    with pytest.raises(TeachError, match=r"is being taught\. Wait for its end"):
        begin(teaching, uploads)
    teaching.discard(first.id, ADA)
    assert not teaching.folder.exists()
    monkeypatch.setenv("TEACH_SECONDS", "0")
    second = begin(teaching, uploads)
    ended(teaching)
    with pytest.raises(TeachError, match="Keep it or throw it away first"):
        begin(teaching, uploads)
    with pytest.raises(TeachError, match="it was thrown away"):
        teaching.keep(first.id, ADA)
    teaching.discard(second.id, ADA)
    assert teaching.job is None


def test_a_failure_is_told_and_followed_by_another_job(teaching, uploads, monkeypatch):
    monkeypatch.setenv("TEACH_FAILS", "1")
    begin(teaching, uploads)
    job = ended(teaching)
    assert (job.state, job.error) == ("failed", "They are all black.")
    with pytest.raises(TeachError, match="is failed, and must be done"):
        teaching.keep(job.id, ADA)
    monkeypatch.delenv("TEACH_FAILS")
    begin(teaching, uploads)
    assert ended(teaching).state == "done"


def test_a_held_out_image_that_cannot_be_scored_is_a_failure(teaching, uploads, monkeypatch):
    monkeypatch.setenv("TEACH_UNREADABLE", "The image needs too many tiles.")
    begin(teaching, uploads)
    assert (ended(teaching).state, teaching.job.error) == ("failed", "part 0.png: The image needs too many tiles.")


def test_the_end_of_the_server_leaves_nothing_half_written(teaching, uploads, service, program, monkeypatch):
    monkeypatch.setenv("TEACH_SECONDS", "30")
    job = begin(teaching, uploads)
    teaching.stop()
    (teaching.folder / str(job.id) / "bundle").mkdir()
    (teaching.folder / "torn").mkdir()
    again = Teaching(service, program=program)
    assert again.job.state == "interrupted"
    assert "The server ended while it was training" in again.job.error
    assert sorted(path.name for path in again.folder.iterdir()) == [str(job.id)]
    assert not (again.folder / str(job.id) / "bundle").exists()
    monkeypatch.setenv("TEACH_SECONDS", "0")
    begin(again, uploads)
    assert ended(again).state == "done"
    assert Teaching(service, program=program).job == again.job  # a job that is done remains


class FakeModels:
    def __init__(self, folder, *, active, candidate=None):
        self.library = SimpleNamespace(folder=folder)
        self.active, self.candidate = active, candidate
        self.shadow = None
        self.refuses = False

    def state(self):
        active = SimpleNamespace(bundle_hash=self.active)
        return SimpleNamespace(active=active, candidate=self.candidate, name=lambda text: f"bundle {text[:4]}")

    def start_shadow(self, bundle_hash, actor):
        if self.refuses:
            raise ModelError("It prepares images in another way.", code="other_preparation")
        self.shadow = bundle_hash, actor


def test_kept_in_the_library_and_in_the_shadow(teaching, uploads, service, tmp_path):
    begin(teaching, uploads, subclass="new & blue")
    job = ended(teaching)
    with pytest.raises(TeachError, match="Start it with --library"):
        teaching.keep(job.id, ADA)
    library = tmp_path / "library"
    library.mkdir()
    service.models = models = FakeModels(library, active=job.base_hash)
    try:
        kept = teaching.keep(job.id, ADA)
        assert (kept.state, kept.in_shadow) == ("kept", True)
        assert [path.name for path in library.iterdir()] == ["cloth-new_blue-ffffffffffff"]
        assert (library / "cloth-new_blue-ffffffffffff" / "bundle.json").is_file()
        assert models.shadow == ("f" * 64, ADA)
        models.refuses = True
        begin(teaching, uploads)
        kept = teaching.keep(ended(teaching).id, ADA)
        assert (kept.state, kept.in_shadow) == ("kept", False)
        assert "but not in the shadow: It prepares images in another way." in kept.error
    finally:
        service.models = None
    events = [(entry.event, entry.actor, entry.detail["subclass"]) for entry in service.store.audit(limit=4)]
    assert events[::-1] == [
        ("teach_started", "Ada", "new & blue"),
        ("teach_kept", "Ada", "new & blue"),
        ("teach_started", "Ada", "new"),
        ("teach_kept", "Ada", "new"),
    ]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"active": "e" * 64}, "It was made from bundle .*, and now bundle eeee inspects"),
        ({"candidate": "d" * 64}, "bundle dddd is there. Start the new bundle on the page Compare"),
    ],
)
def test_keep_undoes_nothing_that_was_done_meanwhile(teaching, uploads, service, tmp_path, changed, words):
    begin(teaching, uploads)
    job = ended(teaching)
    library = tmp_path / "library"
    library.mkdir()
    service.models = models = FakeModels(library, **{"active": job.base_hash} | changed)
    try:
        kept = teaching.keep(job.id, ADA)
    finally:
        service.models = None
    assert (kept.state, kept.in_shadow, models.shadow) == ("kept", False, None)
    assert re.search(words, kept.error)
    assert len(list(library.iterdir())) == 1


def test_what_is_refused(teaching, uploads, service, monkeypatch):
    with pytest.raises(TeachError, match="needs 7 to 60 different good images, got 6"):
        begin(teaching, [*uploads[:6], uploads[0]])
    with pytest.raises(TeachError, match=r"torn\.png: "):
        begin(teaching, [*uploads, Upload("torn.png", b"\x89PNG torn")])
    half = uploads[0].content[: len(uploads[0].content) // 2]
    with pytest.raises(TeachError, match=r"half\.png: "):
        begin(teaching, [Upload("half.png", half), *uploads])
    category, subclass = next(iter(service.detector.subclasses.values()))
    with pytest.raises(TeachError, match=f"knows {category}/{subclass} already"):
        begin(teaching, uploads, category=category, subclass=subclass)
    for name in ("", "../x", "a/b", "x" * 61, ". ", "a\n", "a\u2028b", "a\u200bb"):
        with pytest.raises(TeachError, match="The subclass must have 1 to 60 printable characters"):
            begin(teaching, uploads, subclass=name)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r'pip install "normweave\[train\]"'):
        begin(teaching, uploads)
    assert teaching.job is None
    assert not teaching.folder.exists()


def test_a_library_that_cannot_be_written_keeps_the_job(teaching, uploads, service, tmp_path):
    """As on a full disk or in a read-only folder: the message names the folder, and nothing half-written remains."""
    begin(teaching, uploads)
    job = ended(teaching)
    library = tmp_path / "library"
    library.mkdir()
    gone = teaching.folder / str(job.id) / "bundle" / "gone"
    gone.symlink_to(tmp_path / "nowhere")  # the copy fails after the other files
    service.models = models = FakeModels(library, active=job.base_hash)
    try:
        with pytest.raises(TeachError, match=r"cannot be copied into the library .*library: .*Correct") as raised:
            teaching.keep(job.id, ADA)
        assert (raised.value.code, raised.value.status) == ("library_unwritable", 503)
        assert list(library.iterdir()) == []
        assert (teaching.job.state, models.shadow) == ("done", None)
        gone.unlink()
        assert teaching.keep(job.id, ADA).state == "kept"
    finally:
        service.models = None


def test_a_data_folder_that_cannot_be_written_is_told(teaching, uploads):
    teaching.folder.write_bytes(b"in the way")
    with pytest.raises(TeachError, match=r"The images cannot be stored in .*teach: ") as raised:
        begin(teaching, uploads)
    assert raised.value.status == 503
    assert teaching.job is None
    teaching.folder.unlink()
    begin(teaching, uploads)
    assert ended(teaching).state == "done"


def test_images_of_the_training_are_refused_by_their_names(teaching, uploads, service, monkeypatch):
    """Also those that would be held out: they would be scored as if they were new."""
    hashes = [hashlib.sha256(one.content).hexdigest()[:16] for one in (uploads[0], *uploads[2:9])]
    record = service.detector.record
    monkeypatch.setattr(service.detector, "record", record | {"fit_hashes": hashes[:1]})
    with pytest.raises(TeachError, match=r"^part 0\.png was used in training already\. Give images"):
        begin(teaching, uploads)
    monkeypatch.setattr(service.detector, "record", record | {"calibration_hashes": hashes})
    with pytest.raises(TeachError, match=r"^part 0.png, part 2.png, .*, part 5.png and 3 more were used in training"):
        begin(teaching, uploads)
    assert teaching.job is None
