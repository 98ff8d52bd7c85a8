"""A bundle comes back whole or not at all, whatever was done to it."""

import contextlib
import hashlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from normweave import bundle
from normweave.errors import BundleError, MissingError

RECORD = {"model": "dfm", "seed": 3, "subclasses": {"cloth/twill": ["cloth", "twill"]}}
PAGE = b"<p>report</p>"


def tensors():
    random = np.random.default_rng(0)
    return {
        "head.bank": random.standard_normal((5, 3)).astype(np.float32),
        "head.count": np.array(7),  # a single number has no axes
        "head.mask": np.array([True, False]),
        "head.wide": random.standard_normal((4, 6)).astype(np.float64).T,  # not contiguous
    }


@pytest.fixture
def saved(tmp_path):
    folder = tmp_path / "cloth.bundle"
    bundle.write(folder, tensors=tensors(), record=RECORD, files={"report.html": PAGE})
    return folder


def refused(call, *words):
    """The message of a refusal, which must hold all of these words."""
    with pytest.raises(BundleError) as caught:
        call()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def change(folder, **changes):
    """Write other values into bundle.json."""
    path = folder / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ── what was written comes back ──────────────────────────────────────────────────────────────────────────────────────


def test_comes_back(saved):
    assert bundle.read(saved) == RECORD
    found = bundle.read_tensors(saved)
    assert found.keys() == tensors().keys()
    for name, expected in tensors().items():
        assert found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name], expected, strict=True)
    assert (saved / "report.html").read_bytes() == PAGE
    assert bundle.lists(saved, "report.html")
    assert not bundle.lists(saved, "other.html")


def test_nothing_else_is_left_behind(saved):
    assert [path.name for path in saved.parent.iterdir()] == ["cloth.bundle"]
    assert sorted(path.name for path in saved.iterdir()) == [
        "bundle.json",
        "report.html",
        "weights.safetensors",
    ]


def test_lists_the_hash_of_every_other_file(saved):
    written = json.loads((saved / "bundle.json").read_text())
    assert written["format"] == bundle.FORMAT
    assert written["files"] == {
        name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in ("report.html", "weights.safetensors")
    }


def test_torch_tensors_are_the_same_to_it(tmp_path, saved):
    as_torch = {name: torch.from_numpy(array.copy()) for name, array in reversed(tensors().items())}
    as_torch["head.bank"].requires_grad_()
    bundle.write(tmp_path / "b", tensors=as_torch, record={"other": "record"})
    assert bundle.weights_hash(tmp_path / "b") == bundle.weights_hash(saved)
    assert bundle.bundle_hash(tmp_path / "b") != bundle.bundle_hash(saved)


def test_bundle_hash_changes_with_any_file(tmp_path, saved):
    bundle.write(tmp_path / "b", tensors=tensors(), record=RECORD, files={"report.html": PAGE})
    assert bundle.bundle_hash(tmp_path / "b") == bundle.bundle_hash(saved)
    bundle.write(tmp_path / "c", tensors=tensors(), record=RECORD, files={"report.html": PAGE + b" "})
    assert bundle.bundle_hash(tmp_path / "c") != bundle.bundle_hash(saved)


def test_files_that_are_not_listed_are_ignored(saved):
    (saved / ".DS_Store").write_bytes(b"left by a file browser")
    assert bundle.read(saved) == RECORD


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_existing_folder_is_refused(saved):
    before = bundle.bundle_hash(saved)
    refused(
        lambda: bundle.write(saved, tensors=tensors(), record={"new": 1}),
        f"{saved} exists. Choose another name, or allow replacing it (--overwrite).",
    )
    assert bundle.bundle_hash(saved) == before


def test_overwrite_replaces_the_whole_bundle(saved):
    bundle.write(saved, tensors=tensors(), record={"new": 1}, overwrite=True)
    assert bundle.read(saved) == {"new": 1}
    assert not (saved / "report.html").exists()
    assert [path.name for path in saved.parent.iterdir()] == ["cloth.bundle"]


def test_overwrite_follows_a_link_and_keeps_it(saved, tmp_path):
    link = tmp_path / "current"
    link.symlink_to(saved)
    bundle.write(link, tensors=tensors(), record={"new": 1}, overwrite=True)
    assert link.is_symlink()
    assert bundle.read(saved) == {"new": 1}


def test_overwrite_never_replaces_what_is_not_a_bundle(tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "only-copy.jpg").write_bytes(b"x")
    for place in (photos, photos / "only-copy.jpg"):
        refused(lambda place=place: bundle.write(place, tensors={}, record={}, overwrite=True), "is not a bundle")
    assert (photos / "only-copy.jpg").read_bytes() == b"x"


def test_an_empty_folder_may_be_filled(tmp_path):
    bundle.write(tmp_path, tensors=tensors(), record=RECORD)
    assert bundle.read(tmp_path) == RECORD


@pytest.mark.parametrize("place", ["photo.jpg/b", "photo.jpg/new/b", "x" * 300, f"{'x' * 300}/b", "x" * 245])
def test_a_place_that_cannot_be_written_is_noticed_before_training(tmp_path, place):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    refused(lambda: bundle.check_target(tmp_path / place, overwrite=False), "Cannot ", "Errno")
    bundle.check_target(tmp_path / "a" / "b", overwrite=False)
    assert [path.name for path in tmp_path.iterdir()] == ["photo.jpg"]


def test_a_folder_without_permission_is_noticed_before_training(tmp_path, monkeypatch):
    def forbidden(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(type(tmp_path), "mkdir", forbidden)
    refused(lambda: bundle.check_target(tmp_path / "b", overwrite=False), "Cannot write", "Permission denied")


def test_parents_are_made(tmp_path):
    bundle.write(tmp_path / "a" / "b", tensors=tensors(), record=RECORD)
    assert bundle.read(tmp_path / "a" / "b") == RECORD


def test_the_old_bundle_stays_when_the_new_cannot_be_put_in_place(saved, monkeypatch):
    """The second of the two renames fails, as with a full or broken disk."""
    rename = type(saved).rename

    def breaking(path, target):
        if ".partial-" in path.name:
            raise OSError("the disk is broken")
        return rename(path, target)

    monkeypatch.setattr(type(saved), "rename", breaking)
    refused(
        lambda: bundle.write(saved, tensors=tensors(), record={"new": 1}, overwrite=True),
        "the disk is broken",
    )
    assert bundle.read(saved) == RECORD
    assert [path.name for path in saved.parent.iterdir()] == ["cloth.bundle"]


def test_what_a_killed_process_left_does_not_hinder(tmp_path):
    left = tmp_path / f"b.partial-{os.getpid()}"
    left.mkdir()
    (left / "bundle.json").write_text("half")
    bundle.write(tmp_path / "b", tensors=tensors(), record=RECORD)
    assert bundle.read(tmp_path / "b") == RECORD


@pytest.mark.parametrize("name", ["../out", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "C:x", "bundle.json"])
def test_files_cannot_be_written_elsewhere(tmp_path, name):
    refused(
        lambda: bundle.write(tmp_path / "b", tensors={}, record={}, files={name: b""}),
        "cannot hold a file called",
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"threshold": float("nan")}, "must be JSON without NaN and infinity"),
        ({"path": object()}, "must be JSON without NaN and infinity"),
        ({"files": {}}, "may not have the keys files"),
        ({"format": 2}, "may not have the keys format"),
    ],
)
def test_records_that_could_not_be_read_again(tmp_path, record, words):
    refused(lambda: bundle.write(tmp_path / "b", tensors={}, record=record), words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_not_saved(tmp_path, number):
    bad = {"head.bank": np.array([0, number], np.float32)}
    refused(
        lambda: bundle.write(tmp_path / "b", tensors=bad, record={}),
        "tensor 'head.bank' holds NaN or infinity",
    )


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_file_is_compared_with_its_hash(saved):
    for name in ("report.html", "weights.safetensors"):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        refused(lambda: bundle.read(saved), f"{name} is not the file that was saved", "Copy the bundle again")
        (saved / name).write_bytes(content)
    assert bundle.read(saved) == RECORD


def test_a_file_is_compared_with_its_hash_when_the_bundle_is_written_again(saved, tmp_path):
    bundle.rewrite(saved, tmp_path / "same", record=RECORD | {"seed": 4})
    assert bundle.read(tmp_path / "same") == RECORD | {"seed": 4}
    (saved / "report.html").write_bytes(PAGE.replace(b"report", b"REPORT"))
    for target, overwrite in ((tmp_path / "copy", False), (saved, True)):
        refused(
            lambda to=target, over=overwrite: bundle.rewrite(saved, to, record=RECORD, overwrite=over),
            "report.html is not the file that was saved",
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cloth.bundle", "same"]


def test_weights_are_compared_with_their_hash_where_they_are_read(saved):
    content = bytearray((saved / "weights.safetensors").read_bytes())
    content[-1] ^= 1
    (saved / "weights.safetensors").write_bytes(content)
    refused(lambda: bundle.read_tensors(saved), "weights.safetensors is not the file that was saved")


def test_numbers_that_are_none_are_not_read(saved):
    from safetensors.numpy import save

    content = save({"head.bank": np.array([np.nan], np.float32)})
    (saved / "weights.safetensors").write_bytes(content)
    change(saved, files={"weights.safetensors": hashlib.sha256(content).hexdigest()})
    refused(lambda: bundle.read_tensors(saved), "tensor 'head.bank' holds NaN or infinity")


@pytest.mark.parametrize("content", [b"", b"no safetensors", b"\xff" * 64, (2**40).to_bytes(8, "little")])
def test_weights_that_are_no_weights(saved, content):
    (saved / "weights.safetensors").write_bytes(content)
    change(saved, files={"weights.safetensors": hashlib.sha256(content).hexdigest()})
    refused(lambda: bundle.read_tensors(saved), "weights.safetensors is not a safetensors file")


def test_no_weights(saved):
    change(saved, files={})
    refused(lambda: bundle.read_tensors(saved), "lists no weights.safetensors")
    assert bundle.weights_hash(saved) == ""


def test_a_missing_file_is_named(saved):
    (saved / "report.html").unlink()
    refused(lambda: bundle.read(saved), "report.html is missing. Copy the bundle again.")
    (saved / "report.html").mkdir()
    refused(lambda: bundle.read(saved), "report.html is missing")


def test_a_link_out_of_the_folder_is_refused(saved, tmp_path):
    outside = tmp_path / "secret"
    shutil.move(saved / "report.html", outside)
    (saved / "report.html").symlink_to(outside)
    refused(lambda: bundle.read(saved), "report.html is a link to", "outside the bundle")
    (saved / "report.html").unlink()
    (saved / "report.html").symlink_to("report.html")  # to itself
    refused(lambda: bundle.read(saved), "report.html is missing")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "a/b", "a\\b", "", ".", "..", "bundle.json", "\ud800", "a" * 300]
)
def test_listed_files_stay_in_the_folder(saved, name):
    change(saved, files={name: "0" * 64})
    refused(lambda: bundle.read(saved), "which is not a plain file name")


def test_the_error_of_a_newer_format_states_how_to_upgrade(saved):
    change(saved, format=3)
    refused(
        lambda: bundle.read(saved),
        f"{saved} is in format 3, and this normweave reads up to 2. Upgrade with: pip install -U normweave",
    )


@pytest.mark.parametrize("version", [None, 0, -1, True, "1", 1.0, []])
def test_a_format_that_is_none(saved, version):
    change(saved, format=version)
    refused(lambda: bundle.read(saved), "must contain its format, a whole number from 1")


@pytest.mark.parametrize("files", [None, [], "a", {"report.html": 3}, {"report.html": "abc"}])
def test_a_list_of_files_that_is_none(saved, files):
    change(saved, files=files)
    refused(lambda: bundle.read(saved), "bundle.json")


def test_a_folder_without_a_bundle(tmp_path):
    refused(
        lambda: bundle.read(tmp_path / "b"),
        "does not exist; a bundle is a folder written by 'normweave train'",
    )
    refused(lambda: bundle.read(tmp_path), "holds no bundle.json")
    (tmp_path / "file").write_text("")
    refused(lambda: bundle.read(tmp_path / "file"), "is a file")


def test_a_huge_record_is_not_read(saved):
    os.truncate(saved / "bundle.json", bundle.MAX_RECORD_BYTES + 1)
    refused(lambda: bundle.read(saved), f"has more than {bundle.MAX_RECORD_BYTES} bytes")


def test_safetensors_not_installed(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for call in (
        lambda: bundle.read_tensors(saved),
        lambda: bundle.write(saved.parent / "b", tensors={}, record={}),
    ):
        with pytest.raises(MissingError, match=r'pip install "normweave\[train\]"'):
            call()
    assert bundle.read(saved) == RECORD


# ── damaged bundles ───────────────────────────────────────────────────────────────────────────────────────────────────

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def only_bundle_errors(folder):
    for call in (bundle.read, bundle.read_tensors, bundle.bundle_hash, bundle.weights_hash):
        with contextlib.suppress(BundleError):
            call(folder)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "b"
    bundle.write(folder, tensors=tensors(), record=RECORD, files={"report.html": PAGE})
    return folder, (folder / "bundle.json").read_bytes()


@given(value=anything)
def test_any_json_in_place_of_the_record(fuzzed, value):
    (fuzzed[0] / "bundle.json").write_text(json.dumps(value))
    only_bundle_errors(fuzzed[0])


@given(version=anything | st.just(1), files=anything | st.dictionaries(st.text(max_size=3), anything))
def test_any_json_in_place_of_format_and_files(fuzzed, version, files):
    (fuzzed[0] / "bundle.json").write_text(json.dumps({"format": version, "files": files}))
    only_bundle_errors(fuzzed[0])


@given(content=st.binary(max_size=60))
def test_any_bytes_in_place_of_the_record(fuzzed, content):
    (fuzzed[0] / "bundle.json").write_bytes(content)
    only_bundle_errors(fuzzed[0])


@given(data=st.data())
def test_a_record_cut_short_or_with_a_byte_changed(fuzzed, data):
    folder, whole = fuzzed
    cut = data.draw(st.integers(0, len(whole) - 2))
    (folder / "bundle.json").write_bytes(whole[:cut])
    refused(lambda: bundle.read(folder), "is damaged")
    changed = bytearray(whole)
    changed[cut] = data.draw(st.integers(0, 255))
    (folder / "bundle.json").write_bytes(changed)
    only_bundle_errors(folder)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"1" * 10_000, b'{"format": NaN}', b"\xff\xfe"])
def test_known_tricks(saved, content):
    (saved / "bundle.json").write_bytes(content)
    refused(lambda: bundle.read(saved), "bundle.json is damaged")
