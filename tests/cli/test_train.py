"""From options to settings, and from good images to a bundle."""

import csv
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

from normweave import bundle, settings
from normweave.bridges import ray_fit
from normweave.cli.terminal import Terminal
from normweave.cli.train import compose_settings, int8_summary, point_row, report, show_budget, weights
from normweave.config import AdaptedMoEConfig, Config, MemoryBankConfig, SimpleNetConfig
from normweave.detector import Detector
from normweave.errors import ConfigError
from normweave.features import cache as feature_cache
from normweave.textiles import Textile, render

from .conftest import SMALL, run

NOTHING = {
    "config": None,
    "model": None,
    "clip_weights": None,
    "category": None,
    "subclass": None,
    "subclass_from": None,
    "false_alarm_rate": None,
    "seed": None,
    "assignments": [],
}


def composed(**given):
    return compose_settings(**NOTHING | given)


@pytest.fixture
def settings_file(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("head: {kind: memory_bank, share: 0.2}\nseed: 4\noutcome: {false_alarm_rate: 0.1}\n")
    return path


def test_nothing_named_is_all_defaults():
    assert composed() == Config()


def test_options_come_after_the_file_and_set_comes_last(settings_file):
    config = composed(config=settings_file, false_alarm_rate=0.2, seed=5, assignments=["seed=6", "head.share=0.3"])
    assert config.head == MemoryBankConfig(share=0.3)
    assert config.outcome.false_alarm_rate == 0.2
    assert config.seed == 6
    assert composed(config=settings_file).seed == 4


def test_the_same_model_keeps_the_settings_of_the_file(settings_file):
    assert composed(config=settings_file, model="patchcore").head == MemoryBankConfig(share=0.2)
    assert composed(config=settings_file, model="simplenet").head == SimpleNetConfig()


def test_pictures_of_good_images_can_be_left_out(textiles, tmp_path, monkeypatch):
    configs = []

    def stop(data, *, config, **options):
        configs.append(config)
        raise ConfigError("enough")

    monkeypatch.setattr(Detector, "fit", stop)
    for options in ([], ["--no-references"]):
        assert run("train", textiles, "-o", tmp_path / "b", *options).exit_code == 2
    assert [config.outcome.references for config in configs] == [True, False]


def test_categories_and_subclasses(tmp_path):
    data = composed(category=["bottle", "cable"], subclass=["01"], subclass_from="auto").data
    assert (data.category, data.subclass, data.subclass_from) == (("bottle", "cable"), ("01",), "auto")
    assert composed(category=["all"]).data.category == ()


def test_a_regex_is_given_with_set():
    config = composed(subclass_from="filename-regex", assignments=["data.subclass_regex=^(exp[0-9])_"])
    assert config.data.subclass_regex == "^(exp[0-9])_"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"model": "patchcor"}, "Unknown model 'patchcor'. Did you mean 'patchcore'?"),
        (
            {"subclass_from": "name"},
            "data.subclass_from must be 'folder', 'column', 'filename-regex', 'auto' or",
        ),
        ({"false_alarm_rate": 2.0}, "^--false-alarm-rate: outcome.false_alarm_rate must be less than 1"),
        ({"false_alarm_rate": float("nan")}, "outcome.false_alarm_rate must be a valid number, got 'nan'"),
        (
            {"subclass_from": "filename-regex"},
            "data.subclass_regex must be given with subclass_from=filename-regex",
        ),
    ],
)
def test_mistakes(given, words):
    with pytest.raises(ConfigError, match=".*".join(words.split("'"))):
        composed(**given)


def test_train_prints_its_results(trained):
    output = json.loads(trained.output)
    assert output["bundle_hash"] == bundle.bundle_hash(trained.bundle)
    assert output["model"] == "dfm"
    assert output["fit_images"] + output["calibration_images"] == 24  # 12 of each of two subclasses
    assert output["false_alarm_rate"] == 0.2
    assert output["guarantee"] == "conformal"
    assert output["suspects"] == []  # they come from a cross-validation
    assert output["seed"] == 1
    assert output["refused"] == []
    record = bundle.read(trained.bundle)
    assert record["config"]["features"]["weights"] == "random"
    assert record["config"]["seed"] == 1


def test_train_leaves_only_the_bundle(trained):
    assert [path.name for path in trained.bundle.parent.iterdir()] == ["cloth.bundle"]


def test_unreadable_images_are_reported_and_skipped(textiles, tmp_path):
    data = tmp_path / "cloth"
    shutil.copytree(textiles, data)
    broken = next(data.glob("*/*/train/good/*.png"))
    broken.write_bytes(broken.read_bytes()[:100])
    result = run("train", data, "-o", tmp_path / "b", "--model", "dfm", "--no-cache", *SMALL)
    assert result.exit_code == 4, result.output
    assert f"unreadable  {broken}: " in result.stdout
    assert result.stdout.count(str(broken)) == 1
    assert "fitted on" in result.stdout
    assert bundle.read(tmp_path / "b")["fit_images"] > 0


def test_a_camera_of_12_bits_is_a_remark(textiles, tmp_path):
    data = tmp_path / "cloth"
    shutil.copytree(textiles, data)
    for path in data.glob("*/*/train/good/*.png"):
        Image.fromarray(np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16).save(path)
    result = run("train", data, "-o", tmp_path / "b", "--model", "dfm", "--no-cache", *SMALL)
    assert result.exit_code == 0, result.output
    assert "as from a camera with 12 bits: they are read as nearly black" in result.stderr


def test_an_existing_bundle_is_refused_before_training(trained, textiles, tmp_path):
    result = run("train", tmp_path / "no-data-at-all", "-o", trained.bundle)
    assert result.exit_code == 2
    assert "allow replacing it (--overwrite)" in result.stderr


def test_a_place_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"x")
    result = run("train", tmp_path / "no-data-at-all", "-o", tmp_path / "photo.jpg" / "b")
    assert result.exit_code == 2
    assert "Cannot write the bundle" in result.stderr


def test_a_bundle_may_fill_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", tmp_path / "no-data-at-all", "-o", ".")
    assert result.exit_code == 2
    assert "no-data-at-all: no such file or folder" in result.stderr


def test_a_rate_that_cannot_be_guaranteed_is_reported_and_the_verdicts_are_marked(textiles, tmp_path):
    result = run(
        "train",
        textiles,
        "-o",
        tmp_path / "b",
        "--model=dfm",
        "--no-cache",
        *SMALL,
        "--set=data.calibration=auto",
        "--set=outcome.false_alarm_rate=0.01",
    )
    assert result.exit_code == 0, result.output
    manifest = csv.DictReader((textiles / "manifest.csv").read_text().splitlines())
    groups = len({row["group"] for row in manifest if row["split"] == "train"})
    rate = f"{100 / (groups + 1):.3g} %"
    assert f"{groups} independent good parts can promise {rate} false alarms at best; 1 % needs 99." in result.stdout
    assert "Verdicts are marked uncalibrated." in result.stdout
    assert "dfm, fitted and, by cross-validation, calibrated on the same 24 good images for" in result.stdout
    assert "held-out" not in result.stdout
    predicted = run("predict", tmp_path / "b", textiles, "--json")
    outcomes = [json.loads(line) for line in predicted.stdout.splitlines()]
    assert {(each["guarantee"], each["false_alarm_rate"]) for each in outcomes} == {("uncalibrated", 1 / (groups + 1))}
    assert "uncalibrated  " in run("predict", tmp_path / "b", textiles).stdout


def test_the_int8_accuracy_check_is_reported(textiles, tmp_path):
    labelled = tmp_path / "labelled" / "cloth" / "test"
    for name in ("good", "green"):
        (labelled / name).mkdir(parents=True)
        for number in range(5):
            image = render(Textile("plain", "ecru", "diffuse"), seed=900 + number, size=(64, 64)).image.copy()
            if name == "green":
                image[:, :32] = (40, 250, 40)
            Image.fromarray(image).save(labelled / name / f"{number}.png")
    call = ["train", textiles, "--model=dfm", "--no-cache", *SMALL, "--int8", "--json"]
    result = run(*call, "-o", tmp_path / "b", "--int8-check", tmp_path / "labelled")
    assert result.exit_code == 0, result.output
    output = json.loads(result.stdout)
    assert output["precision"] == bundle.read(tmp_path / "b")["precision"] == "int8"
    assert output["int8_check"]["images"] == 10
    assert output["int8_check"]["image_auroc"] == [1, 1]
    assert run("predict", tmp_path / "b", textiles / "cloth").exit_code in (0, 1)


FUSION = {
    "category": "cloth",
    "held_out_images": 24,
    "synthetic_defects": 128,
    "experts": [
        {"name": "memory", "synthetic_auroc": 0.9, "weight": 0.222},
        {"name": "layout", "synthetic_auroc": 0.5, "weight": 0.0},
        {"name": "gaussian", "synthetic_auroc": 0.95, "weight": 0.778},
    ],
}


def test_the_weights_of_the_experts_are_a_line_for_each_category():
    assert weights(FUSION) == (
        "cloth: memory 0.22, layout 0.00, gaussian 0.78 "
        "(weights from 128 synthetic defects in 24 held-out good images; --set head.expert.kind=… uses one alone)"
    )
    assert "(equal weights, since no good image could be held out; " in weights(FUSION | {"synthetic_defects": 0})


def test_train_prints_the_weights_that_the_bundle_holds(textiles, tmp_path):
    result = run("train", textiles, "-o", tmp_path / "b", "--no-cache", *SMALL)
    assert result.exit_code == 0, result.output
    (fusion,) = bundle.read(tmp_path / "b")["notes"]["fusion"]
    assert weights(fusion) in " ".join(result.stdout.split())
    assert fusion["synthetic_defects"] > 0


def test_settings_that_are_given_are_never_changed_by_the_budget(textiles, tmp_path, monkeypatch):
    kept = []

    def stop(data, *, budget, keep, **options):
        kept.append((budget, keep))
        raise ConfigError("enough")

    monkeypatch.setattr(Detector, "fit", stop)
    path = tmp_path / "config.yaml"
    path.write_text("prepare: {width: 256}\n")
    call = ["train", textiles, "-o", tmp_path / "b", "--budget=best", "-c", path, "--set=head.expert.kind=fusion"]
    assert run(*call).exit_code == 2
    assert kept == [("best", {"prepare.width", "head.expert.kind"})]


def test_the_json_has_the_budget_and_the_time(trained):
    output = json.loads(trained.output)
    assert output["budget"] == bundle.read(trained.bundle)["budget"]
    assert output["budget"]["name"] == "balanced"
    assert output["image_ms"] > 0


CANDIDATE = {
    "height": 256,
    "width": 256,
    "tile_beyond": 4.0,
    "cost": 1.0,
    "auroc": 0.91,
    "image_ms": 12.0,
    "chosen": False,
}


def test_candidates_are_a_table(capsys):
    chosen = CANDIDATE | {"height": 384, "width": 384, "cost": 2.25, "auroc": 0.98, "image_ms": 30.0, "chosen": True}
    budget = chosen | {"name": "best", "candidates": [CANDIDATE, chosen]}
    show_budget(Terminal(), budget, 28.04)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "budget best: input 384 x 384, tiles beyond 4 times this size; 28.0 ms an image on this machine"
    assert [line.split()[-1] for line in lines[2:]] == ["12.0", "chosen"]
    assert "0.9800" in lines[3]
    show_budget(Terminal(), budget | {"candidates": [CANDIDATE | {"auroc": None}]}, None)
    assert "No other input size or tiling was compared" in capsys.readouterr().out


def test_fast_prints_the_settings_that_it_changed(capsys):
    budget = CANDIDATE | {"name": "fast", "candidates": [], "settings": ["features.grid_stride=16", "head.border=1"]}
    show_budget(Terminal(), budget, None)
    assert capsys.readouterr().out.endswith("4 times this size, features.grid_stride=16, head.border=1\n")
    show_budget(Terminal(), budget | {"settings": []}, None)
    assert "no other setting: this model or your settings have no faster one" in capsys.readouterr().out


def test_the_summary_of_the_int8_check():
    assert "not checked" in int8_summary(None)
    assert int8_summary({"images": 9, "image_auroc": [0.9, 0.8999], "pixel_auroc": [None, None]}) == (
        "int8: on 9 labelled images image AUROC 0.9000 (float) 0.8999 (int8)."
    )


def test_a_folder_of_the_cache_that_is_not_used_is_refused(textiles, tmp_path):
    result = run("train", textiles, "-o", tmp_path / "b", "--cache", tmp_path / "c", "--no-cache")
    assert result.exit_code == 2
    assert "--cache names a folder that --no-cache does not use. Leave out one of them." in result.stderr


def test_a_cluster_needs_the_cache(textiles, tmp_path):
    result = run("train", textiles, "-o", tmp_path / "b", "--ray", "local", "--no-cache")
    assert result.exit_code == 2
    assert "--no-cache is not possible with --ray, whose machines keep features there. Leave it out." in result.stderr


def test_a_cluster_gives_the_features_of_the_fit(textiles, tmp_path, monkeypatch):
    """With the settings of the budget; the command prints what the cluster did."""
    calls = []

    class Sources(ray_fit.ClusterSources):
        def __call__(self, extractor, images, config, **given):
            calls.append((config, given))
            self.summary = "fitted elsewhere"
            return feature_cache.streamed(extractor, images.load, len(images))

    @contextmanager
    def sources(address, *, threads):
        calls.append((address, threads))
        yield Sources(None, threads)

    monkeypatch.setattr(ray_fit, "sources", sources)
    cache = tmp_path / "cache"
    options = ["--ray", "10.0.0.5:6379", "--threads", 1, "--cache", cache, "--budget", "fast", "--model", "dfm", *SMALL]
    result = run("train", textiles, "-o", tmp_path / "b", *options)
    assert result.exit_code == 0, result.output
    assert "fitted elsewhere" in result.stderr
    address, (config, given) = calls
    assert address == ("10.0.0.5:6379", 1)
    fitted = Detector.load(tmp_path / "b").config
    assert (config.features, config.prepare) == (fitted.features, fitted.prepare)
    assert (given["cache"], given["progress"]) == (cache, None)


def test_int8_check_without_int8_is_refused(textiles, tmp_path):
    result = run("train", textiles, "-o", tmp_path / "b", "--int8-check", textiles)
    assert result.exit_code == 2
    assert "--int8-check needs --int8." in result.stderr


def test_the_default_model_is_adapted_moe():
    assert composed().head == AdaptedMoEConfig()


@pytest.mark.parametrize(
    ("point", "row"),
    [
        ({"subclass": None, "pooled": True}, ("all together", "7", "3", "1.2500")),
        ({"subclass": "red", "pooled": False}, ("red", "7", "3", "1.2500")),
        ({"subclass": "red", "pooled": True}, ("red", "7", "3", "1.2500 (of all together)")),
        (
            {"subclass": "cloth/red", "category": "cloth", "pooled": True, "pooled_over": "category"},
            ("cloth/red", "7", "3", "1.2500 (of its category)"),
        ),
        (
            {"subclass": "cloth/red", "category": "cloth", "pooled": True, "pooled_over": "all"},
            ("cloth/red", "7", "3", "1.2500 (of all together)"),
        ),
        (
            {"subclass": None, "category": "cloth", "pooled": False, "pooled_over": "category"},
            ("cloth, all subclasses", "7", "3", "1.2500"),
        ),
        (
            {"subclass": None, "category": "cloth", "pooled": True, "pooled_over": "all"},
            ("cloth, all subclasses", "7", "3", "1.2500 (of all together)"),
        ),
        (
            {"subclass": None, "category": None, "pooled": True, "pooled_over": "all"},
            ("all together", "7", "3", "1.2500"),
        ),
    ],
)
def test_a_pooled_threshold_names_its_group(point, row):
    assert point_row(point | {"normals": 7, "groups": 3, "threshold": 1.25}) == row


def test_the_model_is_named_as_on_the_command_line(trained, capsys):
    detector = Detector.load(trained.bundle, threads=1)
    detector.config = settings.with_model(detector.config, "patchcore")
    assert report(Terminal(), detector, trained.bundle) == 0
    assert f"{trained.bundle.name}: patchcore, fitted" in " ".join(capsys.readouterr().out.split())


def test_suspects_and_the_budget_are_printed(trained, capsys):
    detector = Detector.load(trained.bundle, threads=1)
    detector.record["suspects"] = [["good/7.png", 12.5]]
    assert report(Terminal(), detector, trained.bundle) == 0
    printed = capsys.readouterr().out
    assert "suspect     good/7.png: score 12.5000, far above the others of its subclass." in printed
    assert "budget balanced: input 64 x 64, tiles beyond 4 times this size\n" in printed
