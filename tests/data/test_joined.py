"""Joined data sets keep their groups and categories apart."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from normweave.config import DataConfig
from normweave.data import layouts, splits
from normweave.data.joined import join
from normweave.errors import DataError
from normweave.types import Sample


def made(category: str, *groups: str | None) -> list[Sample]:
    return [
        Sample(image_path=Path(f"{category}{number}.png"), category=category, group=group)
        for number, group in enumerate(groups)
    ]


def test_groups_of_the_same_name_stay_apart() -> None:
    joined = join([("a", made("tile", "part1", "part1", None)), ("b", made("board", "part1"))])

    assert [sample.group for sample in joined] == ["tile/part1", "tile/part1", None, "board/part1"]
    assert [sample.category for sample in joined] == ["tile"] * 3 + ["board"]


def test_a_group_over_two_categories_of_one_set_stays_one() -> None:
    lot = made("inside", "lot1") + made("cover", "lot1")

    joined = join([("a", lot), ("b", made("tile", "lot1"))])

    assert [sample.group for sample in joined] == ["cover/lot1", "cover/lot1", "tile/lot1"]


def test_only_the_groups_change() -> None:
    rows = made("tile", "part1")
    rows[0] = replace(rows[0], subclass="light", split="test", label="anomalous", mask_path=Path("mask.png"))

    assert join([("a", rows), ("b", made("board"))]) == [replace(rows[0], group="tile/part1")]


def test_a_single_set_stays_as_it_is() -> None:
    assert join([("a", made("tile", "part1", None))]) == made("tile", "part1", None)


def test_a_category_of_two_sets_is_refused() -> None:
    text = (
        "Category 'board' is in one.csv and in two. Categories of joined data sets must have different names: rename "
        "a folder, or write one set as a manifest and change its column category."
    )
    with pytest.raises(DataError, match=re.escape(text)):
        join([("one.csv", made("board", None) + made("tile", None)), ("two", made("board", None))])


@pytest.mark.data
def test_joining_does_not_change_which_tiles_train(data_root: Path) -> None:
    """Boards bring their splits along, so that drawing those of the tiles is as if the tiles were alone."""
    tiles = layouts.read(data_root / "magnetic-tiles", DataConfig())
    boards = layouts.read(data_root / "deep-pcb", DataConfig())

    joined = splits.complete(join([("tiles", tiles), ("boards", boards)]), seed=0)

    alone = splits.complete(tiles, seed=0) + splits.complete(boards, seed=0)
    assert [sample.split for sample in joined] == [sample.split for sample in alone]
    assert {sample.category for sample in joined if sample.split == "train"} == {"magnetic_tiles", "deep_pcb"}
