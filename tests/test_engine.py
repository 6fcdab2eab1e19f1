"""The training engine: a step against a plain loop; runs that are killed, stopped, damaged."""

import copy
import dataclasses
import errno
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from small_run import (
    file_datasets,
    install_small_network,
    memory_datasets,
    small_config,
)
from torch import nn

from emotion_toolbox import files, keeper
from emotion_toolbox.batches import Batch, batch_slices, steps_per_epoch, training_order
from emotion_toolbox.device import check_gradients, set_deterministic
from emotion_toolbox.draws import draw_uniforms, step_seed
from emotion_toolbox.errors import CheckpointError, ConfigError
from emotion_toolbox.keeper import list_checkpoints, load_verified
from emotion_toolbox.measures import Predictions
from emotion_toolbox.probes import predict
from emotion_transfer import engine
from emotion_transfer.augment import AUGMENT_DRAWS, apply_augmentation, draw_augmentation
from emotion_transfer.config import EnhancedConfig, make_config
from emotion_transfer.engine import Trainer, begin_epoch, fit, train_step
from emotion_transfer.losses import class_weights
from emotion_transfer.mixing import draw_mixing, mix_images, mix_targets
from emotion_transfer.model import build_model
from emotion_transfer.schedule import learning_rate

MODELS = ("resnet50", "efficientnet_b0", "efficientnet_lite0")
NEUTRAL = {f.name for f in dataclasses.fields(EnhancedConfig) if f.metadata["neutral"]}
TIMINGS = ["seconds", "images_per_second", "memory_mb"]  # columns that no two runs share


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


def batches(cfg, train, epoch: int) -> list[Batch]:
    order = order_of(cfg, train, epoch)
    return [train.batch(rows) for rows in batch_slices(order, cfg.BATCH_SIZE)]


def order_of(cfg, train, epoch: int):
    balanced = cfg.BALANCE == "sampler"
    labels = train.split.labels
    return training_order(labels, cfg.BATCH_SIZE, seed=cfg.SEED, epoch=epoch, balanced=balanced)


def copy_of(state):
    """A deep copy of a state that later training does not reach."""
    return copy.deepcopy(state)


def assert_same(ours, theirs, where: str = "") -> None:
    """Two nested states are equal bit for bit."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert ours == theirs or (ours != ours and theirs != theirs), where  # both NaN


# --- a step against a plain loop -----------------------------------------------------------------


class PlainLoop:
    """The same training written as a tutorial would: no scaler, no fused or foreach kernels."""

    def __init__(self, cfg, train) -> None:
        self.cfg, self.train = cfg, train
        self.model = build_model(cfg, len(train.classes))
        self.weight = class_weights(train.split.labels, len(train.classes))
        if cfg.BALANCE != "weights":
            self.weight = torch.ones(len(train.classes))
        named = list(self.model.named_parameters())
        groups = [
            {
                "params": [
                    p for n, p in named if n.startswith(parts) and (p.ndim > 1) == (decay > 0)
                ],
                "weight_decay": decay,
                "lr": rate,
            }
            for parts, rate in (
                ("head.reduction", cfg.LR_HEAD),
                (("backbone", "head.output"), cfg.LR_BACKBONE),  # a probe has learnt already
            )
            for decay in (cfg.WEIGHT_DECAY, 0.0)
        ]
        self.bases = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, foreach=False, fused=False)
        start = {k: v.clone() for k, v in self.model.state_dict().items()}
        self.states: list[dict] = [start]  # the parameters before, and after every step
        self.decays: list[float] = [0.0]

    def thaw(self, epoch: int) -> None:
        first, everything = self.cfg.THAW_EPOCHS
        starts = {"head": 0, "backbone.conv2": first, "backbone.bn2": first}
        for name, parameter in self.model.named_parameters():
            start = next((s for n, s in starts.items() if name.startswith(n)), everything)
            parameter.requires_grad_(epoch >= start)
        self.model.train()
        backbone = self.model.backbone
        trains = self.cfg.BACKBONE_BATCHNORM == "train"
        backbone.bn1.train(trains and epoch >= everything)
        backbone.bn2.train(trains and epoch >= first)
        backbone.drop.train(epoch >= first)

    def step(self, batch: Batch, epoch: int, step: int, steps: int) -> None:
        cfg, first, count = self.cfg, step * self.cfg.BATCH_SIZE, len(batch.labels)
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            group["lr"] = learning_rate(cfg, base, epoch, step, steps)
        plan = draw_augmentation(cfg, draw_uniforms(cfg.SEED, epoch, first, count, AUGMENT_DRAWS))
        spec = self.model.spec
        images = apply_augmentation(batch.images, plan, cfg.IMG_SIZE, spec.mean, spec.std)
        targets = F.one_hot(batch.labels, 3).float()
        if epoch < cfg.EPOCHS - cfg.MIX_OFF_EPOCHS:
            mixing = draw_mixing(cfg, epoch, first, count)
            images, targets = mix_images(images, mixing), mix_targets(targets, mixing)
        torch.manual_seed(step_seed(cfg.SEED, epoch, step))
        scores = self.model(images)
        costs = torch.stack(
            [
                F.cross_entropy(
                    scores, torch.full((count,), c), reduction="none",
                    label_smoothing=cfg.LABEL_SMOOTHING,
                )
                for c in range(3)
            ], 1,
        )  # fmt: skip
        loss = (targets * self.weight * costs).sum() / count
        self.optimizer.zero_grad()
        loss.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in parameters))
        for parameter in parameters:
            parameter.grad.mul_(min(1.0, cfg.GRAD_CLIP / norm))
        self.optimizer.step()
        self.states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        n = epoch * steps + step
        self.decays.append(min(cfg.EMA_DECAY, (1 + n) / (10 + n)))

    def average(self) -> dict[str, torch.Tensor]:
        """The weight average in closed form: a weighted sum over all past weights."""
        result = {k: torch.zeros_like(v).double() for k, v in self.states[0].items()}
        for i, state in enumerate(self.states):
            share = (1 - self.decays[i]) * math.prod(self.decays[i + 1 :])
            for k, v in state.items():
                result[k] += share * v.double()
        return result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"BACKBONE_BATCHNORM": "train", "GRAD_CLIP": 0.05, "BALANCE": "none"},
        {"HEAD": "linear", "MIX_PROB": 0.0, "LABEL_SMOOTHING": 0.0, "WEIGHT_DECAY": 0.1},
        {"BALANCE": "sampler", "THAW_EPOCHS": (0, 0), "EMA_DECAY": 0.3},
    ],
)
def test_training_is_that_of_a_plain_loop(tmp_path, settings):
    """Eighteen steps over both thaws, and over the end of mixing."""
    cfg = small_config(tmp_path, EPOCHS=3, **settings)
    train = memory_datasets()["train"]
    train.split.labels[:5] = 0  # uneven, so that the class weights matter
    trainer, plain = Trainer(cfg, build_model(cfg, 3), train), PlainLoop(cfg, train)
    steps = steps_per_epoch(len(train), cfg.BATCH_SIZE)
    for epoch in range(cfg.EPOCHS):
        begin_epoch(trainer, epoch)
        plain.thaw(epoch)
        for step, batch in enumerate(batches(cfg, train, epoch)):
            train_step(trainer, batch, epoch, step, steps)
            plain.step(batch, epoch, step, steps)
        expected = plain.model.state_dict()
        for name, tensor in trainer.model.state_dict().items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5, msg=name)
    average = plain.average()
    for name, tensor in trainer.average.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor.double(), average[name], rtol=1e-3, atol=2e-5)
        else:
            assert torch.equal(tensor, trainer.model.state_dict()[name])  # counters are copied


def test_the_sums_of_an_epoch(tmp_path):
    """Loss and right answers are those of the batches as they were trained on."""
    cfg = small_config(tmp_path, MIX_PROB=0.0, DROPOUT=0.0, HEAD="linear", LR_HEAD=1e-12)
    train = memory_datasets()["train"]
    trainer = Trainer(cfg, build_model(cfg, 3), train)
    begin_epoch(trainer, 0)
    losses, right = [], 0
    for step, batch in enumerate(batches(cfg, train, 0)):
        images, targets = engine.augment_batch(trainer, batch, 0, step)
        scores = trainer.model(images)
        losses.append(trainer.loss(scores, targets).item())
        right += int((scores.argmax(1) == batch.labels).sum())
        train_step(trainer, batch, 0, step, 6)
    assert trainer.meter.sums.tolist() == pytest.approx([4 * sum(losses), right, 24, 0], rel=1e-5)
    assert trainer.meter.sums.dtype == torch.float64


@pytest.mark.parametrize("parts", [2, 4])
@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path, parts, amp):
    """Without dropout, and with a head without BatchNorm, which sees the parts only."""
    gradients, sums = [], []
    for accumulate in (1, parts):
        cfg = small_config(
            tmp_path,
            BATCH_SIZE=8,
            ACCUMULATE=accumulate,
            HEAD="linear",
            THAW_EPOCHS=(0, 0),
            AMP=amp,
        )
        train = memory_datasets()["train"]
        trainer = Trainer(cfg, build_model(cfg, 3), train)
        begin_epoch(trainer, 0)
        trainer.model.backbone.drop.p = 0.0
        images, targets = engine.augment_batch(trainer, batches(cfg, train, 0)[0], 0, 0)
        sums.append([float(value) for value in engine.backward(trainer, images, targets)])
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    tolerance = {"rtol": 1e-4, "atol": 1e-6} if amp == "off" else {"rtol": 0.05, "atol": 0.01}
    torch.testing.assert_close(gradients[1], gradients[0], **tolerance)
    assert sums[1] == pytest.approx(sums[0], rel=1e-5 if amp == "off" else 1e-2)


def test_running_out_of_memory_names_the_remedy(tmp_path, monkeypatch):
    def exhausted(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "train_step", exhausted)
    with pytest.raises(MemoryError, match=r"ACCUMULATE=4 .*BATCH_SIZE=4"):
        run(small_config(tmp_path, BATCH_SIZE=8, ACCUMULATE=2), tmp_path)


# --- steps that are not finite -------------------------------------------------------------------


class Poison:
    """A forward hook that makes the scores NaN at certain training steps."""

    def __init__(self, model: nn.Module, steps: set[int]) -> None:
        self.steps, self.calls = steps, 0
        model.head.output.register_forward_hook(self)

    def __call__(self, module, inputs, output):
        if not torch.is_grad_enabled():
            return None
        self.calls += 1
        return output * float("nan") if self.calls - 1 in self.steps else None


def state_of(trainer) -> dict:
    return copy_of(
        {
            "model": trainer.model.state_dict(),
            "ema": trainer.average.state_dict(),
            "optimizer": trainer.optimizer.state_dict()["state"],
            "scale": trainer.scaler.get_scale(),
        }
    )


@pytest.mark.parametrize("amp", ["off", "bf16"])
@pytest.mark.parametrize("kind", ["scores", "gradient", "norm"])
def test_a_step_that_is_not_finite_moves_nothing(tmp_path, amp, kind):
    """NaN scores; one infinite gradient; finite gradients whose norm overflows."""
    cfg = small_config(tmp_path, BACKBONE_BATCHNORM="train", THAW_EPOCHS=(0, 0), AMP=amp)
    train = memory_datasets()["train"]
    trainer = Trainer(cfg, build_model(cfg, 3), train)
    begin_epoch(trainer, 0)
    if kind == "scores":
        Poison(trainer.model, {3})
    for step, batch in enumerate(batches(cfg, train, 0)):
        before, sums = state_of(trainer), trainer.meter.sums.clone()
        handle = None
        if kind != "scores" and step == 3:
            value = {"gradient": math.inf, "norm": 1e38}[kind]
            weight = trainer.model.backbone.conv1.weight
            handle = weight.register_hook(lambda g, v=value: g.index_fill(0, torch.tensor(1), v))
        train_step(trainer, batch, 0, step, 6)
        if handle:
            handle.remove()
        if step == 3:
            assert_same(state_of(trainer), before)
            assert (trainer.meter.sums - sums).tolist() == [0, 0, 0, 1]
        else:
            assert not torch.equal(
                trainer.model.head.output.weight, before["model"]["head.output.weight"]
            )
    assert trainer.meter.finite[:6].tolist() == [True, True, True, False, True, True]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_step_on_cuda_never_waits_for_the_device(tmp_path, amp):
    cfg = small_config(
        tmp_path, DEVICE="cuda", AMP=amp, THAW_EPOCHS=(0, 0), BACKBONE_BATCHNORM="train"
    )
    train = memory_datasets()["train"]
    trainer = Trainer(cfg, build_model(cfg, 3), train)
    begin_epoch(trainer, 0)
    moved = [Batch(*(t.cuda() for t in batch)) for batch in batches(cfg, train, 0)]
    train_step(trainer, moved[0], 0, 0, 6)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 6):
            train_step(trainer, moved[step], 0, step, 6)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    images, skipped = trainer.meter.sums[2:].tolist()  # a float16 run may begin with steps skipped
    assert images + 4 * skipped == 24


def test_what_follows_a_skipped_step_is_as_if_it_had_not_been(tmp_path):
    cfg = small_config(tmp_path, BACKBONE_BATCHNORM="train", THAW_EPOCHS=(0, 0))
    train, states = memory_datasets()["train"], []
    for poisoned in (True, False):
        trainer = Trainer(cfg, build_model(cfg, 3), train)
        begin_epoch(trainer, 0)
        if poisoned:
            Poison(trainer.model, {2})
        for step, batch in enumerate(batches(cfg, train, 0)):
            if poisoned or step != 2:
                train_step(trainer, batch, 0, step, 6)
        states.append(state_of(trainer))
    assert_same(*states)


def test_many_skipped_steps_do_not_wear_the_scale_down(tmp_path):
    """A scale that halves at each would, after some hundred, make every gradient vanish."""
    cfg = small_config(tmp_path, THAW_EPOCHS=(0, 0))
    train = memory_datasets()["train"]
    trainer = Trainer(cfg, build_model(cfg, 3), train)
    begin_epoch(trainer, 0)
    Poison(trainer.model, set(range(200)))
    batch = batches(cfg, train, 0)[0]
    for _ in range(200):
        train_step(trainer, batch, 0, 0, 6)
    before = trainer.model.head.output.weight.clone()
    assert trainer.scaler.get_scale() == 1
    train_step(trainer, batch, 0, 0, 6)
    assert not torch.equal(trainer.model.head.output.weight, before)


def test_skipped_steps_are_reported_with_their_images(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("emotion_toolbox.device.READ_EVERY", 4)
    cfg = small_config(tmp_path, EPOCHS=2)
    datasets, model = memory_datasets(), build_model(cfg, 3)
    Poison(model, {1, 6 + 5})
    result = fit(cfg, model, datasets, tmp_path / "checkpoints")
    said = capsys.readouterr().out
    for epoch, step in ((0, 1), (1, 5)):
        order = order_of(cfg, datasets["train"], epoch)
        files = [datasets["train"].split.files[i] for i in order[4 * step : 4 * step + 4]]
        assert f"epoch {epoch + 1}, step {step + 1}: " in said and ", ".join(files) in said
    assert said.count("the step is skipped") == 2
    assert result.history["skipped_steps"][1:].tolist() == [1, 1]
    assert result.finished == "all epochs done"


@pytest.mark.parametrize("read_every", [1, 4, 20])
def test_too_many_in_a_row_stop_the_run(tmp_path, read_every, monkeypatch):
    """Seven in a row that reach over the end of an epoch; four in a row did not count."""
    monkeypatch.setattr("emotion_toolbox.device.READ_EVERY", read_every)
    cfg = small_config(tmp_path, MAX_BAD_STEPS=7)
    model = build_model(cfg, 3)
    Poison(model, {1, 2, 3, 4, *range(9, 99)})
    with pytest.raises(FloatingPointError, match=r"epoch 3, step 4: .*7 such steps in a row"):
        fit(cfg, model, memory_datasets(), tmp_path / "checkpoints")
    newest = load_verified(list_checkpoints(tmp_path / "checkpoints")[0])
    assert (newest["epoch"], newest["step"], newest["bad_streak"]) == (2, 0, 3)
    assert all(torch.isfinite(t).all() for t in newest["model"].values())


# --- whole runs ----------------------------------------------------------------------------------


def run(cfg, folder: Path, datasets=None):
    """`fit` with a new model; its result and the model."""
    model = build_model(cfg, 3)
    return fit(cfg, model, datasets or memory_datasets(), folder / "checkpoints"), model


def newest_state(folder: Path) -> dict:
    """The newest checkpoint without what no two runs share."""
    saved = load_verified(list_checkpoints(folder / "checkpoints")[0])
    del saved["epoch_seconds"]
    saved["history"] = [
        {k: v for k, v in row.items() if k not in TIMINGS} for row in saved["history"]
    ]
    for name in NEUTRAL:
        del saved["config"][name]
    return saved


def history_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "history.csv").drop(columns=TIMINGS)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Two run folders end in the same state, history and best model, bit for bit."""
    assert_same(newest_state(ours), newest_state(theirs))
    pd.testing.assert_frame_equal(history_of(ours), history_of(theirs), check_exact=True)
    best = [sorted(f.glob("checkpoints/best-*.pt"))[-1] for f in (ours, theirs)]
    assert best[0].name == best[1].name and best[0].read_bytes() == best[1].read_bytes()


def test_a_run_from_end_to_end(tmp_path, capsys):
    cfg = small_config(tmp_path, MONITOR="loss")
    result, model = run(cfg, tmp_path)
    said = capsys.readouterr().out
    assert len(result.history) == 5 and result.finished == "all epochs done"
    for epoch in range(1, 5):
        assert f"epoch {epoch}/4: loss" in said
    assert all(len(line) <= 80 for line in said.splitlines() if line.startswith("epoch "))
    found = history_of(tmp_path)
    kept = pd.DataFrame(result.history).drop(columns=TIMINGS)
    pd.testing.assert_frame_equal(found, kept, check_exact=True)  # CSV loses no digit
    scores = found[["val_loss", "val_ema_loss"]].min(axis=1)
    assert result.best_epoch == int(found["epoch"][scores.idxmin()])
    assert result.best_score == -scores.min()
    column = "val_loss" if result.best_source == "raw" else "val_ema_loss"
    row = found.set_index("epoch").loc[result.best_epoch]
    asked = {"size": cfg.IMG_SIZE, "batch_size": cfg.BATCH_SIZE}
    again = predict(model, memory_datasets()["val"], **asked)
    assert again.loss == row[column] == scores.min()  # the model holds the best weights
    clean = np.linspace(0, 23, 12).round().astype(int)
    train = predict(model, memory_datasets()["train"], positions=clean, **asked)
    assert train.accuracy == row["train_clean_accuracy"]
    assert row["gap"] == train.accuracy - again.accuracy
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.name for p in tmp_path.iterdir() if p.is_file()} == {"history.csv", "config.json"}
    assert make_config(json.loads((tmp_path / "config.json").read_text())) == cfg
    states = [path.name[:19] for path in list_checkpoints(tmp_path / "checkpoints")]
    assert states == ["epoch004-step000000", "epoch003-step000000"]


def test_a_complete_run_is_loaded_and_not_trained_again(tmp_path, monkeypatch, capsys):
    cfg = small_config(tmp_path)
    first, trained = run(cfg, tmp_path)
    files = {p: p.read_bytes() for p in tmp_path.rglob("*.pt")}
    monkeypatch.setattr(engine, "train_step", None)  # would raise
    capsys.readouterr()
    again, loaded = run(cfg, tmp_path)
    assert "this run is complete (all epochs done)" in capsys.readouterr().out
    assert_same(loaded.state_dict(), trained.state_dict())
    pd.testing.assert_frame_equal(again.history, first.history)
    assert dataclasses.replace(again, history=None) == dataclasses.replace(first, history=None)
    assert files == {p: p.read_bytes() for p in tmp_path.rglob("*.pt")}


@pytest.mark.parametrize(
    "settings",
    [
        {"EPOCHS": 1},
        {"EPOCHS": 1, "THAW_EPOCHS": None, "WARMUP_EPOCHS": 0, "EMA_DECAY": 0.0},
        {"DEBUG": True, "EPOCHS": 1},
        {"EPOCHS": 2, "HEAD": "linear", "BALANCE": "sampler", "AMP": "bf16"},
        {"EPOCHS": 2, "AMP": "auto", "DETERMINISTIC": True},
        {"EPOCHS": 2, "AMP": "auto", "BATCH_SIZE": 24},
    ],
)
def test_unusual_settings(tmp_path, settings):
    cfg = small_config(tmp_path, **settings)
    try:
        result, model = run(cfg, tmp_path)
    finally:
        torch.use_deterministic_algorithms(False)
    assert result.history["epoch"].tolist() == list(range(cfg.EPOCHS + 1))
    assert result.amp in ("off", "bf16") and result.images_per_second > 0
    if not cfg.EMA_DECAY:
        assert result.best_source == "raw" and "val_ema_loss" not in result.history


def test_the_better_of_raw_and_averaged_weights_is_kept(tmp_path, monkeypatch):
    """Whichever scores better in an epoch, the file holds that one."""
    scores = iter(
        [0.0, 0.0, 0.3, 0.5, 0.6, 0.4, 0.6, 0.6, 0.1, 0.7]
    )  # raw, averaged, from the start on
    original, given = engine.predict, {}

    def scored(model, dataset, **options):
        found = original(model, dataset, **options)
        if "positions" not in options:
            given[id(found)] = found, next(scores)
        return found

    monkeypatch.setattr(engine, "predict", scored)
    monkeypatch.setattr(Predictions, "score", lambda found, name: given[id(found)][1])
    best = []
    end_epoch = engine.end_epoch

    def noting(trainer, val, steps, progress, run_keeper):
        models = {"raw": copy_of(trainer.model.state_dict())}
        models["ema"] = copy_of(trainer.average.state_dict())
        end_epoch(trainer, val, steps, progress, run_keeper)
        best.append((progress.best_epoch, progress.best_source, progress.best_score))
        if progress.best_epoch == progress.epoch - 1:
            kept = load_verified(tmp_path / "checkpoints" / progress.best_file)
            assert_same(dict(kept["model"]), dict(models[progress.best_source]))

    monkeypatch.setattr(engine, "end_epoch", noting)
    run(small_config(tmp_path), tmp_path)
    assert [b[::2] for b in best] == [(0, 0.5), (1, 0.6), best[2][::2], (3, 0.7)]
    assert [b[1] for b in best[:2]] == ["ema", "raw"] and best[3][1] == "ema"
    assert best[2][2] == 0.6  # of equal scores the lower loss decides


def test_of_equal_scores_the_lower_validation_loss_decides(tmp_path, monkeypatch):
    """As where six validation images are all right from the first epoch on."""
    monkeypatch.setattr(Predictions, "score", lambda found, name: 1.0)
    result, _ = run(small_config(tmp_path, EMA_DECAY=0.0), tmp_path)
    losses = result.history["val_loss"]
    assert result.best_epoch == int(result.history["epoch"][losses.idxmin()]) > 1


def scripted(monkeypatch, scores: list[float]) -> None:
    """Let validation find these scores, one an epoch, and 0 at the start."""
    original, now = engine.validate_epoch, [0.0]

    def validate(trainer, val, progress, run_keeper):
        now[0] = scores[progress.epoch] if progress.history else 0.0
        return original(trainer, val, progress, run_keeper)

    monkeypatch.setattr(engine, "validate_epoch", validate)
    monkeypatch.setattr(Predictions, "score", lambda found, name: now[0])


def test_patience_counts_only_once_everything_trains(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.9, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])
    cfg = small_config(tmp_path, EPOCHS=8, THAW_EPOCHS=(2, 4), PATIENCE=2)
    result, _ = run(cfg, tmp_path)
    assert len(result.history) == 7  # the start; epochs 0 to 3 do not count, 4 and 5 do
    assert result.finished == "stopped early: nothing better for 2 epochs"
    assert (result.best_epoch, result.best_score) == (1, 0.9)
    again, _ = run(cfg, tmp_path)
    assert len(again.history) == 7 and again.finished == result.finished


def test_a_better_epoch_starts_the_patience_anew(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.1, 0.05, 0.2, 0.1, 0.3, 0.2, 0.2, 0.2])
    cfg = small_config(tmp_path, EPOCHS=8, THAW_EPOCHS=(0, 0), PATIENCE=2)
    result, _ = run(cfg, tmp_path)
    assert len(result.history) == 8 and result.best_epoch == 5


def test_a_score_that_is_no_number_is_never_the_best(tmp_path, monkeypatch):
    scripted(monkeypatch, [-math.inf, 0.2, -math.inf, 0.1])
    result, _ = run(small_config(tmp_path), tmp_path)
    assert (result.best_epoch, result.best_score) == (2, 0.2)


def test_answers_that_are_no_numbers_have_no_score(tmp_path):
    cfg, datasets = small_config(tmp_path), memory_datasets()
    model = build_model(cfg, 3)
    asked = {"size": cfg.IMG_SIZE, "batch_size": cfg.BATCH_SIZE}
    assert predict(model, datasets["val"], **asked).score(cfg.MONITOR) > 0
    model.head.output.bias.data[1] = math.nan
    found = predict(model, datasets["val"], **asked)
    assert found.score(cfg.MONITOR) == -math.inf


@pytest.mark.parametrize("monitor", ["macro_f1", "accuracy", "loss"])
def test_the_monitored_figure(tmp_path, monitor):
    cfg = small_config(tmp_path, MONITOR=monitor, EMA_DECAY=0.0)
    result, _ = run(cfg, tmp_path)
    column = result.history[f"val_{monitor}"]
    best = column.min() if monitor == "loss" else column.max()
    assert result.best_score == (-best if monitor == "loss" else best)
    assert column[result.best_epoch] == best  # numbered from the start, 0, as the rows are


def test_progress_within_an_epoch_is_not_lost_in_the_figures(tmp_path):
    """The training loss of an epoch that was interrupted is that of all its steps."""
    whole, _ = run(small_config(tmp_path), tmp_path / "whole")
    cfg = small_config(tmp_path, CHECKPOINT_EVERY=0.0)
    for step in (2, 9, 15, 23):
        stop_at_step(cfg, tmp_path / "parts", step)
    parts, _ = run(cfg, tmp_path / "parts")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    for column in ("train_loss", "train_accuracy"):
        assert parts.history[column][1:].tolist() == whole.history[column][1:].tolist()
    seconds = parts.history["seconds"][1:]
    assert (seconds > 0).all() and parts.seconds == pytest.approx(seconds.sum())


# --- stopping and resuming -----------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process where a test cannot afford it."""


def stop_at_step(cfg, folder: Path, position: int, datasets=None) -> None:
    """Train until the step at `position` (over all epochs) is about to begin."""
    original = engine.train_step

    def stopping(trainer, batch, epoch, step, steps):
        if epoch * steps + step == position:
            raise Killed
        original(trainer, batch, epoch, step, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_step", stopping)
        with pytest.raises(Killed):
            run(cfg, folder, datasets)


@pytest.mark.parametrize(
    ("every", "steps", "places"),
    [
        (600.0, None, [(0, 0), (1, 0), (2, 0), (3, 0)]),
        (
            0.0,
            None,
            [(0, 0), *((e, s) for e in (0, 1, 2) for s in range(1, 7)), (1, 0), (2, 0), (3, 0)],
        ),
        (600.0, 4, [(0, 0), (0, 4), (1, 0), (1, 4), (2, 0), (2, 4), (3, 0)]),
        (600.0, 9, [(0, 0), (1, 0), (2, 0), (3, 0)]),
    ],
)
def test_checkpoints_are_written_by_time_and_by_steps(tmp_path, monkeypatch, every, steps, places):
    found = []
    original = keeper.save_checkpoint

    def noting(folder, payload, keep):
        found.append((payload["epoch"], payload["step"]))
        return original(folder, payload, keep)

    monkeypatch.setattr(keeper, "save_checkpoint", noting)
    run(small_config(tmp_path, EPOCHS=3, CHECKPOINT_EVERY=every, CHECKPOINT_STEPS=steps), tmp_path)
    assert sorted(found) == sorted(places)


def test_the_best_model_is_not_overwritten_by_a_worse_one_after_a_stop(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.2, 0.9, 0.3, 0.4])
    cfg = small_config(tmp_path)
    stop_at_step(cfg, tmp_path, 14)
    result, _ = run(cfg, tmp_path)
    assert (result.best_epoch, result.best_score) == (2, 0.9)
    assert [p.name[:13] for p in (tmp_path / "checkpoints").glob("best-*")] == ["best-epoch001"]


@pytest.fixture
def interrupted(tmp_path):
    """A run that stopped in its second epoch, and its configuration."""
    cfg = small_config(tmp_path, RUN_NAME="mine")
    stop_at_step(cfg, tmp_path, 7)
    return cfg, tmp_path


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("EPOCHS", 9), ("SEED", 1), ("LR_HEAD", 0.5), ("THAW_EPOCHS", (1, 3)), ("BATCH_SIZE", 6),
        ("IMG_SIZE", 34), ("DROPOUT", 0.2), ("MONITOR", "loss"), ("PATIENCE", 2), ("AMP", "bf16"),
        ("EMA_DECAY", 0.0), ("HEAD", "linear"), ("CROP_SCALE", (0.5, 1.0)), ("DEBUG", True),
        ("INIT_FROM", "elsewhere.pt"), ("ACCUMULATE", 2),
    ],
)  # fmt: skip
def test_another_setting_is_refused_by_name(interrupted, name, value):
    cfg, folder = interrupted
    files = [*folder.rglob("*.pt"), folder / "config.json"]
    before = {p: p.read_bytes() for p in files}
    changed = dataclasses.replace(cfg, **{name: value})
    with pytest.raises(ConfigError) as caught:
        run(changed, folder)
    shown = str(caught.value)
    assert f"  {name}: {getattr(cfg, name)!r} before, {value!r} now" in shown
    assert shown.count(" before, ") == 1 and "RUN_NAME" in shown and "INIT_FROM" in shown
    assert before == {p: p.read_bytes() for p in files}


def test_a_folder_with_an_automatic_name_is_to_be_made_again(tmp_path):
    """Another RUN_NAME would be no help: these settings have a folder of their own."""
    cfg = small_config(tmp_path)
    stop_at_step(cfg, tmp_path, 7)
    with pytest.raises(ConfigError, match="DROPOUT: 0.1 before.*\n.*folder again") as caught:
        run(dataclasses.replace(cfg, DROPOUT=0.2), tmp_path)
    assert "another RUN_NAME" not in str(caught.value)


@pytest.mark.parametrize("mixture", ["other settings", "another folder", "a lost folder"])
def test_a_model_of_another_run_is_not_trained_on(tmp_path, mixture):
    cfg, first = small_config(tmp_path), tmp_path / "first"
    _, model = run(cfg, first)
    weights = {name: t.clone() for name, t in model.state_dict().items()}
    fit(cfg, model, memory_datasets(), first / "checkpoints")  # its own run: read back
    if mixture == "other settings":
        model, cfg = build_model(cfg, 3), dataclasses.replace(cfg, HEAD="linear")
        weights = {name: t.clone() for name, t in model.state_dict().items()}
    if mixture == "a lost folder":
        shutil.rmtree(first)
    folder = (first if mixture == "a lost folder" else tmp_path / "second") / "checkpoints"
    with pytest.raises(
        ConfigError, match="^this model was made for other settings.*builds it"
    ) as e:
        fit(cfg, model, memory_datasets(), folder)
    assert "\n" not in str(e.value) and not list_checkpoints(folder)
    assert all(torch.equal(t, weights[name]) for name, t in model.state_dict().items())


def test_every_changed_setting_is_named(interrupted):
    cfg, folder = interrupted
    with pytest.raises(ConfigError) as caught:
        run(dataclasses.replace(cfg, EPOCHS=5, LR_HEAD=0.2, BOOTSTRAP=500), folder)
    assert str(caught.value).count(" before, ") == 2
    assert "EPOCHS: 4 before, 5 now" in str(caught.value)


def test_settings_that_shape_nothing_may_change(interrupted, tmp_path):
    cfg, folder = interrupted
    whole = tmp_path / "whole"
    run(cfg, whole)
    neutral = {
        "RUN_NAME": "other", "OUTPUT_ROOT": "elsewhere", "CACHE": False, "CACHE_DIR": "elsewhere",
        "NUM_WORKERS": 3, "BASELINES": (), "BOOTSTRAP": 999,
        "CHECKPOINT_EVERY": 0.0, "CHECKPOINT_KEEP": 5, "ON_SAVE_ERROR": "continue",
        "NEAR_DUPLICATE_BITS": None, "DATASET": "auto", "DATA_ROOT": "elsewhere",
        "IMAGES_ROOT": "elsewhere", "ALLOW_DUPLICATES": True, "MAX_BAD_FRACTION": 0.5,
        "MAX_BAD_STEPS": 3, "CHECKPOINT_STEPS": 2, "TTA": False,
    }  # fmt: skip
    assert set(neutral) == NEUTRAL
    run(dataclasses.replace(cfg, **neutral), folder)
    assert_same_run(folder, whole)


def test_other_data_are_refused(interrupted):
    cfg, folder = interrupted

    def change(split: str, **fields):
        datasets = memory_datasets()
        old = datasets[split].split
        changes = {name: value(getattr(old, name)) for name, value in fields.items()}
        datasets[split].split = dataclasses.replace(old, **changes)
        return datasets

    def relabel(labels):
        return np.roll(labels, 1)

    def rename(files):
        return [*files[:-1], "other.png"]

    for split in ("train", "val"):
        for fields in ({"labels": relabel}, {"files": rename}):
            with pytest.raises(ConfigError, match=rf"{split}\.csv have changed"):
                run(cfg, folder, change(split, **fields))
    reordered = memory_datasets()
    for dataset in reordered.values():
        dataset.classes = dataset.classes[::-1]
    with pytest.raises(ConfigError, match="classes: "):
        run(cfg, folder, reordered)
    run(cfg, folder, change("test", files=rename))  # no part of training


def test_a_damaged_checkpoint_costs_some_steps_and_changes_nothing(tmp_path, capsys):
    run(small_config(tmp_path), tmp_path / "whole")
    cfg = small_config(tmp_path, CHECKPOINT_EVERY=0.0)
    stop_at_step(cfg, tmp_path / "hit", 15)
    newest = list_checkpoints(tmp_path / "hit/checkpoints")[0]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    capsys.readouterr()
    run(cfg, tmp_path / "hit")
    said = capsys.readouterr().out
    assert f"{newest} is damaged" in said and "resuming at epoch 3, step 3" in said
    assert_same_run(tmp_path / "hit", tmp_path / "whole")


def test_a_run_whose_checkpoints_are_all_damaged_never_starts_anew(interrupted):
    cfg, folder = interrupted
    for path in list_checkpoints(folder / "checkpoints"):
        path.write_bytes(b"damaged")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="delete it to start anew"):
            run(cfg, folder)


def test_a_new_run_has_a_checkpoint_before_its_first_step(tmp_path):
    """So that a measured precision is kept, and a full disk shows at once."""
    cfg = small_config(tmp_path, AMP="auto")
    stop_at_step(cfg, tmp_path, 0)
    saved = load_verified(list_checkpoints(tmp_path / "checkpoints")[0])
    assert (saved["epoch"], saved["step"]) == (0, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "choose_amp", None)  # would raise
        result, _ = run(cfg, tmp_path)
    assert result.amp == saved["amp"]


def test_files_of_a_killed_process_are_cleared_away(interrupted):
    cfg, folder = interrupted
    names = ["checkpoints/.epoch001.pt.77.tmp", ".history.csv.77.tmp", ".config.json.8.tmp"]
    leftovers = [folder / name for name in names]
    other = folder / ".notes.tmp"
    for path in (*leftovers, other):
        path.write_text("half")
    run(cfg, folder)
    assert not any(path.exists() for path in leftovers) and other.exists()


def test_a_model_that_was_trained_before_can_train_again(tmp_path):
    """It comes back frozen from the first run; that it is meant must be said."""
    cfg = small_config(tmp_path, AMP="auto")
    _, model = run(cfg, tmp_path / "first")
    model.made_for = None
    fit(cfg, model, memory_datasets(), tmp_path / "second/checkpoints")


# --- one process at a time -----------------------------------------------------------------------


def test_a_second_process_is_kept_out_and_a_dead_one_is_not_waited_for(tmp_path):
    cfg, folder = small_config(tmp_path, EPOCHS=1), tmp_path / "checkpoints"
    folder.mkdir()
    code = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]);"
        "lock.acquire(); print('held', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(folder / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(ConfigError, match=r"another process .*RUN_NAME"):
                run(cfg, tmp_path)
            assert not list_checkpoints(folder)
        finally:
            other.kill()
    result, _ = run(cfg, tmp_path)
    assert result.finished


def test_the_lock_is_released_however_a_run_ends(tmp_path):
    cfg = small_config(tmp_path)
    for _ in range(2):
        stop_at_step(cfg, tmp_path, 3)
    run(cfg, tmp_path)


def test_a_run_in_a_thread_cannot_be_interrupted_but_trains(tmp_path):
    """Signals reach the main thread only; elsewhere `fit` must not try to catch them."""
    cfg, results = small_config(tmp_path, EPOCHS=1), []
    thread = threading.Thread(target=lambda: results.append(run(cfg, tmp_path)))
    thread.start()
    thread.join()
    assert results[0][0].finished == "all epochs done"


# --- a full disk ---------------------------------------------------------------------------------


def fill_disk(monkeypatch, when) -> list[str]:
    """Let writing fail with ENOSPC where `when(file name)` says so; the names that failed."""
    original, failed = files.write_atomically, []

    def write(path: Path, content) -> None:
        if when(path.name):
            failed.append(path.name)
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, content)

    monkeypatch.setattr(files, "write_atomically", write)
    monkeypatch.setattr(keeper, "write_atomically", write)
    return failed


@pytest.mark.parametrize("kind", ["epoch002", "best-epoch001"])
def test_a_full_disk_stops_the_run_and_loses_nothing(tmp_path, monkeypatch, kind):
    scripted(monkeypatch, [0.1, 0.2, 0.3, 0.4])
    run(small_config(tmp_path), tmp_path / "whole")
    cfg = small_config(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        full = []
        fill_disk(patch, lambda name: name.startswith(kind) and (len(full) or full.append(1) or 1))
        with pytest.raises(
            CheckpointError, match=r"could not be written to .*MB free.*OUTPUT_ROOT"
        ):
            run(cfg, tmp_path / "full")
    run(cfg, tmp_path / "full")  # room has been made
    assert_same_run(tmp_path / "full", tmp_path / "whole")


def test_a_table_that_cannot_be_written_costs_no_checkpoint(tmp_path, capsys):
    """A spreadsheet may hold it open; a folder of that name is as much in the way."""
    (tmp_path / "history.csv").mkdir()
    result, _ = run(small_config(tmp_path), tmp_path)
    assert len(result.history) == 5
    saved = load_verified(list_checkpoints(tmp_path / "checkpoints")[0])
    assert (saved["epoch"], len(saved["history"])) == (4, 5)
    assert f"WARNING: {tmp_path / 'history.csv'} could not be written" in capsys.readouterr().out


def test_a_full_disk_shows_before_the_first_step(tmp_path, monkeypatch):
    fill_disk(monkeypatch, lambda name: True)
    monkeypatch.setattr(engine, "train_step", None)  # would raise
    with pytest.raises(CheckpointError, match="could not be written"):
        run(small_config(tmp_path), tmp_path)


def test_training_goes_on_without_checkpoints_where_that_is_wanted(tmp_path, monkeypatch, capsys):
    """The disk is full during the second and third epochs, for every kind of file."""
    scripted(monkeypatch, [0.5, 0.9, 0.7, 0.8])
    cfg = small_config(tmp_path, ON_SAVE_ERROR="continue", CHECKPOINT_EVERY=0.0)
    epochs = []
    original = engine.begin_epoch
    monkeypatch.setattr(engine, "begin_epoch", lambda t, e: (epochs.append(e), original(t, e)))
    failed = fill_disk(monkeypatch, lambda name: epochs and epochs[-1] in (1, 2))
    result, model = run(cfg, tmp_path)
    assert len(result.history) == 5 and len(history_of(tmp_path)) == 5
    assert {name.split("-")[0] for name in failed} >= {"epoch001", "epoch002", "best"}
    assert "Training goes on, as ON_SAVE_ERROR says" in capsys.readouterr().out
    # the best of the second epoch could not be kept; what is reported is what the file holds
    assert (result.best_epoch, result.best_score) == (4, 0.8)
    kept = load_verified(max((tmp_path / "checkpoints").glob("best-*.pt")))
    assert kept["epoch"] == 3
    assert_same(dict(model.state_dict()), dict(kept["model"]))


def test_a_best_model_that_could_not_be_kept_is_not_claimed(tmp_path, monkeypatch):
    scripted(monkeypatch, [0.5, 0.9, 0.3, 0.2])
    fill_disk(monkeypatch, lambda name: name.startswith("best-epoch001"))
    result, model = run(small_config(tmp_path, ON_SAVE_ERROR="continue"), tmp_path)
    assert (result.best_epoch, result.best_score) == (1, 0.5)
    kept = load_verified(next((tmp_path / "checkpoints").glob("best-epoch000-*.pt")))
    assert_same(dict(model.state_dict()), dict(kept["model"]))


def test_a_run_that_kept_no_model_at_all_says_so(tmp_path, monkeypatch):
    fill_disk(monkeypatch, lambda name: True)
    with pytest.raises(CheckpointError, match="no best model could be kept"):
        run(small_config(tmp_path, ON_SAVE_ERROR="continue", EPOCHS=1), tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 kB, where this process may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount, unmount = shutil.which("mount"), shutil.which("umount")
    if not (mount and unmount) or os.name != "posix" or os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)])
    if made.returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run([unmount, str(disk)], check=True)


def test_a_disk_that_is_really_full(tmp_path, small_disk):
    run(small_config(tmp_path), tmp_path / "whole")
    cfg, ballast = small_config(tmp_path), small_disk / "ballast"
    stop_at_step(cfg, small_disk, 7)
    free = shutil.disk_usage(small_disk).free
    ballast.write_bytes(bytes(max(0, free - 8192)))
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(cfg, small_disk)
    assert not list(small_disk.rglob("*.tmp"))
    ballast.unlink()
    run(cfg, small_disk)
    assert_same_run(small_disk, tmp_path / "whole")


# --- runs that are killed ------------------------------------------------------------------------

KILL_SETTINGS = {
    "CHECKPOINT_EVERY": 0.0, "EPOCHS": 6, "THAW_EPOCHS": [1, 3], "MONITOR": "loss",
    "BACKBONE_BATCHNORM": "train",
}  # fmt: skip


def crash_jobs(folder: Path, jobs: list[dict]) -> tuple[list[int], str]:
    """Let `crash_runner.py` do `jobs`; their exit statuses and what they printed."""
    for job in jobs:
        job["settings"] = {**KILL_SETTINGS, **job.get("settings", {})}
    (folder / "spec.json").write_text(json.dumps({"folder": str(folder), "jobs": jobs}))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "crash_runner.py"), str(folder / "spec.json")],
        env={**os.environ, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"outcome"')]
    statuses = [json.loads(line)["outcome"]["status"] for line in lines]
    assert set(statuses) <= {0, -signal.SIGKILL, 130}, done.stderr
    return statuses, done.stdout


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")


@needs_fork
def test_a_run_that_is_killed_again_and_again_ends_the_same(tiny_root):
    """Fourteen SIGKILLs, and a stop by hand; other threads, and with or without the cache.

    Half of the kills come at random instants, half just before or after a file gets its name or is
    forced to disk.
    """
    folder, rng = tiny_root.parent, random.Random(0)
    jobs: list[dict] = [{"run": "whole"}]
    for number in range(9):
        settings = {"CACHE": number % 3 > 0, "NUM_WORKERS": number % 4}
        share = rng.uniform(0.03, 0.14)
        jobs.append({"run": "killed", "kill_share": share, "settings": settings})
    jobs.append({"run": "killed", "interrupt_at": 2})
    for number in range(5):
        point = [("replace", "fsync")[number % 2], 2 + number, ("before", "after")[number // 2 % 2]]
        jobs.append({"run": "killed", "kill_at": point})
    jobs.append({"run": "killed"})
    statuses, said = crash_jobs(folder, jobs)
    assert statuses[0] == statuses[-1] == 0
    assert statuses[1:-1] == [-9] * 9 + [130] + [-9] * 5, said
    assert "stopped and saved; run this cell again" in said
    outputs = folder / "outputs"
    assert_same_run(outputs / "killed", outputs / "whole")
    files = [outputs / name / "result.pt" for name in ("killed", "whole")]
    assert_same(*(torch.load(file, weights_only=True) for file in files))
    assert not list(outputs.rglob("*.tmp")) and not list(outputs.rglob("*.damaged"))
    left = [len(list(outputs.rglob(f"{name}/checkpoints/*.pt"))) for name in ("killed", "whole")]
    assert left[0] == left[1] <= 4  # two checkpoints, and the best models they name


@needs_fork
@pytest.mark.slow
def test_a_kill_at_every_point_of_saving(tiny_root):
    """Every file operation of a run in turn, before and after it, from the first to the last."""
    folder = tiny_root.parent
    jobs: list[dict] = [{"run": "whole"}]
    points = [(f, w, n) for n in (1, 2, 3, 5) for f in ("replace", "fsync", "unlink", "open")
              for w in ("before", "after")]  # fmt: skip
    for function, when, call in points:
        name = f"{function}-{when}-{call}"
        jobs += [{"run": name, "kill_at": [function, call, when], "settings": {"EPOCHS": 3}}]
        jobs += [{"run": name, "kill_at": [function, 13 + call, when], "settings": {"EPOCHS": 3}}]
        jobs += [{"run": name, "settings": {"EPOCHS": 3}}]
    jobs[0]["settings"] = {"EPOCHS": 3}
    statuses, _ = crash_jobs(folder, jobs)
    assert statuses.count(-9) > 40
    for function, when, call in points:
        assert_same_run(folder / f"outputs/{function}-{when}-{call}", folder / "outputs/whole")


@needs_fork
def test_an_interrupt_finishes_the_step_and_saves(tiny_root):
    """At the first step, in the middle, and at the last step of an epoch."""
    folder = tiny_root.parent
    quiet = {"settings": {"CHECKPOINT_EVERY": 600.0}}
    jobs = [{"run": "whole"}, *({"run": "stopped", "interrupt_at": n, **quiet} for n in (1, 3, 2))]
    statuses, said = crash_jobs(folder, [*jobs, {"run": "stopped"}])
    assert statuses == [0, 130, 130, 130, 0]
    positions = re.findall(r"resuming at epoch (\d), step (\d)", said)
    assert positions == [("1", "2"), ("1", "5"), ("1", "7")]
    assert_same_run(folder / "outputs/stopped", folder / "outputs/whole")


@pytest.mark.parametrize(
    ("place", "moment"), [(keeper.Keeper, "_report"), (keeper, "save_checkpoint")]
)
def test_an_interrupt_is_never_answered_without_saving(tmp_path, monkeypatch, place, moment):
    """It may come after the step has decided whether to save."""
    original, calls = getattr(place, moment), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return original(*args)

    cfg = small_config(tmp_path, CHECKPOINT_STEPS=4)
    with monkeypatch.context() as patch:
        patch.setattr("emotion_toolbox.device.READ_EVERY", 2)
        patch.setattr(place, moment, interrupted)
        with pytest.raises(KeyboardInterrupt, match="stopped and saved"):
            run(cfg, tmp_path / "parts")
    saved = load_verified(list_checkpoints(tmp_path / "parts" / "checkpoints")[0])
    assert (saved["epoch"], saved["step"]) == (0, 4)  # the step that was over when it was asked
    run(cfg, tmp_path / "parts")
    run(cfg, tmp_path / "whole")
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_a_stop_that_could_not_save_says_so(tmp_path, monkeypatch):
    cfg = small_config(tmp_path, ON_SAVE_ERROR="continue")
    fill_disk(monkeypatch, lambda name: True)
    original = engine.train_step

    def stop(*args):
        signal.raise_signal(signal.SIGINT)
        original(*args)

    monkeypatch.setattr(engine, "train_step", stop)
    with pytest.raises(KeyboardInterrupt, match="stopped, but not saved; free some disk space"):
        run(cfg, tmp_path)


KERNEL_SETUP = """
import sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
import pytest
from small_run import file_datasets, install_small_network, small_config
from emotion_transfer import engine
from emotion_transfer.model import build_model
install_small_network(pytest.MonkeyPatch())
original = engine.train_step
def slowly(*args):
    time.sleep(0.2)
    original(*args)
engine.train_step = slowly
folder = Path({folder!r})
cfg = small_config(folder)
"""
KERNEL_CELL = """
engine.fit(cfg, build_model(cfg, 3), file_datasets(cfg), folder / "stopped" / "checkpoints")
"""


@pytest.mark.slow
def test_the_stop_button_of_jupyter(tiny_root, tmp_path):
    """In a real kernel: the cell ends with a message, and running it again ends the run."""
    manager = pytest.importorskip("jupyter_client.manager")
    pytest.importorskip("ipykernel")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    folder = tmp_path / "stopped" / "checkpoints"
    kernel, client = manager.start_new_kernel()

    def reply_to(asked: str) -> dict:  # after those to earlier questions
        while (reply := client.get_shell_msg(timeout=120))["parent_header"]["msg_id"] != asked:
            pass
        return reply["content"]

    try:
        setup = KERNEL_SETUP.format(paths=paths, folder=str(tmp_path))
        assert reply_to(client.execute(setup))["status"] == "ok"
        asked = client.execute(KERNEL_CELL)
        deadline = time.monotonic() + 60
        while not list_checkpoints(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(0.7)
        kernel.interrupt_kernel()
        stopped = reply_to(asked)
        assert stopped["ename"] == "Stopped" and len(stopped["traceback"]) == 1, stopped
        assert "stopped and saved; run this cell again to go on from here" in stopped["evalue"]
        saved = load_verified(list_checkpoints(folder)[0])
        assert (0, 0) < (saved["epoch"], saved["step"]) < (4, 0)
        assert reply_to(client.execute(KERNEL_CELL))["status"] == "ok"
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    cfg = small_config(tmp_path)
    run(cfg, tmp_path / "whole", file_datasets(cfg))
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_a_second_interrupt_does_not_wait(tmp_path, monkeypatch):
    asked = threading.Event()
    with keeper.deferred_interrupt(asked):
        signal.raise_signal(signal.SIGINT)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_validating_keeps_the_epoch(tmp_path, monkeypatch):
    original = engine.validate_epoch

    def validate(trainer, val, progress, keeper):
        if progress.history:  # not the start
            signal.raise_signal(signal.SIGINT)
        return original(trainer, val, progress, keeper)

    cfg = small_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(engine, "validate_epoch", validate)
        with pytest.raises(KeyboardInterrupt, match="stopped and saved"):
            run(cfg, tmp_path)
    saved = load_verified(list_checkpoints(tmp_path / "checkpoints")[0])
    assert (saved["epoch"], saved["step"], len(saved["history"])) == (1, 0, 2)
    run(cfg, tmp_path)
    run(cfg, tmp_path / "whole")
    assert_same_run(tmp_path, tmp_path / "whole")


# --- from files ----------------------------------------------------------------------------------


def test_cache_and_decoding_train_the_same(tiny_root, tmp_path):
    for name, settings in (("cached", {}), ("decoded", {"CACHE": False, "NUM_WORKERS": 2})):
        cfg = small_config(tmp_path, **settings)
        run(cfg, tmp_path / name, file_datasets(cfg))
    assert_same_run(tmp_path / "cached", tmp_path / "decoded")


def test_data_may_be_moved_in_the_middle_of_a_run(tiny_root, tmp_path):
    cfg = small_config(tmp_path)
    run(cfg, tmp_path / "whole", file_datasets(cfg))
    stop_at_step(cfg, tmp_path / "moved", 9, file_datasets(cfg))
    tiny_root.rename(tmp_path / "elsewhere")
    moved = dataclasses.replace(cfg, DATA_ROOT=str(tmp_path / "elsewhere"))
    run(moved, tmp_path / "moved", file_datasets(moved))
    assert_same_run(tmp_path / "moved", tmp_path / "whole")


@pytest.mark.parametrize("cache", [True, False])
def test_an_image_replaced_under_its_name_is_noticed(tiny_root, tmp_path, cache):
    cfg = small_config(tmp_path, CACHE=cache)
    datasets = file_datasets(cfg)
    stop_at_step(cfg, tmp_path, 9, datasets)
    files = [datasets["train"].split.path(i) for i in (4, 8)]
    assert files[0].suffix == files[1].suffix
    shutil.copy(files[0], files[1])
    with pytest.raises(ConfigError, match=r"the images or the labels in .*train\.csv have changed"):
        run(cfg, tmp_path, file_datasets(cfg))


def test_an_image_that_vanishes_while_training_is_named(tiny_root, tmp_path):
    cfg = small_config(tmp_path, CACHE=False)
    datasets = file_datasets(cfg)
    lost = datasets["train"].split.path(5)
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(ValueError, match=re.escape(lost.name)):
        run(cfg, tmp_path, datasets)
    lost.write_bytes(content)
    assert run(cfg, tmp_path, datasets)[0].finished


# --- compiled ------------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_training_is_eager_training(tmp_path):
    """Over both thaws; what thaws must train though the graph was traced before."""
    if not shutil.which("g++") and not shutil.which("clang++"):
        pytest.skip("torch.compile needs a C++ compiler on the CPU")
    ends = []
    for compiled in (False, True):
        cfg = small_config(tmp_path, EPOCHS=3, COMPILE=compiled, LR_HEAD=0.01, LR_BACKBONE=0.002)
        datasets = memory_datasets()
        trainer = Trainer(cfg, build_model(cfg, 3), datasets["train"])
        trainer.model.backbone.drop.p = 0.0  # compiled code draws other random numbers
        for module in trainer.model.head.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        levels = []
        for epoch in range(3):
            begin_epoch(trainer, epoch)
            before = copy_of(trainer.model.state_dict())
            for step, batch in enumerate(batches(cfg, datasets["train"], epoch)):
                train_step(trainer, batch, epoch, step, 6)
                check_gradients(trainer.model)
            moved = {
                k for k, v in trainer.model.named_parameters() if not torch.equal(v, before[k])
            }
            levels.append(moved)
        assert (
            len(levels[0])
            < len(levels[1])
            < len(levels[2])
            == len(before) - len(list(trainer.model.named_buffers()))
        )
        assert not any("_orig_mod" in name for name in trainer.model.state_dict())
        ends.append(copy_of(trainer.model.state_dict()))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=5e-3, atol=5e-4, msg=name)


def test_a_tensor_that_gets_no_gradient_is_an_error(tmp_path, monkeypatch):
    """What torch 2.11 did in silence when a compiled model thawed."""
    cfg = small_config(tmp_path, THAW_EPOCHS=(0, 0))
    model = build_model(cfg, 3)
    forward = model.backbone.forward
    monkeypatch.setattr(model.backbone, "forward", lambda images: forward(images).detach())
    with pytest.raises(RuntimeError, match=r"tensors that should train got no gradient.*COMPILE"):
        fit(cfg, model, memory_datasets(), tmp_path / "checkpoints")


REAL_RUNS = [
    ("efficientnet_lite0", "cpu", "off"),
    ("resnet50", "cpu", "bf16"),
    *((name, "cuda", amp) for name in MODELS for amp in ("off", "bf16", "fp16")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "device", "amp"), REAL_RUNS)
def test_a_real_backbone_resumes_bit_for_bit(tiny_config, tmp_path, name, device, amp):
    """Stopped in every epoch; EfficientNet-Lite0 has its packaged weights, the others none."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    settings = {
        "EPOCHS": 3, "THAW_EPOCHS": (1, 2), "BASELINES": (), "MODEL_NAME": name, "DEVICE": device,
        "AMP": amp, "WEIGHTS": "DEFAULT" if name == "efficientnet_lite0" else None,
        "DETERMINISTIC": device == "cuda",
    }  # fmt: skip
    whole = tiny_config(**settings)
    run(whole, tmp_path / "whole", file_datasets(whole))
    cfg = tiny_config(**settings, CHECKPOINT_EVERY=0.0)
    for step in (3, 8, 14):
        stop_at_step(cfg, tmp_path / "parts", step, file_datasets(cfg))
    result, _ = run(cfg, tmp_path / "parts", file_datasets(cfg))
    set_deterministic(False)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    assert np.isfinite(result.history["train_loss"][1:]).all()
