"""The settings of a peer in a plan are read, and mistakes are named."""

import pytest

from normweave.bridges import peers
from normweave.errors import ConfigError


def test_a_peer_is_read_with_its_own_settings_and_ours():
    plan = peers.read(
        "anomalib/stfpm",
        ["epochs=3", "strides=[8, 16]", "prepare.height=128", "outcome.false_alarm_rate=0.1"],
        seed=4,
    )
    assert plan.name == "stfpm"
    assert plan.values == {"strides": (8, 16), "epochs": 3, "max_steps": 0, "batch_images": 8}
    assert plan.config.prepare.height == 128
    assert plan.config.outcome.false_alarm_rate == 0.1
    assert plan.config.seed == 4
    assert plan.config.maps.smoothing == 0  # raw maps


def test_what_stands_in_names_the_backbone():
    plan = peers.read("anomalib/padim", ["features.backbone=tf_efficientnet_lite1"], seed=0)
    assert plan.differs == "tf_efficientnet_lite1 for resnet18"
    assert "DTD" in peers.read("anomalib/draem", [], seed=0).differs


def test_a_whole_number_will_do_for_a_share():
    assert peers.read("anomalib/fastflow", ["hidden_ratio=1"], seed=0).values["hidden_ratio"] == 1.0


@pytest.mark.parametrize(
    ("model", "assignment", "message"),
    [
        ("anomalib/pdim", "epochs=1", "Unknown peer 'anomalib/pdim'. Did you mean 'anomalib/padim'"),
        ("anomalib/stfpm", "epoch=1", "Unknown setting of anomalib/stfpm 'epoch'. Did you mean 'epochs'"),
        ("anomalib/padim", "epochs=1", "Unknown setting of anomalib/padim 'epochs'"),
        ("anomalib/stfpm", "head.border=0", "Unknown setting of anomalib/stfpm 'head.border'"),
        ("anomalib/stfpm", "epochs", "'epochs' must be of the form key=value"),
        ("anomalib/stfpm", "epochs=many", "epochs must be like 100, got 'many'"),
        ("anomalib/stfpm", "epochs=1.5", "epochs must be like 100, got '1.5'"),
        ("anomalib/stfpm", "epochs=[", "epochs is not YAML"),
        ("anomalib/stfpm", "epochs=0", "epochs must be 1 or more, got 0"),
        ("anomalib/stfpm", "max_steps=-1", "max_steps must be 0 or more, got -1"),
        ("anomalib/stfpm", "strides=[]", r"strides must name stages, as \[8, 16\], got \[\]"),
        ("anomalib/stfpm", "features.blocks=[3]", "features.blocks has no effect, its stages are named by strides"),
        ("anomalib/stfpm", "strides=[fine]", r"strides must name stages, as \[8, 16\], got \['fine'\]"),
        (
            "anomalib/patchcore",
            "coreset_sampling_ratio=0",
            r"coreset_sampling_ratio must be in \(0, 1\], got 0.0",
        ),
        ("anomalib/dfm", "pca_level=1.0", r"pca_level must be in \(0, 1\), got 1.0"),
        ("anomalib/fastflow", "hidden_ratio=-1.0", "hidden_ratio must be positive, got -1.0"),
        (
            "anomalib/supersimplenet",
            "perlin_threshold=2.0",
            r"perlin_threshold must be in \(0, 1\), got 2.0",
        ),
        ("anomalib/efficient_ad", "model_size=large", "model_size must be small or medium, got large"),
        ("anomalib/padim", "features.kind=offline_pair", "the features must be timm, got offline_pair"),
        ("anomalib/padim", "prepare.hight=3", "Did you mean 'prepare.height'"),
    ],
)
def test_what_is_wrong_is_named(model: str, assignment: str, message: str):
    with pytest.raises(ConfigError, match=message):
        peers.read(model, [assignment], seed=0)


def test_all_mistakes_are_named_together():
    with pytest.raises(ConfigError, match="epochs must be 1 or more, got 0; Unknown setting"):
        peers.read("anomalib/stfpm", ["epochs=0", "depth=3"], seed=0)
