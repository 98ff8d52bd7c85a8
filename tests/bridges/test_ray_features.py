"""Features that tasks compute are those of one machine, so that a fit on them is the same."""

from dataclasses import replace

import pytest
import torch

from builders import head_config
from normweave.bridges import ray as session
from normweave.bridges import ray_features, ray_tasks
from normweave.bridges.ray_features import compute_slice
from normweave.bridges.ray_fit import ClusterSources
from normweave.bridges.ray_tasks import Failed
from normweave.config import Config, DataConfig, OutcomeConfig, PrepareConfig, TimmConfig
from normweave.detector import Detector
from normweave.errors import DataError, MissingError

CONFIG = Config(
    data=DataConfig(subclass_from="column", calibration="cross-validation", folds=2),
    prepare=PrepareConfig(height=64, width=64),
    features=TimmConfig(weights="random", strides=(8,), batch_images=4),
    head=head_config(expert="gaussian"),
    outcome=OutcomeConfig(false_alarm_rate=0.1, unknown_rate=0.1),
)


@pytest.fixture
def tasks(monkeypatch):
    """The slices of each call; tasks run in this process. `ray_tasks` is tested for itself."""
    calls = []

    def run(cluster, function, items, *, save, processors, reuse, name, progress):
        calls.append(items)
        for item in items:
            save(item, function(item))
        return []

    monkeypatch.setattr(ray_tasks, "run", run)
    monkeypatch.setattr(ray_features, "TASK_ROWS", 10)  # rounded up to three batches
    return calls


@pytest.fixture
def sources():
    """Of a cluster that is not called: the tasks run in this process."""
    return ClusterSources(session.Cluster("local", None, None), 1)


def fit(cloth, sources, cache, **options):
    return Detector.fit(cloth, config=CONFIG, cache=cache, device="cpu", sources=sources, **options)


def test_a_fit_on_them_is_that_of_one_machine_and_computes_none(cloth, tasks, sources, tmp_path):
    steps = []
    far = fit(cloth, sources, tmp_path / "far", progress=lambda step, *_: steps.append(step))
    (slices,) = tasks
    assert [len(each.keys) for each in slices[:-1]] == [12] * (len(slices) - 1)
    assert "features" not in steps
    assert sources.summary == (
        "features computed on the cluster, fitted on this machine: a cross-validation fits a head for each fold of its "
        "few images"
    )
    fit(cloth, sources, tmp_path / "far")
    assert len(tasks) == 1
    near = fit(cloth, None, tmp_path / "near")
    assert far.network.tensors().keys() == near.network.tensors().keys()
    for name, tensor in near.network.tensors().items():
        assert torch.equal(far.network.tensors()[name], tensor), name
    assert far.calibration.as_dict() == near.calibration.as_dict()


def test_failures_and_other_images_or_weights_are_errors(cloth, tasks, sources, tmp_path, monkeypatch):
    fit(cloth, sources, tmp_path / "cache")
    one = tasks[0][0]
    with pytest.raises(MissingError, match=r"A node has other weights of the backbone\. Install the same versions"):
        compute_slice(one._replace(fingerprint="other"))
    with pytest.raises(DataError, match=r"An image of 1 rows is not the one that the machine .* reads: it has changed"):
        compute_slice(one._replace(keys=("other",)))
    gone = replace(one.samples[0], image_path=tmp_path / "gone.png")
    with pytest.raises(DataError, match=r"reads: .*gone\.png: no such file"):
        compute_slice(one._replace(samples=(gone,), keys=one.keys[:1]))
    monkeypatch.setattr(ray_tasks, "run", lambda *_, **__: [Failed(0, "DataError: full.")])
    with pytest.raises(DataError, match=r"features of 1 of \d+ parts .* on the cluster: DataError: full\. Run the com"):
        fit(cloth, sources, tmp_path / "empty")
