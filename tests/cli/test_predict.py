"""Images to verdicts, tables and maps."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow.parquet import write_table

from normweave.cli.predict import check_outputs, find_images, parse_shard, summary
from normweave.detector import Detector
from normweave.errors import ConfigError, DataError
from normweave.types import DefectBox, Outcome

from .conftest import run

OUTCOME = Outcome(
    image_path="a, b.png",
    verdict="anomalous",
    pred_score=1.5,
    p_value=0.02,
    threshold=1.25,
    experts=(("twill", 0.75), ("plain", 0.25)),
    boxes=(DefectBox(1, 2, 3, 4, 1.5),),
    height=8,
    width=9,
)


@pytest.fixture
def photos(tmp_path):
    """Four images in two folders, and other files."""
    for name in ("a/2.png", "a/1.JPG", "b/1.png", "b/deep/0.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    (tmp_path / "a" / "notes.txt").write_text("")
    (tmp_path / "a" / ".hidden.png").write_text("")
    (tmp_path / "b" / ".thumbnails").mkdir()
    (tmp_path / "b" / ".thumbnails" / "1.png").write_text("")
    return tmp_path


# ── which images ─────────────────────────────────────────────────────────────────────────────────────────────────────


def found(photos, *arguments):
    return [path.removeprefix(f"{photos}/") for path in find_images([f"{photos}/{argument}" for argument in arguments])]


def test_folders_files_and_patterns_in_the_order_of_the_call(photos):
    assert found(photos, "b", "a/2.png", "a/*.JPG", "a/notes.txt") == [
        "b/1.png",
        "b/deep/0.png",
        "a/2.png",
        "a/1.JPG",
        "a/notes.txt",
    ]


def test_a_folder_is_read_as_training_reads_it(photos, tmp_path_factory):
    """Links are followed, except to a folder above; one that leads nowhere is an error or an unreadable image."""
    other = tmp_path_factory.mktemp("other")
    shutil.copy(photos / "a" / "2.png", other / "3.png")
    (photos / "b" / "linked").symlink_to(other)
    (photos / "b" / "up").symlink_to("..")
    (other / "home").symlink_to(photos)
    assert found(photos, "b") == ["b/1.png", "b/deep/0.png", "b/linked/3.png"]
    (photos / "a" / "gone.png").symlink_to(photos / "deleted.png")
    assert found(photos, "a") == ["a/1.JPG", "a/2.png", "a/gone.png"]
    (other / "unmounted").symlink_to(photos / "deleted")
    with pytest.raises(DataError, match=r"unmounted: is a link to .*deleted, which does not exist"):
        find_images([str(photos / "b")])


def test_a_pattern_over_folders(photos):
    assert found(photos, "**/1.*") == ["a/1.JPG", "b/1.png"]


def test_a_pattern_over_manifests(photos):
    for name in "ab":
        (photos / f"{name}.csv").write_text(f"image_path\n{name}/1.png\n")
    assert found(photos, "*.csv") == ["a/1.png", "b/1.png"]
    (photos / "a.csv").write_text("image_path\n")
    assert found(photos, "*.csv") == ["b/1.png"]
    (photos / "b.csv").write_text("image_path\n")
    with pytest.raises(DataError, match=r"The table .*\*\.csv has no rows\. Add one row for each image"):
        found(photos, "*.csv")


def test_a_file_of_a_folder_that_matches_too_is_read_once(photos):
    folder = photos / "t.parquet"
    folder.mkdir()
    write_table(pyarrow.table({"image_path": ["../a/2.png"]}), folder / "0.parquet")
    assert found(photos, "**/*.parquet") == ["t.parquet/../a/2.png"]


def test_a_name_that_looks_like_a_pattern(photos):
    shutil.copy(photos / "a" / "2.png", photos / "part[1].png")
    assert found(photos, "part[1].png") == ["part[1].png"]


def test_a_missing_file_is_returned_to_be_reported_in_its_position(photos):
    assert found(photos, "gone.png") == ["gone.png"]


def test_a_list_comes_last_without_empty_lines(photos):
    (photos / "list.txt").write_text(f"{photos}/b/1.png\n\n{photos}/gone.png\r\n{photos}/é.png")
    assert [path.removeprefix(f"{photos}/") for path in find_images([str(photos / "a")], photos / "list.txt")] == [
        "a/1.JPG",
        "a/2.png",
        "b/1.png",
        "gone.png",
        "é.png",
    ]


def test_paths_from_stdin_are_read_one_by_one(monkeypatch):
    read = []

    def lines():
        for text in ("one.png\n", "two.png\n"):
            read.append(text)
            yield text

    monkeypatch.setattr("sys.stdin", lines())
    paths = find_images(["-"])
    assert next(paths) == "one.png"
    assert read == ["one.png\n"]


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffa.png\nK\u00f6per.png\n".encode(),
        "a.png\r\nK\u00f6per.png".encode("utf-16"),
        "\ufeffa.png\nK\u00f6per.png".encode("utf-16-be"),
    ],
)
def test_a_list_with_a_byte_order_mark(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert list(find_images([], tmp_path / "list.txt")) == ["a.png", "K\u00f6per.png"]


def test_a_list_may_have_names_that_are_not_utf_8(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"\xff.png\n")
    assert [os.fsencode(path) for path in find_images([], tmp_path / "list.txt")] == [b"\xff.png"]


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", r"The list .*list\.txt has no path"),
        (b"\xef\xbb\xbf\r\n\n", r"The list .*list\.txt has no path"),
        ("a.png\nb.png\n".encode("utf-16-le"), r"Line 1 of .*list\.txt contains a zero byte"),
        (b"a.png\nb.png\0c.png\0", r"Line 2 of .*list\.txt contains a zero byte"),
        (b"\xff\xfea\0b\0c", r"list\.txt is not text in UTF-16 .* Save the list as UTF-8"),
    ],
)
def test_a_list_without_paths_or_of_other_text_is_refused_before_the_first_image(tmp_path, content, what):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(DataError, match=what):
        find_images([], tmp_path / "list.txt")


def stdin_of(content):
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def test_stdin_may_have_a_byte_order_mark_and_names_that_are_not_utf_8(monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin_of(b"\xef\xbb\xbfa.png\n\xff.png\n"))
    assert [os.fsencode(path) for path in find_images(["-"])] == [b"a.png", b"\xff.png"]


def test_stdin_that_is_closed_or_in_utf_16_is_refused(monkeypatch):
    monkeypatch.setattr("sys.stdin", stdin_of("a.png\n".encode("utf-16")))
    with pytest.raises(DataError, match="Line 1 of stdin contains a zero byte"):
        next(find_images(["-"]))
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(DataError, match="stdin is closed"):
        find_images(["-"])


def test_shards():
    assert [list(range(10))[first::step] for first, step in map(parse_shard, ("1/3", "2/3", "3/3"))] == [
        [0, 3, 6, 9],
        [1, 4, 7],
        [2, 5, 8],
    ]
    for wrong in ("0/3", "4/3", "3", "1/0", "a/b", "-1/2"):
        with pytest.raises(ConfigError, match=f"--shard must be i/n with 1 <= i <= n, such as 2/4, got '{wrong}'"):
            parse_shard(wrong)


def test_arguments_without_an_image_are_refused_at_once(photos):
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="empty contains no image"):
        find_images([str(photos / "a"), str(photos / "empty")])
    with pytest.raises(DataError, match=r"No file matches '.*\*\.bmp'"):
        find_images([f"{photos}/*.bmp"])
    with pytest.raises(DataError, match="No image is given"):
        find_images([])
    with pytest.raises(DataError, match=r"The list .*gone\.txt does not exist"):
        find_images([], photos / "gone.txt")
    with pytest.raises(DataError, match="is no regular file: pipe its paths to -"):
        find_images([], photos)


# ── the text of an outcome ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_summary_of_an_outcome():
    assert summary(OUTCOME) == "ANOMALOUS    1.5000  (threshold 1.2500)  p 0.0200  a, b.png"
    moved = replace(OUTCOME, shift_x=-12.04, shift_y=3.0, rotation=0.52, correlation=0.9)
    assert summary(moved).endswith("p 0.0200  shift -12.0, 3.0  rotation 0.5  a, b.png")
    assert summary(Outcome(image_path="x.png", error="cut short")) == "UNREADABLE  x.png: cut short"
    assert summary(Outcome(image_path="x.png", error="x.png: cut short")) == "UNREADABLE  x.png: cut short"
    normal = Outcome(image_path="x", verdict="normal", pred_score=0.0, threshold=1.0, p_value=1.0)
    assert summary(normal).startswith("normal  ")


def test_the_summary_is_one_line_and_cannot_change_the_terminal_whatever_the_name_of_the_file():
    named = replace(OUTCOME, image_path="a\nnormal\x1b[2J\r.png")
    assert summary(named).endswith(r"p 0.0200  a\nnormal\x1b[2J\x0d.png")
    assert summary(Outcome(image_path="x\n.png", error="cut")) == r"UNREADABLE  x\n.png: cut"


# ── exit codes, with a detector whose verdicts are given ─────────────────────────────────────────────────────────────


class Verdicts:
    """In place of a detector: the verdict of an image is the start of its file name, `unreadable` is an error."""

    batch_images = 2
    bundle_hash = "b" * 64

    def __init__(self):
        self.judged = []

    def stream(self, paths, **_):
        for path in paths:
            self.judged.append(path)
            verdict = Path(path).name.partition("-")[0]
            if verdict == "unreadable":
                yield Outcome(image_path=path, error="cut short")
            else:
                yield replace(OUTCOME, image_path=path, verdict=verdict, bundle_hash=self.bundle_hash)


@pytest.fixture
def verdicts(monkeypatch):
    detector = Verdicts()
    monkeypatch.setattr(Detector, "load", lambda *_, **__: detector)
    return detector


@pytest.mark.parametrize(
    ("images", "exit_code"),
    [
        (["normal-1", "normal-2"], 0),
        (["normal-1", "unknown-2"], 1),
        (["anomalous-1", "normal-2"], 1),
        (["unreadable-1", "normal-2"], 4),
        (["anomalous-1", "unreadable-2"], 4),
    ],
)
def test_every_verdict_has_its_exit_code(verdicts, images, exit_code):
    result = run("predict", "x.bundle", *images, "--json")
    assert result.exit_code == exit_code, result.output
    assert len(result.stdout.splitlines()) == len(images)


@pytest.mark.parametrize(
    ("earlier", "exit_code"), [("normal-0", 0), ("anomalous-0", 1), ("unknown-0", 1), ("unreadable-0", 4)]
)
def test_a_resumed_run_has_the_exit_code_of_all_its_images(verdicts, tmp_path, earlier, exit_code):
    """The rows of the interrupted run count, although their images are not judged again."""
    images = [earlier, "normal-1", "normal-2"]
    table = tmp_path / "r.jsonl"
    rows = [outcome.as_dict() for outcome in Verdicts().stream(images[:2])]
    table.with_name("r.jsonl.partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("predict", "x.bundle", *images, "-o", table, "--resume")
    assert result.exit_code == exit_code, result.output
    assert verdicts.judged == images[2:]
    assert [json.loads(text)["image_path"] for text in table.read_text("utf-8").splitlines()] == images


@pytest.mark.parametrize("arguments", [["-"], ["normal-1", "normal-2", "--shard", "3/3"]])
def test_nothing_judged_is_not_all_normal(verdicts, tmp_path, arguments):
    result = run("predict", "x.bundle", *arguments, "-o", tmp_path / "r.csv", stdin="\n")
    assert result.exit_code == 2
    assert "No image was judged" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_a_file_name_that_is_not_utf_8_in_every_output(verdicts, tmp_path, ending):
    name = os.fsdecode(b"normal-\xff.png")
    (tmp_path / "list.txt").write_bytes(os.fsencode(f"normal-0.png\n{name}\n"))
    table = tmp_path / f"r{ending}"
    rows = [outcome.as_dict() for outcome in Verdicts().stream([name])]
    table.with_name(f"{table.name}.partial").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = run("predict", "x.bundle", name, "--list", tmp_path / "list.txt", "-o", table, "--resume")
    assert result.exit_code == 0, result.output
    assert r"normal-\udcff.png" in result.stdout
    assert verdicts.judged == [name, "normal-0.png", name]  # the unfinished batch is repeated
    assert table.exists()


def test_a_folder_for_maps_that_cannot_be_made_is_refused_before_the_first_image(verdicts, tmp_path):
    (tmp_path / "file").write_text("")
    result = run("predict", "x.bundle", "normal-1", "--maps", tmp_path / "file" / "maps")
    assert result.exit_code == 2
    assert verdicts.judged == []


def test_a_folder_in_place_of_the_table_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "r.csv").mkdir()
    with pytest.raises(DataError, match=r"r\.csv is a folder"):
        check_outputs(tmp_path / "r.csv", None)


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def predicted(trained, textiles, tmp_path_factory):
    """Every test image, as JSON, table and maps."""
    folder = tmp_path_factory.mktemp("predicted")
    images = sorted(str(path) for path in textiles.glob("cloth/*/test/*/*.png"))
    result = run("predict", trained.bundle, *images, "--json", "-o", folder / "r.jsonl", "--maps", folder / "maps")
    return images, result, folder


def test_json_is_one_line_per_image_in_their_order(predicted):
    images, result, folder = predicted
    rows = [json.loads(text) for text in result.stdout.splitlines()]
    assert [row["image_path"] for row in rows] == images
    assert (folder / "r.jsonl").read_text("utf-8") == result.stdout
    assert result.exit_code == (1 if any(row["verdict"] != "normal" for row in rows) else 0)
    for row in rows:
        assert (row["pred_score"] > row["threshold"]) == (row["verdict"] == "anomalous")


def test_every_image_has_its_map(predicted):
    images, result, folder = predicted
    rows = [json.loads(text) for text in result.stdout.splitlines()]
    paths = {row["anomaly_map"] for row in rows}
    assert len(paths) == len(images)  # good/000.png exists in three subclasses
    for row in rows:
        anomaly_map = np.load(row["anomaly_map"], allow_pickle=False)
        assert anomaly_map.shape == (row["height"], row["width"]) == (64, 64)
        assert anomaly_map.dtype == np.float32
        with Image.open(row["anomaly_map"].replace(".npy", ".png")) as image:
            assert image.size == (64, 64)
    assert len(list((folder / "maps").iterdir())) == 2 * len(images)


def test_the_overlay_marks_what_is_above_the_threshold_of_the_boxes(trained, textiles, tmp_path, monkeypatch):
    image = next(textiles.glob("cloth/*/test/*/*.png"))
    monkeypatch.setattr(Detector, "box_threshold", lambda self, outcome: float(np.median(outcome.anomaly_map)))
    assert run("predict", trained.bundle, image, "--maps", tmp_path / "maps").exit_code in (0, 1)
    (scores,) = (np.load(path) for path in (tmp_path / "maps").glob("*.npy"))
    (marked,) = (np.asarray(Image.open(path)) for path in (tmp_path / "maps").glob("*.png"))
    np.testing.assert_array_equal(np.ptp(marked, axis=2) > 0, scores > np.median(scores))


def test_the_exit_code_is_the_verdict(predicted, trained, tmp_path):
    _, result, _ = predicted
    rows = [json.loads(text) for text in result.stdout.splitlines()]
    normal = [row["image_path"] for row in rows if row["verdict"] == "normal"]
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert run("predict", trained.bundle, *normal[:2]).exit_code == 0
    result = run("predict", trained.bundle, normal[0], tmp_path / "noise.png")
    assert result.exit_code == 1, result.output
    assert result.stdout.splitlines()[0].startswith("normal ")
    assert result.stdout.splitlines()[1].startswith("ANOMALOUS ")


def test_an_unreadable_image_is_reported_in_its_position(predicted, trained, tmp_path):
    images, _, _ = predicted
    (tmp_path / "bad.png").write_text("no image")
    result = run("predict", trained.bundle, images[0], tmp_path / "bad.png", tmp_path / "gone.png", *images[1:4])
    assert result.exit_code == 4
    lines = result.stdout.splitlines()
    assert len(lines) == 6
    assert lines[1].startswith(f"UNREADABLE  {tmp_path / 'bad.png'}")
    assert lines[2].startswith(f"UNREADABLE  {tmp_path / 'gone.png'}")
    assert all(path in text for path, text in zip(images[1:4], lines[3:], strict=True))


def test_output_paths_are_checked_before_anything_is_loaded(tmp_path):
    (tmp_path / "maps").mkdir()
    (tmp_path / "maps" / "old.npy").write_text("")
    result = run("predict", tmp_path / "no-bundle", "x.png", "--maps", tmp_path / "maps")
    assert result.exit_code == 2
    assert "maps of two runs would mix" in result.stderr
    result = run("predict", tmp_path / "no-bundle", "x.png", "-o", tmp_path / "r.xlsx")
    assert result.exit_code == 2
    assert "Unknown suffix of --output '.xlsx'. Known: .csv, .jsonl, .parquet." in result.stderr


def test_no_bundle(tmp_path):
    result = run("predict", tmp_path / "no-bundle", "x.png", "--json")
    assert result.exit_code == 2
    assert "a bundle is a folder written by 'normweave train'" in json.loads(result.stdout)["error"]


def scores(result):
    """Return verdict and score by path."""
    rows = [json.loads(text) for text in result.stdout.splitlines()]
    return {row["image_path"]: (row["verdict"], row["pred_score"]) for row in rows}


def test_lists_stdin_and_shards_give_the_same_verdicts(predicted, trained, tmp_path):
    images, result, _ = predicted
    (tmp_path / "list.txt").write_text("\n".join(images))
    assert scores(run("predict", trained.bundle, "--list", tmp_path / "list.txt", "--json")) == scores(result)
    piped = run("predict", trained.bundle, "-", "--json", stdin="\n".join(images))
    assert list(scores(piped)) == images
    assert {path: verdict for path, (verdict, _) in scores(piped).items()} == {
        path: verdict for path, (verdict, _) in scores(result).items()
    }
    parts = [run("predict", trained.bundle, *images, "--json", "--shard", f"{n}/3") for n in (1, 2, 3)]
    assert [list(scores(part)) for part in parts] == [images[n::3] for n in (0, 1, 2)]
    together = scores(parts[0]) | scores(parts[1]) | scores(parts[2])
    for path, (verdict, score) in scores(result).items():
        assert together[path][0] == verdict
        assert together[path][1] == pytest.approx(score, rel=1e-5)


def test_resume_needs_a_table(trained):
    result = run("predict", trained.bundle, "x.png", "--resume")
    assert result.exit_code == 2
    assert "--resume needs a table of an interrupted run. Give its path with --output." in result.stderr


def test_an_unknown_suffix_is_refused():
    with pytest.raises(ConfigError, match=r"Did you mean '\.jsonl'"):
        check_outputs(Path("r.json"), None)
