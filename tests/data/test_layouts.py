"""Folders are read by their layouts, and folders of no layout are refused with a cure."""

from collections import Counter
from pathlib import Path

import pytest

from normweave.config import DataConfig
from normweave.data.layouts import images_below, read, recognise, unused
from normweave.data.manifest import write_manifest
from normweave.errors import ConfigError, DataError
from normweave.types import Sample


@pytest.fixture
def tree(tmp_path):
    """Make empty files in a folder called `parts`, and return the folder."""

    def make(*names):
        root = tmp_path / "parts"
        root.mkdir(exist_ok=True)
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    return make


def summaries(root, **settings):
    """One tuple per sample."""
    return [
        (
            sample.image_path.relative_to(root).as_posix(),
            sample.category,
            sample.subclass,
            sample.split,
            sample.defect if sample.label == "anomalous" else "good",
            sample.mask_path and sample.mask_path.relative_to(root).as_posix(),
        )
        for sample in read(root, DataConfig(), **settings)
    ]


def test_mvtec_ad(tree):
    root = tree(
        "bottle/train/good/000.png",
        "bottle/test/good/000.png",
        "bottle/test/crack/001.png",
        "bottle/ground_truth/crack/001_mask.png",
        "cable/train/good/000.png",
        "cable/test/bent/000.png",
        "readme.txt",
    )
    want = [
        (
            "bottle/test/crack/001.png",
            "bottle",
            None,
            "test",
            "crack",
            "bottle/ground_truth/crack/001_mask.png",
        ),
        ("bottle/test/good/000.png", "bottle", None, "test", "good", None),
        ("bottle/train/good/000.png", "bottle", None, "train", "good", None),
        ("cable/test/bent/000.png", "cable", None, "test", "bent", None),
        ("cable/train/good/000.png", "cable", None, "train", "good", None),
    ]
    assert summaries(root, layout="mvtec_ad") == summaries(root) == want
    assert recognise(root) == "folders"


def test_a_root_may_be_the_category(tree):
    root = tree("train/Good/1.JPG", "test/OK/2.jpeg", "test/hole/3.tif", "ground_truth/hole/3.png")
    assert summaries(root) == [
        ("test/OK/2.jpeg", "parts", None, "test", "good", None),
        ("test/hole/3.tif", "parts", None, "test", "hole", "ground_truth/hole/3.png"),
        ("train/Good/1.JPG", "parts", None, "train", "good", None),
    ]


def test_category_and_subclass(tree):
    root = tree(
        "cloth/red/train/good/1.png",
        "cloth/blue/test/hole/1.png",
        "cloth/blue/ground_truth/hole/1.png",
        "wood/train/normal/1.webp",
    )
    assert summaries(root) == [
        ("cloth/blue/test/hole/1.png", "cloth", "blue", "test", "hole", "cloth/blue/ground_truth/hole/1.png"),
        ("cloth/red/train/good/1.png", "cloth", "red", "train", "good", None),
        ("wood/train/normal/1.webp", "wood", None, "train", "good", None),
    ]


def test_without_train_and_test_the_splits_are_open(tree):
    root = tree("good/1.png", "hole/2.png", "ground_truth/hole/2_mask.png")
    assert summaries(root) == [
        ("good/1.png", "parts", None, None, "good", None),
        ("hole/2.png", "parts", None, None, "hole", "ground_truth/hole/2_mask.png"),
    ]


def test_a_missing_mask_has_its_expected_path(tree):
    root = tree("train/good/1.png", "test/hole/2.png", "test/hole/3.png", "ground_truth/hole/2.png")
    masks = {row[0]: row[5] for row in summaries(root)}
    assert masks["test/hole/2.png"] == "ground_truth/hole/2.png"
    assert masks["test/hole/3.png"] == "ground_truth/hole/3.png"


def test_a_folder_of_good_images(tree):
    root = tree("b.png", "a.png", "notes.txt", ".hidden.png", ".cache/c.png")
    assert summaries(root) == [
        ("a.png", "parts", None, None, "good", None),
        ("b.png", "parts", None, None, "good", None),
    ]


def test_a_folder_of_folders_of_good_images(tree):
    root = tree("red/1.png", "blue/1.png", "blue/2.png")
    assert summaries(root) == [
        ("blue/1.png", "parts", "blue", None, "good", None),
        ("blue/2.png", "parts", "blue", None, "good", None),
        ("red/1.png", "parts", "red", None, "good", None),
    ]


def test_a_manifest_in_the_folder_takes_precedence(tree):
    root = tree("cloth/red/train/good/1.png")
    row = Sample(image_path=root / "cloth/red/train/good/1.png", category="cloth", subclass="rouge", group="roll")
    write_manifest([row], root / "manifest.csv")
    assert recognise(root) == "manifest"
    assert read(root, DataConfig()) == read(root / "manifest.csv", DataConfig()) == [row]
    assert read(root, DataConfig(), layout="folders")[0].subclass == "red"


TILES = [
    "MT_Free/exp1_num_100.jpg",
    "MT_Free/exp2_num_190.jpg",
    "MT_Fray/exp1_num_281.jpg",
    "MT_Fray/exp1_num_281.png",
]


def test_magnetic_tiles_by_number(tree):
    """100 and 190 are 90 apart: one tile; 281 is 91 further: the next."""
    root = tree(*TILES)
    assert recognise(root) == "magnetic_tiles"
    got = {sample.image_path.name: sample for sample in read(root, DataConfig())}
    assert {name: sample.group for name, sample in got.items()} == {
        "exp1_num_100.jpg": "tile0",
        "exp2_num_190.jpg": "tile0",
        "exp1_num_281.jpg": "tile1",
    }
    fray = got["exp1_num_281.jpg"]
    assert (fray.category, fray.subclass, fray.split, fray.label) == (
        "magnetic_tiles",
        "exp1",
        None,
        "anomalous",
    )
    assert (fray.defect, fray.mask_path) == ("fray", root / "MT_Fray/exp1_num_281.png")
    assert got["exp2_num_190.jpg"].label == "normal"


def test_magnetic_tiles_by_table(tree):
    root = tree(*TILES)
    table = "image,group\nMT_Free/exp1_num_100.jpg,x\nMT_Free/exp2_num_190.jpg,y\nMT_Fray/exp1_num_281.jpg,x\n"
    (root / "groups.csv").write_text(table)
    assert [sample.group for sample in read(root, DataConfig())] == ["x", "x", "y"]
    (root / "groups.csv").write_text(table.rsplit("MT_", 1)[0])
    with pytest.raises(DataError, match=r"groups\.csv: no row for MT_Fray/exp1_num_281\.jpg"):
        read(root, DataConfig())


GROUPS = "image,group\nMT_Free/exp1_num_100.jpg,x\nMT_Free/exp2_num_190.jpg,y\nMT_Fray/exp1_num_281.jpg,x\n"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_magnetic_tiles_by_a_table_of_a_spreadsheet(tree, encoding):
    root = tree(*TILES)
    (root / "groups.csv").write_text(GROUPS, encoding)
    assert [sample.group for sample in read(root, DataConfig())] == ["x", "x", "y"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (
            GROUPS.replace(",", ";").encode(),
            r"groups\.csv: columns are image;group. It needs image, group, sep",
        ),
        (GROUPS.replace("group", "tile").encode(), r"groups\.csv: columns are image, tile. It needs image, group"),
        (b"", r"groups\.csv: columns are \(none\)"),
        (GROUPS.replace(",y", "").encode(), r"groups\.csv, row 3: image or group is empty"),
        ((GROUPS + "MT_Free/exp2_num_190.jpg,z\n").encode(), r"groups\.csv, row 5: .*190\.jpg has another group above"),
        (GROUPS.replace("x", "\u00e9").encode("latin-1"), r"groups\.csv: cannot be read as CSV .* Save it as UTF-8"),
        (GROUPS.encode("utf-16-le"), r"groups\.csv: (cannot be read as CSV|columns are)"),
    ],
)
def test_a_table_of_tiles_that_cannot_be_read_is_refused(tree, content, text):
    root = tree(*TILES)
    (root / "groups.csv").write_bytes(content)
    with pytest.raises(DataError, match=text):
        read(root, DataConfig())


def test_magnetic_tiles_with_another_name(tree):
    with pytest.raises(DataError, match=r"photo\.jpg: magnetic tiles are named expN_num_NUMBER\.jpg"):
        read(tree(*TILES, "MT_Free/photo.jpg"), DataConfig())


def test_deep_pcb(tree):
    """Templates of the first half are in train, without their boards, so that no name is in both splits."""
    names = [f"group1/{number}_{what}.jpg" for number in (1, 2, 3, 4) for what in ("temp", "test")]
    root = tree(*names, *(f"group1/{number}.txt" for number in (1, 2, 3, 4)), "LICENSE")
    assert recognise(root) == "deep_pcb"
    assert summaries(root) == [
        ("group1/1_temp.jpg", "deep_pcb", "group1", "train", "good", None),
        ("group1/2_temp.jpg", "deep_pcb", "group1", "train", "good", None),
        ("group1/3_temp.jpg", "deep_pcb", "group1", "test", "good", None),
        ("group1/3_test.jpg", "deep_pcb", "group1", "test", None, "group1/3.txt"),
        ("group1/4_temp.jpg", "deep_pcb", "group1", "test", "good", None),
        ("group1/4_test.jpg", "deep_pcb", "group1", "test", None, "group1/4.txt"),
    ]
    assert [sample.group for sample in read(root, DataConfig())][2:4] == ["group1/3", "group1/3"]


VISA = """object,split,label,image,mask
candle,train,normal,Images/0.JPG,
candle,test,normal,Images/1.JPG,
candle,test,anomaly,Images/2.JPG,Masks/2.png
"""


def test_visa_reads_its_table_and_a_missing_image_stays_in_it(tree):
    root = tree("split_csv/1cls.csv", "Images/0.JPG")
    (root / "split_csv/1cls.csv").write_text(VISA)
    assert recognise(root) == "visa"
    assert summaries(root) == [
        ("Images/0.JPG", "candle", None, "train", "good", None),
        ("Images/1.JPG", "candle", None, "test", "good", None),
        ("Images/2.JPG", "candle", None, "test", None, "Masks/2.png"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("object,", "thing,", r"columns are thing, split, .*VisA's are object, split, label, image, mask"),
        ("train,normal", "fewshot,normal", r"row 2: object 'candle', split 'fewshot', label 'normal'"),
        ("test,anomaly", "test,bad", r"row 4: object 'candle', split 'test', label 'bad'"),
        ("Images/0.JPG", "", r"row 2: .*image ''"),
        ("candle,train", ",train", r"row 2: object ''"),
        (
            "candle,train,normal,Images/0.JPG,\n",
            "candle\n",
            "row 2: object 'candle', split None, label None",
        ),
        (VISA, "", r"1cls\.csv: columns are \(none\)"),
        (VISA, "\n\n", r"1cls\.csv: columns are \(none\)"),
        (VISA[VISA.index("candle") :], "", "no images in the layout visa"),
    ],
)
def test_an_invalid_table_of_visa_is_refused(tree, old, new, text):
    root = tree("split_csv/1cls.csv")
    (root / "split_csv/1cls.csv").write_text(VISA.replace(old, new))
    with pytest.raises(DataError, match=text):
        read(root, DataConfig())


@pytest.mark.parametrize(
    ("good", "bad", "mask"),
    [
        ("Cloth/c1/good/0.png", "Cloth/c1/hole/1.png", "Cloth/c1/ground_truth/hole/1.png"),
        ("Cloth/c1/good/0.png", "Cloth/c1/hole/1.png", "Cloth/c1/mask/1.png"),
        ("Cloth/c1/test/good/0.png", "Cloth/c1/test/hole/1.png", "Cloth/c1/test/Masks/hole/1_mask.png"),
        ("train/Cloth/c1/good/0.png", "test/Cloth/c1/hole/1.png", "ground_truth/Cloth/c1/hole/1.png"),
        ("Cloth/train/c1/good/0.png", "Cloth/test/c1/hole/1.png", "Cloth/gt/c1/hole/1.png"),
        ("c1/train/good/0.png", "c1/test/hole/1.png", "c1/ground_truth/hole/1_mask.png"),
    ],
)
def test_texture_ad_has_split_and_mask_folders_at_any_level(tree, good, bad, mask):
    root = tree(good, bad, mask)
    category = "Cloth" if good.count("c1") and "Cloth" in good else "parts"
    splits = [next((part for part in name.split("/") if part in ("train", "test")), None) for name in (good, bad)]
    assert sorted(summaries(root, layout="texture_ad"), key=lambda row: row[0][-5:]) == [
        (good, category, "c1", splits[0], "good", None),
        (bad, category, "c1", splits[1], "hole", mask),
    ]


def test_a_mask_of_another_subclass_is_not_used(tree):
    root = tree(*(f"Cloth/{name}/0.png" for name in ("c1/good", "c2/good")), "Cloth/c1/hole/1.png")
    root = tree("Cloth/c2/hole/1.png", "Cloth/c1/mask/1.png", "Cloth/c2/mask/2.png")
    masks = {row[2]: row[5] for row in summaries(root, layout="texture_ad") if row[4] == "hole"}
    assert masks == {"c1": "Cloth/c1/mask/1.png", "c2": "Cloth/c2/ground_truth/hole/1.png"}
    root = tree("Cloth/c1/scratch/1.png", "Cloth/c1/ground_truth/hole/1.png")
    masks = {row[4]: row[5] for row in summaries(root, layout="texture_ad") if row[2] == "c1"}
    assert masks == {
        "good": None,
        "hole": "Cloth/c1/ground_truth/hole/1.png",
        "scratch": "Cloth/c1/mask/1.png",
    }


def test_texture_ad_without_subclasses_is_refused(tree):
    with pytest.raises(DataError, match=r"0\.png: folders good\. Texture-AD is read as CATEGORY/SUBCLASS"):
        read(tree("good/0.png"), DataConfig(), layout="texture_ad")
    with pytest.raises(DataError, match=r"folders Cloth/c1/train/test/good"):
        read(tree("Cloth/c1/train/test/good/0.png"), DataConfig(), layout="texture_ad")


def test_subclass_from_the_file_name(tree):
    root = tree("good/exp1_a.png", "good/exp2_b.png", "hole/exp2_c.png")
    config = DataConfig(subclass_from="filename-regex", subclass_regex="^(exp[0-9])_")
    assert [sample.subclass for sample in read(root, config)] == ["exp1", "exp2", "exp2"]
    with pytest.raises(DataError, match=r"d\.png: subclass_regex '\^\(exp\[0-9\]\)_' finds no subclass in 'd'"):
        read(tree("good/d.png"), config)
    for regex, text in (
        ("exp", "has no group. Put the part"),
        ("(exp", "is not a regular expression: missing"),
    ):
        with pytest.raises(ConfigError, match=text):
            read(root, DataConfig(subclass_from="filename-regex", subclass_regex=regex))


def test_subclass_from_the_column(tree, tmp_path):
    root = tree("1.png", "2.png")
    write_manifest([Sample(image_path=root / f"{n}.png", subclass=f"s{n}") for n in (1, 2)], tmp_path / "m.csv")
    config = DataConfig(subclass_from="column")
    assert [sample.subclass for sample in read(tmp_path / "m.csv", config)] == ["s1", "s2"]
    with pytest.raises(DataError, match="subclass_from=column, but no row names a subclass"):
        read(root, config)


@pytest.mark.parametrize("where", ["auto", "none"])
def test_subclasses_are_selected_before_they_are_removed(tree, where):
    root = tree("red/1.png", "blue/1.png")
    got = read(root, DataConfig(subclass_from=where, subclass=("blue",)))
    assert [(sample.image_path.parent.name, sample.subclass) for sample in got] == [("blue", None)]


def test_choosing(tree):
    root = tree("cloth/red/train/good/1.png", "cloth/blue/train/good/1.png", "wood/oak/train/good/1.png")

    def subclasses(**settings):
        return [sample.subclass_name for sample in read(root, DataConfig(**settings))]

    assert subclasses() == subclasses(category=("all",), subclass=("all",)) == ["cloth/blue", "cloth/red", "wood/oak"]
    assert subclasses(category=("cloth",)) == ["cloth/blue", "cloth/red"]
    assert subclasses(subclass=("red", "oak")) == ["cloth/red", "wood/oak"]
    with pytest.raises(ConfigError, match=r"Unknown category 'cloht'. Did you mean 'cloth'. Known: cloth, wood"):
        subclasses(category=("cloht",))
    with pytest.raises(ConfigError, match=r"Unknown subclass 'oak'.*Known: blue, red"):
        subclasses(category=("cloth",), subclass=("oak",))


@pytest.mark.parametrize(
    ("names", "settings", "text"),
    [
        ([], {}, r"no known layout; found nothing. Known: manifest, magnetic_tiles"),
        (["notes.txt", "a/b/c/1.png"], {}, r"found a, notes\.txt\. .*--layout.*write a manifest"),
        (
            ["test/hole/1.png"],
            {},
            "1 anomalous images and no good one. Put good images into a folder named good",
        ),
        (["train/good/notes.txt"], {}, "no images in the layout folders. Allowed endings: .bmp, .jpeg"),
        (["train/1.png", "test/good/1.png"], {}, r"1\.png: is in train itself. Put it into train/good"),
        (["train/good/batch/1.png"], {}, r"1\.png: is too deep. Put it into .*good"),
        (["1.png", "red/1.png"], {}, r"contains images \(1\.png\) and folders of images \(red\)"),
        (["1.png"], {"layout": "mvtec_ad"}, "no images in the layout mvtec_ad"),
        (["1.png"], {"layout": "manifest"}, r"no manifest\.csv or manifest\.parquet in it"),
    ],
    ids=lambda value: ",".join(value) or "empty" if isinstance(value, list) else "",
)
def test_folders_that_do_not_fit_are_refused(tree, names, settings, text):
    with pytest.raises(DataError, match=text):
        read(tree(*names), DataConfig(), **settings)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no such file or folder. Give a folder of images or a manifest"):
        read(tmp_path / "gone", DataConfig())


def test_the_category_of_the_working_folder(tree, monkeypatch):
    monkeypatch.chdir(tree("1.png"))
    assert read(".", DataConfig()) == [Sample(image_path=Path("1.png"), category="parts")]


def test_links_are_followed_except_to_a_folder_above(tree, tmp_path):
    root = tree("cloth/train/good/1.png", "cloth/train/good/2.png")
    linked = tmp_path / "elsewhere" / "train" / "good"
    linked.mkdir(parents=True)
    (linked / "3.png").touch()
    (root / "denim").symlink_to(tmp_path / "elsewhere")
    (root / "cloth" / "train" / "good" / "up").symlink_to("..")
    (linked.parent / "home").symlink_to(root)
    names = ["cloth/train/good/1.png", "cloth/train/good/2.png", "denim/train/good/3.png"]
    assert [path.relative_to(root).as_posix() for path in images_below(root)] == names
    samples = read(root, DataConfig())
    assert [sample.image_path.relative_to(root).as_posix() for sample in samples] == names
    assert [sample.category for sample in samples] == ["cloth", "cloth", "denim"]


def test_a_link_that_leads_nowhere_is_reported(tree):
    root = tree("parts/1.png", "parts/2.png")
    (root / "parts" / "3.png").symlink_to(root / "gone.png")
    assert [sample.image_path.name for sample in read(root / "parts", DataConfig())] == ["1.png", "2.png", "3.png"]
    (root / "more").symlink_to(root / "unmounted")
    with pytest.raises(DataError, match=r"more: is a link to .*unmounted, which does not exist. Correct or remove it"):
        read(root, DataConfig())


@pytest.mark.data
def test_real_magnetic_tiles(data_root):
    """Counts of the data's README: 633 good images in four conditions; 258 with a defect."""
    samples = read(data_root / "magnetic-tiles", DataConfig())
    good = Counter(sample.subclass for sample in samples if sample.label == "normal")
    assert good == {"exp1": 157, "exp2": 159, "exp3": 157, "exp4": 160}
    defects = Counter(sample.defect for sample in samples if sample.label == "anomalous")
    assert defects == {"blowhole": 77, "break": 56, "crack": 37, "fray": 20, "uneven": 68}
    assert len({sample.group for sample in samples}) == 216
    assert all(sample.mask_path.is_file() for sample in samples if sample.mask_path)


@pytest.mark.data
def test_real_deep_pcb(data_root):
    """Families of 100, 107 and 74 pairs; 90100034 has a template without a board, so 75 templates there."""
    samples = read(data_root / "deep-pcb", DataConfig())
    counts = Counter((sample.subclass, sample.split, sample.label) for sample in samples)
    assert {key[0]: count for key, count in counts.items() if key[1] == "train"} == {
        "group44000": 50,
        "group77000": 54,
        "group90100": 38,
    }
    assert all(sample.label == "normal" for sample in samples if sample.split == "train")
    assert sum(counts.values()) == 282 + 140
    assert sum(count for key, count in counts.items() if key[2] == "anomalous") == 140
    train, test = ({one.group for one in samples if one.split == split} for split in ("train", "test"))
    assert not train & test


@pytest.mark.parametrize("name", ["ground_truth", "Ground_Truth", "ground truth", "GroundTruth", "GT", "mask", "Masks"])
@pytest.mark.parametrize(
    ("good", "bad", "home"),
    [
        ("train/good/1.png", "test/hole/2.png", ""),
        ("good/1.png", "hole/2.png", ""),
        ("cloth/red/train/good/1.png", "cloth/red/test/hole/2.png", "cloth/red/"),
        ("train/good/1.png", "test/hole/2.png", "test/"),
    ],
    ids=["beside train and test", "beside good", "in a subclass", "in test"],
)
def test_folders_of_masks_are_known_by_one_list_of_names(name, good, bad, home, tree):
    mask = f"{home}{name}/hole/2.png"
    assert [(row[0], row[4], row[5]) for row in summaries(tree(good, bad, mask))] == sorted(
        [(good, "good", None), (bad, "hole", mask)]
    )


@pytest.mark.parametrize(
    "mask",
    [
        "masks/hole/2.PNG",
        "masks/hole/2.tif",
        "masks/hole/2_mask.TIFF",
        "masks/hole/2-gt.bmp",
        "masks/hole/2_Mask.png",
        "masks/hole/2.jpg.png",
        "masks/Hole/2.png",
        "masks/test/hole/2.png",
        "masks/2.png",
        "masks/2_mask.webp",
        "test/hole/masks/2.png",
    ],
)
def test_masks_are_found_whatever_their_ending_and_suffix(mask, tree):
    root = tree("train/good/1.jpg", "test/hole/2.jpg", "test/hole/22.jpg", mask, "masks/hole/22.png")
    rows = {row[0]: row[5] for row in summaries(root)}
    assert rows["test/hole/2.jpg"] == mask
    assert rows["test/hole/22.jpg"] == "masks/hole/22.png"


def test_a_flat_mask_of_two_images_is_used_by_neither(tree):
    root = tree("good/1.png", "hole/2.png", "scratch/2.png", "scratch/3.png", "masks/2.png", "masks/3.png")
    rows = {row[0]: row[5] for row in summaries(root)}
    assert rows == {
        "good/1.png": None,
        "hole/2.png": "masks/hole/2.png",
        "scratch/2.png": "masks/scratch/2.png",
        "scratch/3.png": "masks/3.png",
    }


def test_the_mask_named_as_the_layout_names_it_comes_first(tree):
    root = tree("train/good/1.png", "test/hole/2.png", "ground_truth/hole/2.bmp", "ground_truth/hole/2_mask.png")
    assert summaries(root, layout="mvtec_ad")[0][5] == "ground_truth/hole/2_mask.png"
    assert summaries(root, layout="btad")[0][5] == "ground_truth/hole/2.bmp"


@pytest.mark.parametrize("images", ["images/1.png", "1.png"])
def test_masks_beside_images_without_labels_are_refused(images, tree):
    """They mark defects, so these images are not all good."""
    with pytest.raises(DataError, match=r"contains masks .*but no folder named good, ok or normal"):
        read(tree(images, "Masks/1.png"), DataConfig())


def test_texture_ad_finds_masks_by_the_same_names(tree):
    root = tree("Cloth/c1/good/0.png", "Cloth/c1/hole/1.png", "Cloth/c1/GroundTruth/hole/1_GT.tif")
    masks = {row[0]: row[5] for row in summaries(root, layout="texture_ad")}
    assert masks["Cloth/c1/hole/1.png"] == "Cloth/c1/GroundTruth/hole/1_GT.tif"


def test_unused_images(tree):
    root = tree(
        "train/good/1.png", "test/hole/2.png", "masks/hole/2.png", "masks/hole/9.png", "masks/good/1.png", "a.txt"
    )
    samples = read(root, DataConfig())
    assert unused(root, samples) == [root / "masks/good/1.png", root / "masks/hole/9.png"]
    write_manifest(samples, root / "manifest.csv")
    assert unused(root, samples) == unused(root / "manifest.csv", samples) == []
