import numpy as np
import pytest
import torch

from builders import InMemory
from normweave.errors import DataError
from normweave.features.standardise import ChannelStandard, Standardised


def fitted(features):
    standard = ChannelStandard(channels=np.shape(features)[1])
    standard.fit(InMemory(features))
    return standard


@pytest.fixture
def features():
    """37 images, which no batch divides; each channel with its own mean, far from 0 in places."""
    generator = np.random.default_rng(0)
    mean = np.array([0, 1e4, -3, 0.1])[:, None, None]
    return (mean + generator.normal(size=(37, 4, 5, 3)) * np.array([1, 0.5, 1e-3, 20])[:, None, None]).astype(
        np.float32
    )


def test_agrees_with_numpy_on_everything_at_once(features):
    standard = fitted(features)
    exact = features.astype(np.float64)
    np.testing.assert_allclose(standard.mean, exact.mean((0, 2, 3)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(standard.deviation, exact.std((0, 2, 3)), rtol=1e-6)


def test_the_order_of_the_images_does_not_matter(features):
    torch.testing.assert_close(fitted(features).deviation, fitted(features[::-1].copy()).deviation)


def test_what_was_fitted_comes_out_with_mean_0_and_deviation_1(features):
    standard = fitted(features)
    out = Standardised(InMemory(features), standard).read(range(37)).double()
    np.testing.assert_allclose(out.mean((0, 2, 3)), 0, atol=2e-3)  # float32 at 10 000 has steps of 0.001
    np.testing.assert_allclose(out.std((0, 2, 3), correction=0), 1, atol=1e-3)


def test_reads_no_more_than_16_at_once(features):
    source = InMemory(features)
    ChannelStandard(channels=4).fit(source)
    assert source.largest_read == 16


@pytest.mark.parametrize("value", [0.0, 0.1, 1e4])
def test_a_channel_that_never_changes_is_centred_and_not_blown_up(features, value):
    features[:, 1] = value
    standard = fitted(features)
    assert standard.deviation[1] == 1
    changed = torch.as_tensor(features[:1])
    changed[:, 1] += 2
    torch.testing.assert_close(standard(changed)[0, 1], torch.full((5, 3), 2.0), rtol=0, atol=2e-3)


def test_a_source_is_standardised_as_it_is_read(features):
    source = InMemory(features)
    standard = fitted(features)
    standardised = Standardised(source, standard)
    assert len(standardised) == 37
    assert standardised.shape == (4, 5, 3)
    rows = [30, 2, 2]
    expected = (features[rows] - standard.mean.numpy()[:, None, None]) / standard.deviation.numpy()[
        :, None, None
    ]
    np.testing.assert_allclose(standardised.read(rows), expected, rtol=1e-6)


def test_what_was_fitted_is_in_the_state(features):
    standard = fitted(features)
    restored = ChannelStandard(channels=4)
    restored.load_state_dict(standard.state_dict())
    assert torch.equal(restored.mean, standard.mean)
    assert torch.equal(restored.deviation, standard.deviation)


def test_no_images_are_refused():
    with pytest.raises(DataError, match="needs at least one image, got none"):
        fitted(np.zeros((0, 4, 2, 2)))
