"""Reviewed images become data for the other commands, and the rates that they measure are printed."""

import asyncio
import csv
import json
import shutil
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import pytest

from normweave.detector import Detector
from normweave.serve.config import ServeConfig
from normweave.serve.files import Files
from normweave.serve.records import Review
from normweave.serve.service import InspectionService, Upload
from normweave.serve.store import Store

from .conftest import SMALL, run


class Reviewed(NamedTuple):
    """The data folder of a server, and its bundle."""

    folder: Path
    bundle: Path


@pytest.fixture(scope="module")
def reviewed(textiles, trained, tmp_path_factory):
    """A bundle at 50 % false alarms, and the data folder of a server that inspected all test images with it.

    Every image is reviewed.
    """
    folder = tmp_path_factory.mktemp("server")
    bundle = folder / "cloth.bundle"
    Detector.load(trained.bundle, threads=1, device="cpu").with_rate(0.5).save(bundle)
    with closing(Files(folder / "files")) as files, closing(Store.open(folder / "store.sqlite")) as store:
        detector = Detector.load(bundle, threads=1, device="cpu")
        service = InspectionService(detector, store=store, files=files, config=ServeConfig())
        paths = sorted(textiles.glob("cloth/*/test/*/*.png"))
        uploads = [Upload(path.name, path.read_bytes()) for path in paths]
        found = asyncio.run(service.inspect(uploads, source="api", actor="test"))
        for path, inspection in zip(paths, found, strict=True):
            good = path.parent.name == "good"
            store.review(
                inspection.id,
                Review(
                    at=datetime.now(UTC),
                    decision="accept" if good else "reject",
                    reviewer="Ada",
                    defect="" if good else path.parent.name,
                ),
            )
        service.stop()
    return Reviewed(folder, bundle)


def test_a_manifest_for_the_other_commands(reviewed, tmp_path):
    manifest = tmp_path / "reviewed.csv"
    result = run("data", "from-reviews", reviewed.folder, "-o", manifest)
    assert result.exit_code == 0, result.output
    assert f"{manifest}: 9 good images (train), 9 defective ones (test)\n" in result.stdout
    checked = run("data", "check", manifest)
    assert checked.exit_code == 0, checked.output
    assert checked.stdout.endswith("18 images, 0 faults\n")

    bundle = tmp_path / "cloth.bundle"
    shutil.copytree(reviewed.bundle, bundle)
    recalibrated = run("calibrate", bundle, manifest, "--false-alarm-rate", "0.2", "--json")
    assert recalibrated.exit_code == 0, recalibrated.output
    assert json.loads(recalibrated.stdout)["calibration_images"] == 9

    options = [
        "--model",
        "dfm",
        "--no-cache",
        "--seed",
        "1",
        "--json",
        *SMALL,
        "--set=data.calibration=cross-validation",
    ]
    refitted = run("train", manifest, "-o", tmp_path / "again.bundle", *options)
    assert refitted.exit_code == 0, refitted.output
    assert json.loads(refitted.stdout)["fit_images"] == 9  # the good ones only

    again = run("calibrate", tmp_path / "again.bundle", manifest)
    assert again.exit_code == 2
    assert "was used in training, so it cannot be used for calibration" in " ".join(again.stderr.split())


def test_rates_and_operating_points_are_printed_and_not_used(reviewed, tmp_path):
    options = ["-o", tmp_path / "m.csv", "--bundle", reviewed.bundle, "--detection", "0"]
    text = run("data", "from-reviews", reviewed.folder, *options)
    assert text.exit_code == 0, text.output
    assert "Detection rate: " in text.stdout
    assert "if at most 5 % of the decisions are wrong" in text.stdout
    assert "false alarms, measured" in text.stdout
    command = f"normweave calibrate {reviewed.bundle} GOOD_IMAGES --false-alarm-rate 0.2"
    assert f"It is not used until you do so: {command}\n" in text.stdout
    result = run("data", "from-reviews", reviewed.folder, *options, "--wrong-reviews", "0", "--json")
    found = json.loads(result.stdout)
    assert (found["good"], found["defective"], found["removed"], found["contradictions"]) == (9, 9, 0, [])
    rates = found["rates"]
    assert rates["inspections"] == 18
    assert rates["measured"]["wrong_reviews"] == 0
    assert (rates["present"], rates["proposed"]) == (0.5, 0.2)
    assert found["command"] == command
    names = {row["defect"] for row in rows_of(tmp_path / "m.csv") if row["defect"]}
    assert set(rates["measured"]["detection_by_defect"]) == names
    assert Detector.load(reviewed.bundle).calibration.false_alarm_rate == 0.5


def rows_of(manifest):
    with manifest.open(newline="") as file:
        return list(csv.DictReader(file))


def test_images_of_a_part_are_a_group(reviewed, tmp_path):
    result = run("data", "from-reviews", reviewed.folder, "-o", tmp_path / "m.csv", "--part", r"^00(\d)", "--json")
    assert result.exit_code == 0, result.output
    assert {(row["name"], row["group"]) for row in rows_of(tmp_path / "m.csv")} == {
        (f"00{number}.png", str(number)) for number in range(3)
    }
    assert sum(stratum["images"] for stratum in json.loads(result.stdout)["rates"]["measured"]["strata"]) == 3


def test_wrong_calls(reviewed, tmp_path):
    def refused(*arguments):
        result = run("data", "from-reviews", *arguments, "-o", tmp_path / "m.csv")
        assert result.exit_code == 2
        return " ".join(result.stderr.split())

    assert "has no store.sqlite" in refused(tmp_path)
    assert "'(' is no regular expression" in refused(reviewed.folder, "--part", "(")
    assert "a server uses its own" in refused("http://127.0.0.1:9", "--database", "postgresql://x/y")
    assert "does not answer" in refused("http://127.0.0.1:9")
    assert "must be in [0, 0.5)" in refused(reviewed.folder, "--wrong-reviews", "0.7")
    assert "must be in [0, 0.5)" in refused("http://127.0.0.1:9", "--wrong-reviews", "0.7")
    missing = tmp_path / "none.txt"
    assert f"token cannot be read from {missing}" in refused("http://127.0.0.1:9", "--token-file", missing)
    missing.write_bytes(b"\xff\xfe\xff")
    assert f"token cannot be read from {missing}" in refused("http://127.0.0.1:9", "--token-file", missing)
    missing.unlink()
    other = run("data", "from-reviews", reviewed.folder, "-o", tmp_path / "m.txt")
    assert (other.exit_code, "a manifest ends in .csv or .parquet" in other.stderr) == (2, True)
    assert list(tmp_path.iterdir()) == []  # no image is copied for a call that is wrong


def test_images_that_several_servers_share(reviewed, tmp_path):
    """As with serve --images: without their place, all would be called removed by retention."""
    folder, shared, manifest = tmp_path / "server-1", tmp_path / "images", tmp_path / "m.csv"
    folder.mkdir()
    shutil.copy(reviewed.folder / "store.sqlite", folder)
    shutil.copytree(reviewed.folder / "files", shared)
    without = run("data", "from-reviews", folder, "-o", manifest)
    assert (without.exit_code, f"no folder {folder / 'files'} with the images" in without.stderr) == (2, True)
    result = run("data", "from-reviews", folder, "-o", manifest, "--images", shared, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["removed"] == 0
    direct = tmp_path / "direct" / "m.csv"
    run("data", "from-reviews", reviewed.folder, "-o", direct)
    assert rows_of(manifest) == rows_of(direct)
    of_server = run("data", "from-reviews", "http://127.0.0.1:9", "-o", manifest, "--images", shared)
    assert (of_server.exit_code, "a server uses its own" in of_server.stderr) == (2, True)
