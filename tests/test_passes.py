"""What is merged from parts of the images is what is computed from all of them."""

from functools import partial

import numpy as np
import pytest
import torch

from builders import InMemory, InParts, random
from normweave.features.standardize import ChannelStandardizer, StandardizedFeatures
from normweave.passes import BATCH_IMAGES, Subset, added, added_rows, over, per_image, present

FEATURES = random(40, 3, 2, 2)
KINDS = torch.arange(40) // 9  # five kinds, not all of them in each part
SOURCES = [InMemory(FEATURES), InParts(FEATURES)]


def means(features, kinds):
    return features.mean((2, 3)), kinds


def sums(number, batches):
    total, count = torch.zeros(number, 3, dtype=torch.float64), torch.zeros(number, dtype=torch.float64)
    for features, kinds in batches:
        total.index_add_(0, kinds, features.mean((2, 3)).double())
        count += kinds.bincount(minlength=number)
    return present(count, total)


@pytest.mark.parametrize("source", SOURCES, ids=["one part", "parts"])
@pytest.mark.parametrize("rows", [np.arange(40), np.array([3, 4, 39, 11, 0, 1, 1])], ids=["all", "any order"])
def test_results_of_images_are_in_the_order_of_the_rows(source, rows):
    found, kinds = per_image(source, means, rows=rows, aligned=(KINDS[rows],))
    torch.testing.assert_close(found, FEATURES[rows].mean((2, 3)), rtol=0, atol=1e-7)
    assert torch.equal(kinds, KINDS[rows])


@pytest.mark.parametrize("source", SOURCES, ids=["one part", "parts"])
@pytest.mark.parametrize("number", [5, 7], ids=["all kinds", "some kinds"])
def test_sums_are_merged_by_their_row(source, number):
    count, total = over(source, partial(sums, number), merge=partial(added_rows, number), aligned=(KINDS,))
    for kind in range(number):
        own = FEATURES[kind == KINDS].mean((2, 3)).double()
        assert count[kind] == len(own)
        torch.testing.assert_close(total[kind], own.sum(0))


def test_one_part_is_returned_as_it_is():
    parts = (torch.ones(2), torch.zeros(3))
    assert added([parts]) is parts
    assert [each.tolist() for each in added([parts, parts])] == [[2, 2], [0, 0, 0]]


def test_no_image_is_an_empty_part():
    assert over(InParts(FEATURES), list, merge=list, rows=np.empty(0, dtype=np.int64)) == [[]]


def test_few_images_are_read_at_once():
    source = InMemory(FEATURES)
    over(source, list, merge=list)
    assert source.largest_read == BATCH_IMAGES


def test_channels_are_standardized_where_the_images_are():
    here, apart = ChannelStandardizer(channels=3), ChannelStandardizer(channels=3)
    here.fit(InMemory(FEATURES))
    apart.fit(InParts(FEATURES))
    torch.testing.assert_close(apart.mean, here.mean, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(apart.std, here.std, rtol=1e-6, atol=1e-7)
    found, _ = per_image(StandardizedFeatures(InParts(FEATURES), here), means, aligned=(KINDS,))
    torch.testing.assert_close(found, here(FEATURES).mean((2, 3)))


def test_rows_of_a_subset_are_numbered_within_it():
    chosen, rows = np.array([30, 2, 7]), np.array([2, 0])
    for source in SOURCES:
        (found, _) = per_image(Subset(source, chosen), means, rows=rows, aligned=(KINDS[:2],))
        torch.testing.assert_close(found, FEATURES[[7, 30]].mean((2, 3)))
    assert torch.equal(Subset(SOURCES[0], chosen).read(rows), FEATURES[[7, 30]])
