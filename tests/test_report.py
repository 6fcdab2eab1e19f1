"""What a run writes down: the keys others rely on, numbers that are numbers, honest sentences."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from small_run import file_datasets, install_small_network, listed, small_config

from emotion_toolbox.report import (
    closing_text,
    describe_difference,
    software_versions,
    summarise_run,
    write_summary,
)
from emotion_transfer.baselines import run_baseline
from emotion_transfer.engine import fit
from emotion_transfer.evaluation import predict
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
    found = {name: predict(cfg, model, datasets[name]) for name in ("val", "test")}
    metrics = {
        name: evaluate_predictions(p.labels, p.probabilities, data.classes, resamples=200)
        for name, p in found.items()
    }
    baselines = [run_baseline(name, cfg, datasets, tmp_path / "run") for name in cfg.BASELINES]
    comparison = compare_models(cfg, found["test"], baselines, data.classes)
    summary = summarise_run(cfg, data, result, metrics, comparison)
    return cfg, result, found, summary


def test_the_summary_holds_what_others_rely_on(run, tmp_path):
    cfg, result, found, summary = run
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


def test_the_weights_are_named(run):
    cfg, _, _, summary = run
    assert summary["weights"] == "none"
    assert str(cfg.OUTPUT_ROOT) not in json.dumps(summary)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float64("nan")])
def test_what_is_no_number_becomes_null(tmp_path, value):
    write_summary(tmp_path / "s.json", {"a": value, "b": [1.5, value], "c": {"d": (value, "x")}})
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text) == {"a": None, "b": [1.5, None], "c": {"d": [None, "x"]}}
    assert "NaN" not in text and "Infinity" not in text


def test_versions_of_what_shapes_a_result(monkeypatch):
    found = software_versions()
    assert {"python", "platform", "torch", "torchvision", "timm", "numpy"} <= found.keys()
    assert "absent" not in found.values()
    monkeypatch.setattr("emotion_transfer.report.version", raise_missing)
    assert software_versions()["timm"] == "absent"


def raise_missing(name: str) -> str:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


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


def test_the_closing_text_is_written_from_the_numbers(run):
    _, result, _, summary = run
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
    cfg, result, found, _ = run
    cfg = dataclasses.replace(cfg, BASELINES=())
    data = listed(cfg)
    metrics = {
        name: evaluate_predictions(p.labels, p.probabilities, data.classes, resamples=100)
        for name, p in found.items()
    }
    comparison = compare_models(cfg, found["test"], [], data.classes)
    summary = summarise_run(cfg, data, result, metrics, comparison)
    assert summary["baselines"] == {} and "reaches a test accuracy" in closing_text(
        summary, tmp_path
    )
    write_summary(tmp_path / "s.json", summary)
