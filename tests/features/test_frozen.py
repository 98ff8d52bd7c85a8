import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from normweave import features
from normweave.config import TimmConfig
from normweave.errors import ConfigError, DataError
from normweave.features.frozen import Backbone, FrozenFeatures


def build(height=64, width=64, **settings):
    settings = {"backbone": "resnet18", "weights": "random", "batch_images": 2} | settings
    return features.build(TimmConfig(**settings), height=height, width=width)


def frozen(model, *, height=32, width=32, **settings):
    """Return an extractor over any model."""
    settings = {"name": "own", "indices": [0], "mean": (0.5,) * 3, "std": (0.5,) * 3} | settings
    backbone = Backbone(model, **{"grid_stride": 8, "neighbourhood": 3} | settings)
    return FrozenFeatures(backbone, height=height, width=width, batch_images=2)


@pytest.fixture(scope="module")
def pixels():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 64, 64), dtype=np.uint8))


def slow_average(grid, side):
    """Each cell of (H, W) averaged with the neighbours that exist."""
    reach = side // 2
    return np.array(
        [
            [
                grid[max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1].mean()
                for j in range(grid.shape[1])
            ]
            for i in range(grid.shape[0])
        ]
    )


def slow_bilinear(grid, height, width):
    """Pixel centres at half integers, borders repeated."""
    found = np.empty((height, width))
    for i in range(height):
        for j in range(width):
            y = min(max((i + 0.5) * grid.shape[0] / height - 0.5, 0), grid.shape[0] - 1)
            x = min(max((j + 0.5) * grid.shape[1] / width - 0.5, 0), grid.shape[1] - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, grid.shape[0] - 1), min(left + 1, grid.shape[1] - 1)
            v, u = y - top, x - left
            found[i, j] = (1 - v) * ((1 - u) * grid[top, left] + u * grid[top, right]) + v * (
                (1 - u) * grid[bottom, left] + u * grid[bottom, right]
            )
    return found


@pytest.mark.parametrize("neighbourhood", [1, 3, 5])
def test_agrees_with_a_slow_literal_implementation(pixels, neighbourhood):
    """Normalise, timm's own intermediates, average, resize, concatenate: from the parts, untouched by us."""
    extractor = build(neighbourhood=neighbourhood)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("resnet18", pretrained=False).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = (pixels[:1] / 255 - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        stages = model.forward_intermediates(images, intermediates_only=True)[1:4]
    slow = [
        slow_bilinear(slow_average(channel, neighbourhood), 8, 8) for stage in stages for channel in stage[0].numpy()
    ]

    np.testing.assert_allclose(extractor.extract(pixels[:1])[0], np.stack(slow), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "patch", "prefix"),
    [
        ("vit_small_patch14_dinov2", 14, 1),  # the class token
        ("vit_small_patch14_reg4_dinov2", 14, 5),  # and four register tokens
        ("vit_small_patch16_dinov3", 16, 5),  # with rotary position embeddings
    ],
)
def test_blocks_are_averaged_after_layer_normalization(name, patch, prefix):
    """From the tokens that the blocks return, for images of another size than the model was made for."""
    torch.manual_seed(0)
    model = timm.create_model(name, depth=3, embed_dim=48, num_heads=3, init_values=1.0).eval()
    tokens = []
    for block in (model.blocks[0], model.blocks[2]):
        block.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    extractor = frozen(
        model,
        height=3 * patch,
        width=4 * patch,
        indices=[0, 2],
        grid_stride=patch,
        neighbourhood=1,
        average=True,
    )
    images = torch.randint(0, 256, (2, 3, 3 * patch, 4 * patch), dtype=torch.uint8)
    tokens.clear()

    got = extractor.extract(images).numpy()

    assert [one.shape for one in tokens] == [(2, prefix + 12, 48)] * 2
    expected = np.zeros((2, 48, 3, 4))
    for each in tokens:
        for image, sequence in enumerate(each.numpy()):
            for number, token in enumerate(sequence[prefix:]):
                normalized = (token - token.mean()) / np.sqrt(token.var() + 1e-6)
                expected[image, :, number // 4, number % 4] += normalized / 2
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert extractor.dims == (48,)


def test_pixels_are_normalized_as_the_weights_expect():
    """EfficientNet-Lite: mean = std = 0.5, so 0 becomes -1 and 255 becomes 1."""

    class Stem(nn.Module):
        def forward_intermediates(self, images, **settings):
            return [functional.avg_pool2d(images, 8)]

    extractor = frozen(Stem(), neighbourhood=1)
    ends = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 32, 32)
    torch.testing.assert_close(extractor(ends)[:, :, 0, 0], torch.tensor([[-1.0] * 3, [1.0] * 3]))


def test_the_layers_above_the_last_stage_are_gone():
    whole = build(strides=(4, 8, 16, 32))
    cut = build(strides=(4, 8))
    assert len(list(cut.model.layer3.modules())) == 1, "layer3 has stride 16"
    assert sum(p.numel() for p in cut.parameters()) < 0.1 * sum(p.numel() for p in whole.parameters())
    assert cut.shape[0] == 64 + 128


def test_batch_norm_is_merged_into_the_convolutions(pixels):
    extractor = build(backbone="tf_efficientnet_lite0", weights="auto")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in extractor.modules())


def test_a_network_in_which_merging_would_be_wrong_is_left_as_it_is():
    """Two neighbours in the list that do not follow each other in the computation."""

    class Crossed(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution = nn.Conv2d(3, 3, 8, stride=8)
            self.norm = nn.BatchNorm2d(3)
            self.norm.running_mean += 3

        def forward_intermediates(self, images, **settings):
            return [self.convolution(self.norm(images))]

    torch.manual_seed(0)
    model = Crossed().eval()
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.convolution(model.norm((pixels.float() - 127.5) / 127.5))

    extractor = frozen(model, neighbourhood=1)

    assert isinstance(extractor.model.norm, nn.BatchNorm2d)
    torch.testing.assert_close(extractor(pixels), expected)


def test_features_are_bit_equal_in_any_batch(pixels):
    """Whatever the row in the batch, the other images and the number of passes, with the packaged weights."""
    extractor = build(backbone="tf_efficientnet_lite0", weights="auto", batch_images=4)
    six = torch.cat([pixels, 255 - pixels])
    together = extractor.extract(six)
    for row in range(6):
        assert torch.equal(extractor.extract(six[row : row + 1])[0], together[row])
    assert torch.equal(extractor.extract(six.flip(0)), together.flip(0))


def test_the_fingerprint_changes_with_one_bit_of_one_weight():
    model = timm.create_model("resnet18", pretrained=False).eval()
    before = frozen(model, indices=[1]).fingerprint
    assert frozen(model, indices=[1]).fingerprint == before
    weight = model.layer1[0].conv1.weight.data
    weight.view(torch.int32)[0, 0, 0, 0] ^= 1
    assert frozen(model, indices=[1]).fingerprint != before


@pytest.mark.parametrize(
    "other",
    [
        {"strides": (4, 8)},
        {"grid_stride": 16},
        {"neighbourhood": 1},
        {"batch_images": 3},
        {"width": 128},
        {"height": 128},
        {"backbone": "resnet34"},
    ],
    ids=lambda other: next(iter(other)),
)
def test_the_fingerprint_changes_with_every_setting(other):
    assert build(**other).fingerprint != build().fingerprint


def test_the_fingerprint_of_averaged_blocks_is_another():
    tiny = {"backbone": "vit_tiny_patch16_224"}
    assert build(**tiny, blocks=(12,)).fingerprint != build(**tiny, strides=(16,)).fingerprint


def test_pixels_of_another_size_or_type_are_refused():
    extractor = build()
    with pytest.raises(
        DataError, match=r"must be uint8 of shape \(n, 3, 64, 64\), got torch.uint8 of shape \(1, 3, 64"
    ):
        extractor.extract(torch.zeros(1, 3, 64, 65, dtype=torch.uint8))
    with pytest.raises(DataError, match=r"got torch.float32 of shape"):
        extractor.extract(torch.zeros(1, 3, 64, 64))


def test_an_input_size_that_the_network_cannot_read_is_refused():
    with pytest.raises(
        ConfigError, match=r"'pit_ti_224' cannot read 64 x 64 pixels \(.*\). Choose another prepare.height"
    ):
        build(backbone="pit_ti_224", strides=(16,))


def test_a_grid_of_no_cells_is_refused():
    with pytest.raises(ConfigError, match=r"features.grid_stride 128 is larger than the input of 64 x 64 pixels"):
        build(grid_stride=128)


def test_a_small_pass_is_padded_unless_fill_is_false():
    extractor = features.build(TimmConfig(weights="random"), height=64, width=64)
    pixels = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    sizes = []
    extractor.register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    filled, bare = extractor.extract(pixels), extractor.extract(pixels, fill=False)
    assert sizes == [extractor.batch_images, 3]
    torch.testing.assert_close(bare, filled, rtol=1e-4, atol=1e-5)
