"""Cloth, the smallest trainings of anomalib's models, and their Engine."""

import socket
from pathlib import Path

import pytest

from normweave import settings
from normweave.bridges import peers
from normweave.config import Config
from normweave.data import layouts
from normweave.textiles import SEEN, UNSEEN, make_textures

SIDE = {"efficient_ad": 256, "supersimplenet": 128}
NEEDS = "needs pip install 'normweave[bench]'"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Every attempt to connect to another machine fails."""
    connect = socket.socket.connect

    def refuse(self, address):
        assert address[0] == "127.0.0.1", f"tried to connect to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="session")
def textiles(tmp_path_factory):
    """Synthetic cloth of a size, as samples; made once."""
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
    """Return a plan of the smallest training of a model."""
    side = SIDE.get(name, 64)
    chosen = [
        f"prepare.height={side}",
        f"prepare.width={side}",
        "outcome.false_alarm_rate=0.2",
        "data.calibration=split",
    ]
    for key, least in (("epochs", 1), ("max_steps", 1), ("teacher_steps", 1), ("batch_images", 4)):
        if key in peers.PEERS[name].settings:
            chosen.append(f"{key}={least}")
    return peers.read(f"anomalib/{name}", [*chosen, *further], seed=0)


def config_for(model: str, *further: str) -> Config:
    sides = ["prepare.height=64", "prepare.width=64", "outcome.false_alarm_rate=0.2", "data.calibration=split"]
    return settings.override(settings.with_model(Config(), model), [*sides, *further])


def to_test(samples):
    return [sample for sample in samples if sample.split == "test"]


def quiet_engine(folder: Path):
    from anomalib.engine import Engine

    return Engine(default_root_dir=folder, accelerator="cpu", enable_progress_bar=False, enable_model_summary=False)


def predicted(engine, model, paths: list[Path]):
    """Return the raw score and map of each image by anomalib's Engine, which reads the files itself."""
    from anomalib.data import PredictDataset

    outputs = {}
    for path in paths:
        (batch,) = engine.predict(model, dataset=PredictDataset(path))
        outputs[path] = (float(batch.pred_score), batch.anomaly_map.squeeze().numpy())
    return outputs
