"""No file or group is in two sets, for any groups, duplicates and splits that hypothesis generates."""

from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from normweave.config import DataConfig
from normweave.data import layouts
from normweave.data.splits import complete, divide, file_content, holdout, shared
from normweave.errors import CheckError, DataError
from normweave.types import Sample


def sample(number, **fields):
    return Sample(image_path=Path(f"{number}.png"), **fields)


def normals(count, **fields):
    return [sample(number, split="train", **fields) for number in range(count)]


def itself(one):
    return one.image_path


def ties(samples, content):
    """Yield the (sample, sample) pairs of one group or content, which may not be in two sets, by brute force."""
    for first in samples:
        for second in samples:
            if content(first) == content(second) or (first.group is not None and first.group == second.group):
                yield first, second


rows = st.lists(
    st.tuples(
        st.sampled_from([None, "a", "b", "c", "d", "e", "f"]),  # group
        st.sampled_from([None, "red", "blue"]),  # subclass
        st.integers(0, 30),  # content
        st.booleans(),  # anomalous
    ),
    min_size=1,
    max_size=40,
)


@given(rows=rows, seed=st.integers(0, 5))
@settings(deadline=None)
def test_complete_never_divides_a_group_or_a_file(rows, seed):
    samples = [
        sample(number, group=group, subclass=subclass, label="anomalous" if anomalous else "normal")
        for number, (group, subclass, _, anomalous) in enumerate(rows)
    ]
    contents = {one.image_path: row[2] for one, row in zip(samples, rows, strict=True)}
    got = complete(samples, seed=seed, content=lambda one: contents[one.image_path])
    assert [one.image_path for one in got] == [one.image_path for one in samples]
    assert all(one.split in ("train", "test") for one in got)
    assert all(one.split == "test" for one in got if one.label == "anomalous")
    assert all(a.split == b.split for a, b in ties(got, lambda one: contents[one.image_path]))
    if all(one.label == "normal" for one in got):
        assert all(one.split == "train" for one in got)


@given(rows=rows, seed=st.integers(0, 5), share=st.floats(0.1, 0.9), at_least=st.integers(0, 10))
@settings(deadline=None)
def test_divide_never_divides_a_group_or_a_file(rows, seed, share, at_least):
    samples = [
        sample(n, group=group, subclass=subclass, split="train") for n, (group, subclass, _, _) in enumerate(rows)
    ]
    contents = {one.image_path: row[2] for one, row in zip(samples, rows, strict=True)}

    def content(one):
        return contents[one.image_path]

    try:
        fit, calibration = divide(samples, calibration_share=share, at_least=at_least, seed=seed, content=content)
    except (DataError, CheckError):  # too few; the refusals are tested below
        return
    assert sorted(fit + calibration, key=samples.index) == samples
    assert len(fit) >= 2
    assert len(calibration) >= at_least
    assert {one.subclass for one in fit} == {one.subclass for one in samples}
    where = {one.image_path: "fit" for one in fit} | {one.image_path: "calibration" for one in calibration}
    assert all(where[a.image_path] == where[b.image_path] for a, b in ties(samples, content))


@given(
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 3)), min_size=1, max_size=60),
    seed=st.integers(0, 5),
    share=st.floats(0.05, 0.9),
)
def test_holdout_takes_whole_groups_and_leaves_every_subclass_one(rows, seed, share):
    groups, subclasses = np.array(rows).T
    held_out = holdout(groups, subclasses, share=share, seed=seed)
    assert not set(groups[held_out]) & set(groups[~held_out])
    assert set(subclasses[~held_out]) == set(subclasses)
    groups_of = {name: len(set(groups[subclasses == name])) for name in set(subclasses.tolist())}
    if len(set(groups)) > 1 and len(groups_of) == 1:
        assert held_out.any()


def test_holdout_of_one_group_is_empty():
    assert not holdout(np.zeros(20, int), np.zeros(20, int), share=0.5, seed=0).any()


def test_holdout_keeps_to_its_share():
    groups, subclasses = np.arange(200), np.arange(200) % 4
    held_out = holdout(groups, subclasses, share=0.15, seed=0)
    assert held_out.sum() == 30
    assert sorted(np.bincount(subclasses[held_out])) == [7, 7, 8, 8]
    assert (held_out != holdout(groups, subclasses, share=0.15, seed=1)).any()
    np.testing.assert_array_equal(held_out, holdout(groups, subclasses, share=0.15, seed=0))


def test_half_of_the_groups_train():
    """20 tiles seen under 3 lights; 4 tiles have a defect too, and tile 19 only a defect: 19 hold normals, 10 train."""
    samples = [
        sample(f"{tile}-{light}", group=f"tile{tile}", subclass=light)
        for tile in range(19)
        for light in ("dark", "mid", "bright")
    ]
    samples += [
        sample(f"bad-{tile}", group=f"tile{tile}", label="anomalous", subclass="mid") for tile in (0, 1, 2, 3, 19)
    ]
    got = complete(samples, seed=3, content=itself)
    train = {one.group for one in got if one.split == "train"}
    assert len(train) == 10
    assert not train & {"tile0", "tile1", "tile2", "tile3", "tile19"}
    assert Counter(one.subclass for one in got if one.split == "train") == {
        "dark": 10,
        "mid": 10,
        "bright": 10,
    }
    assert got == complete(samples, seed=3, content=itself)
    assert got != complete(samples, seed=4, content=itself)


def test_each_subclass_trains_where_groups_allow():
    samples = [sample(f"rare-{n}", subclass="rare", group=f"r{n // 2}") for n in range(4)]
    samples += [sample(f"often-{n}", subclass="often", group=f"o{n // 2}") for n in range(60)]
    samples += [sample("bad", label="anomalous", subclass="often")]
    for seed in range(10):
        got = complete(samples, seed=seed, content=itself)
        assert {one.subclass for one in got if one.split == "train"} == {"rare", "often"}
        assert {one.subclass for one in got if one.split == "test"} == {"rare", "often"}


def test_given_splits_are_kept_and_others_follow_their_group():
    samples = [
        sample(0, split="calibration", group="a"),
        sample(1, group="a"),
        sample(2, split="test", group="b"),
        sample(3, group="b"),
        sample(4, label="anomalous", group="b"),
    ]
    got = complete(samples, seed=0, content=itself)
    assert [one.split for one in got] == ["calibration", "calibration", "test", "test", "test"]


def test_an_anomalous_image_does_not_follow_its_group_into_train():
    samples = [sample(0, split="train", group="a"), sample(1, label="anomalous", group="a")]
    with pytest.raises(DataError, match=r"1\.png is anomalous and has no split, but images of its group.*are in train"):
        complete(samples, seed=0, content=itself)


def test_given_splits_that_share_a_group_are_refused():
    samples = [sample(0, split="train", group="a"), sample(1, split="test", group="a"), sample(2)]
    with pytest.raises(DataError, match=r"Group 'a' is in train and test: 0\.png and 1\.png"):
        complete(samples, seed=0, content=itself)


def test_calibration_rows_are_used_as_marked():
    samples = [
        *normals(5),
        *(sample(f"c{n}", split="calibration") for n in range(3)),
        sample("t", split="test"),
    ]
    fit, calibration = divide(samples, calibration_share=0.5, at_least=3, seed=0, content=itself)
    assert fit == samples[:5]
    assert calibration == samples[5:8]
    with pytest.raises(CheckError, match=r"5 train and 3 calibration images are marked. At least 2 and 4 are needed"):
        divide(samples, calibration_share=0.5, at_least=4, seed=0, content=itself)


def test_calibration_is_balanced_and_keeps_to_its_share():
    samples = [sample(n, split="train", subclass="red" if n < 90 else "blue", group=str(n // 3)) for n in range(120)]
    fit, calibration = divide(samples, calibration_share=0.33, at_least=19, seed=0, content=itself)
    counts = Counter(one.subclass for one in calibration)
    assert 36 <= len(calibration) <= 40
    assert 27 <= counts["red"] <= 30
    assert 9 <= counts["blue"] <= 12
    again = divide(samples, calibration_share=0.33, at_least=19, seed=0, content=itself)
    assert (fit, calibration) == again
    assert divide(samples, calibration_share=0.33, at_least=19, seed=1, content=itself) != again


def test_one_large_group_is_not_held_out_when_small_ones_do():
    samples = normals(90, group="lot") + [sample(f"s{n}", split="train", group=f"g{n}") for n in range(40)]
    for seed in range(5):
        _, calibration = divide(samples, calibration_share=0.2, at_least=19, seed=seed, content=itself)
        assert len(calibration) == 26
        assert all(one.group != "lot" for one in calibration)


def test_at_least_counts_when_it_is_more_than_the_share():
    samples = [sample(n, split="train", subclass="red" if n < 20 else "blue") for n in range(40)]
    counts = Counter(
        one.subclass for one in divide(samples, calibration_share=0.1, at_least=20, seed=0, content=itself).calibration
    )
    assert counts == {"red": 10, "blue": 10}


def test_groups_too_large_for_the_share_are_held_out_where_at_least_needs_them():
    """Four groups of 15, a third is 20: one group is too few for 19, so it takes two."""
    samples = [sample(n, split="train", group=str(n % 4)) for n in range(60)]
    for at_least, held_out in ((15, 15), (19, 30)):
        division = divide(samples, calibration_share=0.33, at_least=at_least, seed=0, content=itself)
        assert len(division.calibration) == held_out


def test_two_images_are_always_left_to_fit_on():
    samples = [*normals(5, group="a"), sample("b", split="train", group="b")]
    for seed in range(10):
        division = divide(samples, calibration_share=0.9, at_least=0, seed=seed, content=itself)
        assert len(division.fit) == 5


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (normals(1), "1 normal train images. At least 2 are needed. Add good images"),
        (normals(20), "20 normal train images. At least 21 are needed"),
        ([], "0 normal train images"),
        (
            normals(40, group="lot"),
            r"40 normal train images are in 1 groups.*the largest has 40.* 0 can be held out .*; 19 are needed",
        ),
        (
            [sample(n, split="train", subclass=str(n % 2), group=f"lot {n % 2}") for n in range(60)],
            "0 can be held out if each subclass keeps one group to fit on; 19 are needed",
        ),
        (
            [*normals(40), sample("x", split="train", label="anomalous")],
            "Anomalous, but marked train or calibration: x.png",
        ),
        ([*normals(40), sample("x")], r"Without a split: x\.png. Draw the missing splits with"),
        (
            [sample(f"bad{n}", split="calibration", label="anomalous") for n in range(5)],
            r"bad0\.png, bad1\.png, bad2\.png and 2 more",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_too_few_or_invalid_images_are_refused(samples, text):
    with pytest.raises((DataError, CheckError), match=text):
        divide(samples, calibration_share=0.33, at_least=19, seed=0, content=itself)


def test_the_same_file_under_two_names_is_found(tmp_path):
    for name, colour in (("a", 10), ("b", 10), ("c", 20)):
        Image.new("L", (16, 16), colour).save(tmp_path / f"{name}.png")
    a, b, c = (Sample(image_path=tmp_path / f"{name}.png") for name in "abc")
    assert list(shared({"x": [a, b], "y": [c]})) == []
    for sets in ({"x": [a], "y": [b]}, {"x": [a], "z": [c], "y": [b]}, {"x": [a, c], "y": [b]}):
        (found,) = shared(sets)
        assert str(found) == f"The same file is in x and y: {a.image_path} and {b.image_path}."
    (found,) = shared({"x": [replace(a, group="lot")], "y": [replace(c, group="lot")]})
    assert str(found) == f"Group 'lot' is in x and y: {a.image_path} and {c.image_path}."


def test_files_that_cannot_be_read_are_not_the_same(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "void.png").touch()
    empty, void = (Sample(image_path=tmp_path / name) for name in ("empty.png", "void.png"))
    assert list(shared({"x": [empty], "y": [void], "z": [sample("gone")]})) == []
    assert file_content(empty) != file_content(void)


def test_all_shared_files_and_groups_are_found():
    one, two, three = (sample(n, group=group) for n, group in ((1, "a"), (2, "a"), (3, "b")))
    found = list(shared({"x": [one, three], "y": [two, three], "z": [one]}, content=itself))
    assert Counter((item.what, item.first, item.second) for item in found) == {
        ("group", "x", "y"): 2,  # groups a and b
        ("file", "x", "y"): 1,
        ("file", "x", "z"): 1,
        ("group", "x", "z"): 1,
    }


@pytest.mark.data
def test_magnetic_tiles_are_divided_by_tile(data_root):
    samples = complete(layouts.read(data_root / "magnetic-tiles", DataConfig()), seed=0)
    division = divide(samples, calibration_share=0.33, at_least=19, seed=0)
    sets = defaultdict(list)
    sets["test"] = [one for one in samples if one.split == "test"]
    sets["fit"], sets["calibration"] = division
    tiles = {name: {one.group for one in members} for name, members in sets.items()}
    assert not tiles["fit"] & tiles["calibration"] | tiles["fit"] & tiles["test"] | tiles["calibration"] & tiles["test"]
    assert len(tiles["fit"] | tiles["calibration"]) == 77  # of the 153 tiles with good images
    assert sum(one.label == "anomalous" for one in sets["test"]) == 258
    for members in division:
        counts = Counter(one.subclass for one in members)
        assert sorted(counts) == ["exp1", "exp2", "exp3", "exp4"]
        assert max(counts.values()) - min(counts.values()) <= 3
