from pathlib import Path

import pytest

from normweave.data.manifest import check
from normweave.data.published import PUBLISHED, Count, differences
from normweave.types import Sample


def category(name, count):
    """Samples of one category with these numbers of images."""
    rows = [("train", "normal")] * count.train + [("test", "normal")] * count.test_good
    rows += [("test", "anomalous")] * count.test_anomalous
    return [
        Sample(image_path=Path(f"{name}/{number}.png"), category=name, split=split, label=label)
        for number, (split, label) in enumerate(rows)
    ]


@pytest.mark.parametrize("layout", PUBLISHED)
def test_a_complete_data_set_has_no_differences(layout):
    samples = [sample for name, count in PUBLISHED[layout].items() for sample in category(name, count)]

    assert list(differences(samples, layout)) == []


def test_a_category_with_other_numbers_is_reported_and_a_missing_one_is_not():
    samples = category("01", Count(3, 3, 2)) + category("02", PUBLISHED["btad"]["02"])

    assert list(differences(samples, "btad")) == [
        "01 of btad has 3 train, 3 good and 2 anomalous test images; published are 400 train, 21 good and 49 anomalous "
        "test images. Unpack the data set again."
    ]
    assert list(differences(samples, None)) == list(differences(samples, "texture_ad")) == []


def test_check_reports_the_differences():
    faults = check(category("tubes", Count(1, 0, 0)), layout="mpdd")

    assert [fault.type for fault in faults] == ["missing image", "wrong count"]


def test_published_numbers_add_up_to_the_published_sums():
    sums = {name: tuple(map(sum, zip(*counts.values(), strict=True))) for name, counts in PUBLISHED.items()}
    assert sums == {
        "mvtec_ad": Count(3629, 467, 1258),
        "visa": Count(8659, 962, 1200),
        "btad": Count(1799, 451, 290),
        "mpdd": Count(888, 176, 282),
    }
