"""The baselines against scikit-learn by hand, and when a kept result counts."""

import dataclasses
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.preprocessing import StandardScaler
from small_run import install_small_network, memory_datasets, small_config

from emotion_toolbox import probes
from emotion_toolbox.backbones import BACKBONES, PACKAGED, make_backbone
from emotion_toolbox.pixels import prepare_images
from emotion_toolbox.probes import predict
from emotion_transfer import baselines as module
from emotion_transfer.baselines import (
    majority,
    plain_config,
    run_baseline,
    scratch_config,
)
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.model import build_model, find_probe, make_optimizer
from emotion_transfer.schedule import cycle_bounds

NAMES = EnhancedConfig().BASELINES


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


# --- majority ------------------------------------------------------------------------------------


def test_the_majority_baseline_is_the_training_frequencies(tmp_path):
    datasets = memory_datasets()
    datasets["train"].split.labels[:6] = 2
    p, note = majority(small_config(tmp_path), datasets, tmp_path).values()
    share = np.bincount(datasets["train"].split.labels, minlength=3) / 24
    assert p.shape == (12, 3) and (p == share).all() and p.argmax() == 2
    assert note == "always rage"


def test_a_tie_goes_to_the_first_class(tmp_path):
    p, note = majority(small_config(tmp_path), memory_datasets(), tmp_path).values()
    assert note == "always calm" and (p.argmax(1) == 0).all()


# --- linear probe --------------------------------------------------------------------------------


def features_by_hand(cfg, dataset) -> np.ndarray:
    torch.manual_seed(cfg.SEED)
    backbone = make_backbone(cfg.MODEL_NAME, cfg.WEIGHTS).eval()
    spec = BACKBONES[cfg.MODEL_NAME]
    batch = dataset.batch(np.arange(len(dataset)))
    with torch.no_grad():
        images = prepare_images(batch.images, cfg.IMG_SIZE, spec.mean, spec.std)
        return backbone(images).numpy()


@pytest.mark.parametrize("name", ["small", "efficientnet_lite0"])
def test_the_linear_probe_is_a_logistic_regression_by_hand(tmp_path, name):
    weights = None if name == "small" else "DEFAULT"
    cfg = small_config(tmp_path, MODEL_NAME=name, WEIGHTS=weights, BATCH_SIZE=5)
    datasets = memory_datasets()
    result = run_baseline("linear_probe", cfg, datasets, tmp_path)
    x = {split: features_by_hand(cfg, dataset) for split, dataset in datasets.items()}
    labels = datasets["train"].split.labels
    scaler = StandardScaler().fit(x["train"])
    scaled = scaler.transform(x["train"])
    scores = {}
    for c in (1e-4, 1e-3, 1e-2, 1e-1):
        probe = LogisticRegression(C=c, max_iter=2000)
        scores[c] = cross_val_score(probe, scaled, labels, cv=5, scoring="f1_macro").mean()
    best = max(scores, key=lambda c: (scores[c], -c))
    probe = LogisticRegression(C=best, max_iter=2000).fit(scaled, labels)
    expected = probe.predict_proba(scaler.transform(x["test"]))
    np.testing.assert_allclose(result["probabilities"], expected, atol=2e-3)
    assert str(result["note"]).startswith(f"logistic regression, C = {best:g}, the best of 4")
    assert result["probabilities"].sum(1) == pytest.approx(1)


def test_training_begins_as_the_probe_and_shares_it(tmp_path, monkeypatch):
    cfg, datasets = small_config(tmp_path), memory_datasets()
    probe = find_probe(cfg, datasets, tmp_path / "linear_probe")
    for kind in ("progressive", "linear"):
        model = build_model(dataclasses.replace(cfg, HEAD=kind), 3, probe)
        found = predict(model, datasets["test"], size=cfg.IMG_SIZE, batch_size=5)
        np.testing.assert_allclose(found.probabilities, probe["probabilities"], atol=1e-5)
    monkeypatch.setattr(probes, "extract_features", None)  # once is enough
    again = run_baseline("linear_probe", cfg, datasets, tmp_path)
    np.testing.assert_array_equal(again["probabilities"], probe["probabilities"])
    random = build_model(dataclasses.replace(cfg, START="random"), 3)
    assert set(random.head) == {"reduction"}


def test_a_head_on_several_levels_begins_as_a_probe_of_its_own(tmp_path):
    several = {"HEAD": "multilevel", "MODEL_NAME": PACKAGED[0], "WEIGHTS": PACKAGED[1]}
    cfg, datasets = small_config(tmp_path, **several), memory_datasets()
    probe = find_probe(cfg, datasets, tmp_path / "linear_probe")
    model = build_model(cfg, 3, probe)
    assert probe["weight"].shape == (3, BACKBONES[cfg.MODEL_NAME].width)
    assert model.head["output"].in_features > BACKBONES[cfg.MODEL_NAME].features
    found = predict(model, datasets["test"], size=cfg.IMG_SIZE, batch_size=5)
    np.testing.assert_allclose(found.probabilities, probe["probabilities"], atol=1e-5)
    last = find_probe(dataclasses.replace(cfg, HEAD="linear"), datasets, tmp_path / "linear_probe")
    assert last["weight"].shape[1] < probe["weight"].shape[1]  # kept for other features


def test_a_class_without_training_images_has_no_probability(tmp_path):
    datasets = memory_datasets()
    labels = datasets["train"].split.labels
    labels[labels == 1] = 0
    result = run_baseline("linear_probe", small_config(tmp_path), datasets, tmp_path)
    assert result["probabilities"].shape == (12, 3) and result["probabilities"][:, 1].max() < 1e-6
    np.testing.assert_allclose(result["probabilities"].sum(1), 1)


def test_random_weights_are_those_of_the_seed(tmp_path):
    answers = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)
        cfg = small_config(tmp_path, SEED=seed)
        found = run_baseline("linear_probe", cfg, memory_datasets(), tmp_path / str(number))
        answers.append(found["probabilities"])
    np.testing.assert_array_equal(answers[0], answers[1])
    assert not np.array_equal(answers[0], answers[2])


@pytest.mark.parametrize("name", NAMES)
def test_every_baseline_answers_for_every_test_image(tmp_path, name):
    result = run_baseline(name, small_config(tmp_path, EPOCHS=2), memory_datasets(), tmp_path)
    assert result["probabilities"].shape == (12, 3)
    np.testing.assert_allclose(result["probabilities"].sum(1), 1)
    assert ("curve" in result) == (name in ("from_scratch", "plain_finetune"))
    assert len(result.get("curve", [0, 0, 0])) == 3  # the start, and two epochs


# --- plain fine-tune -----------------------------------------------------------------------------


def test_the_plain_recipe(tmp_path):
    cfg = small_config(tmp_path, EPOCHS=5, PATIENCE=2, INIT_FROM="x.pt", THAW_EPOCHS=(1, 3))
    plain = plain_config(cfg)
    assert cycle_bounds(plain) == [(0, 5)]  # one cosine, everything thawed from the first step
    assert plain.PATIENCE >= plain.EPOCHS  # never stopped early
    model = build_model(plain, 3)
    groups = make_optimizer(plain, model).param_groups
    assert {group["base_lr"] for group in groups} == {1e-4}
    assert list(model.head.named_children())[0][0] == "output" and len(model.head) == 1
    off = ["MIXUP_ALPHA", "CUTMIX_ALPHA", "LABEL_SMOOTHING", "EMA_DECAY", "DROPOUT", "ROTATION",
           "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "BLUR_PROB", "ERASE_PROB"]  # fmt: skip
    assert not any(getattr(plain, name) for name in off)
    same = ["EPOCHS", "BATCH_SIZE", "IMG_SIZE", "MODEL_NAME", "SEED", "WEIGHTS", "WEIGHT_DECAY",
            "CROP_SCALE", "FLIP_PROB", "MONITOR"]  # fmt: skip
    assert all(getattr(plain, name) == getattr(cfg, name) for name in same)


def test_the_plain_fine_tune_is_trained_and_tested(tmp_path):
    cfg, datasets = small_config(tmp_path), memory_datasets()
    result = run_baseline("plain_finetune", cfg, datasets, tmp_path)
    assert result["probabilities"].shape == (12, 3) and "of 4" in str(result["note"])
    assert (tmp_path / "plain_finetune/history.csv").exists()
    (tmp_path / "plain_finetune.npz").unlink()  # its checkpoints are left: loaded, not trained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emotion_transfer.engine.train_step", None)
        again = run_baseline("plain_finetune", cfg, datasets, tmp_path)
    np.testing.assert_array_equal(result["probabilities"], again["probabilities"])


def test_from_random_weights_is_the_same_recipe_without_imagenet(tmp_path):
    cfg = small_config(tmp_path, EPOCHS=20, MODEL_NAME="efficientnet_lite0", WEIGHTS="DEFAULT")
    scratch = scratch_config(cfg)
    assert scratch.WEIGHTS is None and scratch.EPOCHS == 4
    assert cycle_bounds(scratch) == [(0, 4)]
    model, pretrained = build_model(scratch, 3), make_backbone(cfg.MODEL_NAME, cfg.WEIGHTS)
    ours = dict(model.backbone.named_parameters())
    assert not any(torch.equal(p, ours[n]) for n, p in pretrained.named_parameters() if p.ndim > 1)
    groups = make_optimizer(scratch, model).param_groups
    assert {group["base_lr"] for group in groups} == {cfg.LR_HEAD}


# --- kept results --------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    """A baseline that counts how often it is trained."""
    calls: list[int] = []

    def make(cfg, datasets, folder):
        calls.append(1)
        return {"probabilities": np.full((12, 3), 1 / 3), "note": f"trained {len(calls)}"}

    monkeypatch.setitem(module.BASELINE_MAKERS, "majority", make)
    return calls


def test_a_result_is_kept_and_read_back(tmp_path, counted, capsys):
    cfg = small_config(tmp_path)
    first = run_baseline("majority", cfg, memory_datasets(), tmp_path)
    again = run_baseline("majority", cfg, memory_datasets(), tmp_path)
    assert len(counted) == 1 and str(again["note"]) == str(first["note"]) == "trained 1"
    np.testing.assert_array_equal(again["probabilities"], first["probabilities"])


def test_what_shapes_nothing_may_change(tmp_path, counted):
    cfg = small_config(tmp_path)
    for change in ({}, {"RUN_NAME": "x"}, {"NUM_WORKERS": 7}, {"BOOTSTRAP": 999}):
        run_baseline("majority", dataclasses.replace(cfg, **change), memory_datasets(), tmp_path)
    assert len(counted) == 1


@pytest.mark.parametrize(
    "change", [{"EPOCHS": 5}, {"SEED": 1}, {"IMG_SIZE": 36}, {"FLIP_PROB": 0.1}]
)
def test_a_setting_that_shapes_it_makes_it_new(tmp_path, counted, change):
    cfg = small_config(tmp_path)
    run_baseline("majority", cfg, memory_datasets(), tmp_path)
    run_baseline("majority", dataclasses.replace(cfg, **change), memory_datasets(), tmp_path)
    assert len(counted) == 2


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("what", ["labels", "files"])
def test_other_images_make_it_new(tmp_path, counted, split, what):
    cfg, datasets = small_config(tmp_path), memory_datasets()
    run_baseline("majority", cfg, datasets, tmp_path)
    if what == "labels":
        datasets[split].split.labels[0] += 1
    else:
        datasets[split].split.files[3] = "another.png"
    run_baseline("majority", cfg, datasets, tmp_path)
    assert len(counted) == 2


DAMAGE = {
    "empty": lambda data: b"",
    "text": lambda data: b"not an archive",
    "cut": lambda data: data[: len(data) // 2],
    "start": lambda data: b"PK" + bytes(200),
    "flipped": lambda data: bytes(b ^ 255 if 60 < i < 300 else b for i, b in enumerate(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_made_anew(tmp_path, counted, capsys, damage):
    cfg, file = small_config(tmp_path), tmp_path / "majority.npz"
    run_baseline("majority", cfg, memory_datasets(), tmp_path)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    result = run_baseline("majority", cfg, memory_datasets(), tmp_path)
    assert len(counted) == 2 and result["note"] == "trained 2"
    assert "majority.npz is damaged" in capsys.readouterr().out
    run_baseline("majority", cfg, memory_datasets(), tmp_path)
    assert len(counted) == 2 and not list(tmp_path.glob(".*"))


class Planted:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_a_planted_result_is_not_unpickled(tmp_path, counted):
    cfg, mark = small_config(tmp_path), tmp_path / "mark"
    run_baseline("majority", cfg, memory_datasets(), tmp_path)
    with np.load(tmp_path / "majority.npz") as kept:
        key = kept["key"]
    planted = np.array([Planted(mark)], dtype=object)
    np.savez(tmp_path / "majority.npz", key=key, probabilities=planted, note="x")
    run_baseline("majority", cfg, memory_datasets(), tmp_path)
    assert len(counted) == 2 and not mark.exists()
    with zipfile.ZipFile(tmp_path / "majority.npz", "w") as archive:
        archive.writestr("other.txt", "x")
    run_baseline("majority", cfg, memory_datasets(), tmp_path)
    assert len(counted) == 3
