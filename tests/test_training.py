"""Training with stages small enough to compute by hand. As a program: trains, and kills itself in the third epoch."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from builders import InMemory, normals, quick_training
from normweave.errors import BundleError, ConfigError, DataError, MissingError
from normweave.heads.base import TrainingStage
from normweave.training import Workers, read_checkpoint, train, write_checkpoint


def fit_data(*, count=20, holdout=None, seed=0):
    features = torch.randn(count, 6, 3, 3, generator=torch.Generator().manual_seed(9))
    features[:, 0, 0, 0] = torch.arange(count) / count  # identifies the image
    fields = {} if holdout is None else {"holdout": holdout}
    return normals(features, subclasses=np.arange(count) % 3, names=("a", "b", "c"), seed=seed, **fields)


class Denoise(TrainingStage):
    """Reconstruct patches from noised ones. Noise, batch norm and momentum make all of the state matter."""

    def __init__(
        self,
        *,
        name="denoise",
        epochs=5,
        batch_images=4,
        epoch_images=0,
        patience=0,
        rate=1e-2,
        noise=1,
        clip=0.0,
        final_rate=1.0,
        accumulate=1,
    ):
        self.name = name
        self.gradient_clip = clip
        self.final_rate = final_rate
        self.accumulate = accumulate
        self.noise = noise
        module = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6))
        training = quick_training(
            epochs=epochs,
            batch_images=batch_images,
            epoch_images=epoch_images,
            patience=patience,
            learning_rate=rate,
        )
        super().__init__(module, training)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.module.parameters():
            nn.init.normal_(parameter, std=0.3, generator=generator)
        self.seen = []

    def optimiser(self):
        return torch.optim.AdamW(self.module.parameters(), lr=self.learning_rate)

    def loss(self, features, subclasses, *, generator, training):
        noise = self.noise * torch.randn(features.shape, generator=generator)
        images = (features[:, 0, 0, 0] * 20).round().long().tolist()
        self.seen.append((training, self.module.training, images, subclasses.tolist(), noise[0, 0, 0, 0].item()))
        patches = features.flatten(2).transpose(1, 2).flatten(0, 1)  # (B*P, 6)
        noised = patches + noise.flatten(2).transpose(1, 2).flatten(0, 1)
        return {"loss": (self.module(noised) - patches).square().mean()}


class Scripted(TrainingStage):
    """A weight that counts steps, and a loss on the held-out images that is taken from a list."""

    name = "scripted"

    def __init__(self, holdout_losses, *, patience, epochs=None, batch_images=100):
        self.holdout_losses = holdout_losses
        epochs = len(holdout_losses) if epochs is None else epochs
        module = nn.Linear(1, 1, bias=False)
        super().__init__(module, quick_training(epochs=epochs, batch_images=batch_images, patience=patience))
        nn.init.zeros_(self.module.weight)

    def optimiser(self):
        return torch.optim.SGD(self.module.parameters(), lr=1.0)

    def loss(self, features, subclasses, *, generator, training):
        if training:
            return {"loss": -self.module.weight.sum()}
        return {"loss": torch.tensor(self.holdout_losses[round(self.module.weight.item()) - 1])}


SHORTER_AND_SLOWER = {"clip": 0.5, "final_rate": 0.1, "accumulate": 3}
"""With clipped gradients, a decaying learning rate and steps of several batches, whose state matters too."""


def weights(stage):
    return {name: tensor.clone() for name, tensor in stage.module.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class KilledError(Exception):
    """Ends a run."""


def test_every_epoch_visits_every_image_that_is_not_held_out_once_in_another_order():
    stage, data = Denoise(), fit_data()
    train(stage, data, device="cpu")
    trained = [images for training, _, images, _, _ in stage.seen if training]
    held_out = [images for training, _, images, _, _ in stage.seen if not training]
    epochs = [np.concatenate(trained[start : start + 4]).tolist() for start in range(0, 20, 4)]
    for images in epochs:
        assert sorted(images) == [row for row in range(20) if row % 5]
    assert len({tuple(images) for images in epochs}) == 5
    assert held_out == [[0, 5, 10, 15]] * 5
    assert all(labels == [row % 3 for row in images] for _, _, images, labels, _ in stage.seen)


def test_an_epoch_of_at_most_n_images_draws_other_images_each_time():
    """It also limits the held-out images, which are the same after every epoch."""
    stage, data = Denoise(epoch_images=6), fit_data(holdout=np.arange(20) % 2 == 0)
    history = train(stage, data, device="cpu")
    trained = [images for training, _, images, _, _ in stage.seen if training]
    held_out = [images for training, _, images, _, _ in stage.seen if not training]
    epochs = [np.concatenate(trained[start : start + 2]).tolist() for start in range(0, 10, 2)]
    assert [len(images) for images in trained] == [4, 2] * 5
    assert all(len(set(images)) == 6 for images in epochs)
    assert len({tuple(sorted(images)) for images in epochs}) > 1
    assert held_out == [[0, 4, 8, 12], [16]] * 5
    assert len(history.losses) == 5


def test_batch_statistics_are_on_in_training_and_off_elsewhere():
    stage = Denoise()
    train(stage, fit_data(), device="cpu")
    assert all(mode == training for training, mode, *_ in stage.seen)
    assert not stage.module.training
    assert all(parameter.grad is None for parameter in stage.module.parameters())


def test_every_batch_has_its_own_random_numbers_and_the_held_out_images_always_the_same():
    def draws(stage, data):
        train(stage, data, device="cpu")
        return (
            [number for training, *_, number in stage.seen if training],
            [number for training, *_, number in stage.seen if not training],
        )

    trained, held_out = draws(Denoise(), fit_data())
    assert len(set(trained)) == len(trained) == 20
    assert len(set(held_out)) == 1
    assert draws(Denoise(), fit_data()) == (trained, held_out)
    assert not set(draws(Denoise(), fit_data(seed=1))[0]) & set(trained)
    assert not set(draws(Denoise(name="other"), fit_data())[0]) & set(trained)


def test_agrees_with_a_loop_by_hand():
    """All images in one batch and no noise, so that the order and the draws do not matter."""
    stage, hand = (Denoise(batch_images=100, noise=0) for _ in range(2))
    data = fit_data(holdout=np.zeros(20, dtype=bool))
    history = train(stage, data, device="cpu")

    optimiser = hand.optimiser()
    patches = data.features.features.permute(0, 2, 3, 1).reshape(-1, 6)
    losses = []
    for _ in range(5):
        loss = (hand.module(patches) - patches).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert history.losses == pytest.approx(losses, rel=1e-5)
    last = "3.weight"  # biases before a batch norm have no gradient but rounding, which Adam blows up
    torch.testing.assert_close(weights(stage)[last], weights(hand)[last], rtol=1e-4, atol=1e-5)


def trained_by_hand(*, clip, final_rate, rate, epochs=5):
    """Losses and last weights by plain descent on all images at once."""
    stage = Denoise(batch_images=100, noise=0)
    patches = fit_data().features.features.permute(0, 2, 3, 1).reshape(-1, 6)
    losses, norms = [], []
    for epoch in range(epochs):
        loss = (stage.module(patches) - patches).square().mean()
        parameters = list(stage.module.parameters())
        gradients = torch.autograd.grad(loss, parameters)
        norm = sum(gradient.square().sum().item() for gradient in gradients) ** 0.5
        factor = min(1.0, clip / norm) if clip else 1.0
        share = final_rate + (1 - final_rate) * (1 + np.cos(np.pi * epoch / epochs)) / 2
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * share * factor * gradient
        losses.append(loss.item())
        norms.append(norm)
    return losses, weights(stage), norms


@pytest.mark.parametrize("final_rate", [1.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 0.5])
def test_gradients_are_clipped_and_the_learning_rate_follows_a_cosine(clip, final_rate):
    losses, expected, norms = trained_by_hand(clip=clip, final_rate=final_rate, rate=0.5)
    assert max(norms) > 0.5  # otherwise no gradient would be clipped
    stage = Denoise(batch_images=100, noise=0, clip=clip, final_rate=final_rate)
    stage.optimiser = lambda: torch.optim.SGD(stage.module.parameters(), lr=0.5)

    history = train(stage, fit_data(holdout=np.zeros(20, dtype=bool)), device="cpu")

    assert history.losses == pytest.approx(losses, rel=1e-4)
    for name, tensor in weights(stage).items():
        if "num_batches" not in name:
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=1e-4)


def test_keeps_the_weights_of_the_best_epoch_and_stops_when_patience_runs_out():
    stage = Scripted([5.0, 3.0, 4.0, 2.0, 2.0, 9.0, 3.0, 1.0], patience=3)
    history = train(stage, fit_data(), device="cpu")
    assert (history.epochs, history.best_epoch, history.best_loss) == (7, 4, 2.0)
    assert history.stopped_early
    assert history.holdout_losses == [5.0, 3.0, 4.0, 2.0, 2.0, 9.0, 3.0]
    assert stage.module.weight.item() == 4


def test_without_patience_all_epochs_are_trained():
    stage = Scripted([1.0, 5.0, 5.0, 5.0, 5.0], patience=0)
    history = train(stage, fit_data(), device="cpu")
    assert (history.epochs, history.best_epoch, history.stopped_early) == (5, 1, False)
    assert stage.module.weight.item() == 1


def test_without_held_out_images_keeps_the_last_weights():
    stage = Scripted([], patience=1, epochs=4)
    history = train(stage, fit_data(holdout=np.zeros(20, dtype=bool)), device="cpu")
    assert (history.epochs, history.best_epoch, history.stopped_early) == (4, 4, False)
    assert history.holdout_losses == []
    assert stage.module.weight.item() == 4


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 2.5), (5, 1)])
def test_a_step_averages_the_gradients_of_several_batches(accumulate, steps):
    """Each batch moves the weight by one over the number of batches in a step, also those left over at the end."""
    stage = Scripted([], patience=0, epochs=1, batch_images=4)
    stage.accumulate = accumulate
    train(stage, fit_data(holdout=np.zeros(20, dtype=bool)), device="cpu")
    assert stage.module.weight.item() == pytest.approx(steps)


def test_the_loss_on_held_out_images_counts_every_image_the_same():
    """Six images in batches of four: the mean over images, not over batches."""

    class Mean(Scripted):
        def loss(self, features, subclasses, *, generator, training):
            return {"loss": features[:, 0, 0, 0].mean() + 0 * self.module.weight.sum()}

    history = train(Mean([], patience=0, epochs=1, batch_images=4), fit_data(holdout=np.arange(20) < 6), device="cpu")
    assert history.best_loss == pytest.approx(np.mean(np.arange(6) / 20))


@pytest.mark.parametrize("changed", [{}, SHORTER_AND_SLOWER], ids=["plain", "clip, cosine and steps of 3 batches"])
@pytest.mark.parametrize("epoch", [1, 2, 4, 5])
def test_a_run_resumed_after_any_epoch_ends_with_the_same_weights(tmp_path, epoch, changed):
    complete, data = Denoise(**changed), fit_data()
    history = train(complete, data, device="cpu")

    def stop(what, done, total):
        if done == epoch:
            raise KilledError

    with pytest.raises(KilledError):
        train(Denoise(**changed), data, folder=tmp_path, progress=stop, device="cpu")
    resumed = Denoise(**changed)
    assert train(resumed, data, folder=tmp_path, resume=True, device="cpu") == history
    assert equal(weights(resumed), weights(complete))
    assert sum(training for training, *_ in resumed.seen) == (5 - epoch) * 4  # batches an epoch


def test_a_run_killed_within_an_epoch_is_resumed_to_the_same_weights(tmp_path):
    child = subprocess.run([sys.executable, __file__, str(tmp_path)])  # with as many threads as this process
    assert child.returncode == -signal.SIGKILL
    complete, resumed = Denoise(**SHORTER_AND_SLOWER), Denoise(**SHORTER_AND_SLOWER)
    history = train(complete, fit_data(), device="cpu")
    assert train(resumed, fit_data(), folder=tmp_path, resume=True, device="cpu") == history
    assert equal(weights(resumed), weights(complete))
    assert sum(training for training, *_ in resumed.seen) == 3 * 4


def test_a_run_ended_while_writing_is_resumed_from_the_checkpoint_before(tmp_path, monkeypatch):
    calls = []

    def replace(source, target):
        calls.append(source)
        if len(calls) == 3:
            raise KilledError
        os.rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(KilledError):
            train(Denoise(), fit_data(), folder=tmp_path, device="cpu")
    complete, resumed = Denoise(), Denoise()
    train(complete, fit_data(), device="cpu")
    train(resumed, fit_data(), folder=tmp_path, resume=True, device="cpu")
    assert equal(weights(resumed), weights(complete))
    assert sum(training for training, *_ in resumed.seen) == 3 * 4
    assert [path.name for path in tmp_path.iterdir()] == ["denoise.safetensors"]


@pytest.mark.parametrize("patience", [0, 2])
def test_a_finished_stage_is_loaded_and_not_trained_again(tmp_path, patience):
    losses = [5.0, 3.0, 4.0, 4.0, 4.0]
    history = train(Scripted(losses, patience=patience), fit_data(), folder=tmp_path, device="cpu")
    assert history.epochs == (5 if patience == 0 else 4)
    again = Scripted(losses, patience=patience)
    again.loss = None  # not to be called
    assert train(again, fit_data(), folder=tmp_path, resume=True, device="cpu") == history
    assert again.module.weight.item() == 2
    assert not again.module.training


def test_without_resume_training_starts_again(tmp_path):
    train(Denoise(), fit_data(), folder=tmp_path, device="cpu")
    stage = Denoise()
    train(stage, fit_data(), folder=tmp_path, device="cpu")
    assert sum(training for training, *_ in stage.seen) == 5 * 4


def test_an_old_checkpoint_is_deleted_when_a_new_run_starts(tmp_path):
    """Otherwise a run that was killed in its first epoch would be resumed from the weights of another run."""
    train(Denoise(), fit_data(), folder=tmp_path, device="cpu")
    killed = Denoise()
    killed.loss = None
    with pytest.raises(TypeError):
        train(killed, fit_data(), folder=tmp_path, device="cpu")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("stage", "data"),
    [
        (Denoise(epochs=6), fit_data()),
        (Denoise(epoch_images=8), fit_data()),
        (Denoise(rate=1e-3), fit_data()),
        (Denoise(clip=0.5), fit_data()),
        (Denoise(final_rate=0.1), fit_data()),
        (Denoise(accumulate=2), fit_data()),
        (Denoise(), fit_data(seed=1)),
        (Denoise(), fit_data(count=21)),
        (Denoise(), fit_data(holdout=np.arange(20) == 3)),
    ],
    ids=["epochs", "epoch images", "rate", "clip", "final rate", "accumulation", "seed", "images", "held out"],
)
def test_a_checkpoint_of_other_settings_is_refused(tmp_path, stage, data):
    train(Denoise(), fit_data(), folder=tmp_path, device="cpu")
    with pytest.raises(ConfigError, match=r"checkpoint of 'denoise' was written with other settings.*without --resume"):
        train(stage, data, folder=tmp_path, resume=True, device="cpu")


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"\x02\0\0\0\0\0\0\0{}"], ids=["empty", "pickle", "bare"])
def test_a_damaged_checkpoint_is_refused(tmp_path, content):
    (tmp_path / "denoise.safetensors").write_bytes(content)
    with pytest.raises(BundleError, match=r"not a checkpoint that can be read .*Delete it, or train without"):
        train(Denoise(), fit_data(), folder=tmp_path, resume=True, device="cpu")


def test_a_checkpoint_is_one_safetensors_file_and_is_read_unchanged(tmp_path):
    checkpoint = {
        "tree": {0: [1, 2.5, None], "flag": True, "pair": (0.9, float("inf"))},
        "tensors": [{"step": torch.tensor(3.0), "view": torch.arange(6).view(2, 3).T}],
        "like an encoded tensor": ["tensor", "0"],
        "empty": [{}, [], ()],
    }
    path = tmp_path / "deep" / "state.safetensors"
    write_checkpoint(checkpoint, path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == {"0", "1"}
    back = read_checkpoint(path)
    tensors = checkpoint.pop("tensors")[0], back.pop("tensors")[0]
    assert back == checkpoint
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_with_other_types_is_refused(tmp_path):
    with pytest.raises(TypeError, match="A checkpoint cannot hold a set"):
        write_checkpoint({"names": {"a"}}, tmp_path / "state.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_is_an_error_with_the_cure():
    data = fit_data()
    data.features.features[:] *= 1e30
    with pytest.raises(ConfigError, match=r"'denoise' diverged: the loss is inf at epoch 1, batch 1.*lower the"):
        train(Denoise(), data, device="cpu")
    with pytest.raises(ConfigError, match=r"the loss is nan at epoch 2, the held-out images"):
        train(Scripted([1.0, float("nan")], patience=0), fit_data(), device="cpu")


def test_features_that_are_not_finite_are_named():
    data = fit_data()
    data.features.features[7, 2, 1, 1] = torch.nan
    with pytest.raises(DataError, match="features of fit image 7 hold NaN or infinity"):
        train(Denoise(), data, device="cpu")


def test_without_training_images_it_raises():
    with pytest.raises(DataError, match=r"Nothing to train 'denoise' on: all 20 fit images are held out"):
        train(Denoise(), fit_data(holdout=np.ones(20, dtype=bool)), device="cpu")


def test_devices_that_are_unknown_or_missing_are_named():
    with pytest.raises(ConfigError, match="device must be auto, cpu or cuda, got 'tpu'"):
        train(Denoise(), fit_data(), device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(MissingError, match=r"No CUDA device was found\. Use device cpu or auto"):
            train(Denoise(), fit_data(), device="cuda")


def test_reports_progress_after_each_epoch():
    reports = []
    train(Denoise(), fit_data(), progress=lambda *report: reports.append(report), device="cpu")
    assert reports == [("train denoise", epoch, 5) for epoch in range(1, 6)]


def test_prints_nothing_and_leaves_global_state_unchanged(capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("lightning.pytorch")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.INFO)
    stage, data = Denoise(), fit_data()
    torch.manual_seed(3)
    random = torch.get_rng_state()
    train(stage, data, device="auto")
    assert capfd.readouterr() == ("", "")
    assert records == []
    assert logger.level == logging.INFO
    assert torch.equal(torch.get_rng_state(), random)
    assert list(tmp_path.iterdir()) == []


def test_on_a_cluster_trains_in_this_process_alone(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_JOB_NAME", "inspection")
    assert train(Denoise(), fit_data(), device="cpu").epochs == 5


def test_ctrl_c_stays_a_keyboard_interrupt():
    handler = signal.getsignal(signal.SIGINT)

    def interrupt(what, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(Denoise(), fit_data(), progress=interrupt, device="cpu")
    assert signal.getsignal(signal.SIGINT) is handler


def test_trains_in_a_thread_as_well():
    stage, threaded = Denoise(), Denoise()
    train(stage, fit_data(), device="cpu")
    thread = threading.Thread(target=train, args=(threaded, fit_data()), kwargs={"device": "cpu"})
    thread.start()
    thread.join()
    assert equal(weights(threaded), weights(stage))


class Centre(TrainingStage):
    """A weight for each channel and a sum of all images. The loss is a mean over images, without random numbers."""

    name = "centre"
    gradient_clip = 0.5
    final_rate = 0.1

    def __init__(self):
        super().__init__(nn.Module(), quick_training(epochs=4, batch_images=13))
        self.module.weight = nn.Parameter(torch.zeros(6))
        self.module.unused = nn.Parameter(torch.ones(1))
        self.module.register_buffer("total", torch.zeros(6))

    def optimiser(self):
        return torch.optim.Adam(self.module.parameters(), lr=0.1)

    def loss(self, features, subclasses, *, generator, training):
        values = features.mean(dim=(2, 3))  # (B, 6)
        if training:
            self.module.total += values.sum(dim=0)
        return {"loss": (self.module.weight - values).square().sum(dim=1).mean()}


class OneOfTwo(LightningEnvironment):
    """One of two processes that were started by others."""

    def __init__(self, rank):
        super().__init__()
        self.rank = rank

    def world_size(self):
        return 2

    def global_rank(self):
        return self.rank

    def set_world_size(self, size):
        pass

    def set_global_rank(self, rank):
        pass


def _train_one_half(make, folder: Path, rank: int):
    """Train with every second image, together with another process, and write the weights."""
    data = fit_data(count=17, holdout=np.arange(17) % 5 == 0)  # 13 and 4
    side = [np.flatnonzero(data.holdout == held_out)[rank::2] for held_out in (False, True)]
    rows = np.sort(np.concatenate(side))
    half = replace(
        data,
        features=InMemory(data.features.read(rows)),
        subclasses=data.subclasses[rows],
        groups=data.groups[rows],
        holdout=data.holdout[rows],
    )
    workers = Workers(rank, 2, 13, partial(DDPStrategy, find_unused_parameters=True), OneOfTwo(rank))
    if rank:
        torch.set_num_threads(1)  # those of OpenMP do not survive a fork
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    try:
        stage = make()
        history = train(stage, half, device="cpu", workers=workers)
    finally:
        torch.distributed.destroy_process_group()
    noise = [torch.tensor([value for *_, value in stage.seen])] if isinstance(stage, Denoise) else []
    save_file(weights(stage) | dict(zip(["noise"], noise, strict=False)), folder / f"{rank}.safetensors")
    return history


def train_in_two_processes(make, folder):
    """Return the history and what both processes wrote."""
    folder.mkdir()
    other = multiprocessing.get_context("fork").Process(target=_train_one_half, args=(make, folder, 1))
    other.start()
    history = _train_one_half(make, folder, 0)
    other.join()
    assert other.exitcode == 0
    return history, *(load_file(folder / f"{rank}.safetensors") for rank in (0, 1))


FORK = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # in which nothing is imported again


@FORK
def test_two_processes_train_as_one(tmp_path):
    """With one batch of all images the gradients are those of one process, although one has 7 images and one 6."""
    history, one, two = train_in_two_processes(Centre, tmp_path / "two")
    alone = Centre()
    expected = train(alone, fit_data(count=17, holdout=np.arange(17) % 5 == 0), device="cpu")
    assert history.losses == pytest.approx(expected.losses, rel=1e-5)
    assert history.holdout_losses == pytest.approx(expected.holdout_losses, rel=1e-5)
    assert equal(one, two)
    torch.testing.assert_close(one["weight"], weights(alone)["weight"])
    torch.testing.assert_close(2 * one["total"], weights(alone)["total"])  # the mean of what each has added


@FORK
def test_two_processes_draw_different_numbers_and_give_the_same_weights_each_time(tmp_path):
    """With batch norm, whose statistics are averaged, and batches of an odd number of images."""
    make = partial(Denoise, batch_images=5, **SHORTER_AND_SLOWER)
    _, one, two = train_in_two_processes(make, tmp_path / "first")
    _, again, _ = train_in_two_processes(make, tmp_path / "second")
    assert not set(one.pop("noise").tolist()) & set(two.pop("noise").tolist())
    del again["noise"]
    assert equal(one, two)
    assert equal(one, again)


@pytest.mark.parametrize(("size", "first", "end"), [(2, 0, 8), (3, 8, 16), (4, 16, 17), (2, 3, 8)])
def test_workers_divide_each_batch_and_the_weighted_mean_is_that_of_the_batch(size, first, end):
    batch = np.arange(first, end)
    seen, mean = [], 0.0
    for rank in range(size):
        own, weight = Workers(rank, size, 100, None, None).share(batch)
        assert len(own) > 0
        images = own * size + rank
        mean += weight * images.mean() / size
        seen += images.tolist() if weight else []
    assert sorted(seen) == batch.tolist()
    assert mean == pytest.approx(batch.mean())


def _die_in_the_third_epoch(folder: Path) -> None:
    stage = Denoise(**SHORTER_AND_SLOWER)
    loss = stage.loss

    def killing(*args, **kwargs):
        if sum(training for training, *_ in stage.seen) == 2 * 4 + 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return loss(*args, **kwargs)

    stage.loss = killing
    train(stage, fit_data(), folder=folder, device="cpu")


if __name__ == "__main__":
    _die_in_the_third_epoch(Path(sys.argv[1]))
