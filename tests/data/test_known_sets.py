"""Tiny made-up trees in the documented structure of each published data set: read back, planted faults found."""

import zlib

import numpy as np
import pytest
from PIL import Image

from normweave.config import DataConfig
from normweave.data.layouts import read, recognise
from normweave.data.manifest import check, counts
from normweave.data.published import PUBLISHED, Count
from normweave.errors import DataError


def picture(path):
    """An image unlike any other, so that no two files are the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(zlib.crc32(str(path).encode())).integers(
        0, 256, (12, 16, 3), dtype=np.uint8
    )
    Image.fromarray(pixels).save(path)


def mask(path, *, size=(16, 12), value=255):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((size[1], size[0]), dtype=np.uint8)
    pixels[3:6, 4:9] = value
    Image.fromarray(pixels).save(path)


def mvtec_ad(root):
    """bottle/{train/good,test/good,test/DEFECT}/NNN.png, bottle/ground_truth/DEFECT/NNN_mask.png."""
    for number in range(3):
        picture(root / f"bottle/train/good/{number:03}.png")
        picture(root / f"bottle/test/good/{number:03}.png")
    for number in range(2):
        picture(root / f"bottle/test/broken_large/{number:03}.png")
        mask(root / f"bottle/ground_truth/broken_large/{number:03}_mask.png")
    (root / "bottle/license.txt").write_text("CC BY-NC-SA 4.0")


def mpdd(root):
    """As MVTec AD; defects have spaces in their names."""
    for number in range(3):
        picture(root / f"connector/train/good/{number:03}.png")
        picture(root / f"connector/test/good/{number:03}.png")
    for number in range(2):
        picture(root / f"connector/test/parts mismatch/{number:03}.png")
        mask(root / f"connector/ground_truth/parts mismatch/{number:03}_mask.png")


def btad(root):
    """01/{train/ok,test/ok,test/ko}/NNNN.bmp; masks in 01/ground_truth/ko/, .png in 01 and 02, .bmp in 03."""
    for product, ending in (("01", "png"), ("03", "bmp")):
        for number in range(3):
            picture(root / f"{product}/train/ok/{number:04}.bmp")
            picture(root / f"{product}/test/ok/{number:04}.bmp")
        for number in range(2):
            picture(root / f"{product}/test/ko/{number:04}.bmp")
            mask(root / f"{product}/ground_truth/ko/{number:04}.{ending}")


def visa(root):
    """OBJECT/Data/{Images/{Normal,Anomaly}/N.JPG,Masks/Anomaly/N.png}, split_csv/1cls.csv; masks number the kinds."""
    rows = ["object,split,label,image,mask"]
    for number, split in enumerate(["train"] * 3 + ["test"] * 3):
        image = f"candle/Data/Images/Normal/{number:04}.JPG"
        picture(root / image)
        rows.append(f"candle,{split},normal,{image},")
    for number in range(2):
        image, truth = (
            f"candle/Data/Images/Anomaly/{number:03}.JPG",
            f"candle/Data/Masks/Anomaly/{number:03}.png",
        )
        picture(root / image)
        mask(root / truth, value=number + 4)
        rows.append(f"candle,test,anomaly,{image},{truth}")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\r\n".join(rows) + "\r\n")


def visa_prepared(root):
    """As the authors' prepare_data.py writes it: 1cls/OBJECT/{train/good,test/{good,bad},ground_truth/bad}."""
    for number in range(3):
        picture(root / f"1cls/candle/train/good/{number:04}.JPG")
        picture(root / f"1cls/candle/test/good/{number + 3:04}.JPG")
    for number in range(2):
        picture(root / f"1cls/candle/test/bad/{number:03}.JPG")
        mask(root / f"1cls/candle/ground_truth/bad/{number:03}.png")


def texture_ad(root):
    """Category, subclass; some subclasses train and test, others test only."""
    for number in range(3):
        picture(root / f"Cloth/cloth1/train/good/{number}.png")
        picture(root / f"Cloth/cloth1/test/good/{number}.png")
    for number in range(2):
        picture(root / f"Cloth/cloth1/test/wrinkle/{number}.png")
        mask(root / f"Cloth/cloth1/ground_truth/wrinkle/{number}_mask.png")


SETS = {
    "mvtec_ad": (mvtec_ad, "folders", [("bottle", "broken_large")]),
    "mpdd": (mpdd, "folders", [("connector", "parts mismatch")]),
    "btad": (btad, "folders", [("01", "ko"), ("03", "ko")]),
    "visa": (visa, "visa", [("candle", None)]),
    "visa, prepared": (visa_prepared, None, [("candle", "bad")]),
    "texture_ad": (texture_ad, "folders", [("Cloth", "wrinkle")]),
}


@pytest.fixture(params=SETS)
def known(request, tmp_path):
    """(folder, layout, what is recognised, its categories and defects)."""
    make, recognised, kinds = SETS[request.param]
    make(tmp_path)
    return tmp_path, request.param.split(",")[0], recognised, kinds


def test_is_read_as_documented(known):
    root, layout, recognised, kinds = known
    samples = read(root, DataConfig(), layout=layout)
    subclass = "cloth1" if layout == "texture_ad" else None
    for category, defect in kinds:
        own = [one for one in samples if one.category == category]
        got = sorted((one.split, one.label, one.defect or "", one.subclass) for one in own)
        assert got == [
            *[("test", "anomalous", defect or "", subclass)] * 2,
            *[("test", "normal", "", subclass)] * 3,
            *[("train", "normal", "", subclass)] * 3,
        ]
    assert {one.category for one in samples} == {category for category, _ in kinds}
    assert all((one.mask_path is not None) == (one.label == "anomalous") for one in samples)
    assert check(samples) == []
    if recognised is not None:
        assert recognise(root) == recognised
        assert len(read(root, DataConfig())) == len(samples)


def test_counts_are_held_against_the_published_ones(known):
    root, layout, _, kinds = known
    samples = read(root, DataConfig(), layout=layout)
    assert counts(samples)[:2] == [
        {
            "category": kinds[0][0],
            "subclass": "cloth1" if layout == "texture_ad" else None,
            "split": split,
            "good": 3,
            "anomalous": bad,
        }
        for split, bad in (("test", 2), ("train", 0))
    ]
    faults = check(samples, layout=layout)
    if layout == "texture_ad":
        assert faults == []  # nothing is published by category
        return
    wanted = PUBLISHED[layout][kinds[0][0]]
    assert [fault.kind for fault in faults] == ["wrong count"] * len(kinds)
    assert faults[0].text == (
        f"{kinds[0][0]} of {layout} has 3 train, 3 good and 2 anomalous test images; published are "
        f"{wanted.train} train, {wanted.test_good} good and {wanted.test_anomalous} anomalous test "
        "images. Unpack the data set again."
    )


def test_planted_faults_are_found(known):
    root, layout, _, _ = known
    samples = read(root, DataConfig(), layout=layout)
    bad = sorted((one for one in samples if one.label == "anomalous"), key=lambda one: one.image_path)
    train = [one for one in samples if one.split == "train"]
    test = [one for one in samples if one.split == "test" and one.label == "normal"]
    bad[0].mask_path.unlink()
    mask(bad[1].mask_path, size=(12, 16))
    train[0].image_path.write_bytes(b"no image")
    test[0].image_path.write_bytes(train[1].image_path.read_bytes())

    faults = check(read(root, DataConfig(), layout=layout))
    assert sorted((fault.kind, fault.path) for fault in faults) == sorted(
        [
            ("missing mask", bad[0].image_path),
            ("wrong mask", bad[1].image_path),
            ("unreadable image", train[0].image_path),
            ("shared file", test[0].image_path),
        ]
    )


def test_a_row_of_visa_whose_image_is_gone_is_a_fault(tmp_path):
    visa(tmp_path)
    gone = tmp_path / "candle/Data/Images/Normal/0001.JPG"
    gone.unlink()
    assert [(fault.kind, fault.path) for fault in check(read(tmp_path, DataConfig()))] == [
        ("missing image", gone)
    ]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            "object,split",
            "thing,split",
            r"columns are thing, split, .*VisA's are object, split, label, image, mask",
        ),
        ("candle,train,normal", "candle,fewshot,normal", r"row 2: split 'fewshot', label 'normal'"),
        ("test,anomaly", "test,bad", r"row 8: split 'test', label 'bad'"),
    ],
)
def test_a_table_of_visa_that_is_none_is_refused(tmp_path, old, new, text):
    visa(tmp_path)
    table = tmp_path / "split_csv/1cls.csv"
    table.write_text(table.read_text().replace(old, new))
    with pytest.raises(DataError, match=text):
        read(tmp_path, DataConfig())


@pytest.mark.parametrize(
    ("images", "masks"),
    [
        (("Cloth/c1/good/0.png", "Cloth/c1/hole/1.png"), "Cloth/c1/ground_truth/hole/1.png"),
        (("Cloth/c1/good/0.png", "Cloth/c1/hole/1.png"), "Cloth/c1/mask/1.png"),
        (("Cloth/c1/test/good/0.png", "Cloth/c1/test/hole/1.png"), "Cloth/c1/test/Masks/hole/1_mask.png"),
        (("train/Cloth/c1/good/0.png", "test/Cloth/c1/hole/1.png"), "ground_truth/Cloth/c1/hole/1.png"),
        (("Cloth/train/c1/good/0.png", "Cloth/test/c1/hole/1.png"), "Cloth/gt/c1/hole/1.png"),
        (("c1/train/good/0.png", "c1/test/hole/1.png"), "c1/ground_truth/hole/1_mask.png"),
    ],
)
def test_texture_ad_is_read_however_splits_and_masks_lie(tmp_path, images, masks):
    root = tmp_path / "Cloth" if images[0].startswith("c1") else tmp_path
    for image in images:
        picture(root / image)
    mask(root / masks)
    good, bad = sorted(read(root, DataConfig(), layout="texture_ad"), key=lambda one: one.image_path.name)
    assert (good.category, good.subclass, good.label, good.mask_path) == ("Cloth", "c1", "normal", None)
    assert (bad.category, bad.subclass, bad.defect, bad.mask_path) == ("Cloth", "c1", "hole", root / masks)
    for one, name in zip((good, bad), images, strict=True):
        assert one.split == next((part for part in name.split("/") if part in ("train", "test")), None)


def test_a_mask_of_another_subclass_is_not_taken(tmp_path):
    for subclass in ("c1", "c2"):
        picture(tmp_path / f"Cloth/{subclass}/good/0.png")
        picture(tmp_path / f"Cloth/{subclass}/hole/1.png")
    mask(tmp_path / "Cloth/c1/mask/1.png")
    mask(tmp_path / "Cloth/c2/mask/2.png")
    samples = read(tmp_path, DataConfig(), layout="texture_ad")
    got = {one.subclass: one.mask_path for one in samples if one.defect}
    assert got["c1"] == tmp_path / "Cloth/c1/mask/1.png"
    assert not got["c2"].exists()
    picture(tmp_path / "Cloth/c1/scratch/1.png")
    mask(tmp_path / "Cloth/c1/ground_truth/hole/1.png")
    samples = read(tmp_path, DataConfig(), layout="texture_ad")
    got = {one.defect: one.mask_path for one in samples if one.subclass == "c1" and one.defect}
    assert got == {
        "hole": tmp_path / "Cloth/c1/ground_truth/hole/1.png",
        "scratch": tmp_path / "Cloth/c1/mask/1.png",
    }


def test_texture_ad_without_subclasses_is_refused(tmp_path):
    picture(tmp_path / "good/0.png")
    with pytest.raises(DataError, match=r"0\.png: folders good\. Texture-AD is read as CATEGORY/SUBCLASS"):
        read(tmp_path, DataConfig(), layout="texture_ad")
    picture(tmp_path / "Cloth/c1/train/test/good/0.png")
    (tmp_path / "good/0.png").unlink()
    with pytest.raises(DataError, match=r"folders Cloth/c1/train/test/good"):
        read(tmp_path, DataConfig(), layout="texture_ad")


def test_published_numbers_add_up_to_the_published_sums():
    sums = {name: tuple(map(sum, zip(*counts.values(), strict=True))) for name, counts in PUBLISHED.items()}
    assert sums == {
        "mvtec_ad": Count(3629, 467, 1258),
        "visa": Count(8659, 962, 1200),
        "btad": Count(1799, 451, 290),
        "mpdd": Count(888, 176, 282),
    }
