"""Plans say what is wrong with them."""

from pathlib import Path

import pytest

from normweave.benchmark.plan import read_plan
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


def test_a_plan_says_which_subclasses_are_unseen(tmp_path: Path):
    fixed = "protocols: [unseen-subclass, leave-k-out], unseen: [b, d], leave_out: 3"
    (item,) = read_plan(written(tmp_path, GOOD.replace("protocols: [given]", fixed))).data
    samples = [
        Sample(image_path=tmp_path / f"{kind}{number}.png", subclass=kind, split=split)
        for kind in "abcd"
        for number, split in enumerate(("train", "test"))
    ]
    (fold,) = item.folds(samples, "unseen-subclass", seed=0)
    assert {sample.subclass for sample in fold.tests["unseen"]} == {"b", "d"}
    first, second = item.folds(samples, "leave-k-out", seed=0)
    assert (len(first.tests["unseen"]), len(second.tests["unseen"])) == (3, 1)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("model: patchcore", "modle: patchcore", "Did you mean 'model'"),
        ("protocols: [given]", "protocols: [givn]", "Did you mean 'given'"),
        ("title: A table", "", "title missing"),
        ("name: Memory, ", "", "name missing"),
        ("seeds: [0, 1]", "seeds: [0, 1", "cannot be read as a plan"),
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
        ("path: cloth, ", "parts: [{path: tiles, parts: []}], ", "Unknown key of .*: cloth: parts 'parts'"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, says: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        read_plan(written(tmp_path, GOOD.replace(old, new)))


def test_parts_decide_the_run_and_a_baseline_does_not(tmp_path: Path):
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
def test_every_plan_of_ours_holds_settings_that_exist(path: Path):
    plan = read_plan(path)
    for item in plan.data:
        for method in plan.methods:
            Run(method=method, data=item, root="data", protocol=item.protocols[0], fold="all", seed=0).config  # noqa: B018
