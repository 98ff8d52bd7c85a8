"""Folds: nothing that tests has trained."""

import re
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normweave.benchmark.protocols import Protocol, folds
from normweave.data import splits
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
    for protocol in get_args(Protocol):
        samples = tiles_and_boards(parts) if protocol == "multi-category" else tiles(parts)
        made = folds(samples, protocol, seed=seed, unseen=("exp1",))
        assert made
        for fold in made:
            assert fold.tests
            for tests in fold.tests.values():
                assert not groups(fold.samples) & groups(tests)
            assert all(sample.label == "normal" for sample in fold.samples)
            seen = {sample.subclass_name for sample in fold.samples}
            assert {sample.subclass_name for sample in fold.tests.get("seen", ())} <= seen
            assert not {sample.subclass_name for sample in fold.tests.get("unseen", ())} & seen


def test_no_file_stands_on_both_sides(tmp_path: Path):
    """Copies of one file, without groups: fit, calibration and test get the file whole, under every protocol."""
    samples = []
    for subclass in ("a", "b", "c"):
        for number in range(12):
            path = tmp_path / f"{subclass}{number}.png"
            path.write_bytes(f"picture {number // 2}".encode())  # each content twice in every subclass
            label = "anomalous" if number >= 10 else "normal"
            samples.append(Sample(image_path=path, category="cloth", subclass=subclass, label=label))
            samples.append(replace(samples[-1], image_path=path.with_suffix(".jpg"), category="felt"))
            path.with_suffix(".jpg").write_bytes(path.read_bytes())
    for protocol in get_args(Protocol):
        for fold in folds(samples, protocol, seed=0, unseen=("b",)):
            division = splits.divide(fold.samples, calibration_share=0.3, at_least=1, seed=0)
            sets = (division.fit, division.calibration, *fold.tests.values())
            contents = [{sample.image_path.read_bytes() for sample in rows} for rows in sets]
            sides = [*contents[:2], set().union(*contents[2:])]
            assert all(sides)
            assert sum(map(len, sides)) == len(set().union(*sides))


def test_the_subclass_that_is_left_out_tests_and_no_other():
    made = folds(tiles(20), "leave-one-subclass-out", seed=0)
    assert [fold.name for fold in made] == ["without exp0", "without exp1", "without exp2"]
    for left_out, fold in zip(("exp0", "exp1", "exp2"), made, strict=True):
        assert {sample.subclass for sample in fold.tests["unseen"]} == {left_out}
        assert left_out not in {sample.subclass for sample in fold.samples}
        assert {sample.label for sample in fold.tests["unseen"]} == {"normal", "anomalous"}


def tiles_and_boards(parts: int = 20) -> list[Sample]:
    boards = [
        replace(sample, image_path=Path(f"b{sample.image_path}"), category="board", group=f"b{sample.group}")
        for sample in tiles(parts)
    ]
    return tiles(parts) + boards


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


def test_the_subclasses_that_a_plan_names_only_test():
    (fold,) = folds(tiles_and_boards(), "unseen-subclass", seed=0, unseen=("exp1", "board/exp2"))
    unseen = {"tile/exp1", "board/exp1", "board/exp2"}
    assert {sample.subclass_name for sample in fold.tests["unseen"]} == unseen
    assert {sample.subclass_name for sample in fold.samples} == {"tile/exp0", "tile/exp2", "board/exp0"}
    assert {sample.subclass_name for sample in fold.tests["seen"]} == {"tile/exp0", "tile/exp2", "board/exp0"}
    for names, text in (
        (
            (),
            r"needs the subclasses that only test \(unseen: \[\.\.\]\); got \[\], of which none are not there",
        ),
        (("exp7",), r"of which \['exp7'\] are not there\. Known: board/exp0, board/exp1"),
        (("exp0", "exp1", "exp2"), "nothing is left to train on. Name fewer"),
    ):
        with pytest.raises(DataError, match=text):
            folds(tiles_and_boards(), "unseen-subclass", seed=0, unseen=names)


@given(conditions=st.integers(3, 7), leave_out=st.integers(1, 2), seed=st.integers(0, 3))
def test_every_subclass_is_left_out_once_with_k_at_a_time(conditions: int, leave_out: int, seed: int):
    made = folds(tiles(20, conditions), "leave-k-out", seed=seed, leave_out=leave_out)
    left = [sorted({sample.subclass for sample in fold.tests["unseen"]}) for fold in made]
    assert sorted(name for names in left for name in names) == [f"exp{n}" for n in range(conditions)]
    assert {len(names) for names in left[:-1]} <= {leave_out}
    assert [fold.name for fold in made] == [
        "without " + ", ".join(f"tile/{name}" for name in names) for names in left
    ]
    again = folds(tiles(20, conditions), "leave-k-out", seed=seed, leave_out=leave_out)
    assert [fold.name for fold in again] == [fold.name for fold in made]


def test_leaving_out_k_needs_more_than_k():
    few = [
        sample for sample in tiles_and_boards() if sample.subclass_name not in ("board/exp1", "board/exp2")
    ]
    made = folds(few, "leave-k-out", seed=0, leave_out=2)
    assert {sample.category for fold in made for sample in fold.tests["unseen"]} == {"tile"}
    with pytest.raises(DataError, match=r"needs a category with more than 3 subclasses.*Set leave_out lower"):
        folds(tiles(20), "leave-k-out", seed=0, leave_out=3)
    with pytest.raises(DataError, match="leave_out must be 1 or more, got 0"):
        folds(tiles(20), "leave-k-out", seed=0, leave_out=0)


def test_one_model_for_all_categories_or_one_for_each():
    (together,) = folds(tiles_and_boards(), "multi-category", seed=0)
    assert {sample.category for sample in together.samples} == {"board", "tile"}
    apart = folds(tiles_and_boards(), "one-per-category", seed=0)
    assert [fold.name for fold in apart] == ["board", "tile"]
    for fold in apart:
        assert {sample.category for sample in (*fold.samples, *fold.tests["seen"])} == {fold.name}
    assert sorted(s.image_path for fold in apart for s in fold.samples) == sorted(
        s.image_path for s in together.samples
    )
    with pytest.raises(DataError, match=r"multi-category needs at least two categories.*got \['tile'\]"):
        folds(tiles(20), "multi-category", seed=0)


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
