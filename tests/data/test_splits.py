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
from normweave.data.splits import complete, divide, file_content, good_images, holdout, independent_groups, shared
from normweave.errors import ConfigError, DataError
from normweave.types import Sample


def sample(number, **fields):
    return Sample(image_path=Path(f"{number}.png"), **fields)


def normals(count, **fields):
    return [sample(number, split="train", **fields) for number in range(count)]


def test_good_images_are_normal_and_no_test_images():
    given = [sample(0), sample(1, split="test"), sample(2, label="anomalous"), sample(3, split="calibration")]
    assert good_images(given) == [given[0], given[3]]


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

    given = {"calibration_share": share, "at_least": at_least, "seed": seed, "content": content}
    for method in ("auto", "split", "cross-validation"):
        try:
            fit, calibration, folds = divide(samples, method=method, **given)
        except DataError:  # too few; the refusals are tested below
            continue
        where = {one.image_path: number for number, part in enumerate(folds or (fit, calibration)) for one in part}
        assert len(where) == len(samples)
        assert all(where[a.image_path] == where[b.image_path] for a, b in ties(samples, content))
        if folds:
            assert method != "split"
            assert fit == calibration == samples
            assert sorted((one for fold in folds for one in fold), key=samples.index) == samples
            assert all(folds)
            assert len(samples) - max(map(len, folds)) >= 2
        else:
            assert method != "cross-validation"
            assert sorted(fit + calibration, key=samples.index) == samples
            assert len(fit) >= 2
            assert {one.subclass for one in fit} == {one.subclass for one in samples}
            if method == "auto":
                held_out = independent_groups(calibration, [content(one) for one in calibration])
                assert len(set(held_out)) >= at_least


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
    for at_least in (3, 4):  # too few are no error: their operating points are uncalibrated
        division = divide(samples, calibration_share=0.5, at_least=at_least, seed=0, content=itself)
        assert division == (samples[:5], samples[5:8], ())
    with pytest.raises(ConfigError, match=r"3 rows are marked calibration, and data\.calibration is cross-validation"):
        divide(samples, method="cross-validation", calibration_share=0.5, at_least=3, seed=0, content=itself)


def test_calibration_is_balanced_and_keeps_to_its_share():
    samples = [sample(n, split="train", subclass="red" if n < 90 else "blue", group=str(n // 3)) for n in range(120)]
    fit, calibration, folds = divide(samples, calibration_share=0.33, at_least=10, seed=0, content=itself)
    assert not folds
    counts = Counter(one.subclass for one in calibration)
    assert 36 <= len(calibration) <= 40
    assert 27 <= counts["red"] <= 30
    assert 9 <= counts["blue"] <= 12
    again = divide(samples, calibration_share=0.33, at_least=10, seed=0, content=itself)
    assert (fit, calibration, ()) == again
    assert divide(samples, calibration_share=0.33, at_least=10, seed=1, content=itself) != again


def test_one_large_group_is_not_held_out_when_small_ones_do():
    samples = normals(90, group="lot") + [sample(f"s{n}", split="train", group=f"g{n}") for n in range(40)]
    for seed in range(5):
        _, calibration, _ = divide(samples, calibration_share=0.2, at_least=19, seed=seed, content=itself)
        assert len(calibration) == 26
        assert all(one.group != "lot" for one in calibration)


def test_a_split_holds_out_more_than_the_share_where_at_least_needs_it():
    samples = [sample(n, split="train", subclass="red" if n < 20 else "blue") for n in range(40)]
    given = {"calibration_share": 0.1, "at_least": 20, "seed": 0, "content": itself}
    counts = Counter(one.subclass for one in divide(samples, method="split", **given).calibration)
    assert counts == {"red": 10, "blue": 10}
    assert len(divide(samples, **given).folds) == 5  # auto


def test_groups_too_large_for_the_share_are_held_out_where_at_least_needs_them():
    """Four groups of 15, a third is 20: one group, and for two of them more than the share."""
    samples = [sample(n, split="train", group=str(n % 4)) for n in range(60)]
    for at_least, held_out in ((1, 15), (2, 30), (4, 15)):  # four are impossible: back to the share
        division = divide(samples, method="split", calibration_share=0.33, at_least=at_least, seed=0, content=itself)
        assert len(division.calibration) == held_out


def test_folds_are_even_in_groups_and_subclasses():
    samples = [
        sample(f"{n}-{k}", split="train", subclass="red" if n < 15 else "blue", group=str(n))
        for n in range(20)
        for k in range(1 + n % 3)
    ]
    given = {"calibration_share": 0.33, "at_least": 19, "content": itself}
    division = divide(samples, seed=0, **given)
    assert [len({one.group for one in fold}) for fold in division.folds] == [4] * 5
    assert [len({one.group for one in fold if one.subclass == "red"}) for fold in division.folds] == [3] * 5
    assert division == divide(samples, seed=0, **given)
    assert division != divide(samples, seed=1, **given)
    assert len(divide(samples, seed=0, folds=3, **given).folds) == 3
    assert len(divide(normals(5), seed=0, folds=9, **given).folds) == 5


def test_images_of_one_group_or_one_file_are_not_independent():
    samples = [sample(n, group=group) for n, group in enumerate(["a", "b", "a", None, None, "b", None])]
    numbers = independent_groups(samples, ["0", "1", "2", "3", "3", "5", "0"])
    assert numbers == [numbers[0], numbers[1], numbers[0], numbers[3], numbers[3], numbers[1], numbers[0]]
    assert len(set(numbers)) == 3


def test_two_images_are_always_left_to_fit_on():
    samples = [*normals(5, group="a"), sample("b", split="train", group="b")]
    for seed in range(10):
        division = divide(samples, calibration_share=0.9, at_least=0, seed=seed, content=itself)
        assert len(division.fit) == 5


@pytest.mark.parametrize(
    ("samples", "text"),
    [
        (normals(1), "1 normal train images. At least 2 are needed. Add good images"),
        (normals(2), "2 normal train images in 2 groups.* leaves 1 to fit on; at least 2 are needed"),
        ([], "0 normal train images"),
        (normals(40, group="lot"), r"40 normal train images in 1 groups.* leaves 0 to fit on"),
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
    with pytest.raises(DataError, match=text):
        divide(samples, calibration_share=0.33, at_least=19, seed=0, content=itself)


def test_a_split_needs_a_group_that_can_be_held_out():
    samples = [sample(n, split="train", subclass=str(n % 2), group=f"lot {n % 2}") for n in range(60)]
    with pytest.raises(DataError, match=r"None can be held out .* or set data\.calibration=cross-validation"):
        divide(samples, method="split", calibration_share=0.33, at_least=19, seed=0, content=itself)


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
    sets["fit"], sets["calibration"], _ = division
    tiles = {name: {one.group for one in members} for name, members in sets.items()}
    assert not tiles["fit"] & tiles["calibration"] | tiles["fit"] & tiles["test"] | tiles["calibration"] & tiles["test"]
    assert len(tiles["fit"] | tiles["calibration"]) == 77  # of the 153 tiles with good images
    assert sum(one.label == "anomalous" for one in sets["test"]) == 258
    for members in (division.fit, division.calibration):
        counts = Counter(one.subclass for one in members)
        assert sorted(counts) == ["exp1", "exp2", "exp3", "exp4"]
        assert max(counts.values()) - min(counts.values()) <= 3
