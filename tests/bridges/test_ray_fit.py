"""A fit on a cluster of two nodes is that of one machine, although a node or a process is killed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from builders import head_config
from clusters import nodes, tree
from normweave.bridges import ray_features
from normweave.bridges.ray_fit import sources
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig
from normweave.detector import Detector
from normweave.errors import DataError

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),  # of Ray
]
CONFIG = Config(
    data=DataConfig(subclass_from="column", calibration="split"),
    prepare=PrepareConfig(height=64, width=64),
    features=TimmConfig(weights="random", strides=(8,), batch_images=4),
    outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
)


@pytest.fixture(autouse=True)
def no_network():
    """Connections to this machine are allowed, unlike in the other tests of this folder."""


@pytest.fixture(scope="module")
def cluster():
    with nodes(2) as running:
        yield running


@pytest.fixture(scope="module")
def far_sources(cluster):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "20")
        with sources(cluster.address) as connected:
            yield connected


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(ray_features, "TASK_ROWS", 8)


def fit(cloth, folder, **options):
    return Detector.fit(cloth, cache=folder, device="cpu", **{"config": CONFIG} | options)


def test_two_nodes_fit_the_detector_of_one_machine_although_one_is_killed(cloth, cluster, far_sources, tmp_path):
    """Features stay on the nodes, here in one folder, and the killed node is replaced."""
    near = fit(cloth, tmp_path / "near")
    steps = []

    def kill(step, done, total):
        steps.append(step)
        if steps.count("statistics of images") == 40:
            cluster.kill(cluster.nodes.pop(0))
            cluster.nodes.append(cluster.add())

    far = fit(cloth, tmp_path / "far", sources=far_sources, progress=kill)
    assert far_sources.summary == "fitted on the machines of the cluster"
    assert len(steps) > 40
    one, other = near.network.tensors(), far.network.tensors()
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # the scales of the fusion are quantiles of scores in float32
        tolerance = 1e-4 if name.startswith("head.fusion.") else 1e-6
        torch.testing.assert_close(other[name], tensor, rtol=tolerance, atol=1e-6, msg=name)
    images = sorted(cloth.parent.glob("cloth/*/test/*/*.png"))
    scores = [[outcome.pred_score for outcome in each.stream(map(str, images))] for each in (near, far)]
    assert scores[1] == pytest.approx(scores[0], abs=1e-4)
    assert far.map_threshold == pytest.approx(near.map_threshold, rel=1e-4)


def test_two_nodes_train_by_gradient_within_the_noise_of_seeds_although_a_process_is_killed(
    cloth, cluster, far_sources, tmp_path
):
    """Then all workers start again."""
    training = {"epochs": 50, "batch_images": 8, "learning_rate": 1e-3, "patience": 0}
    config = replace(CONFIG, head=head_config("simplenet", hidden=16, training=training))
    images = sorted(cloth.parent.glob("cloth/*/test/*/*.png"))

    def scores(detector):
        return np.array([outcome.pred_score for outcome in detector.stream(map(str, images))])

    near = [scores(fit(cloth, tmp_path, config=replace(config, seed=seed))) for seed in range(3)]
    killed = []

    def kill(step, done, total):
        if step == "train simplenet" and not killed:
            processes = [process for node in cluster.nodes for process in tree(node)]
            killed.append(next(process for process in processes if "RayTrainWorker" in " ".join(process.cmdline())))
            killed[0].kill()

    far = fit(cloth, tmp_path, sources=far_sources, config=config, progress=kill)
    assert len(killed) == 1
    assert far_sources.summary == "features computed on the cluster, trained by gradient on 2 machines"
    assert far.record["trained_on_machines"] == 2
    noise = max(np.abs(one - other).mean() for one in near for other in near)
    assert min(np.abs(scores(far) - one).mean() for one in near) < noise


def test_nodes_that_are_left_train_when_one_is_lost_for_good(cloth, cluster, far_sources, tmp_path):
    """Here one is left, so that the machine of the command trains."""
    training = {"epochs": 50, "batch_images": 8, "patience": 0}
    config = replace(CONFIG, head=head_config("simplenet", hidden=16, training=training))
    near = fit(cloth, tmp_path, config=config)
    steps = []

    def kill(step, done, total):
        if step == "train simplenet" and len(cluster.nodes) == 2:
            cluster.kill(cluster.nodes.pop())
        steps.append((step, done, total))

    far = fit(cloth, tmp_path, sources=far_sources, config=config, progress=kill)
    assert ("wait for 2 machines", 1, 2) in steps
    assert "trained_on_machines" not in far.record
    assert far_sources.summary.startswith("features computed on the cluster, fitted on this machine")
    for name, tensor in near.network.tensors().items():
        torch.testing.assert_close(far.network.tensors()[name], tensor, rtol=0, atol=0, msg=name)


def test_features_that_do_not_fit_the_caches_are_refused(cloth, far_sources, tmp_path):
    """The last test: an error ends the connection."""
    limit = r"features of \d+ images take .* GiB, and the caches of 1 machines are limited to 1e-06 GiB .* Add mac"
    with pytest.raises(DataError, match=limit):
        fit(cloth, tmp_path, sources=far_sources, cache_gib=1e-6)
