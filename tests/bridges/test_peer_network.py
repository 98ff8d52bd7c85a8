"""anomalib's models give through our bridge what they give in their own Engine."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch

from .conftest import NEEDS

pytest.importorskip("normweave.bridges.anomalib", reason=NEEDS)

from anomalib.data import PredictDataset
from torch.utils.data import DataLoader

from normweave.bridges import models, peer_network, peers
from normweave.data.images import content_hash
from normweave.detector import Detector
from normweave.errors import DataError

from .conftest import SIDE, config_for, planned, predicted, quiet_engine, to_test

# Lightning and anomalib warn of the number of workers, of a missing optimiser and of each other.
pytestmark = pytest.mark.filterwarnings("ignore")

SLOW = ("draem", "efficient_ad")
PEERS = [
    pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else [])
    for name in peers.PEERS
    if name != "dinomaly"  # whose weights are not in any package
]


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
    content = Detector.fit(samples, model="patchcore", config=config_for("patchcore"), use_cache=False).record[
        "fit_hashes"
    ]
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


def test_a_peer_is_given_the_images_that_our_detectors_are_given(textiles):
    samples = textiles(64)
    peer = peer_network.fit(planned("padim"), samples)
    detector = Detector.fit(samples, config=config_for("dfm"), use_cache=False)

    for key in ("fit_hashes", "calibration_hashes"):
        assert sorted(peer.record[key]) == detector.record[key]
    assert peer.record["data_fingerprint"] == detector.record["data_fingerprint"]
    assert peer.subclasses == detector.subclasses


def test_the_threshold_of_a_peer_is_drawn_from_calibration_images_only(textiles):
    """At rate a of n scores, each image a group of its own: the ceil((n + 1)(1 - a))-th smallest."""
    samples = [replace(sample, group=None) for sample in textiles(64)]
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


@pytest.mark.slow
def test_dinomaly_runs_on_weights_from_a_file(textiles, tmp_path):
    """The file has untrained weights: the test checks only that weights are read from a file."""
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
