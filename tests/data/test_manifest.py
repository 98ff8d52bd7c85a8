"""Manifests are read, written, refused with a cure if invalid, and checked for faults."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from normweave.config import DataConfig
from normweave.data import layouts
from normweave.data.manifest import COLUMNS, NOTES, check, counts, read_manifest, write_manifest
from normweave.errors import ConfigError, DataError
from normweave.types import Sample


@pytest.fixture
def table(tmp_path):
    """Write text as a manifest and return its path."""

    def write(text, name="manifest.csv", encoding="utf-8"):
        path = tmp_path / name
        path.write_text(text, encoding)
        return path

    return write


def image(path, *, colour=100, size=(16, 12)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, colour).save(path)
    return path


def test_every_column(table, tmp_path):
    path = table(
        "image_path,category,subclass,group,split,label,defect,mask_path\n"
        "images/1.png,cloth,red,roll 7,test,anomalous,hole,masks/1.png\n"
        '"images/2, again.png",cloth,,,,,,\n'
    )
    assert read_manifest(path) == [
        Sample(
            image_path=tmp_path / "images/1.png",
            category="cloth",
            subclass="red",
            group="roll 7",
            split="test",
            label="anomalous",
            defect="hole",
            mask_path=tmp_path / "masks/1.png",
        ),
        Sample(image_path=tmp_path / "images/2, again.png", category="cloth"),
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_only_the_image_is_required(table, tmp_path, encoding):
    path = table("image_path\nKöper.png\n", encoding=encoding)
    assert read_manifest(path) == [Sample(image_path=tmp_path / "Köper.png")]


@pytest.mark.parametrize(
    ("values", "label"),
    [
        (("good", "ok", "normal", "0", "Good", " OK "), "normal"),
        (("anomalous", "bad", "defect", "1", "Bad"), "anomalous"),
    ],
)
def test_labels(table, values, label):
    path = table("image_path,label\n" + "".join(f"{n}.png,{value}\n" for n, value in enumerate(values)))
    assert [sample.label for sample in read_manifest(path)] == [label] * len(values)


def test_a_named_defect_makes_a_row_without_label_anomalous(table):
    path = table("image_path,defect\n1.png,hole\n2.png,good\n3.png,\n")
    assert [(sample.label, sample.defect) for sample in read_manifest(path)] == [
        ("anomalous", "hole"),
        ("normal", None),
        ("normal", None),
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "image_path,label\n1.png,good\n2.png,broken\n",
            r"row 3: label is 'broken'. Allowed: good, ok, normal, 0",
        ),
        ("image_path,label\n1.png,good\n\n2.png,nok\n", "row 4: label is 'nok'"),
        (
            "image_path,split\n1.png,Train\n2.png,val\n",
            "row 3: split is 'val'. Allowed: train, calibration, test, or empty",
        ),
        ("image_path,label,defect\n1.png,good,hole\n", "row 2: label is 'good', but the defect is 'hole'"),
        ("image_path,label\n,good\n", "row 2: image_path is empty"),
        ("image_path,label\n1.png,good,more\n", "row 2: more values than the header has columns"),
        ("label,split\ngood,train\n", "no column image_path. Columns: image_path, category"),
        ("image_path\n", "no rows"),
        ("", "no column image_path"),
        ('image_path\n"1.png\n', "cannot be read as CSV .* Save it as UTF-8, separated by commas"),
    ],
)
def test_wrong_rows_are_named(table, text, reason):
    with pytest.raises(DataError, match=reason):
        read_manifest(table(text))


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("image_path,labels", "Unknown column in .*'labels'. Did you mean 'label'. Known: category, defect"),
        (
            "image_path;label",
            "Unknown column in .*'image_path;label'. Did you mean 'image_path'.* separated by commas",
        ),
    ],
)
def test_wrong_columns_get_a_hint(table, header, reason):
    with pytest.raises(ConfigError, match=reason):
        read_manifest(table(f"{header}\n1.png\n"))


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_column_that_is_given_twice_is_refused(tmp_path, ending):
    path = tmp_path / f"manifest{ending}"
    if ending == ".csv":
        path.write_text("image_path,label,label\n1.png,good,bad\n")
    else:
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = [pyarrow.array([text]) for text in ("1.png", "good", "bad")]
        parquet.write_table(pyarrow.Table.from_arrays(columns, names=["image_path", "label", "label"]), path)
    with pytest.raises(DataError, match="column 'label' is given more than once"):
        read_manifest(path)


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_file_name_that_is_not_utf_8_is_refused_before_the_table_is_written(tmp_path, ending):
    name = b"\xff.png".decode(errors="surrogateescape")
    with pytest.raises(DataError, match=r"image_path '\\udcff\.png' is not UTF-8, .* Rename the file"):
        write_manifest([Sample(image_path=tmp_path / name)], tmp_path / f"manifest{ending}")
    assert list(tmp_path.iterdir()) == []


def test_tables_that_cannot_be_read(table, tmp_path):
    with pytest.raises(DataError, match=r"no such manifest. Write one with: normweave data manifest"):
        read_manifest(tmp_path / "gone.csv")
    with pytest.raises(DataError, match=r"a manifest ends in \.csv or \.parquet"):
        read_manifest(table("image_path\n1.png\n", name="manifest.txt"))
    with pytest.raises(DataError, match=r"a manifest ends in \.csv or \.parquet"):
        write_manifest([], tmp_path / "manifest.xlsx")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_manifest(table("image_path\n1.png\n", name="manifest.parquet"))
    with pytest.raises(DataError, match="cannot be read as CSV"):
        read_manifest(table("image_path\nKöper.png\n", encoding="latin-1"))


def test_parquet_may_contain_numbers_booleans_and_missing_values(tmp_path):
    columns = {
        "image_path": ["1.png", "2.png", "3.png"],
        "subclass": [7, 8, None],
        "group": [1.0, float("nan"), 2.5],
        "label": [True, False, None],
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "manifest.parquet")
    got = read_manifest(tmp_path / "manifest.parquet")
    assert [sample.subclass for sample in got] == ["7", "8", None]
    assert [sample.group for sample in got] == ["1", None, "2.5"]
    assert [sample.label for sample in got] == ["anomalous", "normal", "normal"]


SAMPLES = [
    Sample(image_path=Path("a/1.png"), category="c", subclass="s", group="g", split="calibration"),
    Sample(
        image_path=Path("a/ä,\"'\n.png"),
        label="anomalous",
        defect="hole",
        mask_path=Path("m/2.png"),
        split="test",
    ),
    Sample(image_path=Path("b/3.png")),
]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_what_is_written_is_read_back(tmp_path, ending):
    """Also from another folder: paths are relative to the table."""
    samples = [
        replace(
            one,
            image_path=tmp_path / one.image_path,
            mask_path=one.mask_path and tmp_path / one.mask_path,
        )
        for one in SAMPLES
    ]
    path = tmp_path / "tables" / f"all.{ending}"
    write_manifest(samples, path)
    got = [
        replace(
            one,
            image_path=Path(os.path.normpath(one.image_path)),
            mask_path=one.mask_path and Path(os.path.normpath(one.mask_path)),
        )
        for one in read_manifest(path)
    ]
    assert got == samples
    write_manifest(samples, tmp_path / f"beside.{ending}")
    assert read_manifest(tmp_path / f"beside.{ending}") == samples


def test_csv_is_plain(tmp_path):
    write_manifest([Sample(image_path=tmp_path / "a" / "1.png", subclass="s")], tmp_path / "m.csv")
    assert (tmp_path / "m.csv").read_bytes() == (",".join(COLUMNS) + "\na/1.png,default,s,,,normal,,\n").encode()


def test_an_interrupted_write_leaves_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "m.csv"
    write_manifest(SAMPLES[:1], path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_manifest(SAMPLES, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.csv"]


def test_a_valid_set_has_no_faults(tmp_path):
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(12, 16, dtype=np.uint8) * 255).save(mask)
    samples = [
        Sample(image_path=image(tmp_path / "1.png", colour=1), split="train", group="a"),
        Sample(
            image_path=image(tmp_path / "2.png", colour=2),
            split="test",
            group="b",
            label="anomalous",
            mask_path=mask,
        ),
        Sample(image_path=image(tmp_path / "3.png", colour=3), split="test", group="b"),
    ]
    assert check(samples) == []


def test_every_fault_is_found(tmp_path):
    for number in range(12):
        image(tmp_path / f"{number}.png", colour=number)
    (tmp_path / "text.png").write_text("no image")
    blank = image(tmp_path / "blank.png", colour=0)
    full = image(tmp_path / "full.png", colour=255)
    other = image(tmp_path / "other.png", colour=255, size=(12, 16))
    copy = image(tmp_path / "copy.png", colour=8)

    def row(name, **fields):
        return Sample(image_path=tmp_path / name, **{"split": "test", **fields})

    samples = [
        row("gone.png"),
        row("text.png"),
        row("0.png", label="anomalous", mask_path=tmp_path / "gone.png"),
        row("1.png", label="anomalous", mask_path=tmp_path / "text.png"),
        row("2.png", label="anomalous", mask_path=other),
        row("3.png", label="anomalous", mask_path=blank),
        row("4.png", mask_path=full),
        row("5.png"),
        row("5.png"),
        row("6.png", split="calibration", label="anomalous", mask_path=full),
        row("7.png", split="train", label="anomalous", group="roll"),
        row("8.png", split="calibration"),
        row(copy.name),
        row("9.png", group="roll"),
    ]
    faults = [(fault.type, fault.path.name if fault.path else None) for fault in check(samples)]
    assert sorted(faults, key=str) == sorted(
        [
            ("missing image", "gone.png"),
            ("unreadable image", "text.png"),
            ("missing mask", "0.png"),
            ("unreadable mask", "1.png"),
            ("wrong mask", "2.png"),
            ("empty mask", "3.png"),
            ("marked normal", "4.png"),
            ("duplicate path", "5.png"),
            ("anomalous in train", "6.png"),
            ("anomalous in train", "7.png"),
            ("shared file", "copy.png"),
            ("shared group", "9.png"),
            ("no good training image", None),
        ],
        key=str,
    )
    texts = {fault.type: fault.text for fault in check(samples)}
    assert "16 x 12 pixels, its image 12 x 16" in texts["wrong mask"]
    assert "Group 'roll' is in train and test" in texts["shared group"]


@pytest.mark.data
def test_faults_of_the_real_sets(data_root):
    """Magnetic tiles: four masks are empty although the images are labelled uneven."""
    faults = check(layouts.read(data_root / "magnetic-tiles", DataConfig()))
    assert sorted((fault.type, fault.path.name) for fault in faults) == [
        ("empty mask", f"exp{name}.jpg") for name in ("3_num_45042", "4_num_124690", "4_num_352527", "4_num_45057")
    ]
    boards = layouts.read(data_root / "deep-pcb", DataConfig())
    tested = [board for board in boards if board.split == "test"][:40]
    assert check([*tested, boards[0]]) == []


def test_counts_per_category_subclass_and_split():
    rows = [
        ("cloth", "red", "train", "normal"),
        ("cloth", "red", "test", "anomalous"),
        ("cloth", None, None, "normal"),
    ]
    samples = [
        Sample(image_path=Path("1.png"), category=category, subclass=subclass, split=split, label=label)
        for category, subclass, split, label in [*rows, rows[0]]
    ]
    columns = ("category", "subclass", "split", "good", "anomalous")
    assert [tuple(row[column] for column in columns) for row in counts(samples)] == [
        ("cloth", None, None, 1, 0),
        ("cloth", "red", "test", 0, 1),
        ("cloth", "red", "train", 2, 0),
    ]


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_notes_are_written_for_people_and_not_read(tmp_path, ending):
    samples = [
        Sample(image_path=tmp_path / "1.png", defect="hole", label="anomalous"),
        Sample(image_path=tmp_path / "2.png"),
    ]
    path = tmp_path / f"reviewed.{ending}"
    notes = [dict.fromkeys(NOTES, "") | {"comment": "at the edge", "reviewer": "Ada"}, dict.fromkeys(NOTES, "")]
    write_manifest(samples, path, notes=notes)
    assert read_manifest(path) == samples
    if ending == "csv":
        assert path.read_text("utf-8").splitlines()[0] == ",".join(COLUMNS + NOTES)
        assert "at the edge" in path.read_text("utf-8")
