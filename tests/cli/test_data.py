"""Data sets from the command line."""

import csv
import json
import shutil

from PIL import Image

from .conftest import run


def test_a_clean_data_set_has_no_fault(textiles):
    result = run("data", "check", textiles)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [
        "cloth/plain-ecru-diffuse, test: 3 good, 3 anomalous",
        "cloth/plain-ecru-diffuse, train: 12 good, 0 anomalous",
        "cloth/satin-navy-diffuse, test: 3 good, 3 anomalous",
        "cloth/twill-indigo-raking, test: 3 good, 3 anomalous",
        "cloth/twill-indigo-raking, train: 12 good, 0 anomalous",
        "42 images, 0 faults",
    ]


def test_faults_are_listed_with_exit_code_2(textiles, tmp_path):
    data = tmp_path / "cloth"
    shutil.copytree(textiles, data)
    broken = sorted(data.glob("cloth/*/train/good/*.png"))[0]
    broken.write_bytes(b"no image")
    mask = sorted(data.glob("cloth/*/ground_truth/*/*.png"))[0]
    mask.unlink()
    result = run("data", "check", data)
    assert result.exit_code == 2
    assert "unreadable image: " in result.stdout
    assert str(broken) in result.stdout
    assert "missing mask: " in result.stdout
    found = json.loads(run("data", "check", data, "--json").stdout)
    assert found["images"] == 42
    assert sum(row["good"] + row["anomalous"] for row in found["counts"]) == 42
    assert {"unreadable image", "missing mask"} == {fault["type"] for fault in found["faults"]}
    assert str(broken) in {fault["path"] for fault in found["faults"]}


def test_remarks_are_shown_and_are_no_faults(tmp_path):
    for number, name in enumerate(("good/1.png", "hole/2.png", "GT/hole/2.png", "GT/hole/9.png")):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (9, 9), number + 200).save(path)
    result = run("data", "check", tmp_path)
    assert result.exit_code == 0, result.output
    assert "remark: 1 images are not used, for example " in result.stdout
    assert result.stdout.endswith("2 images, 0 faults\n")
    found = json.loads(run("data", "check", tmp_path, "--json").stdout)
    assert found["faults"] == []
    assert "9.png" in found["remarks"][0]


def test_a_manifest_can_be_read_back(textiles, tmp_path):
    shutil.copytree(textiles / "cloth", tmp_path / "folders" / "cloth")
    table = tmp_path / "cloth.csv"
    result = run("data", "manifest", tmp_path / "folders", "-o", table)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{table}: 42 images\n"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 42
    assert {row["subclass"] for row in rows} == {
        "plain-ecru-diffuse",
        "twill-indigo-raking",
        "satin-navy-diffuse",
    }
    assert run("data", "check", table).exit_code == 0


def test_a_manifest_of_chosen_subclasses(textiles, tmp_path):
    table = tmp_path / "cloth.csv"
    result = run("data", "manifest", textiles, "-o", table, "--subclass", "satin-navy-diffuse", "--json")
    assert json.loads(result.stdout) == {"manifest": str(table), "images": 6}


def test_several_folders_become_one_manifest(textiles, tmp_path):
    """Each in its own layout: a folder with a manifest, and one of good images."""
    parts = tmp_path / "parts"
    parts.mkdir()
    for number, image in enumerate(sorted(textiles.glob("cloth/*/train/good/*.png"))):
        shutil.copy(image, parts / f"{number}.png")
    table = tmp_path / "all.csv"
    result = run("data", "manifest", textiles, parts, "-o", table)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{table}: 66 images\n"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["category"] for row in rows] == ["cloth"] * 42 + ["parts"] * 24
    assert all((tmp_path / row["image_path"]).is_file() for row in rows)
    assert {row["group"].split("/")[0] for row in rows} == {"cloth", ""}
    assert run("data", "check", table).exit_code == 0

    result = run("data", "manifest", textiles, parts, "-o", table, "--category", "parts", "--json")
    assert json.loads(result.stdout)["images"] == 24


def test_a_category_in_two_folders_is_refused(textiles, tmp_path):
    result = run("data", "manifest", textiles, textiles, "-o", tmp_path / "all.csv")
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert f"Category 'cloth' is in {textiles} and in {textiles}." in message
    assert "change its column category" in message
    assert not (tmp_path / "all.csv").exists()


def test_a_named_layout_is_that_of_every_folder(textiles, tmp_path):
    (tmp_path / "bare").mkdir()
    shutil.copy(next(textiles.glob("cloth/*/train/good/*.png")), tmp_path / "bare")
    result = run("data", "manifest", textiles, tmp_path / "bare", "-o", tmp_path / "a.csv", "--layout", "manifest")
    assert result.exit_code == 2
    assert "no manifest.csv" in result.stderr


def test_textures_are_made_from_the_seed(tmp_path):
    def made(name, seed):
        options = ["--train-images=1", "--test-images=0", "--defect-images=1", "--size=64"]
        result = run("data", "make-textures", tmp_path / name, *options, "--seed", seed)
        assert result.exit_code == 0, result.output
        assert result.stdout == f"{tmp_path / name / 'manifest.csv'}\n"
        return {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.png")}

    first = made("a", 1)
    assert len(first) == 6 + 10 + 10  # good images of six seen subclasses, a defective one of all ten, and its mask
    assert made("b", 1) == first
    assert made("c", 2) != first


def test_a_folder_that_is_not_there(tmp_path):
    result = run("data", "check", tmp_path / "gone")
    assert result.exit_code == 2
    assert str(tmp_path / "gone") in result.stderr
