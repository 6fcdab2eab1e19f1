"""What a run writes down: the keys others rely on, numbers that are numbers, honest sentences."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from small_run import (
    file_datasets,
    install_small_network,
    listed,
    memory_datasets,
    small_config,
)

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.measures import (
    TEMPERATURES,
    Predictions,
    calibrate,
    fit_temperature,
    paired_test,
)
from emotion_toolbox.probes import predict
from emotion_toolbox.report import (
    PUBLISHED_EMOSET,
    closing_text,
    comparison_table,
    describe_difference,
    describe_temperature,
    figure_note,
    make_run_folder,
    published_accuracies,
    software_versions,
    summarise_run,
    write_predictions,
    write_summary,
)
from emotion_toolbox.tables import MIKELS_CLASSES
from emotion_transfer.baselines import run_baseline
from emotion_transfer.engine import fit
from emotion_transfer.intervals import evaluate_predictions
from emotion_transfer.model import build_model


@pytest.fixture
def run(tiny_root, tmp_path, monkeypatch):
    """A run from data to summary: its configuration, result, predictions and summary."""
    install_small_network(monkeypatch)
    cfg = small_config(tmp_path, BASELINES=("majority", "linear_probe"))
    data, datasets = listed(cfg), file_datasets(cfg)
    model = build_model(cfg, 3)
    result = fit(cfg, model, datasets, tmp_path / "run/checkpoints")
    asked = {"size": cfg.IMG_SIZE, "batch_size": cfg.BATCH_SIZE}
    found = {name: predict(model, datasets[name], **asked) for name in ("val", "test")}
    temperature = fit_temperature(found["val"].labels, found["val"].probabilities)
    calibrated = {name: calibrate(p, temperature) for name, p in found.items()}
    raw, metrics = (
        {
            name: evaluate_predictions(p.labels, p.probabilities, data.classes, resamples=200)
            for name, p in predictions.items()
        }
        for predictions in (found, calibrated)
    )
    test, tests = found["test"], {}
    for name in cfg.BASELINES:
        p = run_baseline(name, cfg, datasets, tmp_path / "run")["probabilities"]
        metrics[name] = evaluate_predictions(test.labels, p, data.classes, resamples=200)
        tests[name] = paired_test(test.labels, test.predicted, p.argmax(1), resamples=200)
    measured = metrics, tests, temperature, raw
    summary = summarise_run(vars(cfg), data, datasets, result, *measured)
    return cfg, result, found, summary, measured


def test_the_summary_holds_what_others_rely_on(run, tmp_path):
    cfg, result, found, summary, _ = run
    file = tmp_path / "deep/summary.json"
    write_summary(file, summary)
    read = json.loads(file.read_text())
    assert {
        "dataset", "synthetic", "model", "weights", "classes", "epochs", "metrics", "baselines",
        "train_val_gap", "seconds", "images_per_second", "device", "versions",
    } <= read.keys()  # fmt: skip
    assert read["dataset"] == "tiny" and read["synthetic"] is False
    assert read["model"] == "small" and read["weights"] == "none"
    assert read["classes"] == ["calm", "joy", "rage"] and read["epochs"] == 4
    assert read["metrics"].keys() == {"val", "test"}
    assert read["baselines"].keys() == {"majority", "linear_probe"}
    names = {"accuracy", "macro_f1", "weighted_f1", "macro_precision", "macro_recall"}
    for estimates in (*read["metrics"].values(), *read["baselines"].values()):
        assert names <= estimates.keys()
        for name, estimate in estimates.items():  # each of them, so that programs can loop
            assert estimate.keys() == {"value", "low", "high"}, name
            assert estimate["low"] <= estimate["value"] <= estimate["high"], name
    for split, predictions in found.items():
        assert read["metrics"][split]["accuracy"]["value"] == predictions.accuracy
        assert read["metrics"][split]["macro_f1"]["value"] == predictions.macro_f1
    assert read["temperature"] != 1
    for split, predictions in found.items():  # its loss is the cross-entropy of the logits
        before, after = read["uncalibrated"][split], read["metrics"][split]
        assert before.keys() == {"ece", "nll"} and after["ece"] != before["ece"]
        assert before["nll"]["value"] == pytest.approx(predictions.loss, abs=1e-9)
    assert read["metrics"]["val"]["nll"]["value"] < read["uncalibrated"]["val"]["nll"]["value"]
    best = result.history.set_index("epoch").loc[result.best_epoch]
    assert read["train_val_gap"] == best["gap"]
    assert read["best_epoch"] == result.best_epoch and read["best_source"] == result.best_source
    assert read["seconds"] == pytest.approx(result.history["seconds"].sum())
    expected = 4 * 24 / result.history["seconds"].sum()
    assert read["images_per_second"] == pytest.approx(expected)
    assert read["device"] == "cpu (1 threads)" and read["precision"] == "off"
    assert read["images"] == {"train": 24, "val": 12, "test": 12}
    assert read["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert read["paired_tests"]["majority"].keys() >= {"difference", "p_value"}


def test_where_the_weights_came_from(run, tmp_path):
    cfg, result, _, summary, measured = run
    data, datasets = listed(cfg), file_datasets(cfg)
    for settings, expected in (
        ({"WEIGHTS": None}, "none"),
        ({"WEIGHTS": "DEFAULT"}, "DEFAULT"),
        ({"WEIGHTS": "DEFAULT", "INIT_FROM": "best.pt"}, "best.pt"),
    ):
        found = summarise_run(vars(cfg) | settings, data, datasets, result, *measured)
        assert found["weights"] == expected
    assert str(cfg.OUTPUT_ROOT) not in json.dumps(summary)  # no path of this machine


def test_the_counts_are_of_the_images_that_were_looked_at(run):
    """Two batches of each split, with DEBUG."""
    cfg, result, _, _, measured = run
    few = file_datasets(dataclasses.replace(cfg, DEBUG=True))
    summary = summarise_run(vars(cfg), listed(cfg), few, result, *measured)
    assert summary["images"] == {"train": 8, "val": 8, "test": 8}
    assert "on 8 images" in closing_text(summary, Path("x"))


def test_versions_of_what_shapes_a_result():
    found = software_versions()
    assert {"python", "platform", "torch", "torchvision", "timm", "numpy"} <= found.keys()


@pytest.mark.parametrize(
    ("low", "value", "high", "expected"),
    [
        (0.02, 0.05, 0.08, "better than the majority baseline by 5.0 points"),
        (-0.08, -0.05, -0.02, "**worse** than the majority baseline by 5.0 points"),
        (-0.01, 0.05, 0.11, "does not differ clearly from the majority baseline: +5.0 points"),
        (-0.11, -0.05, 0.01, "does not differ clearly from the majority baseline: -5.0 points"),
        (0.0, 0.05, 0.1, "does not differ clearly"),
        (0.0, 0.0, 0.0, "does not differ clearly"),
    ],
)
def test_a_difference_in_words(low, value, high, expected):
    text = describe_difference("majority baseline", {"value": value, "low": low, "high": high})
    assert expected in text
    assert f"{100 * low:+.1f} to {100 * high:+.1f}" in text


def test_the_temperature_in_words():
    before, after = ({m: {"value": v} for m in ("ece", "nll")} for v in (0.51, 0.3))
    text = describe_temperature(1.5, before, after)
    assert text.startswith("A temperature of 1.50 takes the test ECE from 0.510 to 0.300, the NLL")
    assert "range" not in text
    for end in TEMPERATURES:
        assert describe_temperature(end, before, after).startswith(f"A temperature of {end:.2f} ")
        assert "the end of its range" in describe_temperature(end, before, after)


def test_the_closing_text_is_written_from_the_numbers(run):
    _, result, _, summary, _ = run
    text = closing_text(summary, Path("outputs/x"))
    test = summary["metrics"]["test"]["accuracy"]
    assert (
        f"**{test['value']:.1%}** (95 % interval {test['low']:.1%} to {test['high']:.1%})" in text
    )
    assert "on 12 images" in text and "outputs/x" in text and "Synthetic" not in text
    assert f"best epoch was {result.best_epoch} of 4" in text
    assert text.count("\n- ") == 2 and "linear probe baseline" in text
    worse = json.loads(json.dumps(summary))
    worse["paired_tests"]["majority"]["difference"] = {"value": -0.3, "low": -0.5, "high": -0.1}
    worse["synthetic"] = True
    text = closing_text(worse, Path("outputs/x"))
    assert "It is **worse** than the majority baseline by 30.0 points" in text
    assert text.startswith("> **Synthetic sample.**")


def test_a_run_without_baselines(run, tmp_path):
    cfg, result, _, _, (metrics, _, *calibration) = run
    datasets = file_datasets(cfg)
    summary = summarise_run(vars(cfg), listed(cfg), datasets, result, metrics, {}, *calibration)
    assert summary["baselines"] == {}
    text = closing_text(summary, tmp_path)
    assert "reaches a test accuracy" in text and "\n- " not in text
    write_summary(tmp_path / "s.json", summary)


# --- tables --------------------------------------------------------------------------------------


def test_the_table_of_predictions(tmp_path):
    dataset = memory_datasets()["test"]
    dataset.classes = ('calm, "very"', "joy", "ragé")
    dataset.split.files[2] = "odd, name\n'x'.png"
    p = np.random.default_rng(0).dirichlet(np.ones(3), len(dataset))
    file = tmp_path / "deep/predictions.csv"
    write_predictions(file, dataset, Predictions(dataset.split.labels, p, loss=1.0))
    read = pd.read_csv(file)
    names = [f"p_{name}" for name in dataset.classes]
    assert list(read) == ["path", "label", "predicted", "confidence", *names]
    assert read["path"].tolist() == list(dataset.split.files)
    assert read["label"].tolist() == [dataset.classes[i] for i in dataset.split.labels]
    assert read["predicted"].tolist() == [dataset.classes[i] for i in p.argmax(1)]
    np.testing.assert_allclose(read[names].to_numpy(), p, atol=5e-7)
    np.testing.assert_allclose(read["confidence"], p.max(1), atol=1e-6)
    with file.open(newline="", encoding="utf-8") as rows:
        assert len(list(csv.reader(rows))) == 1 + len(dataset)


def test_the_comparison_is_on_the_same_images():
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    answers = {
        "majority": np.zeros(8, int),
        "from_scratch": labels,
        "this notebook": np.array([0, 1, 2, 0, 1, 2, 1, 1]),
    }
    ours = answers["this notebook"]
    metrics = {
        name: evaluate_predictions(labels, np.eye(3)[a] * 0.8 + 0.2 / 3, ("a", "b", "c"))
        for name, a in answers.items()
    }
    tests = {n: paired_test(labels, ours, a) for n, a in answers.items() if a is not ours}
    table = comparison_table(metrics, tests)
    assert table.index.tolist() == ["majority", "from scratch", "this notebook"]
    assert table.loc["majority", "accuracy"].startswith("0.375 [")
    assert table.loc["majority", "ours is better by"].startswith("+0.500")
    assert table.loc["from scratch", "ours is better by"].startswith("-0.125")
    assert table.loc["this notebook", "p (McNemar)"] == ""


def test_published_figures_stand_beside_emoset_only():
    assert published_accuracies(MIKELS_CLASSES, synthetic=False) == PUBLISHED_EMOSET
    assert published_accuracies(MIKELS_CLASSES, synthetic=True) == {}
    assert published_accuracies(("calm", "joy"), synthetic=False) == {}
    assert PUBLISHED_EMOSET["ResNet-50"] == 0.7404 and max(PUBLISHED_EMOSET.values()) == 0.7840


def test_what_a_figure_must_say_of_itself():
    assert figure_note(False, "resnet50", False) == ""
    note = figure_note(True, "efficientnet_lite0", True)
    assert "SYNTHETIC SAMPLE" in note and "efficientnet_lite0" in note and "DEBUG" in note


# --- the folder of a run -------------------------------------------------------------------------


def name_of(cfg) -> str:
    return make_run_folder(cfg, listed(cfg)).name


def test_a_run_keeps_its_name_where_its_data_are_moved(tiny_config, tiny_root, tmp_path):
    before = name_of(tiny_config())
    assert before.startswith("tiny-efficientnet_lite0-")
    (tmp_path / "far").mkdir()
    tiny_root.rename(tmp_path / "far" / "tiny")
    assert name_of(tiny_config(DATA_ROOT=str(tmp_path / "far" / "tiny"))) == before


def test_other_data_of_the_same_name_get_another_run(tiny_config, tiny_root, tmp_path):
    before = name_of(tiny_config())
    other = shutil.copytree(tiny_root, tmp_path / "far" / "tiny")
    table = other / "val.csv"
    rows = table.read_text().splitlines()
    table.write_text("\n".join(rows[:-1]) + "\n")
    assert name_of(tiny_config(DATA_ROOT=str(other))) != before
    assert name_of(tiny_config(SEED=7)) != before
    assert name_of(tiny_config(RUN_NAME="mine")) == "mine"


def test_a_folder_that_cannot_be_made_is_named(tiny_config, tmp_path):
    (tmp_path / "outputs").write_text("a file")
    cfg = tiny_config()
    with pytest.raises(ConfigError, match=r"OUTPUT_ROOT=.*choose another folder"):
        make_run_folder(cfg, listed(cfg))
    made = make_run_folder(dataclasses.replace(cfg, OUTPUT_ROOT=str(tmp_path / "b")), listed(cfg))
    assert (made / "figures").is_dir()
