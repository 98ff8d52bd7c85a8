"""anomalib's models are built with our backbone, size and normalisation, or refused with the cure."""

import pytest
import torch
from torch import nn

from normweave.bridges import peers
from normweave.config import TimmConfig
from normweave.data.images import decode
from normweave.errors import ConfigError, MissingError
from normweave.features.timm import load_model

from .conftest import NEEDS, planned, to_test

models = pytest.importorskip("normweave.bridges.models", reason=NEEDS)

# Lightning and anomalib warn of the number of workers, of a missing optimiser and of each other.
pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_peer_normalises_as_its_backbone_needs(tmp_path):
    model = models.build(planned("padim"), work=tmp_path)
    grey = torch.full((1, 3, 64, 64), 0.25)
    loaded = load_model("tf_efficientnet_lite0", TimmConfig(weights="random", strides=(8,)))
    wanted = [(0.25 - mean) / std for mean, std in zip(loaded.mean, loaded.std, strict=True)]
    assert model.pre_processor.transform(grey)[0, :, 0, 0].tolist() == pytest.approx(wanted)


def test_stfpms_student_does_not_begin_as_its_teacher(tmp_path):
    model = models.build(planned("stfpm"), work=tmp_path).model
    teacher, student = (part.feature_extractor.conv_stem.weight for part in (model.teacher_model, model.student_model))
    assert not torch.equal(teacher, student)
    assert not teacher.requires_grad
    assert student.requires_grad


class Two(nn.Module):
    """Two grids."""

    def forward(self, images):
        return {"a": images[:, :2], "b": images}


def test_split_features_keep_all_information():
    parted = models.SplitTeacher(Two(), channels=(2, 3), decoder_channels=(6, 7))
    images = torch.randn(2, 3, 6, 7)
    for layer, before in Two()(images).items():
        now = parted(images)[layer]
        d = before.shape[1]
        assert now.shape[1] == {"a": 6, "b": 7}[layer]
        assert (now >= 0).all()
        torch.testing.assert_close(now[:, :d] - now[:, d : 2 * d], before)
        torch.testing.assert_close(now.norm(dim=1), before.norm(dim=1))
    with pytest.raises(ConfigError, match=r"at most \[1, 5\] channels at strides 4, 8 and 16, got \[2, 3\]"):
        models.SplitTeacher(Two(), channels=(2, 3), decoder_channels=(3, 10))


@pytest.mark.slow
def test_reverse_distillation_uses_a_decoder_that_fits_where_there_is_one(tmp_path):
    plan = planned("reverse_distillation", "features.backbone=resnet34", "features.weights=random")
    model = models.build(plan, work=tmp_path).model
    assert not isinstance(model.encoder, models.SplitTeacher)
    assert model.eval()(torch.rand(1, 3, 64, 64)).anomaly_map.shape == (1, 1, 64, 64)


def test_a_teacher_learns_the_features_of_the_backbone(textiles):
    """EfficientAD's, at a size at which the rest of it would not run."""
    from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork

    images = [torch.from_numpy(decode(s.image_path).transpose(2, 0, 1).copy()) for s in to_test(textiles(64))[:4]]
    side = ["prepare.height=64", "prepare.width=64"]

    def distance(steps: int) -> float:
        torch.manual_seed(0)
        teacher = SmallPatchDescriptionNetwork(176)
        plan = peers.read("anomalib/efficient_ad", [*side, f"teacher_steps={steps}"], seed=0)
        models.distil(teacher, plan, images.__getitem__, 4, generator=torch.Generator().manual_seed(0))
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        config = TimmConfig(strides=(4, 8, 16), grid_stride=4, batch_images=1)
        extractor = models.build_features(config, height=64, width=64)
        features = torch.cat([extractor(image[None]) for image in images])  # (4, D, 16, 16)
        mean, std = features.mean((0, 2, 3), keepdim=True), features.std((0, 2, 3), keepdim=True)
        wanted = ((features - mean) / std)[:, :, 4:-4, 4:-4]  # the network looks at whole patches only
        outputs = torch.cat([teacher(image[None] / 255) for image in images])
        return nn.functional.mse_loss(outputs, wanted).item()

    assert distance(60) < 0.9 * distance(1)


@pytest.mark.parametrize(
    ("name", "further", "error", "message"),
    [
        (
            "padim",
            "n_features=177",
            ConfigError,
            r"must be at most 176, the channels of strides \[4, 8, 16\]",
        ),
        ("dfm", "strides=[8, 16]", ConfigError, r"strides must name one stage, got \[8, 16\]"),
        ("supersimplenet", "prepare.height=64", ConfigError, "needs 128 x 128 pixels or more, got 64 x 128"),
        ("efficient_ad", "prepare.width=128", ConfigError, "needs 256 x 256 pixels or more, got 256 x 128"),
        (
            "efficient_ad",
            "penalty_images=nowhere",
            MissingError,
            "no folder 'nowhere'. Correct penalty_images",
        ),
        (
            "efficient_ad",
            "teacher=nowhere.safetensors",
            MissingError,
            "Convert anomalib's pretrained_teacher_small",
        ),
        ("draem", "anomaly_source=nowhere", MissingError, "no folder 'nowhere'. Correct anomaly_source"),
        ("stfpm", "features.backbone=resnet", ConfigError, "Unknown backbone 'resnet'"),
        ("stfpm", "strides=[3]", ConfigError, "has no stage of stride 3"),
        (
            "dinomaly",
            "epochs=1",
            MissingError,
            "needs the weights of vit_base_patch14_reg4_dinov2, .* Copy the file from https://huggingface.co/timm/"
            "vit_base_patch14_reg4_dinov2.lvd142m/resolve/main/model.safetensors here and name it .*weights=PATH",
        ),
        ("dinomaly", "weights=given.safetensors", ConfigError, "multiples of 14, got 64 x 64"),
    ],
)
def test_an_impossible_setting_is_refused_before_the_training(name, further, error, message, tmp_path):
    with pytest.raises(error, match=message):
        models.build(planned(name, further), work=tmp_path)
