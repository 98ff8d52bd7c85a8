import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normweave.errors import ConfigError, DataError
from normweave.textiles import SEEN, UNSEEN, Textile, make_textures, render
from normweave.textiles.dataset import cut

SMALL = (96, 128)  # (height, width), not square so that a swap shows
TWO = {"seen": SEEN[1:2], "unseen": UNSEEN[3:4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    home = tmp_path_factory.mktemp("textures") / "cloth data"
    make_textures(home, seed=3, size=SMALL, train_images=5, test_images=4, defect_images=9, **TWO)
    return home


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "manifest.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_good_fabric_has_the_requested_size_and_an_empty_mask():
    photograph = render(SEEN[0], seed=1, size=SMALL)

    assert photograph.image.shape == (*SMALL, 3)
    assert photograph.image.dtype == np.uint8
    assert photograph.mask.shape == SMALL
    assert photograph.mask.dtype == np.bool_
    assert not photograph.mask.any()


def test_the_seed_decides_the_image():
    first, again, other = (render(SEEN[2], seed=seed, size=SMALL, defect="hole") for seed in (7, 7, 8))

    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert np.abs(first.image.astype(int) - other.image).mean() > 2


@pytest.mark.parametrize("names", [("twil", "navy", "raking"), ("twill", "navi", "raking"), ("twill", "navy", "rakin")])
def test_an_unknown_textile_is_refused_with_the_most_similar_name(names):
    with pytest.raises(ConfigError, match=r"Did you mean '(twill|navy|raking)'\?"):
        Textile(*names)


def test_an_unknown_defect_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=re.escape("Unknown defect 'holes'. Did you mean 'hole'? Known: broken_thread")
    ):
        render(SEEN[0], seed=0, defect="holes")


def test_defaults_keep_unseen_apart_from_seen():
    names = [textile.name for textile in SEEN + UNSEEN]

    assert len(names) == len(set(names))
    assert {textile.weave for textile in UNSEEN} - {textile.weave for textile in SEEN}
    assert {textile.colour for textile in UNSEEN} - {textile.colour for textile in SEEN}


def test_every_row_exists_and_every_image_is_a_row(folder):
    rows = rows_of(folder)

    listed = {row["image_path"] for row in rows} | {row["mask_path"] for row in rows if row["mask_path"]}
    on_disk = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert listed == on_disk
    assert len({row["image_path"] for row in rows}) == len(rows) == (5 + 4 + 9) + (4 + 9)


def test_rows_agree_with_the_folders(folder):
    for row in rows_of(folder):
        category, subclass, split, defect, _ = row["image_path"].split("/")
        assert (row["category"], row["subclass"], row["split"]) == (category, subclass, split)
        assert row["label"] == ("normal" if defect == "good" else "anomalous")
        assert row["defect"] == ("" if defect == "good" else defect)
        mask = row["image_path"].replace("/test/", "/ground_truth/") if row["defect"] else ""
        assert row["mask_path"] == mask


def test_masks_on_disk_are_black_and_white_and_of_their_image(folder):
    for row in rows_of(folder):
        image = pixels(folder / row["image_path"])
        assert image.shape == (*SMALL, 3)
        if row["mask_path"]:
            mask = pixels(folder / row["mask_path"])
            assert mask.shape == SMALL
            assert set(np.unique(mask)) == {0, 255}


def test_unseen_subclasses_have_test_images_only(folder):
    splits = defaultdict(set)
    for row in rows_of(folder):
        splits[row["subclass"]].add(row["split"])

    assert splits == {SEEN[1].name: {"train", "test"}, UNSEEN[3].name: {"test"}}


def test_train_images_are_normal_and_defect_types_are_equally_frequent(folder):
    rows = rows_of(folder)

    assert {row["label"] for row in rows if row["split"] == "train"} == {"normal"}
    counts = defaultdict(int)
    for row in rows:
        counts[row["subclass"], row["defect"]] += bool(row["defect"])
    numbers = [count for (subclass, defect), count in counts.items() if defect and subclass == SEEN[1].name]
    assert sorted(numbers) == [1] * 5 + [2] * 2  # nine among seven types of defect


def test_a_roll_gives_two_to_four_pieces_and_never_spans_splits():
    pieces = list(cut(SEEN[0], Path("data"), 0, 60, 60, 60))

    splits, good = defaultdict(set), defaultdict(int)
    for piece in pieces:
        splits[piece.sample.group].add(piece.sample.split)
        good[piece.sample.group] += piece.sample.defect is None
    assert all(len(own) == 1 for own in splits.values())
    assert set(list(good.values())[:-1]) <= {1, 2, 3, 4}
    assert np.mean(list(good.values())) > 2
    assert len({(piece.sample.group, piece.roll) for piece in pieces}) == len(splits)


def test_no_two_pieces_share_a_seed():
    pieces = [piece for textile in SEEN + UNSEEN for piece in cut(textile, Path("data"), 0, 30, 30, 30)]

    assert len({piece.seed for piece in pieces}) == len(pieces)


def test_same_seed_same_bytes_and_an_image_does_not_depend_on_how_many_are_made(folder, tmp_path):
    more = make_textures(tmp_path / "more", seed=3, size=SMALL, train_images=7, test_images=6, defect_images=11, **TWO)
    other = make_textures(tmp_path / "other", seed=4, size=SMALL, train_images=1, test_images=0, defect_images=0, **TWO)

    for row in rows_of(folder):
        for path in filter(None, (row["image_path"], row["mask_path"])):
            assert (folder / path).read_bytes() == (more.parent / path).read_bytes()
    groups = {row["image_path"]: row["group"] for row in rows_of(more.parent)}
    assert all(groups[row["image_path"]] == row["group"] for row in rows_of(folder))
    path = rows_of(other.parent)[0]["image_path"]
    assert (folder / path).read_bytes() != (other.parent / path).read_bytes()


def test_a_folder_made_with_the_same_settings_is_left_as_it_is(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    again = make_textures(folder, seed=3, size=SMALL, train_images=5, test_images=4, defect_images=9, **TWO)

    assert again == folder / "manifest.csv"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_a_folder_made_with_other_settings_is_refused(folder):
    with pytest.raises(
        DataError, match=r"contains textures made with other settings, see .*textures\.json\. Choose another"
    ):
        make_textures(folder, seed=9, size=SMALL, train_images=5, test_images=4, defect_images=9, **TWO)


def test_a_folder_with_an_image_missing_is_refused(tmp_path):
    manifest = make_textures(tmp_path / "a", size=(64, 64), train_images=2, test_images=0, defect_images=0, **TWO)
    (manifest.parent / rows_of(manifest.parent)[1]["image_path"]).unlink()

    with pytest.raises(DataError, match=r"misses 1 of its 2 images, first cloth/.*001\.png\. Delete the folder"):
        make_textures(tmp_path / "a", size=(64, 64), train_images=2, test_images=0, defect_images=0, **TWO)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")

    with pytest.raises(
        DataError, match=r"photos exists and contains no textures\.json\. Choose an empty or a new folder\."
    ):
        make_textures(tmp_path / "photos", train_images=1, test_images=1, defect_images=1)

    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "holiday.jpg"]


def test_an_empty_folder_is_used(tmp_path):
    manifest = make_textures(tmp_path, size=(64, 64), train_images=1, test_images=0, defect_images=0, **TWO)

    assert manifest == tmp_path / "manifest.csv"
    assert len(rows_of(tmp_path)) == 1


def test_a_run_that_is_stopped_leaves_nothing(tmp_path):
    def stop(done: int, of: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_textures(
            tmp_path / "a",
            size=(64, 64),
            train_images=3,
            test_images=0,
            defect_images=0,
            progress=stop,
            **TWO,
        )

    assert list(tmp_path.iterdir()) == []


def test_progress_counts_up_to_all_images(tmp_path):
    calls = []
    make_textures(
        tmp_path / "a",
        size=(64, 64),
        train_images=2,
        test_images=1,
        defect_images=0,
        progress=lambda done, of: calls.append((done, of)),
        **TWO,
    )

    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_all_wrong_settings_are_named_together(tmp_path):
    with pytest.raises(ConfigError) as wrong:
        make_textures(
            tmp_path / "a",
            size=(32, 256),
            train_images=-1,
            test_images=1,
            defect_images=1,
            seen=SEEN[:2],
            unseen=SEEN[1:2],
        )

    assert str(wrong.value) == (
        "textures: size must be 64 x 64 or more, got 32 x 256; train_images must be 0 or more, got -1; "
        "a textile may be named once, got twice: twill-indigo-raking"
    )
