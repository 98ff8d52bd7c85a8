import csv
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from normweave.errors import ConfigError, DataError
from normweave.textiles import (
    DEFECT_SHARE,
    DEFECTS,
    SEEN,
    UNSEEN,
    WEAVES,
    Textile,
    interlacing,
    make_textures,
    render,
)
from normweave.textiles import dataset as textures

SMALL = (96, 128)  # (height, width), not square so that a swap shows
ONE_EACH = [Textile(weave, "sand", "raking") for weave in WEAVES]
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


# ── the weave ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_plain_is_a_checkerboard():
    over = interlacing("plain", weft=7, warp=9)

    assert over.shape == (7, 9)
    rows, columns = np.indices(over.shape)
    np.testing.assert_array_equal(over, (rows + columns) % 2 == 0)


def test_twill_moves_one_warp_aside_with_every_weft():
    over = interlacing("twill", weft=12, warp=12)

    np.testing.assert_array_equal(over[1:, 1:], over[:-1, :-1])
    assert over.mean() == 0.75  # three over, one under


def test_satin_binds_each_warp_once_and_never_beside_the_last():
    over = interlacing("satin", weft=8, warp=8)

    np.testing.assert_array_equal((~over).sum(axis=0), 1)
    np.testing.assert_array_equal((~over).sum(axis=1), 1)
    places = np.argmin(over, axis=1)
    steps = np.diff(np.append(places, places[0])) % 8
    assert not set(steps.tolist()) & {0, 1, 7}  # a step of one would be a twill


def test_herringbone_is_a_twill_that_turns_back():
    over = interlacing("herringbone", weft=8, warp=16)

    np.testing.assert_array_equal(over[1:, 1:8], over[:-1, 0:7])
    np.testing.assert_array_equal(over[1:, 8:15], over[:-1, 9:16])
    np.testing.assert_array_equal(over[:, 8], ~over[:, 7])  # the clean cut between the stripes


@pytest.mark.parametrize(("weave", "block"), [("basket", (2, 2)), ("rib", (2, 1))])
def test_basket_and_rib_are_plain_with_yarns_taken_together(weave, block):
    over = interlacing(weave, weft=8, warp=8)

    np.testing.assert_array_equal(
        over, np.kron(interlacing("plain", weft=8, warp=8), np.ones(block))[:8, :8] > 0
    )


@pytest.mark.parametrize("weave", WEAVES)
def test_every_yarn_of_a_draft_is_held(weave):
    """A yarn that is always over or always under would lie loose on the cloth."""
    over = interlacing(weave, weft=len(WEAVES[weave].draft), warp=len(WEAVES[weave].draft[0]))

    for axis in (0, 1):
        assert over.any(axis=axis).all()
        assert not over.all(axis=axis).any()


# ── the picture ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_good_cloth_has_the_size_asked_for_and_an_empty_mask():
    cloth = render(SEEN[0], seed=1, size=SMALL)

    assert cloth.image.shape == (*SMALL, 3)
    assert cloth.image.dtype == np.uint8
    assert cloth.mask.shape == SMALL
    assert cloth.mask.dtype == np.bool_
    assert not cloth.mask.any()


@pytest.mark.parametrize("textile", SEEN + UNSEEN, ids=lambda textile: textile.name)
def test_cloth_is_neither_black_nor_burnt_out(textile):
    image = render(textile, seed=2).image

    assert 25 < image.mean() < 225
    assert (image.max(axis=2) == 255).mean() < 0.01
    assert (image.max(axis=2) == 0).mean() < 0.01


def test_yarns_repeat_at_the_pitch_of_the_weave():
    """The strongest frequency down the image is that of two weft yarns, the repeat of plain weave, or of one."""
    image = render(Textile("plain", "ecru", "raking"), seed=4, size=(256, 256)).image.mean(axis=2)
    spectrum = np.abs(np.fft.rfft(image - image.mean(axis=0), axis=0)).mean(axis=1)
    period = len(image) / (5 + spectrum[5:].argmax())  # the first five are light and waves

    pitch = WEAVES["plain"].pitch[0]
    assert min(abs(period / pitch - 1), abs(period / pitch - 2)) < 0.12, (period, pitch)


def test_light_comes_from_where_the_lamp_is(monkeypatch):
    """Left slopes of the warp are the bright ones with the lamp on the left, right slopes with it on the right."""
    bright = {}
    for side, azimuth in (("left", 180.0), ("right", 0.0)):
        lamp = textures.replace(textures.LIGHTINGS["raking"], azimuth=azimuth)
        monkeypatch.setitem(textures.LIGHTINGS, "raking", lamp)
        bright[side] = render(Textile("rib", "ecru", "raking"), seed=4).image.mean(axis=2)
    # The two pictures show the same yarns, so the one is the other moved by less than half a yarn to the lamp's side.
    left, right = (picture - picture.mean() for picture in (bright["left"], bright["right"]))
    agreement = [np.mean(left * np.roll(right, shift, axis=1)) for shift in range(-3, 4)]
    assert int(np.argmax(agreement)) - 3 < 0, agreement


def test_same_seed_same_picture_and_another_seed_another():
    first, again, other = (render(SEEN[2], seed=seed, size=SMALL, defect="hole") for seed in (7, 7, 8))

    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.mask, again.mask)
    assert np.abs(first.image.astype(int) - other.image).mean() > 2


def test_pieces_of_a_roll_share_its_dye_lot():
    """The hue, which the lamp's brightness does not change, varies from roll to roll and hardly within one."""
    hues = np.empty((6, 3))
    for roll, piece in np.ndindex(6, 3):
        red, _, blue = render(SEEN[0], seed=10 * roll + piece, size=SMALL, roll=roll).image.mean(axis=(0, 1))
        hues[roll, piece] = red / blue

    assert hues.std(axis=1).mean() < 0.2 * hues.mean(axis=1).std()


# ── the damage ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("textile", ONE_EACH, ids=lambda textile: textile.weave)
def test_the_mask_is_where_the_picture_changed(textile, defect):
    good, bad = render(textile, seed=5), render(textile, seed=5, defect=defect)
    change = np.abs(bad.image.astype(int) - good.image).max(axis=2)

    assert DEFECT_SHARE[0] <= bad.mask.mean() <= DEFECT_SHARE[1]
    assert not change[~bad.mask].any()
    assert (change[bad.mask] > 2).mean() > 0.6  # the edges of a soft stain are faint, its mask is closed
    assert change[bad.mask].mean() > textures.VISIBLE


@pytest.mark.parametrize("defect", DEFECTS)
@pytest.mark.parametrize("textile", UNSEEN, ids=lambda textile: textile.name)
def test_nothing_that_can_be_seen_is_left_out_of_the_mask(textile, defect, monkeypatch):
    """Before the picture outside the mask is taken over from the good one, it already looks like it."""
    seen = {}
    honest = textures.visible_change

    def watch(before, after):
        mask = honest(before, after)
        seen["left out"] = np.abs(after - before).max(axis=0)[~mask]
        return mask

    monkeypatch.setattr(textures, "visible_change", watch)
    render(textile, seed=6, defect=defect)

    assert seen["left out"].mean() < 0.2  # grey levels
    assert (seen["left out"] > 4 * textures.VISIBLE).mean() < 0.001


def test_a_damaged_window_is_lit_as_the_whole_picture_would_be():
    """The shortcut of `relight` (only what the damage touches) gives what lighting everything gives."""
    textile, size = Textile("twill", "olive", "raking"), (128, 128)
    fabric = textures.weave_piece(textile, roll=1, seed=1, size=size)
    sitting = textures.set_up(textile, seed=1, size=size)
    tables = textures.tabulate(fabric)
    everything = tuple(slice(0, length) for length in fabric.weft_place.across.shape)
    good = np.empty((3, *fabric.weft_place.across.shape), np.float32)
    textures.relight(good, everything, fabric, tables, sitting)
    for damage in textures.DAMAGE.values():
        damaged = damage(fabric, np.random.default_rng(2))
        changed = textures.tabulate(damaged)
        part, whole = good.copy(), good.copy()
        textures.relight(part, textures.touched(fabric, damaged, tables, changed), damaged, changed, sitting)
        textures.relight(whole, everything, damaged, changed, sitting)

        kept = slice(textures.MARGIN, -textures.MARGIN)
        off = np.abs(part - whole)[:, kept, kept]
        assert off.max() < 0.02, damage.__name__  # of white


def test_defects_are_not_always_in_the_same_place():
    centres = [np.argwhere(render(SEEN[0], seed=seed, defect="knot").mask).mean(axis=0) for seed in range(8)]

    assert np.std(centres, axis=0).min() > 20  # pixels


def test_defects_run_from_subtle_to_clear():
    strengths = []
    for seed in range(12):
        good, bad = render(SEEN[0], seed=seed), render(SEEN[0], seed=seed, defect="stain")
        strengths.append(np.abs(bad.image.astype(int) - good.image)[bad.mask].mean())

    assert max(strengths) > 1.8 * min(strengths)


@pytest.mark.parametrize(
    "words", [("twil", "navy", "raking"), ("twill", "navi", "raking"), ("twill", "navy", "rakin")]
)
def test_an_unknown_textile_is_refused_with_the_likely_word(words):
    with pytest.raises(ConfigError, match=r"Did you mean '(twill|navy|raking)'\?"):
        Textile(*words)


def test_an_unknown_defect_is_refused_with_the_known_ones():
    with pytest.raises(
        ConfigError, match=re.escape("Unknown defect 'holes'. Did you mean 'hole'? Known: broken_thread")
    ):
        render(SEEN[0], seed=0, defect="holes")


# ── the folder ────────────────────────────────────────────────────────────────────────────────────────────────────


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


def test_rows_say_what_the_folders_say(folder):
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


def test_train_images_are_normal_and_defects_are_dealt_out_evenly(folder):
    rows = rows_of(folder)

    assert {row["label"] for row in rows if row["split"] == "train"} == {"normal"}
    counts = defaultdict(int)
    for row in rows:
        counts[row["subclass"], row["defect"]] += bool(row["defect"])
    dealt = [count for (subclass, defect), count in counts.items() if defect and subclass == SEEN[1].name]
    assert sorted(dealt) == [1] * 5 + [2] * 2  # nine among seven kinds


def test_a_roll_gives_two_to_four_pieces_and_never_spans_splits():
    pieces = list(textures.cut(SEEN[0], 0, 60, 60, 60))

    splits, good = defaultdict(set), defaultdict(int)
    for piece in pieces:
        splits[piece.group].add(piece.split)
        good[piece.group] += piece.defect is None
    assert all(len(own) == 1 for own in splits.values())
    assert set(list(good.values())[:-1]) <= {1, 2, 3, 4}
    assert np.mean(list(good.values())) > 2
    assert len({(piece.group, piece.roll) for piece in pieces}) == len(splits)


def test_no_two_pieces_share_a_seed():
    pieces = [piece for textile in SEEN + UNSEEN for piece in textures.cut(textile, 0, 30, 30, 30)]

    assert len({piece.seed for piece in pieces}) == len(pieces)


def test_same_seed_same_bytes_and_an_image_does_not_depend_on_how_many_are_made(folder, tmp_path):
    more = make_textures(
        tmp_path / "more", seed=3, size=SMALL, train_images=7, test_images=6, defect_images=11, **TWO
    )
    other = make_textures(
        tmp_path / "other", seed=4, size=SMALL, train_images=1, test_images=0, defect_images=0, **TWO
    )

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
        DataError, match=r"holds textures made with other settings, see .*textures\.json\. Choose another"
    ):
        make_textures(folder, seed=9, size=SMALL, train_images=5, test_images=4, defect_images=9, **TWO)


def test_a_folder_with_an_image_missing_is_refused(tmp_path):
    manifest = make_textures(
        tmp_path / "a", size=(64, 64), train_images=2, test_images=0, defect_images=0, **TWO
    )
    (manifest.parent / rows_of(manifest.parent)[1]["image_path"]).unlink()

    with pytest.raises(
        DataError, match=r"misses 1 of its 2 images, first cloth/.*001\.png\. Delete the folder"
    ):
        make_textures(tmp_path / "a", size=(64, 64), train_images=2, test_images=0, defect_images=0, **TWO)


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"x")

    with pytest.raises(
        DataError, match=r"photos exists and was not made here\. Choose an empty or a new folder\."
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
    heard = []
    make_textures(
        tmp_path / "a",
        size=(64, 64),
        train_images=2,
        test_images=1,
        defect_images=0,
        progress=lambda done, of: heard.append((done, of)),
        **TWO,
    )

    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]


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
