"""On a cluster of two nodes each image has one row, equal to that of `normweave predict`, also after kills."""

import json
import os
import re
import shutil
from functools import partial
from pathlib import Path

import fsspec
import pyarrow
import pytest
from pyarrow import parquet

from clusters import nodes
from normweave.bridges.ray_predict import (
    COMPLETE,
    MOST_LOSSES,
    RUN,
    Counts,
    Job,
    check_losses,
    check_versions,
    check_visible,
    ending,
    predict,
    score_part,
    suffix_of,
    suitable_part,
    versions,
)
from normweave.bridges.ray_tasks import whole_batches
from normweave.cli.predict import find_images
from normweave.data import stored
from normweave.detector import Detector
from normweave.errors import ConfigError, DataError, MissingError, NormweaveError
from normweave.outcome.table import readable
from s3_server import s3_server

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Ray
]
PART = 4
"""Images of a part, as many as in a batch."""


@pytest.fixture(autouse=True)
def no_network():
    """Connections to this machine are allowed, unlike in the other tests of this folder."""


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An S3 server and what reaches it; the nodes of the cluster inherit the environment."""
    with s3_server(tmp_path_factory.mktemp("s3")):
        system = fsspec.filesystem("s3")
        system.mkdir("line")
        yield system


FATAL = """
import os, signal
from fsspec import AbstractFileSystem

class Fatal(AbstractFileSystem):
    protocol = "fatal"

    def info(self, path, **options):
        return {"name": path, "type": "file", "size": 1}

    def cat_file(self, path, **options):
        os.kill(os.getpid(), signal.SIGSEGV)
"""


@pytest.fixture(scope="module")
def fatal(tmp_path_factory):
    """Install a store whose package ends the process that reads an image."""
    folder = tmp_path_factory.mktemp("packages")
    (folder / "fatal.py").write_text(FATAL)
    (folder / "fatal-1.dist-info").mkdir()
    (folder / "fatal-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fatal\nVersion: 1\n")
    (folder / "fatal-1.dist-info" / "entry_points.txt").write_text("[fsspec.specs]\nfatal = fatal:Fatal\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(str(folder))
        fsspec.register_implementation("fatal", "fatal.Fatal")
        yield


@pytest.fixture(scope="module")
def cluster(store, fatal):
    with nodes(2) as running:
        yield running


@pytest.fixture(scope="module")
def images(photos, store, tmp_path_factory):
    """Sources of every form: files, an unreadable and a missing one, images of a store and in a table of it."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "bad.png").write_text("no image")
    shutil.copy(photos[0], os.fsencode(folder) + b"/\xff.png")
    shutil.copy(photos[0], folder / "line\u2028separator.png")
    store.put(photos[0], "line/images/0.png")
    contents = [Path(path).read_bytes() for path in photos]
    parquet.write_table(pyarrow.table({"image": contents}), folder / "t.parquet")
    store.put(str(folder / "t.parquet"), "line/t.parquet")
    missing = [str(folder / "bad.png"), "s3://line/images/gone.png", str(folder / "gone.png")]
    return [
        os.fsdecode(os.fsencode(folder) + b"/\xff.png"),
        str(folder / "line\u2028separator.png"),
        *photos,
        "s3://line/images",
        *missing,
        "s3://line/t.parquet",
        *photos,
    ]


@pytest.fixture(scope="module")
def expected(bundle, images):
    """The rows of one machine."""
    return [without_time(outcome.as_dict()) for outcome in Detector.load(bundle, threads=1).stream(find_images(images))]


def without_time(row):
    return {name: value for name, value in row.items() if name != "latency_ms"}


def run(bundle, images, output, cluster, **options):
    listed = partial(find_images, images)
    return predict(bundle, listed, output=output, address=cluster.address, part_images=PART, **options)


def counts(expected):
    names = ["unreadable" if row["error"] else row["verdict"] for row in expected]
    return Counts(images=len(names), **{name: names.count(name) for name in set(names)})


def found(folder):
    """The rows of the parts of a folder, in their order."""
    lines = [line for path in sorted(folder.glob("part-*")) for line in path.read_bytes().splitlines()]
    return [without_time(json.loads(line)) for line in lines]


def test_two_nodes_give_the_rows_of_one_machine_although_nodes_are_killed(
    bundle, images, expected, cluster, tmp_path, monkeypatch
):
    """One node is killed after some parts, then the other one, both replaced.

    The last image ends every process that reads it.
    """
    here = str(Path.cwd())
    monkeypatch.chdir(tmp_path)  # the nodes were started in another folder
    expected = [row | {"error": row["error"] and row["error"].replace(here, str(tmp_path))} for row in expected]
    error = "fatal://line/1.png: its decoder ended its process with signal 11 (SIGSEGV)."
    unreadable = next(row for row in expected if row["error"])
    expected.append(unreadable | {"image_path": "fatal://line/1.png", "error": error})
    images = [*images, "fatal://line/1.png"]
    output, killed = tmp_path / "r.jsonl", []

    def kill(task, done, total):
        if len(killed) < 2 and done > len(expected) * (1 + len(killed)) / 4:
            killed.append(cluster.nodes.pop(0))
            cluster.kill(killed[-1])
            cluster.nodes.append(cluster.add())

    assert run(bundle, images, "r.jsonl", cluster, progress=kill) == counts(expected)
    assert len(killed) == 2
    assert found(output) == expected
    assert sorted(path.name for path in output.iterdir())[:2] == [COMPLETE, RUN]
    assert len(list(output.iterdir())) == 2 + -(-len(expected) // PART)
    assert json.loads((output / COMPLETE).read_text())["images"] == len(expected)

    (output / COMPLETE).unlink()
    os.truncate(max(output.glob("part-*")), 0)  # as of a machine that lost power
    assert run(bundle, images, "r.jsonl", cluster, resume=True) == counts(expected)
    assert found(output) == expected

    with pytest.raises(ConfigError, match=r"--threads must be at most .* of a machine of the cluster, 1, got 99\."):
        run(bundle, images, "never.jsonl", cluster, threads=99)
    assert not Path("never.jsonl").exists()


def test_the_head_is_killed_and_the_command_started_again(bundle, images, expected, cluster, store):
    """The results are in a store. The cluster is gone then, so the second run is on this machine alone."""
    output, seen = "s3://line/r.parquet", []

    def kill(task, done, total):
        if not seen and done >= 8:
            seen.append(done)
            cluster.kill(cluster.head)

    with pytest.raises(NormweaveError, match=r"(was lost|ended the work)"):
        run(bundle, images, output, cluster, progress=kill)
    store.invalidate_cache()
    kept = {path: store.info(path)["LastModified"] for path in store.glob("line/r.parquet/part-*")}
    assert seen
    assert 0 < len(kept) < -(-len(expected) // PART)
    cluster.address = "local"
    assert run(bundle, images, output, cluster, resume=True) == counts(expected)
    store.invalidate_cache()
    found = []
    for path in sorted(store.glob("line/r.parquet/part-*")):
        with store.open(path) as file:
            found += parquet.read_table(file).to_pylist()
    assert [without_time(row) for row in found] == readable(expected)
    assert all(store.info(path)["LastModified"] == time for path, time in kept.items())


# ── what is refused before a cluster is started ──────────────────────────────────────────────────────────────────────


class Nowhere:
    address = "127.0.0.1:1"


@pytest.fixture
def begun(bundle, tmp_path):
    """The folder of an interrupted run."""
    folder = tmp_path / "r.jsonl"
    folder.mkdir()
    (folder / RUN).write_text(json.dumps({"bundle_hash": Detector.load(bundle).bundle_hash, "part_images": PART}))
    return folder


@pytest.mark.parametrize(
    ("change", "resume", "what"),
    [
        (lambda folder: None, False, r"contains _run\.json, as of an interrupted run\. Resume it \(--resume\)"),
        (lambda folder: (folder / COMPLETE).write_text("{}"), True, r"is complete\. Leave out --resume"),
        (lambda folder: (folder / COMPLETE).write_text("{}"), False, r"is complete\. Give a new folder"),
        (lambda folder: (folder / RUN).write_text("{}"), True, r"but no readable _run\.json\. Give a new folder"),
        (
            lambda folder: (folder / RUN).write_text('{"bundle_hash": "b", "part_images": 4}'),
            True,
            r"was written with another bundle \(b…, this is .*Resume with that bundle, or give a new folder",
        ),
    ],
)
def test_a_folder_of_another_run_is_refused(bundle, images, begun, change, resume, what):
    change(begun)
    with pytest.raises(DataError, match=what):
        run(bundle, images, str(begun), Nowhere(), resume=resume)


def test_a_part_with_fewer_rows_than_images_was_cut(tmp_path):
    """Also in a folder that was given with a slash at its end."""
    images = [f"{number}.png" for number in range(4)]
    rows = [{"image_path": name, "verdict": "normal", "error": None} for name in images[:3]]
    (tmp_path / "part-000000008.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = Job("run", None, "b", f"{tmp_path}/", ".jsonl", str(tmp_path), 1, "cpu", {}, 4)
    result = score_part({"first": [8], "images": [json.dumps(images)], "file": ['""']}, job)
    error = json.loads(result["error"][0])
    assert error["type"] == "DataError"
    where = f"{tmp_path}/part-000000008.jsonl"
    assert error["text"].startswith(f"{where} has 3 rows, but this run has 4 images from 9 on in this part.")
    assert "remove it, then resume" in error["text"]


@pytest.mark.parametrize(
    ("images", "at_once", "part"),
    [(100, 2, 64), (1920, 2, 80), (7680, 2, 256), (131072, 400, 64), (5000, 0, 256)],
)
def test_parts_are_large_unless_processors_would_have_few(images, at_once, part):
    """0: no machine has joined yet."""
    assert suitable_part(images, at_once) == part
    assert whole_batches(part, 24) == {64: 72, 80: 96, 256: 264}[part]


def test_a_file_in_place_of_the_folder_is_refused(bundle, images, tmp_path):
    (tmp_path / "r.jsonl").touch()
    with pytest.raises(DataError, match=r"r\.jsonl is a file, and with --ray the results are a folder of parts\. Give"):
        run(bundle, images, str(tmp_path / "r.jsonl"), Nowhere())


def test_without_a_cluster_no_run_is_begun(bundle, images, tmp_path):
    with pytest.raises(MissingError, match="No Ray cluster answers"):
        run(bundle, images, str(tmp_path / "r.jsonl"), Nowhere())
    assert not (tmp_path / "r.jsonl").exists()


def test_a_part_that_cannot_be_written_is_an_error_with_its_cause(bundle, photos, tmp_path):
    (tmp_path / "file").touch()
    job = Job(
        run="r",
        files=None,
        bundle_hash="b",
        output=str(tmp_path / "file" / "r.jsonl"),
        suffix=".jsonl",
        current_folder=str(tmp_path),
        threads=1,
        device="cpu",
        versions={},
        batch=PART,
    )
    result = score_part({"first": [64], "images": [json.dumps([photos[0]])], "file": ['""']}, job)
    error = json.loads(result["error"][0])
    assert error["type"] == "DataError"
    assert re.search(
        r"could not score the images from 65 on and write them to .*Not a directory.* then resume\.", error["text"]
    )


def test_an_image_whose_decoder_ends_its_process_is_found(fatal, photos, tmp_path):
    (tmp_path / "bad.png").write_text("no image")
    images = [photos[0], str(tmp_path / "bad.png"), stored.UrlImage("fatal://line/1.png"), photos[1]]
    assert ending(images) == {2: "fatal://line/1.png: its decoder ended its process with signal 11 (SIGSEGV)."}


def test_a_part_that_ends_its_process_again_and_again_ends_the_run():
    check_losses(MOST_LOSSES - 1, ["a.png", "b.png"])
    with pytest.raises(
        NormweaveError, match=r"4 processes of .* the 2 images from a\.png on, and each .* Then resume\."
    ):
        check_losses(MOST_LOSSES, ["a.png", "b.png"])


def test_other_versions_are_refused():
    check_versions(versions())
    with pytest.raises(
        MissingError, match=r"The worker .* has .*, and the machine of the command \{'numpy': '0'\}\. Ins"
    ):
        check_versions({"numpy": "0"})


def test_a_file_that_only_the_machine_of_the_command_sees_is_no_unreadable_image(tmp_path):
    check_visible("")
    check_visible(str(tmp_path))
    with pytest.raises(DataError, match=r"The worker .* does not see .*a\.png, which the machine .* Mount the folder"):
        check_visible(str(tmp_path / "a.png"))


def test_the_suffix_of_the_folder_is_the_format():
    assert suffix_of("s3://bucket/r.parquet/") == ".parquet"
    with pytest.raises(ConfigError, match=r"Unknown suffix of --output '\.csv'\. Known: \.jsonl, \.parquet\."):
        suffix_of("r.csv")
