"""`add-subclass` and `remove-subclass` print what changed or why nothing did; test_subclasses.py runs them."""

import json
import shutil

import pytest

from normweave.cli.subclasses import show_check
from normweave.cli.terminal import Terminal

from .conftest import run


@pytest.fixture(scope="module")
def third(cloth):
    """Folder of the good images of a subclass that the bundle does not know."""
    return sorted((cloth.parent / "cloth").glob("*/train/good"))[2]


def test_the_comparison_of_scores_is_printed(capsys):
    moved = [["a.png", "cloth/red", "cloth/new"], ["b.png", "cloth/red", "cloth/red"]]
    show_check(Terminal(), {"tiles": 0, "equal": 0, "moved": []})
    show_check(Terminal(), {"tiles": 4, "equal": 2, "moved": moved})
    none, summary, nearer, used = capsys.readouterr().out.splitlines()

    assert "Give some with --check" in none
    assert summary == "scores of 2 of 4 other images are the same in every bit"
    assert nearer == "changed     a.png: nearer to cloth/new than to cloth/red"
    assert used == "changed     b.png: scored with a part of cloth/red before"


def test_an_existing_bundle_is_not_replaced(fusion_bundle, third):
    for command in (("add-subclass", fusion_bundle, third), ("remove-subclass", fusion_bundle)):
        result = run(*command, "--category", "cloth", "--subclass", "new", "-o", fusion_bundle)
        assert result.exit_code == 2
        assert "allow replacing it (--overwrite)" in result.stderr


@pytest.mark.parametrize("names", [("--category", "cloth"), ("--subclass", "new")])
def test_one_name_without_the_other_is_refused(fusion_bundle, third, tmp_path, names):
    result = run("add-subclass", fusion_bundle, third, *names, "-o", tmp_path / "new")
    assert result.exit_code == 2
    assert "--category and --subclass belong together" in result.stderr


def test_too_few_images_write_nothing(fusion_bundle, third, tmp_path):
    few = tmp_path / "few"
    few.mkdir()
    for path in sorted(third.iterdir())[:3]:
        shutil.copy(path, few)
    result = run(
        "add-subclass", fusion_bundle, few, "--category", "cloth", "--subclass", "new", "-o", tmp_path / "new", "--json"
    )
    assert result.exit_code == 2
    assert "at least 5 good images, got 3" in json.loads(result.stdout)["error"]
    assert not (tmp_path / "new").exists()
