"""Plans are read from YAML, and errors name the key, the allowed values and the cure."""

from pathlib import Path

import pytest

from normweave.benchmark.plan import DataPlan, read_plan
from normweave.benchmark.run import Run
from normweave.errors import ConfigError
from normweave.types import Sample

GOOD = """
title: A table
data:
  - {name: cloth, path: cloth, protocols: [given]}
methods:
  - {name: Memory, model: patchcore, set: [head.share=0.2]}
seeds: [0, 1]
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "plan.yaml"
    path.write_text(text)
    return path


def test_a_plan_is_read(tmp_path: Path):
    plan = read_plan(written(tmp_path, GOOD))
    assert plan.seeds == (0, 1)
    assert plan.data[0].protocols == ("given",)
    run = Run(method=plan.methods[0], data=plan.data[0], root="data", protocol="given", fold="all", seed=1)
    assert run.config.head.share == 0.2
    assert run.config.seed == 1


def test_a_plan_names_the_unseen_subclasses(tmp_path: Path):
    fixed = "protocols: [unseen-subclass, leave-k-out], unseen: [b, d], leave_out: 3"
    (item,) = read_plan(written(tmp_path, GOOD.replace("protocols: [given]", fixed))).data
    samples = [
        Sample(image_path=tmp_path / f"{name}{number}.png", subclass=name, split=split)
        for name in "abcd"
        for number, split in enumerate(("train", "test"))
    ]
    (fold,) = item.folds(samples, "unseen-subclass", seed=0)
    assert {sample.subclass for sample in fold.tests["unseen"]} == {"b", "d"}
    first, second = item.folds(samples, "leave-k-out", seed=0)
    assert (len(first.tests["unseen"]), len(second.tests["unseen"])) == (3, 1)


def test_changes_of_the_training_images_are_named_in_the_rows_and_are_part_of_the_key(tmp_path: Path):
    def first(more: str) -> DataPlan:
        return read_plan(written(tmp_path, GOOD.replace("protocols: [given]", f"protocols: [given]{more}"))).data[0]

    items = [first(more) for more in ("", ", contamination: 0.1", ", contamination: 0.1, train_images: 10")]
    assert [item.name for item in items] == [
        "cloth",
        "cloth (contamination 0.1)",
        "cloth (train_images 10, contamination 0.1)",
    ]
    method = read_plan(written(tmp_path, GOOD)).methods[0]
    runs = [Run(method=method, data=item, root="data", protocol="given", fold="all", seed=0) for item in items]
    assert len({run.key for run in runs}) == 3
    samples = [
        Sample(image_path=tmp_path / f"{split}{label}{number}.png", split=split, label=label)
        for split, label in (("train", "normal"), ("test", "normal"), ("test", "anomalous"))
        for number in range(20)
    ]
    assert [len(item.folds(samples, "given", seed=0)[0].samples) for item in items] == [20, 22, 11]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: patchcore", "modle: patchcore", "Did you mean 'model'"),
        ("protocols: [given]", "protocols: [givn]", "Did you mean 'given'"),
        ("title: A table", "", "title missing"),
        ("name: Memory, ", "", "name missing"),
        ("seeds: [0, 1]", "seeds: [0, 1", "Could not read the plan"),
        ("set: [head.share=0.2]", "baseline: Memory", "baseline of 'Memory' 'Memory'"),
        ("set: [head.share=0.2]", "baseline: Plain", "Name another method of the plan"),
        (
            "seeds: [0, 1]",
            "baseline: Plain",
            "'Plain'.* Known: Memory. Name a method of the plan",
        ),
        ("path: cloth, ", "", "got no source of images. Give one of path, textures, parts"),
        (
            "path: cloth, ",
            "path: cloth, parts: [{path: tiles}], ",
            "got path and parts. Give one of path, textures",
        ),
        (
            "path: cloth, ",
            "parts: [{layout: folders}], ",
            "cloth: parts: got no source of images. Give one of path, t",
        ),
        ("path: cloth, ", "parts: [{paht: tiles}], ", "Did you mean 'path'"),
        ("[given]", "[given], contamination: 0.6", "cloth: contamination must be a share between 0 and 0.5, got 0.6"),
        ("[given]", "[given], contamination: -0.1", "contamination must be a share between 0 and 0.5, got -0.1. 0.1 m"),
        ("[given]", "[given], contamination: some", "contamination must be a share between 0 and 0.5, got 'some'"),
        ("[given]", "[given], train_images: 2", "train_images must be at least 3, or 0 for all images, got 2. Set it"),
        (
            "[given]",
            "[given], train_images: 5.0",
            "cloth: train_images must be at least 3, or 0 for all images, got 5.0",
        ),
        ("path: cloth, ", "parts: [{path: tiles, parts: []}], ", "Unknown key of .*: cloth: parts 'parts'"),
    ],
)
def test_errors_name_what_is_wrong(old: str, new: str, message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        read_plan(written(tmp_path, GOOD.replace(old, new)))


def test_the_key_of_a_run_depends_on_its_parts_and_not_on_its_baseline(tmp_path: Path):
    def key(text: str) -> str:
        plan = read_plan(written(tmp_path, text))
        method = plan.methods[0]
        return Run(method=method, data=plan.data[0], root="data", protocol="given", fold="all", seed=1).key

    parts = "parts: [{path: tiles}, {path: boards, layout: deep_pcb}], "
    plan = GOOD.replace("path: cloth, ", parts)
    assert len(read_plan(written(tmp_path, plan)).data[0].parts) == 2
    other = [
        GOOD,
        plan.replace("path: boards", "path: cards"),
        plan.replace("layout: deep_pcb", "layout: folders"),
        plan.replace("path: boards, layout: deep_pcb", "textures: {train_images: 3}"),
        plan.replace("{path: tiles}", "{path: tiles, set: [data.category=tiles]}"),
    ]
    assert len({key(text) for text in [plan, *other]}) == 6

    two = plan.replace("seeds:", "  - {name: Plain, model: dfm}\nseeds:")
    assert key(two) == key(plan)
    assert key(two.replace("model: patchcore", "model: patchcore, baseline: Plain")) == key(plan)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "plans").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_plan_in_the_repository_has_valid_settings(path: Path):
    plan = read_plan(path)
    for item in plan.data:
        for method in plan.methods:
            Run(method=method, data=item, root="data", protocol=item.protocols[0], fold="all", seed=0).config  # noqa: B018
