import numpy as np
import pytest
import torch

from builders import InMemory
from normweave.errors import DataError
from normweave.features.standardize import ChannelStandardizer, StandardizedFeatures
from normweave.passes import batches


def fitted(features):
    standardizer = ChannelStandardizer(channels=np.shape(features)[1])
    standardizer.fit(InMemory(features))
    return standardizer


class InParts(InMemory):
    """Features whose statistics are merged from three parts, as of several machines."""

    def over(self, statistics, merge, rows, aligned):
        return merge([statistics(batches(InMemory(self.features), part)) for part in np.split(rows, [5, 21])])


@pytest.fixture
def features():
    """37 images, which no batch divides; each channel with its own mean, some far from 0."""
    generator = np.random.default_rng(0)
    mean = np.array([0, 1e4, -3, 0.1])[:, None, None]
    return (mean + generator.normal(size=(37, 4, 5, 3)) * np.array([1, 0.5, 1e-3, 20])[:, None, None]).astype(
        np.float32
    )


def test_agrees_with_numpy_on_everything_at_once(features):
    standardizer = fitted(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(standardizer.mean, exact.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(standardizer.std, exact.std((0, 2, 3)), rtol=1e-6)


def test_the_order_of_the_images_does_not_matter(features):
    torch.testing.assert_close(fitted(features).std, fitted(features[::-1].copy()).std)


def test_the_mean_of_cached_features_has_the_same_bits_in_any_parts():
    """Means of a power of two of numbers with 16 bits often lie halfway between two of 32 bits."""
    features = np.random.default_rng(0).normal(size=(32, 256, 8, 8)).astype(np.float16).astype(np.float32)
    in_parts = ChannelStandardizer(channels=256)
    in_parts.fit(InParts(features))
    assert torch.equal(in_parts.mean, fitted(features).mean)


def test_the_fit_images_have_mean_0_and_std_1_afterwards(features):
    standardizer = fitted(features)
    out = StandardizedFeatures(InMemory(features), standardizer).read(range(37)).double()
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0, atol=2e-3)  # float32 at 10 000 has steps of 0.001
    np.testing.assert_allclose(out.std((0, 2, 3), correction=0), 1, atol=1e-3)


def test_reads_no_more_than_16_at_once(features):
    source = InMemory(features)
    ChannelStandardizer(channels=4).fit(source)
    assert source.largest_read == 16


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_constant_channel_is_centred_and_divided_by_1(features, value):
    features[:, 1] = value
    standardizer = fitted(features)
    assert standardizer.std[1] == 1
    changed = torch.as_tensor(features[:1])
    changed[:, 1] += 2
    torch.testing.assert_close(standardizer(changed)[0, 1], torch.full((5, 3), 2.0), rtol=0, atol=2e-3)


def test_a_source_is_standardized_as_it_is_read(features):
    source = InMemory(features)
    standardizer = fitted(features)
    standardized = StandardizedFeatures(source, standardizer)
    assert len(standardized) == 37
    assert standardized.shape == (4, 5, 3)
    rows = [30, 2, 2]
    expected = (features[rows] - standardizer.mean.numpy()[:, None, None]) / standardizer.std.numpy()[:, None, None]
    np.testing.assert_allclose(standardized.read(rows), expected, rtol=1e-6)


def test_what_was_fitted_is_in_the_state(features):
    standardizer = fitted(features)
    restored = ChannelStandardizer(channels=4)
    restored.load_state_dict(standardizer.state_dict())
    assert torch.equal(restored.mean, standardizer.mean)
    assert torch.equal(restored.std, standardizer.std)


def test_no_images_are_refused():
    with pytest.raises(DataError, match="needs at least one image, got none"):
        fitted(np.zeros((0, 4, 2, 2)))
