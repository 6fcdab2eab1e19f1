"""The comparison with other recipes: its statistics, its records, and that every arm trains."""

import json
import math
import multiprocessing
import os
import sys
from pathlib import Path

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import stats

from benchmarks import peers_accuracy, recipes
from benchmarks.paired import first_reaching, summarise_arms, time_to_best
from benchmarks.recipes import Answer, Task
from emotion_toolbox.backbones import PACKAGED, make_backbone
from emotion_toolbox.paired import pack_hits, resample_mean, unpack_hits
from emotion_toolbox.tables import load_splits
from emotion_transfer.commands.train import train


def record(hits, seconds=10.0, curve=((5.0, 0.5),), arm="ours", seed=0):
    return {
        "arm": arm, "seed": seed, "correct": pack_hits(hits), "test_images": len(hits),
        "test_accuracy": float(np.mean(hits)), "seconds": seconds, "curve": curve, "data": "x",
    }  # fmt: skip


@pytest.mark.parametrize("count", [1, 8, 9, 372])
def test_hits_survive_packing(count):
    hits = np.random.default_rng(count).random(count) < 0.5
    assert np.array_equal(unpack_hits(pack_hits(hits), count), hits)


def test_interval_of_one_seed_is_binomial():
    hits = (np.arange(300) < 240).astype(float)
    found = resample_mean(hits[None])
    low, high = stats.binom(300, 0.8).ppf([0.025, 0.975]) / 300
    assert found.value == 0.8
    assert found.low == pytest.approx(low, abs=1.01 / 300)
    assert found.high == pytest.approx(high, abs=1.01 / 300)


def test_interval_of_seeds_alone_is_scipys():
    by_seed = np.random.default_rng(0).random(12)
    found = resample_mean(np.repeat(by_seed[:, None], 50, axis=1))
    other = stats.bootstrap((by_seed,), np.mean, method="percentile", rng=1).confidence_interval
    assert found.low == pytest.approx(other.low, abs=0.01)
    assert found.high == pytest.approx(other.high, abs=0.01)


def test_interval_over_both_has_the_variance_of_the_closed_form():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(20, 1)) + 2 * rng.normal(size=(1, 60)) + 5 * rng.normal(size=(20, 60))
    mean, rows, columns = values.mean(), values.mean(1), values.mean(0)
    both = values - rows[:, None] - columns + mean
    variance = rows.var() / 20 + columns.var() / 60 + both.var() / (20 * 60)
    found = resample_mean(values)
    width = 2 * stats.norm.ppf(0.975) * math.sqrt(variance)
    assert found.high - found.low == pytest.approx(width, rel=0.04)


def test_equal_arms_differ_by_nothing_and_paired_intervals_are_narrower():
    rng = np.random.default_rng(5)
    hits = rng.random((3, 200)) < 0.7
    other = hits.copy()
    other[:, :10] = ~other[:, :10]
    runs = {
        "ours": {s: record(hits[s]) for s in range(3)},
        "fastai": {s: record(hits[s]) for s in range(3)},
        "timm": {s: record(other[s]) for s in range(3)},
    }
    found = summarise_arms(runs)
    assert found["minus_fastai"] == {"value": 0, "low": 0, "high": 0}
    assert found["minus_timm"]["value"] == pytest.approx(hits.mean() - other.mean())
    alone = found["test_accuracy"]
    paired = found["minus_timm"]
    assert paired["high"] - paired["low"] < 0.7 * (alone["high"] - alone["low"])


def test_only_seeds_of_both_arms_are_paired():
    right, wrong = [True] * 8, [False] * 8
    runs = {"ours": {0: record(right), 1: record(wrong)}, "probe": {1: record(wrong)}}
    found = summarise_arms(runs)
    assert found["minus_probe"]["value"] == 0
    assert found["seeds"] == {"ours": 2, "probe": 1}


def test_time_to_the_plain_best():
    plain = record([True], curve=[(10, 0.3), (20, 0.6), (30, 0.6), (40, 0.5)])
    early = record([True], curve=[(5, 0.6), (9, 0.7)])
    late = record([True], curve=[(5, 0.1), (30, 0.61)])
    never = record([True], curve=[(5, 0.59)])
    assert first_reaching(plain["curve"], 0.6) == 20
    assert time_to_best(early, plain) == 0.25
    assert time_to_best(late, plain) == 1.5
    assert time_to_best(never, plain) == math.inf

    def summary(*ours):
        return summarise_arms({
            "ours": dict(enumerate(ours)), "plain_finetune": dict.fromkeys(range(3), plain),
        })  # fmt: skip

    found = summary(early, late, never)
    assert found["time_to_plain_best"] == 1.5
    assert found["seeds_never_at_plain_best"] == 1
    found = summary(early, never, never)
    assert found["time_to_plain_best"] is None
    assert found["seeds_never_at_plain_best"] == 2
    json.dumps(found, allow_nan=False)


def test_wall_time_is_the_ratio_of_medians_and_null_without_fastai():
    ours = {s: record([True], seconds=t) for s, t in enumerate([9, 30, 10])}
    fastai = {s: record([True], seconds=t) for s, t in enumerate([40, 1, 20])}
    assert summarise_arms({"ours": ours, "fastai": fastai})["wall_vs_fastai"] == 0.5
    alone = summarise_arms({"ours": ours})
    assert alone["wall_vs_fastai"] is alone["minus_fastai"] is alone["time_to_plain_best"] is None


def test_runs_beside_other_work_are_not_timed():
    slow = {"timed": False, "seconds": 1000.0, "curve": [(900.0, 0.9)]}
    ours = {0: record([True], 10), 1: record([False], 10) | slow}
    others = {0: record([True], 40), 1: record([True], 40) | slow}
    found = summarise_arms({"ours": ours, "fastai": others, "plain_finetune": others})
    assert found["wall_vs_fastai"] == 0.25
    assert found["time_to_plain_best"] == 1
    assert found["minus_fastai"]["value"] == -0.5
    assert found["seeds"]["ours"] == 2


def test_other_data_sets_stay_in_the_file():
    about = {"machine": {"cpu": "some"}, "versions": {"torch": "2"}}
    first = peers_accuracy.merge_set(None, "one", about, [record([True])])
    both = peers_accuracy.merge_set(first, "two", about, [record([False])])
    again = peers_accuracy.merge_set(both, "one", about, [record([False])])
    assert again["summary"]["two"] == both["summary"]["two"]
    assert again["summary"]["one"]["test_accuracy"]["value"] == 0
    assert again["sets"].keys() == {"one", "two"}


def test_the_better_of_raw_and_averaged_weights_counts():
    history = pd.DataFrame({
        "val_accuracy": [0.1, 0.2], "val_macro_f1": [0.5, 0.1], "val_loss": [1.0, 3.0],
        "val_ema_accuracy": [0.3, 0.4], "val_ema_macro_f1": [0.4, 0.2], "val_ema_loss": [0.5, 4.0],
    })  # fmt: skip
    assert peers_accuracy.chosen_accuracy(history, "macro_f1") == [0.1, 0.4]
    assert peers_accuracy.chosen_accuracy(history, "loss") == [0.3, 0.2]
    raw = history[["val_accuracy", "val_macro_f1"]]
    assert peers_accuracy.chosen_accuracy(raw, "macro_f1") == [0.1, 0.2]


# --- records ------------------------------------------------------------------------------------


@pytest.fixture
def fake_arms(monkeypatch):
    """Arms that answer at once: always class 0."""

    def answer(task, folder):
        count = len(load_splits(task.root).splits["test"])
        return Answer(np.zeros(count, np.int64), [(0.5, 0.25)], {"folder": str(folder)})

    monkeypatch.setattr(peers_accuracy, "ARMS", dict.fromkeys(peers_accuracy.ARMS, answer))
    monkeypatch.setattr(peers_accuracy, "in_own_process", lambda function, *args: function(*args))
    monkeypatch.setattr(
        peers_accuracy.record_run, "__defaults__", (True, lambda function, *args: function(*args))
    )


def command(root, work, *more):
    asked = ["--data", str(root), "--name", "tiny", "--seeds", "2", "--epochs", "1", "--size", "32"]
    out = work / "recipe.json"
    rc = peers_accuracy.main([*asked, "--work", str(work), "--out", str(out), *more])
    assert rc == 0
    return json.loads(out.read_text(encoding="utf-8"))


def test_a_run_that_is_there_is_not_repeated(tiny_root, tmp_path, fake_arms, monkeypatch):
    work = tmp_path / "work"
    first = command(tiny_root, work, "--arms", "ours,probe")
    assert len(list(work.glob("tiny-32px-1-epochs-*.json"))) == 4
    assert [p for p in work.iterdir() if p.is_dir()] == []  # nothing else is left behind
    made = []
    real = peers_accuracy.run_arm
    monkeypatch.setattr(peers_accuracy, "run_arm", lambda *a: made.append(a[0]) or real(*a))
    assert command(tiny_root, work, "--arms", "ours,probe")["summary"] == first["summary"]
    assert made == []
    (work / "tiny-32px-1-epochs-probe-1.json").unlink()
    (work / "recipe.json").unlink()
    command(tiny_root, work, "--arms", "probe")
    assert made == ["probe"]


def test_runs_in_the_results_are_not_repeated_on_another_machine(
    tiny_root, tmp_path, fake_arms, monkeypatch
):
    work = tmp_path / "work"
    first = command(tiny_root, work, "--arms", "ours,probe")
    for file in work.glob("tiny-*.json"):
        file.unlink()
    monkeypatch.setattr(peers_accuracy, "run_arm", None)
    assert command(tiny_root, work, "--arms", "ours,probe") == first


def test_untimed_runs_say_so_and_show_no_seconds(tiny_root, tmp_path, fake_arms):
    found = command(tiny_root, tmp_path / "work", "--arms", "ours", "--untimed")
    assert [run["timed"] for run in found["sets"]["tiny"]["runs"]] == [False, False]
    assert peers_accuracy.as_markdown(found).splitlines()[-1].endswith("|  |  |")


def test_a_part_of_the_arms_keeps_the_records_of_the_others(tiny_root, tmp_path, fake_arms):
    command(tiny_root, tmp_path / "work", "--arms", "ours")
    found = command(tiny_root, tmp_path / "work", "--arms", "timm")["summary"]["tiny"]
    assert found["test_accuracy_of_each"].keys() == {"ours", "timm"}
    assert found["minus_timm"]["value"] == 0


def test_runs_on_other_images_are_made_again(tiny_root, tmp_path, fake_arms):
    work = tmp_path / "work"
    command(tiny_root, work, "--arms", "ours,probe")
    csv = tiny_root / "test.csv"
    csv.write_text("\n".join(csv.read_text().splitlines()[:-1]) + "\n")
    found = command(tiny_root, work, "--arms", "ours")
    assert {run["test_images"] for run in found["sets"]["tiny"]["runs"]} == {11}
    assert found["summary"]["tiny"]["seeds"] == {"ours": 2}


def test_an_arm_whose_package_is_missing_is_skipped(
    tiny_root, tmp_path, fake_arms, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "fastai.vision.all", None)
    found = command(tiny_root, tmp_path / "work", "--arms", "ours,fastai")
    assert "pip install" in found["sets"]["tiny"]["skipped"]["fastai"]
    assert "fastai is skipped" in capsys.readouterr().out
    assert found["summary"]["tiny"]["seeds"] == {"ours": 2}
    assert "fastai" not in found["versions"]


def test_an_arm_must_answer_to_every_test_image(tiny_root, tmp_path, fake_arms, monkeypatch):
    few = Answer(np.zeros(3, np.int64), [], {})
    monkeypatch.setitem(peers_accuracy.ARMS, "ours", lambda task, folder: few)
    with pytest.raises(ValueError, match="3 of 12 test images"):
        peers_accuracy.run_arm("ours", tiny_root, 32, 1, 0, tmp_path)


def test_the_committed_table_is_that_of_the_committed_runs():
    root = Path(__file__).parents[1]
    file = root / "benchmarks" / "results" / "recipe.json"
    results = json.loads(file.read_text(encoding="utf-8"))
    table = peers_accuracy.as_markdown(results)
    assert table in (root / "docs" / "recipe.md").read_text(encoding="utf-8")
    for name, found in results["sets"].items():
        again = peers_accuracy.merge_set(None, name, found, found["runs"])
        for arm, e in again["summary"][name]["test_accuracy_of_each"].items():
            kept = results["summary"][name]["test_accuracy_of_each"][arm]
            assert e["value"] == pytest.approx(kept["value"])


@pytest.mark.parametrize("wrong", [["--arms", "ours,keras"], ["--name", "a/b"]])
def test_a_wrong_argument_is_refused(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        peers_accuracy.main(["--data", "d", "--work", "w", "--name", "n", *wrong])
    assert stop.value.code == 2
    assert wrong[1].split(",")[-1] in capsys.readouterr().err


def test_a_run_has_a_process_of_its_own():
    assert peers_accuracy.in_own_process(os.getpid) != os.getpid()
    usual = multiprocessing.get_all_start_methods()[0]
    assert peers_accuracy.in_own_process(multiprocessing.get_start_method) == usual


# --- the arms -----------------------------------------------------------------------------------


def test_every_arm_begins_with_the_packaged_weights():
    images = torch.randn(2, 3, 64, 64)
    backbone = make_backbone(*PACKAGED).eval()
    network = recipes.timm_network(3).eval()
    with torch.no_grad():
        pooled = network.forward_features(images).mean((2, 3))
        torch.testing.assert_close(pooled, backbone(images))
        assert network(images).shape == (2, 3)


def test_rotation_reflects_at_the_edge_and_evaluation_only_resizes():
    white = Image.new("RGB", (50, 40), "white")
    torch.manual_seed(0)
    for _ in range(5):
        turned = recipes.keras_transform(32, training=True)(white)
        assert turned.shape == (3, 32, 32)
        assert turned.min() == turned.max() == 1
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8))
    resized = np.asarray(noise.resize((32, 32), Image.Resampling.BILINEAR), np.float32)
    found = recipes.keras_transform(32, training=False)(noise).permute(1, 2, 0).numpy()
    np.testing.assert_allclose(found, resized / 127.5 - 1, atol=1e-6)


@pytest.fixture
def root(tmp_path, monkeypatch):
    """As `tiny_root`, but with enough images for a batch of ours as it ships."""
    monkeypatch.setitem(conftest.TINY_COUNTS, "train", 12)
    return conftest.write_tiny_data(tmp_path / "data")


@pytest.mark.parametrize("arm", peers_accuracy.ARMS)
def test_every_arm_trains(arm, root, tmp_path):
    if arm == "fastai":
        pytest.importorskip("fastai.vision.all")
    made = peers_accuracy.run_arm(arm, root, 32, 1, 0, tmp_path)
    hits = unpack_hits(made["correct"], made["test_images"])
    assert hits.mean() == made["test_accuracy"]
    seconds = [second for second, _ in made["curve"]]
    assert seconds == sorted(seconds)
    assert all(0 < second <= made["seconds"] for second in seconds)
    assert all(0 <= accuracy <= 1 for _, accuracy in made["curve"])
    assert (len(seconds) > 0) == (not arm.startswith("probe"))
    json.dumps(made, allow_nan=False)
    assert not any(tmp_path.glob("tmp*"))


def test_ours_is_what_the_command_trains(root, tmp_path):
    made = peers_accuracy.ARMS["ours"](Task(root, 32, 2, 5), tmp_path)
    run = train({
        "DATA_ROOT": str(root), "CACHE_DIR": str(tmp_path / "other"), "SEED": 5, "EPOCHS": 2,
        "OUTPUT_ROOT": str(tmp_path / "outputs"), "MODEL_NAME": PACKAGED[0], "IMG_SIZE": 32,
        "BASELINES": ("majority",), "BOOTSTRAP": 100,
    })  # fmt: skip
    table, classes = pd.read_csv(Path(run) / "predictions_test.csv"), load_splits(root).classes
    assert [classes[i] for i in made.predicted] == table["predicted"].tolist()
    assert len(made.curve) == len(pd.read_csv(Path(run) / "history.csv"))
