"""No test image, and no image of the same part, is in the training set of its fold."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normweave.benchmark import protocols
from normweave.benchmark.plan import read_plan
from normweave.benchmark.protocols import PROTOCOLS, DrawnSplits, Fold, ProtocolSettings, folds
from normweave.data import splits
from normweave.errors import ConfigError, DataError
from normweave.types import Sample


def tiles(parts: int, conditions: int = 3) -> list[Sample]:
    """Return images of every part under every condition; each fifth part is defective."""
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
def test_no_part_is_in_training_and_test(parts: int, seed: int):
    for protocol in PROTOCOLS:
        samples = tiles_and_boards(parts) if protocol == "multi-category" else tiles(parts)
        made = folds(samples, protocol, ProtocolSettings(unseen=("exp1",)), seed=seed)
        assert made
        for fold in made:
            assert fold.tests
            for tests in fold.tests.values():
                assert not groups(fold.samples) & groups(tests)
            assert all(sample.label == "normal" for sample in fold.samples)
            seen = {sample.subclass_name for sample in fold.samples}
            assert {sample.subclass_name for sample in fold.tests.get("seen", ())} <= seen
            assert not {sample.subclass_name for sample in fold.tests.get("unseen", ())} & seen


@pytest.mark.parametrize("method", ["split", "cross-validation"])
def test_no_file_is_in_training_and_test(tmp_path: Path, method: str):
    """Copies of one file, without groups, are in one of fit, calibration and test, or in one fold and no test."""
    samples = []
    for subclass in ("a", "b", "c"):
        for number in range(12):
            path = tmp_path / f"{subclass}{number}.png"
            path.write_bytes(f"image {number // 2}".encode())  # each content twice in every subclass
            label = "anomalous" if number >= 10 else "normal"
            samples.append(Sample(image_path=path, category="cloth", subclass=subclass, label=label))
            samples.append(replace(samples[-1], image_path=path.with_suffix(".jpg"), category="felt"))
            path.with_suffix(".jpg").write_bytes(path.read_bytes())
    for protocol in PROTOCOLS:
        for fold in folds(samples, protocol, ProtocolSettings(unseen=("b",)), seed=0):
            division = splits.divide(fold.samples, method=method, calibration_share=0.3, at_least=1, seed=0)
            held_out = division.folds or (division.fit, division.calibration)
            sets = (*held_out, *fold.tests.values())
            contents = [{sample.image_path.read_bytes() for sample in rows} for rows in sets]
            parts = [*contents[: len(held_out)], set().union(*contents[len(held_out) :])]
            assert all(parts)
            assert sum(map(len, parts)) == len(set().union(*parts))


def test_only_the_subclass_that_is_left_out_is_tested():
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


def test_folds_of_several_categories_have_different_names():
    names = [fold.name for fold in folds(tiles_and_boards(), "leave-one-subclass-out", seed=0)]
    assert names == [f"without {category}/exp{number}" for category in ("board", "tile") for number in range(3)]


def test_seen_trains_on_all_categories():
    (fold,) = folds(tiles_and_boards(), "seen", seed=0)
    assert {sample.category for sample in fold.samples} == {"board", "tile"}
    assert {sample.category for sample in fold.tests["seen"]} == {"board", "tile"}


def test_given_splits_test_subclasses_without_training_images_as_unseen():
    samples = [
        Sample(image_path=Path(f"{name}{split}{number}.png"), category="cloth", subclass=name, split=split)
        for name, split in (("red", "train"), ("red", "test"), ("blue", "test"))
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


def test_the_unseen_subclasses_of_a_plan_are_only_tested():
    (fold,) = folds(tiles_and_boards(), "unseen-subclass", ProtocolSettings(unseen=("exp1", "board/exp2")), seed=0)
    unseen = {"tile/exp1", "board/exp1", "board/exp2"}
    assert {sample.subclass_name for sample in fold.tests["unseen"]} == unseen
    assert {sample.subclass_name for sample in fold.samples} == {"tile/exp0", "tile/exp2", "board/exp0"}
    assert {sample.subclass_name for sample in fold.tests["seen"]} == {"tile/exp0", "tile/exp2", "board/exp0"}
    for names, text in (
        (
            (),
            r"needs the subclasses that are only tested \(unseen: \[\.\.\]\), got \[\], not in the data: none",
        ),
        (("exp7",), r"not in the data: \['exp7'\]\. Known: board/exp0, board/exp1"),
        (("exp0", "exp1", "exp2"), "no training images are left without"),
    ):
        with pytest.raises(DataError, match=text):
            folds(tiles_and_boards(), "unseen-subclass", ProtocolSettings(unseen=names), seed=0)


@given(conditions=st.integers(3, 7), leave_out=st.integers(1, 2), seed=st.integers(0, 3))
def test_every_subclass_is_left_out_once_with_k_at_a_time(conditions: int, leave_out: int, seed: int):
    made, again = (
        folds(tiles(20, conditions), "leave-k-out", ProtocolSettings(leave_out=leave_out), seed=seed) for _ in range(2)
    )
    left = [sorted({sample.subclass for sample in fold.tests["unseen"]}) for fold in made]
    assert sorted(name for names in left for name in names) == [f"exp{n}" for n in range(conditions)]
    assert {len(names) for names in left[:-1]} <= {leave_out}
    assert [fold.name for fold in made] == ["without " + ", ".join(f"tile/{name}" for name in names) for names in left]
    assert [fold.name for fold in again] == [fold.name for fold in made]


def test_leaving_out_k_needs_more_than_k():
    samples = [sample for sample in tiles_and_boards() if sample.subclass_name not in ("board/exp1", "board/exp2")]
    made = folds(samples, "leave-k-out", seed=0)
    assert {sample.category for fold in made for sample in fold.tests["unseen"]} == {"tile"}
    with pytest.raises(DataError, match=r"needs a category with more than 3 subclasses.*Set leave_out lower"):
        folds(tiles(20), "leave-k-out", ProtocolSettings(leave_out=3), seed=0)
    with pytest.raises(DataError, match="leave_out must be 1 or more, got 0"):
        folds(tiles(20), "leave-k-out", ProtocolSettings(leave_out=0), seed=0)


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


def test_a_protocol_is_added_by_registering_a_function(tmp_path: Path, monkeypatch):
    """Plans and `folds` read the protocols from the registry: no other source file names one."""
    monkeypatch.setattr(protocols, "PROTOCOLS", dict(PROTOCOLS))

    @protocols.register("first-subclass")
    def first_subclass(split: DrawnSplits) -> list[Fold]:
        return [split.fold("first", leave_out=split.subclasses[1:])]

    path = tmp_path / "plan.yaml"
    path.write_text(
        "title: New\ndata: [{name: tiles, path: tiles, protocols: [first-subclass]}]\n"
        "methods: [{name: Bank, model: patchcore}]\n"
    )
    (item,) = read_plan(path).data
    (fold,) = item.folds(tiles(20), "first-subclass", seed=0)
    assert {sample.subclass for sample in fold.samples} == {"exp0"}
    assert {sample.subclass for sample in fold.tests["unseen"]} == {"exp1", "exp2"}
    source = Path(protocols.__file__)
    others = "".join(p.read_text() for p in source.parents[1].rglob("*.py") if p != source)
    assert not [name for name in PROTOCOLS if "-" in name and f'"{name}"' in others]


@settings(max_examples=10)
@given(parts=st.integers(20, 40), seed=st.integers(0, 9), share=st.sampled_from([0.05, 0.1, 0.2]))
def test_defective_test_images_among_the_training_images_of_every_protocol(parts: int, seed: int, share: float):
    for protocol in PROTOCOLS:
        samples = tiles_and_boards(parts) if protocol == "multi-category" else tiles(parts)
        defective = {sample.image_path for sample in samples if sample.label == "anomalous"}
        chosen = ProtocolSettings(unseen=("exp1",), contamination=share)
        clean = folds(samples, protocol, replace(chosen, contamination=0.0), seed=seed)
        for fold, before in zip(folds(samples, protocol, chosen, seed=seed), clean, strict=True):
            good = [sample for sample in fold.samples if sample.image_path not in defective]
            added = [sample for sample in fold.samples if sample.image_path in defective]
            assert tuple(good) == before.samples
            assert abs(len(added) / len(fold.samples) - share) <= 0.6 / len(before.samples) or len(added) == 1
            assert {(sample.label, sample.split, sample.mask_path) for sample in added} == {("normal", "train", None)}
            assert {sample.subclass_name for sample in added} <= {sample.subclass_name for sample in good}
            tests = [sample for rows in fold.tests.values() for sample in rows]
            assert not groups(fold.samples) & groups(tests)
            assert {sample for rows in before.tests.values() for sample in rows} - set(tests) == {
                sample for rows in before.tests.values() for sample in rows if sample.group in groups(added)
            }
            assert "anomalous" in {sample.label for sample in tests}


def test_defective_training_images_are_of_few_groups_and_about_the_same_share_of_each_subclass():
    samples = [sample for sample in tiles(50) if sample.subclass != "exp2" or int(sample.group[4:]) % 2]
    (fold,) = folds(samples, "seen", ProtocolSettings(contamination=0.1), seed=0)
    defective = {sample.image_path for sample in samples if sample.label == "anomalous"}
    added = [sample for sample in fold.samples if sample.image_path in defective]
    shares = [
        sum(sample.subclass == name for sample in added) / sum(sample.subclass == name for sample in fold.samples)
        for name in ("exp0", "exp1", "exp2")
    ]
    assert max(shares) - min(shares) < 0.06
    assert len(groups(added)) == max(sum(sample.subclass == name for sample in added) for name in ("exp0", "exp1"))
    again, other = (folds(samples, "seen", ProtocolSettings(contamination=0.1), seed=seed)[0] for seed in (0, 1))
    assert again.samples == fold.samples
    assert other.samples != fold.samples


def test_a_copy_of_a_defective_training_image_is_not_tested(tmp_path: Path):
    samples = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        path.write_bytes(f"image {number if number < 10 else 10}".encode())  # the two defective ones are copies
        label, split = ("anomalous" if number >= 10 else "normal"), ("train" if number < 6 else "test")
        samples.append(Sample(image_path=path, label=label, split=split))
    with pytest.raises(DataError, match=r"without the 1 groups of the 1 defective .* has no defective test image"):
        folds(samples, "given", ProtocolSettings(contamination=0.1), seed=0)
    samples[-1].image_path.write_bytes(b"another defect")
    (fold,) = folds(samples, "given", ProtocolSettings(contamination=0.1), seed=0)
    assert [sample.label for sample in fold.tests["seen"]] == ["normal"] * 4 + ["anomalous"]
    with pytest.raises(
        DataError, match=r"0\.5 of the 6 training images .* needs 6 defective test images .*, got 2\. Set"
    ):
        folds(samples, "given", ProtocolSettings(contamination=0.5), seed=0)


@pytest.mark.parametrize("protocol", sorted(PROTOCOLS))
def test_few_training_images_of_every_protocol_are_of_many_groups_and_of_each_subclass(protocol: str):
    samples = tiles_and_boards()
    chosen = ProtocolSettings(unseen=("exp1",), train_images=10)
    clean = folds(samples, protocol, replace(chosen, train_images=0), seed=0)
    for fold, before in zip(folds(samples, protocol, chosen, seed=0), clean, strict=True):
        assert len(fold.samples) == 10
        assert set(fold.samples) <= set(before.samples)
        assert fold.tests == before.tests
        names = [sample.subclass_name for sample in before.samples]
        drawn = [sum(sample.subclass_name == name for sample in fold.samples) for name in set(names)]
        assert max(drawn) - min(drawn) <= 1
        assert len(groups(fold.samples)) == min(10, len(groups(before.samples)))
    drawn = {folds(samples, protocol, chosen, seed=seed)[0].samples for seed in (0, 0, 1)}
    assert len(drawn) == 2
    many = folds(samples, protocol, replace(chosen, train_images=1000), seed=0)
    assert [fold.samples for fold in many] == [fold.samples for fold in clean]


def test_few_training_images_with_defective_ones_and_fewer_than_subclasses():
    (fold,) = folds(tiles(60), "seen", ProtocolSettings(train_images=9, contamination=0.1), seed=0)
    assert len(fold.samples) == 10  # the defective image comes on top
    with pytest.raises(DataError, match=r"3 images cannot hold one of each of the 6 subclasses of fold 'all'\. Set tr"):
        folds(tiles_and_boards(), "seen", ProtocolSettings(train_images=3), seed=0)


def test_an_unknown_protocol_is_an_error():
    with pytest.raises(ConfigError, match=r"Unknown protocol 'sen'\. Did you mean 'seen'\? Known: given"):
        folds(tiles(10), "sen", seed=0)


@pytest.mark.data
def test_magnetic_tiles_are_divided_as_documented(data_root: Path):
    from normweave.config import DataConfig
    from normweave.data.layouts import read

    samples = read(data_root / "magnetic-tiles", DataConfig())
    with_good = {sample.group for sample in samples if sample.label == "normal"}
    with_defect = {sample.group for sample in samples if sample.label == "anomalous"}
    (fold,) = folds(samples, "seen", seed=0)
    assert groups(fold.samples) <= with_good - with_defect
    assert abs(len(groups(fold.samples)) - len(with_good) / 2) <= 1
    assert sum(sample.label == "anomalous" for sample in fold.tests["seen"]) == 258
