"""Plans say what is wrong with them."""

from pathlib import Path

import pytest

from normweave.benchmark.plan import read_plan
from normweave.benchmark.run import Run
from normweave.errors import ConfigError

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


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("model: patchcore", "modle: patchcore", "Did you mean 'model'"),
        ("protocols: [given]", "protocols: [givn]", "Did you mean 'given'"),
        ("title: A table", "", "title missing"),
        ("name: Memory, ", "", "name missing"),
        ("seeds: [0, 1]", "seeds: [0, 1", "cannot be read as a plan"),
    ],
)
def test_what_is_wrong_is_named(old: str, new: str, says: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=says):
        read_plan(written(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "plans").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_plan_of_ours_holds_settings_that_exist(path: Path):
    plan = read_plan(path)
    for item in plan.data:
        for method in plan.methods:
            Run(method=method, data=item, root="data", protocol=item.protocols[0], fold="all", seed=0).config  # noqa: B018
