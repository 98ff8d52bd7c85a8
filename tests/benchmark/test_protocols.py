"""Folds: nothing that tests has trained."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normweave.benchmark.protocols import folds
from normweave.errors import DataError
from normweave.types import Sample


def tiles(parts: int, conditions: int = 3) -> list[Sample]:
    """Every part is photographed under every condition; each fifth part has a defect."""
    return [
        Sample(
            image_path=Path(f"{condition}_{part}.png"),
            category="tile",
            subclass=f"exp{condition}",
            group=f"part{part}",
            label="anomalous" if part % 5 == 0 else "normal",
        )
        for part in range(parts)
        for condition in range(conditions)
    ]


def groups(samples) -> set[str]:
    return {sample.group for sample in samples}


@given(parts=st.integers(6, 40), seed=st.integers(0, 9))
def test_no_part_stands_on_both_sides(parts: int, seed: int):
    for protocol in ("seen", "leave-one-subclass-out", "given"):
        for fold in folds(tiles(parts), protocol, seed=seed):
            for tests in fold.tests.values():
                assert not groups(fold.samples) & groups(tests)
            assert all(sample.label == "normal" for sample in fold.samples)


def test_the_subclass_that_is_left_out_tests_and_no_other():
    made = folds(tiles(20), "leave-one-subclass-out", seed=0)
    assert [fold.name for fold in made] == ["without exp0", "without exp1", "without exp2"]
    for left_out, fold in zip(("exp0", "exp1", "exp2"), made, strict=True):
        assert {sample.subclass for sample in fold.tests["unseen"]} == {left_out}
        assert left_out not in {sample.subclass for sample in fold.samples}
        assert {sample.label for sample in fold.tests["unseen"]} == {"normal", "anomalous"}


def tiles_and_boards() -> list[Sample]:
    boards = [
        replace(sample, image_path=Path(f"b{sample.image_path}"), category="board", group=f"b{sample.group}")
        for sample in tiles(20)
    ]
    return tiles(20) + boards


def test_folds_of_several_categories_have_names_of_their_own():
    names = [fold.name for fold in folds(tiles_and_boards(), "leave-one-subclass-out", seed=0)]
    assert names == [
        f"without {category}/exp{number}" for category in ("board", "tile") for number in range(3)
    ]


def test_one_model_sees_all_categories():
    (fold,) = folds(tiles_and_boards(), "seen", seed=0)
    assert {sample.category for sample in fold.samples} == {"board", "tile"}
    assert {sample.category for sample in fold.tests["seen"]} == {"board", "tile"}


def test_given_splits_keep_kinds_without_training_apart():
    samples = [
        Sample(image_path=Path(f"{kind}{split}{number}.png"), category="cloth", subclass=kind, split=split)
        for kind, split in (("red", "train"), ("red", "test"), ("blue", "test"))
        for number in range(2)
    ]
    (fold,) = folds(samples, "given", seed=0)
    assert {sample.subclass for sample in fold.tests["seen"]} == {"red"}
    assert {sample.subclass for sample in fold.tests["unseen"]} == {"blue"}


def test_one_subclass_cannot_be_left_out():
    with pytest.raises(
        DataError, match=re.escape("needs at least two subclasses with training images, got ['tile/exp0']")
    ):
        folds(tiles(10, conditions=1), "leave-one-subclass-out", seed=0)


@pytest.mark.data
def test_magnetic_tiles_are_divided_as_their_readme_says(data_root: Path):
    from normweave.config import DataConfig
    from normweave.data.layouts import read

    samples = read(data_root / "magnetic-tiles", DataConfig())
    with_good = {sample.group for sample in samples if sample.label == "normal"}
    damaged = {sample.group for sample in samples if sample.label == "anomalous"}
    (fold,) = folds(samples, "seen", seed=0)
    assert groups(fold.samples) <= with_good - damaged
    assert abs(len(groups(fold.samples)) - len(with_good) / 2) <= 1
    assert sum(sample.label == "anomalous" for sample in fold.tests["seen"]) == 258
