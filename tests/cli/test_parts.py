"""Parts of several views in `predict`."""

import csv
import json
import shutil

import pytest

from normweave import bundle
from normweave.cli.parts import Listed, Parts, is_table, read_list, summary
from normweave.detector import Detector
from normweave.errors import ConfigError, DataError
from normweave.outcome.parts import PartRule
from normweave.types import Outcome, PartOutcome, PartReason

from .conftest import run


@pytest.fixture
def pictures(textiles, tmp_path):
    """Two parts with two views each; of the second part one view is missing."""
    good = sorted(textiles.rglob("good/*.png"))[:3]
    assert len(good) == 3
    for name, path in zip(("17_front", "17_back", "18_front"), good, strict=True):
        shutil.copy(path, tmp_path / f"{name}.png")
    return tmp_path


def lines(text):
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_ends_with_a_line_for_each_part(trained, pictures):
    options = ["--part", "([^/_]+)_([^/_]+)[.]png$", "--views", "front,back", "-o", pictures / "out.csv"]
    result = run("predict", trained.bundle, pictures, *options, "--json")
    *images, first, second = lines(result.stdout)
    assert {(one["part_id"], one["view"]) for one in images} == {("17", "front"), ("17", "back"), ("18", "front")}
    assert (first["part_id"], second["part_id"]) == ("17", "18")
    assert second["reasons"][-1] == {"reason": "missing", "view": "back", "inspection": None}
    assert second["verdict"] != "normal"
    assert result.exit_code == 1
    with (pictures / "out_parts.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["part_id"], row["images"]) for row in rows] == [("17", "2"), ("18", "1")]


@pytest.fixture(scope="module")
def other(trained, tmp_path_factory):
    """A bundle with other thresholds, so that it is seen which one judged."""
    detector = Detector.load(trained.bundle, threads=1, device="cpu").with_rate(0.5)
    return detector.save(tmp_path_factory.mktemp("other") / "other.bundle")


def test_each_view_has_its_bundle(trained, other, pictures):
    (pictures / "20_front.png").write_bytes(b"no image")
    options = ["--part", "([^/_]+)_([^/_]+)[.]png$", "--view-bundle", f"back={other}", "-o", pictures / "out.jsonl"]
    result = run("predict", trained.bundle, pictures, *options, "--json", "--threads", "1")
    *images, first, second, third = lines(result.stdout)
    first_hash, back_hash = bundle.bundle_hash(trained.bundle), bundle.bundle_hash(other)
    assert first_hash != back_hash
    assert [(one["view"], one["bundle_hash"]) for one in images] == [
        ("back", back_hash),
        ("front", first_hash),
        ("front", first_hash),
        ("front", None),
    ]
    assert images[0]["threshold"] < images[1]["threshold"]
    assert first["bundles"] == [
        {"view": "back", "bundle_hash": back_hash},
        {"view": "front", "bundle_hash": first_hash},
    ]
    assert second["bundles"] == [{"view": "front", "bundle_hash": first_hash}]
    assert third["bundles"] == [{"view": "front", "bundle_hash": None}]
    whole = (pictures / "out.jsonl").read_text()
    done = whole.splitlines(keepends=True)
    (pictures / "out.jsonl").unlink()
    (pictures / "out.jsonl.partial").write_text("".join(done[:1]))  # of the other bundle
    again = run("predict", trained.bundle, pictures, *options, "--resume", "--threads", "1")
    assert again.exit_code == result.exit_code
    same = [[json.loads(text)[key] for key in ("pred_score", "bundle_hash")] for text in done]
    rows = lines((pictures / "out.jsonl").read_text())
    assert [[row[key] for key in ("pred_score", "bundle_hash")] for row in rows] == same


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--view-bundle", "back=x"), "--view-bundle is about the views of parts. Name them with --part"),
        (("--part", "(.)", "--view-bundle", "back"), "must be VIEW=BUNDLE, each view once, got 'back'"),
        (("--part", "(.)", "--view-bundle", "a=x", "--view-bundle", "a=y"), "each view once, got 'a=y'"),
        (("--part", "(.)", "--views", "a,b", "--view-bundle", "c=x"), "Unknown view of --view-bundle 'c'"),
        (("--part", "(.)", "--view-bundle", "a =x"), "--view-bundle: the name of a view has no white space around it"),
        (
            ("--part", "(.)", "--view-bundle", "a=missing.bundle"),
            "--view-bundle a: missing.bundle does not exist; a bundle is a folder",
        ),
    ],
)
def test_bundles_of_views_that_cannot_be_used(trained, pictures, options, words):
    result = run("predict", trained.bundle, pictures, *options)
    assert result.exit_code == 2
    assert words in " ".join(result.stderr.split())


def test_a_list_with_other_columns_is_refused(trained, pictures):
    table = pictures / "list.csv"
    table.write_text("path,part\n17_front.png,A\n")
    result = run("predict", trained.bundle, "--list", table)
    assert result.exit_code == 2
    assert "columns are path, part. It needs image_path, part_id, separated by commas" in " ".join(
        result.stderr.split()
    )


def test_a_view_that_no_image_shows_is_named(trained, other, pictures):
    result = run("predict", trained.bundle, pictures, "--part", "([^/_]+)_[^/]+$", "--view-bundle", f"side={other}")
    assert "No image shows the view side of --view-bundle." in result.stderr


def test_a_list_names_the_parts(trained, pictures):
    table = pictures / "list.csv"
    table.write_text("image_path,part_id,view\n17_front.png,A,top\n17_back.png,A,\n18_front.png,,\n")
    result = run("predict", trained.bundle, "--list", table, "--views", "2", "--json", "-o", pictures / "out.jsonl")
    *images, part = lines(result.stdout)
    assert [(one["part_id"], one["view"]) for one in images] == [("A", "top"), ("A", "17_back"), (None, None)]
    assert (part["part_id"], part["images"]) == ("A", 2)
    assert lines((pictures / "out_parts.jsonl").read_text()) == [part]


def test_a_resumed_run_counts_the_images_that_were_done(trained, pictures):
    options = ["predict", trained.bundle, pictures, "--part", "([^/_]+)_[^/]+$", "-o", pictures / "out.jsonl"]
    run(*options)
    whole = (pictures / "out_parts.jsonl").read_text()
    done = (pictures / "out.jsonl").read_text().splitlines(keepends=True)
    (pictures / "out.jsonl").unlink()
    (pictures / "out.jsonl.partial").write_text("".join(done[:1]))
    assert run(*options, "--resume").exit_code in (0, 1)
    assert (pictures / "out_parts.jsonl").read_text() == whole


def test_images_without_a_part_are_counted_and_a_run_without_parts_is_refused(trained, pictures):
    some = run("predict", trained.bundle, pictures, "--part", "(18)_")
    assert some.exit_code in (0, 1)
    assert "2 of 3 images show no part" in some.stderr
    none = run("predict", trained.bundle, pictures, "--part", "(x)_")
    assert none.exit_code == 2
    assert "No image shows a part: --part '(x)_' matches no path" in none.stderr


def test_views_need_parts_and_shards_divide_them(trained, pictures):
    assert "--views is about parts" in run("predict", trained.bundle, pictures, "--views", "2").stderr
    result = run("predict", trained.bundle, pictures, "--part", "(.+)_", "--shard", "1/2")
    assert "would divide the images of a part" in result.stderr
    assert "at least 1" in run("predict", trained.bundle, pictures, "--part", "(.+)_", "--views", "0").stderr


def test_of_several_images_of_a_view_the_worst_counts():
    parts = Parts(PartRule(part="^(.)_(.)"), {"c.png": Listed("1", "a")})
    for path, verdict in (("1_a.png", "normal"), ("c.png", "anomalous"), ("2_a.png", None), ("other.png", "unknown")):
        error = "torn" if verdict is None else None
        parts.add(parts.identified(Outcome(image_path=path, verdict=verdict, error=error)).as_dict())
    one, two = parts.outcomes()
    assert (one.verdict, one.images, two.verdict) == ("anomalous", 2, "incomplete")
    assert summary(one) == "ANOMALOUS   part 1, 2 images: a anomalous"
    missing = PartOutcome(part_id="3", verdict="incomplete", images=1, reasons=(PartReason("missing", None, None),))
    assert summary(missing).endswith("a view missing")


def test_an_image_of_a_list_with_a_view_and_no_part_is_refused_before_the_first_image():
    with pytest.raises(ConfigError, match=r"'c.png' has the view 'a', but no part"):
        Parts(PartRule(), {"c.png": Listed(None, "a")})


def test_lists_with_parts(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("a.png\nb.png\n")
    assert not is_table(table)
    table.write_text("part_id,image_path\n1,a.png\n1,a.png\n")
    assert is_table(table)
    with pytest.raises(DataError, match="row 3"):
        read_list(table)
