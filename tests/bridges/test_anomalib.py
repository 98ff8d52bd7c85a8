"""anomalib's models give through our bridge what they give in their own Engine, and ours in theirs what they give."""

import socket
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from torch import nn

# First, for it knows which warnings of anomalib's import mean nothing.
pytest.importorskip("normweave.bridges.anomalib", reason="needs pip install 'normweave[bench]'")

from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from torch.utils.data import DataLoader

from normweave import settings
from normweave.bridges import backbones, models, peer_network, peers
from normweave.bridges.anomalib import NormweaveModel
from normweave.config import Config, TimmConfig
from normweave.data import layouts
from normweave.data.images import content_hash, decode
from normweave.detector import Detector
from normweave.errors import BundleError, ConfigError, DataError, MissingError
from normweave.features.timm import load_model
from normweave.textiles import SEEN, UNSEEN, make_textures

# Lightning and anomalib warn of the number of workers, of a missing optimiser and of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

SIDE = {"efficient_ad": 256, "supersimplenet": 128}
SLOW = ("draem", "efficient_ad")
PEERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in peers.PEERS
    if name != "dinomaly"  # whose weights nobody has offline
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever reaches out fails, and says so."""

    def refuse(self, address):
        raise AssertionError(f"reached for the network: {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def textiles(tmp_path_factory):
    """Made-up cloth of a size, as samples; made once."""
    made: dict[int, list] = {}

    def make(side: int):
        if side not in made:
            manifest = make_textures(
                tmp_path_factory.mktemp("textiles") / str(side),
                size=(side, side),
                train_images=12,
                test_images=2,
                defect_images=2,
                seen=SEEN[:2],
                unseen=UNSEEN[:1],
            )
            config = settings.override(Config(), ["data.subclass_from=column"])
            made[side] = layouts.read(manifest, config.data)
        return made[side]

    return make


def planned(name: str, *further: str) -> peers.PeerPlan:
    """The smallest training there is."""
    side = SIDE.get(name, 64)
    chosen = [f"prepare.height={side}", f"prepare.width={side}", "outcome.false_alarm_rate=0.2"]
    for key, least in (("epochs", 1), ("max_steps", 1), ("teacher_steps", 1), ("batch_images", 4)):
        if key in peers.PEERS[name].settings:
            chosen.append(f"{key}={least}")
    return peers.read(f"anomalib/{name}", [*chosen, *further], seed=0)


def to_test(samples):
    return [sample for sample in samples if sample.split == "test"]


def quiet_engine(folder: Path) -> Engine:
    return Engine(
        default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False
    )


def predicted(engine: Engine, model, paths: list[Path]):
    """Raw score and map of each image by anomalib's Engine, which reads the files itself."""
    outputs = {}
    for path in paths:
        (batch,) = engine.predict(model, dataset=PredictDataset(path))
        outputs[path] = (float(batch.pred_score), batch.anomaly_map.squeeze().numpy())
    return outputs


@pytest.mark.parametrize("name", PEERS)
def test_a_trained_peer_gives_the_scores_of_its_own_engine(name, textiles, tmp_path):
    plan = planned(name)
    samples = textiles(SIDE.get(name, 64))

    peer = peer_network.fit(plan, samples)
    ours = {sample.image_path: outcome for sample, outcome, *_ in peer.stream_samples(to_test(samples)[::5])}
    theirs = predicted(quiet_engine(tmp_path), peer.network.model, list(ours))

    assert len(ours) >= 2
    for path, (score, anomaly_map) in theirs.items():
        # Batches of other sizes round otherwise; DFM's distances are small differences of large numbers.
        assert ours[path].pred_score == pytest.approx(score, rel=1e-3), path
        np.testing.assert_allclose(
            ours[path].anomaly_map, anomaly_map, rtol=1e-3, atol=1e-4 * np.abs(anomaly_map).max()
        )
        assert ours[path].model == f"anomalib/{name}"


@pytest.mark.parametrize("name", ["padim", "dfm"])
def test_training_here_is_training_there(name, textiles, tmp_path):
    """Of peers that no order of the images changes: the same fit images through anomalib's Engine, read by it."""
    samples = textiles(64)
    plan = planned(name)
    peer = peer_network.fit(plan, samples)
    torch.manual_seed(plan.config.seed)  # PaDiM draws the channels that it keeps
    model = models.build(plan, work=tmp_path)
    fit_images = tmp_path / "fit"
    fit_images.mkdir()
    content = Detector.fit(
        samples, model="patchcore", config=config_for("patchcore"), use_cache=False
    ).record["fit_hashes"]
    for number, sample in enumerate(s for s in samples if s.split == "train"):
        if content_hash(sample.image_path)[:16] in content:
            (fit_images / f"{number}.png").write_bytes(sample.image_path.read_bytes())
    assert len(list(fit_images.iterdir())) == peer.record["fit_images"]
    data = PredictDataset(fit_images)
    engine = quiet_engine(tmp_path / "engine")
    engine.fit(model, train_dataloaders=DataLoader(data, batch_size=4, collate_fn=data.collate_fn))

    some = to_test(samples)[::5]
    theirs = predicted(engine, model, [sample.image_path for sample in some])
    for sample, outcome, *_ in peer.stream_samples(some):
        assert outcome.pred_score == pytest.approx(theirs[sample.image_path][0], rel=1e-2)


def config_for(model: str, *further: str) -> Config:
    sides = ["prepare.height=64", "prepare.width=64", "outcome.false_alarm_rate=0.2"]
    return settings.override(settings.with_model(Config(), model), [*sides, *further])


def test_a_peer_is_given_the_images_that_our_detectors_are_given(textiles):
    samples = textiles(64)
    peer = peer_network.fit(planned("padim"), samples)
    detector = Detector.fit(samples, config=config_for("dfm"), use_cache=False)

    for key in ("fit_hashes", "calibration_hashes"):
        assert sorted(peer.record[key]) == detector.record[key]
    assert peer.record["data_fingerprint"] == detector.record["data_fingerprint"]
    assert peer.subclasses == detector.subclasses


def test_the_threshold_of_a_peer_is_drawn_from_calibration_images_only(textiles):
    """At rate a of n scores: the ceil((n + 1)(1 - a))-th smallest."""
    samples = textiles(64)
    peer = peer_network.fit(planned("padim"), samples)
    scores = np.sort(peer.calibration.scores)
    n = len(scores)
    assert n == peer.record["calibration_images"]

    (_, outcome, *_), *_ = peer.stream_samples(to_test(samples))

    assert outcome.threshold == scores[int(np.ceil((n + 1) * 0.8)) - 1]
    with pytest.raises(DataError, match="was used in training"):
        list(peer.stream_samples([sample for sample in samples if sample.split == "train"]))


def test_the_same_seed_trains_the_same_peer(textiles):
    samples = textiles(64)
    once, again = (
        [
            outcome.pred_score
            for _, outcome, *_ in peer_network.fit(planned("stfpm"), samples).stream_samples(to_test(samples))
        ]
        for _ in range(2)
    )
    assert once == again


def test_an_image_that_cannot_be_read_is_a_row_with_its_reason(textiles, tmp_path):
    samples = textiles(64)
    peer = peer_network.fit(planned("dfm"), samples)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    test = to_test(samples)[0]

    rows = list(peer.stream_samples([type(test)(image_path=broken, split="test"), test]))
    streamed = list(peer.stream([broken, test.image_path]))

    assert [row.error is None for _, row, *_ in rows] == [True, False]
    assert [row.error is None for row in streamed] == [False, True]
    assert streamed[1].pred_score == pytest.approx(rows[0][1].pred_score)


# ── backbones ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_registered_backbone_is_the_carried_one():
    config = TimmConfig()
    backbone = backbones.register(config, strides=(4, 8, 16))
    loaded = load_model(config.backbone, TimmConfig(weights="auto", strides=(4, 8, 16)))
    model = timm.create_model(
        backbone.name, pretrained=True, features_only=True, out_indices=backbone.indices
    )
    images = torch.rand(1, 3, 64, 64)

    with torch.no_grad():
        got = model.eval()(images)
        wanted = loaded.model.eval().forward_intermediates(
            images, indices=loaded.indices, intermediates_only=True
        )

    assert backbone.channels == [24, 40, 112]
    assert len(backbone.layers) == 3
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert (backbone.mean, backbone.std) == (loaded.mean, loaded.std)


def test_other_weights_have_another_name():
    names = {
        backbones.register(TimmConfig(weights=weights), strides=[8]).name for weights in ("auto", "random")
    }
    assert len(names) == 2


def test_a_peer_normalises_as_its_backbone_wants_it(tmp_path):
    model = models.build(planned("padim"), work=tmp_path)
    grey = torch.full((1, 3, 64, 64), 0.25)
    loaded = load_model("tf_efficientnet_lite0", TimmConfig(weights="random", strides=(8,)))
    wanted = [(0.25 - mean) / std for mean, std in zip(loaded.mean, loaded.std, strict=True)]
    assert model.pre_processor.transform(grey)[0, :, 0, 0].tolist() == pytest.approx(wanted)


def test_stfpms_student_does_not_begin_as_its_teacher(tmp_path):
    model = models.build(planned("stfpm"), work=tmp_path).model
    teacher, student = (
        part.feature_extractor.conv_stem.weight for part in (model.teacher_model, model.student_model)
    )
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


def test_a_teacher_learns_what_the_backbone_says(textiles):
    """EfficientAD's, at a size at which the rest of it would not run."""
    from anomalib.models.image.efficient_ad.torch_model import SmallPatchDescriptionNetwork

    images = [
        torch.from_numpy(decode(s.image_path).transpose(2, 0, 1).copy()) for s in to_test(textiles(64))[:4]
    ]
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
    ("name", "further", "error", "says"),
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
def test_what_a_peer_cannot_do_is_said_before_it_trains(name, further, error, says, tmp_path):
    with pytest.raises(error, match=says):
        models.build(planned(name, further), work=tmp_path)


@pytest.mark.slow
def test_dinomaly_runs_on_weights_from_a_file(textiles, tmp_path):
    """Untrained ones here: what is tested is the way by which the real ones come in."""
    from safetensors.torch import save_file

    encoder = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False)
    save_file(encoder.state_dict(), tmp_path / "small.safetensors")
    sides = ["prepare.height=70", "prepare.width=70"]
    plan = planned(
        "dinomaly",
        *sides,
        "encoder=vit_small_patch14_reg4_dinov2",
        f"weights={tmp_path / 'small.safetensors'}",
    )
    peer = peer_network.fit(plan, textiles(64))
    torch.testing.assert_close(
        peer.network.model.model.encoder.feature_extractor.blocks[3].attn.qkv.weight,
        encoder.blocks[3].attn.qkv.weight,
    )
    (_, outcome, *_), *_ = peer.stream_samples(to_test(textiles(64))[:1])
    assert outcome.anomaly_map.shape == (64, 64)


# ── ours in their Engine ─────────────────────────────────────────────────────────────────────────────────────────────


def folder_of(samples) -> Folder:
    """anomalib's own data module over one textile, which reads the files itself."""
    home = samples[0].image_path.parents[2]
    return Folder(
        name="textile",
        root=home,
        normal_dir="train/good",
        abnormal_dir=[f"test/{path.name}" for path in (home / "test").iterdir() if path.name != "good"],
        normal_test_dir="test/good",
        train_batch_size=8,
        eval_batch_size=8,
        num_workers=0,
        val_split_mode="same_as_test",
    )


@pytest.mark.parametrize(
    ("name", "further"),
    [
        ("dfm", ()),
        ("patchcore", ("maps.smoothing=0",)),
        ("simplenet", ("head.training.epochs=1",)),
        pytest.param(
            "adapted-moe", ("data.subclass_from=auto", "head.max_subclasses=2"), marks=pytest.mark.slow
        ),
    ],
)
def test_our_model_gives_the_scores_of_our_detector_in_the_engine(name, further, textiles, tmp_path):
    data = folder_of(textiles(64))
    model = NormweaveModel(config_for(name, *further))
    engine = quiet_engine(tmp_path)

    engine.fit(model, datamodule=data)
    (metrics,) = engine.test(model, datamodule=data, verbose=False)
    batches = engine.predict(model, datamodule=data)

    assert 0 <= metrics["image_AUROC"] <= 1
    seen = 0
    for batch in batches:
        for path, score, label, anomaly_map in zip(
            batch.image_path, batch.pred_score, batch.pred_label, batch.anomaly_map, strict=True
        ):
            outcome = model.detector.score(str(path))
            assert float(score) == pytest.approx(outcome.pred_score, rel=1e-4, abs=1e-5)
            np.testing.assert_allclose(anomaly_map.squeeze(), outcome.anomaly_map, rtol=1e-3, atol=1e-4)
            assert bool(label) == (outcome.pred_score > outcome.threshold)
            seen += 1
    assert seen == 4
    alone = Detector.fit(
        sorted(str(s) for s in (data.train_data.samples.image_path)), config=model.config, use_cache=False
    )
    assert alone.record["fit_hashes"] == model.detector.record["fit_hashes"]


@pytest.mark.slow
def test_our_model_is_exported_by_their_engine(textiles, tmp_path):
    data = folder_of(textiles(64))
    model = NormweaveModel(
        {
            "head": {"kind": "dfm"},
            "prepare": {"height": 64, "width": 64},
            "outcome": {"false_alarm_rate": 0.2},
        }
    )
    engine = quiet_engine(tmp_path)
    engine.fit(model, datamodule=data)

    path = engine.export(model, "onnx", export_root=tmp_path, input_size=(64, 64))
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    image = next(s.image_path for s in textiles(64) if s.split == "test")
    pixels = decode(image).transpose(2, 0, 1)[None].astype(np.float32) / 255
    names = [output.name for output in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, {session.get_inputs()[0].name: pixels}), strict=True))
    outcome = model.detector.score(str(image))
    assert float(outputs["pred_score"].item()) == pytest.approx(outcome.pred_score, rel=1e-3)
    np.testing.assert_allclose(outputs["anomaly_map"].squeeze(), outcome.anomaly_map, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_our_model_is_loaded_from_a_bundle_and_not_from_a_checkpoint(textiles, tmp_path):
    data = folder_of(textiles(64))
    model = NormweaveModel(config_for("dfm"))
    engine = quiet_engine(tmp_path / "engine")
    engine.fit(model, datamodule=data)

    with pytest.raises(BundleError, match=r"Save it with model.detector.save\('part.bundle'\)"):
        NormweaveModel.load_from_checkpoint(engine.best_model_path)

    model.detector.save(tmp_path / "part.bundle")
    again = NormweaveModel(bundle=str(tmp_path / "part.bundle"))
    paths = [sample.image_path for sample in to_test(textiles(64))[:2]]
    first, second = (
        predicted(quiet_engine(tmp_path / name), one, paths) for name, one in (("a", model), ("b", again))
    )
    for path in paths:
        assert second[path][0] == pytest.approx(first[path][0], rel=1e-5)
    assert not again.train().model.training
