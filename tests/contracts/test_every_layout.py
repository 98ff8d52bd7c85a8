"""The contract of every data layout in `LAYOUTS`. A new layout needs one builder of a small folder in `FOLDERS`."""

import re
import zlib

import numpy as np
import pytest
from PIL import Image

from normweave.config import DataConfig
from normweave.data.layouts import LAYOUTS, Layout, read, recognise
from normweave.data.manifest import check, read_manifest, write_manifest
from normweave.errors import ConfigError, DataError
from normweave.types import Sample


def write_images(root, *names):
    """Write images with random pixels, so that no two files are the same."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        Image.fromarray(random.integers(0, 256, (12, 16, 3), dtype=np.uint8)).save(path)


def write_masks(root, *names, value=255):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.zeros((12, 16), dtype=np.uint8)
        pixels[3:6, 4:9] = value
        Image.fromarray(pixels).save(path)


# Each builder writes three good and two anomalous images or more. All images that it writes must be read.


def mvtec_ad(root):
    """bottle/{train/good,test/good,test/DEFECT}/NNN.png, bottle/ground_truth/DEFECT/NNN_mask.png."""
    write_images(root, "bottle/train/good/000.png", "bottle/train/good/001.png", "bottle/test/good/000.png")
    write_images(root, "bottle/test/broken_large/000.png", "bottle/test/contamination/000.png")
    write_masks(root, *(f"bottle/ground_truth/{name}/000_mask.png" for name in ("broken_large", "contamination")))
    (root / "bottle/license.txt").write_text("CC BY-NC-SA 4.0")


def mpdd(root):
    """As MVTec AD; defects have spaces in their names."""
    write_images(root, "tubes/train/good/000.png", "tubes/train/good/001.png", "tubes/test/good/000.png")
    write_images(root, "tubes/test/parts mismatch/000.png", "tubes/test/parts mismatch/001.png")
    write_masks(root, *(f"tubes/ground_truth/parts mismatch/00{number}_mask.png" for number in (0, 1)))


def btad(root):
    """01/{train/ok,test/ok,test/ko}/NNNN.bmp; masks in 01/ground_truth/ko/, .png in 01 and 02, .bmp in 03."""
    for product, ending in (("01", "png"), ("03", "bmp")):
        write_images(root, f"{product}/train/ok/0000.bmp", f"{product}/train/ok/0001.bmp")
        write_images(root, f"{product}/test/ok/0000.bmp", f"{product}/test/ko/0001.bmp")
        write_masks(root, f"{product}/ground_truth/ko/0001.{ending}")


def visa(root):
    """OBJECT/Data/{Images/{Normal,Anomaly}/N.JPG,Masks/Anomaly/N.png}; masks hold the numbers of defect types."""
    rows = ["object,split,label,image,mask"]
    for number, split in enumerate(("train", "train", "test")):
        image = f"candle/Data/Images/Normal/{number:04}.JPG"
        write_images(root, image)
        rows.append(f"candle,{split},normal,{image},")
    for number in (0, 1):
        image, mask = (f"candle/Data/{name}/{number:03}" for name in ("Images/Anomaly", "Masks/Anomaly"))
        write_images(root, f"{image}.JPG")
        write_masks(root, f"{mask}.png", value=number + 4)
        rows.append(f"candle,test,anomaly,{image}.JPG,{mask}.png")
    (root / "split_csv").mkdir()
    (root / "split_csv/1cls.csv").write_text("\r\n".join(rows) + "\r\n")


def visa_prepared(root):
    """As the authors' prepare_data.py writes it: 1cls/OBJECT/{train/good,test/{good,bad},ground_truth/bad}."""
    home = "1cls/candle"
    write_images(root, f"{home}/train/good/0.JPG", f"{home}/train/good/1.JPG", f"{home}/test/good/2.JPG")
    write_images(root, f"{home}/test/bad/000.JPG", f"{home}/test/bad/001.JPG")
    write_masks(root, f"{home}/ground_truth/bad/000.png", f"{home}/ground_truth/bad/001.png")


def texture_ad(root):
    """A folder per category and per subclass; masks with the suffix _mask."""
    home = "Cloth/cloth1"
    write_images(root, f"{home}/train/good/0.png", f"{home}/train/good/1.png", f"{home}/test/good/0.png")
    write_images(root, f"{home}/test/wrinkle/0.png", f"{home}/test/wrinkle/1.png")
    write_masks(root, f"{home}/ground_truth/wrinkle/0_mask.png", f"{home}/ground_truth/wrinkle/1_mask.png")


def magnetic_tiles(root):
    """MT_{Free,DEFECT}/expN_num_NUMBER.jpg with a mask .png of the same stem."""
    write_images(root, *(f"MT_Free/exp1_num_{number}.jpg" for number in (100, 300, 500)))
    for name in ("MT_Fray/exp1_num_700", "MT_Crack/exp2_num_900"):
        write_images(root, f"{name}.jpg")
        write_masks(root, f"{name}.png")


def deep_pcb(root):
    """FAMILY/NAME_temp.jpg without defects, NAME_test.jpg with the boxes NAME.txt; boards of train are not read."""
    write_images(root, *(f"group1/{number}_temp.jpg" for number in (1, 2, 3, 4)))
    write_images(root, "group1/3_test.jpg", "group1/4_test.jpg")
    for number in (3, 4):
        (root / f"group1/{number}.txt").write_text("2 3 9 8 1\n")


def folders(root):
    """category/subclass/{good,DEFECT}/STEM.*, without train and test."""
    home = "cloth/red"
    write_images(root, *(f"{home}/good/{number}.png" for number in (0, 1, 2)))
    write_images(root, f"{home}/hole/0.png", f"{home}/hole/1.png")
    write_masks(root, f"{home}/ground_truth/hole/0.png", f"{home}/ground_truth/hole/1_mask.png")


def good_images(root):
    """A folder per subclass."""
    write_images(root, "red/0.png", "red/1.png", "blue/0.png")


def manifest(root):
    """A table; the images may be anywhere."""
    write_images(root, "photos/0.png", "photos/1.png", "photos/2.png", "photos/3.png", "photos/4.png")
    write_masks(root, "masks/3.gif.png", "masks/4.png")
    samples = [Sample(image_path=root / f"photos/{number}.png", category="cloth") for number in range(3)]
    for name, mask in (("3", "3.gif.png"), ("4", "4.png")):
        path = root / f"photos/{name}.png"
        samples.append(Sample(image_path=path, category="cloth", label="anomalous", mask_path=root / "masks" / mask))
    write_manifest(samples, root / "manifest.csv")


FOLDERS = {  # layout, builder
    "manifest": ("manifest", manifest),
    "magnetic_tiles": ("magnetic_tiles", magnetic_tiles),
    "visa": ("visa", visa),
    "visa, prepared": ("visa", visa_prepared),
    "deep_pcb": ("deep_pcb", deep_pcb),
    "folders": ("folders", folders),
    "good_images": ("good_images", good_images),
    "texture_ad": ("texture_ad", texture_ad),
    "mvtec_ad": ("mvtec_ad", mvtec_ad),
    "mpdd": ("mpdd", mpdd),
    "btad": ("btad", btad),
}


@pytest.fixture(params=FOLDERS)
def built(request, tmp_path):
    """(name of the layout, its folder)."""
    layout, build = FOLDERS[request.param]
    build(tmp_path)
    return layout, tmp_path


def faults(samples):
    return sorted((fault.type, fault.path) for fault in check(samples))


def test_every_layout_has_a_folder():
    assert {layout for layout, _ in FOLDERS.values()} == set(LAYOUTS), "Write one builder per layout in FOLDERS."


def test_all_images_are_read_once_and_without_faults(built):
    layout, root = built
    samples = read(root, DataConfig(), layout=layout)

    masks = {sample.mask_path for sample in samples if sample.mask_path}
    images = {path for path in root.rglob("*.*") if path.suffix.lower() in (".png", ".jpg", ".bmp")}
    assert sorted(sample.image_path for sample in samples) == sorted(images - masks)
    assert check(samples) == []
    assert read(root, DataConfig(), layout=layout) == samples


def test_labels_masks_and_splits_agree(built):
    layout, root = built
    samples = read(root, DataConfig(), layout=layout)

    assert sum(sample.label == "normal" for sample in samples) >= 3
    assert sum(sample.label == "anomalous" for sample in samples) >= (0 if layout == "good_images" else 2)
    for sample in samples:
        assert sample.category != "default"
        assert (sample.mask_path is not None) == (sample.label == "anomalous")
        assert sample.defect is None or sample.label == "anomalous"
        assert sample.split in (None, "test") or sample.label == "normal"


def test_samples_survive_a_manifest(built, tmp_path_factory):
    layout, root = built
    samples = read(root, DataConfig(), layout=layout)
    write_manifest(samples, root / "copy.csv")

    assert read_manifest(root / "copy.csv") == samples


def test_faults_in_the_files_are_found(built):
    layout, root = built
    samples = read(root, DataConfig(), layout=layout)
    normal = [sample for sample in samples if sample.label == "normal"]
    anomalous = [sample for sample in samples if sample.label == "anomalous"]
    normal[0].image_path.write_bytes(b"no image")
    expected = [("unreadable image", normal[0].image_path)]
    if anomalous:
        anomalous[0].mask_path.unlink()
        expected.append(("missing mask", anomalous[0].image_path))

    assert faults(read(root, DataConfig(), layout=layout)) == sorted(expected)


def test_a_folder_is_recognised_by_the_first_layout_that_matches(built):
    layout, root = built
    recognised = next((name for name, one in LAYOUTS.items() if one.matches and one.matches(root)), None)

    if LAYOUTS[layout].matches is None:
        assert recognised is None or len(read(root, DataConfig())) == len(read(root, DataConfig(), layout=layout))
    elif "1cls" not in {path.name for path in root.iterdir()}:  # the prepared form of VisA is used by name
        assert recognised == recognise(root) == layout
        assert read(root, DataConfig()) == read(root, DataConfig(), layout=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_empty_folder_is_refused(layout, tmp_path):
    with pytest.raises(DataError, match=re.escape(f"{tmp_path}: no ")) as refused:
        read(tmp_path, DataConfig(), layout=layout)

    assert re.search(r"Allowed endings: \.bmp|Give the path of the table, or another layout\.$", str(refused.value))


def test_a_folder_of_no_layout_is_refused_with_all_layouts(tmp_path):
    (tmp_path / "notes.txt").touch()

    with pytest.raises(DataError) as refused:
        read(tmp_path, DataConfig())

    text = str(refused.value)
    assert text.startswith(f"{tmp_path}: no known layout; found notes.txt. Known: {', '.join(LAYOUTS)}.")
    assert text.endswith("or write a manifest (normweave data manifest).")


def test_an_unknown_layout_is_refused_with_all_layouts(tmp_path):
    with pytest.raises(ConfigError, match=r"Unknown layout 'mvtec'. Did you mean 'mvtec_ad'\?") as refused:
        read(tmp_path, DataConfig(), layout="mvtec")

    assert f"Known: {', '.join(sorted(LAYOUTS))}. " in str(refused.value)
    assert "write a manifest" in str(refused.value)


def test_a_new_row_in_the_table_is_enough(tmp_path, monkeypatch):
    """`read` uses a new layout by name and recognises it; errors list it."""
    write_images(tmp_path, "frame-1.png")

    def read_frames(root):
        return [Sample(image_path=path, category="frames") for path in sorted(root.glob("frame-*.png"))]

    layout = Layout(read_frames, lambda root: any(root.glob("frame-*.png")))
    monkeypatch.setattr("normweave.data.layouts.LAYOUTS", {"frames": layout, **LAYOUTS})

    expected = [Sample(image_path=tmp_path / "frame-1.png", category="frames")]
    assert read(tmp_path, DataConfig()) == read(tmp_path, DataConfig(), layout="frames") == expected
    with pytest.raises(ConfigError, match=r"Known: .*frames"):
        read(tmp_path, DataConfig(), layout="frame")
