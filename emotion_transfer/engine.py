"""The training engine: a step, an epoch, an evaluation, and `fit` that survives being killed."""

import contextlib
import dataclasses
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import psutil
import torch
import torch.nn.functional as F
from filelock import FileLock, Timeout
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim.swa_utils import AveragedModel
from tqdm.auto import tqdm

from emotion_transfer.augment import (
    AUGMENT_DRAWS,
    ColourJitter,
    apply_augmentation,
    draw_augmentation,
    jitter_colours,
)
from emotion_transfer.checkpoint import (
    CheckpointError,
    load_newest,
    load_verified,
    save_checkpoint,
    save_with_digest,
    write_atomically,
)
from emotion_transfer.config import NEUTRAL_FIELDS, ConfigError, EnhancedConfig, config_to_json
from emotion_transfer.evaluation import Predictions, predict
from emotion_transfer.loader import (
    Batch,
    EmotionDataset,
    batch_slices,
    fetch_ahead,
    make_loader,
    steps_per_epoch,
    training_order,
)
from emotion_transfer.losses import SoftTargetLoss, class_weights
from emotion_transfer.mixing import draw_mixing, mix_images, mix_targets, mixing_active
from emotion_transfer.model import (
    EmotionClassifier,
    batch_norms,
    make_optimizer,
    set_training_mode,
    thaw_level,
)
from emotion_transfer.precision import choose_amp, choose_device, keep_freed_memory, precision
from emotion_transfer.schedule import set_learning_rates
from emotion_transfer.seeding import draw_uniforms, set_deterministic, step_seed

# %% [markdown]
# #### Averaging the weights
#
# The weights jitter from step to step around something better than each of them. An exponential
# moving average (EMA) follows at a distance and usually generalises a little better; it is
# evaluated beside the raw weights in every epoch, and the better of the two is kept. Early on the
# average is short, or it would remember the random start: its decay grows as (1 + n) / (10 + n)
# with the number of steps n until it reaches `EMA_DECAY`.


# %%
def ema_decay(cfg: EnhancedConfig, updates: int) -> float:
    """The decay of the weight average at its `updates`-th step."""
    return min(cfg.EMA_DECAY, (1 + updates) / (10 + updates))


@torch.no_grad()
def update_average(ema: AveragedModel, model: EmotionClassifier, share: Tensor) -> None:
    """Move `ema` towards `model` by `share`, a tensor of one number; the first time, copy it.

    ``AveragedModel.update_parameters`` does the same, but waits for the device in every step.
    """
    first = int(ema.n_averaged) == 0  # a number on the CPU
    moved: list[list[Tensor]] = [[], []]
    copied: list[list[Tensor]] = [[], []]
    for old, new in zip(
        [*ema.module.parameters(), *ema.module.buffers()],
        [*model.parameters(), *model.buffers()],
        strict=True,
    ):
        pair = copied if first or not old.is_floating_point() else moved
        pair[0].append(old)
        pair[1].append(new)
    if copied[0]:
        torch._foreach_copy_(copied[0], copied[1])
    if moved[0] and share.device.type == "cpu":  # nothing to wait for: one pass instead of three
        torch._foreach_lerp_(moved[0], moved[1], float(share))
    elif moved[0]:
        step = torch._foreach_sub(moved[1], moved[0])
        torch._foreach_mul_(step, share)
        torch._foreach_add_(moved[0], step)
    ema.n_averaged += 1


# %% [markdown]
# #### Everything a run carries
#
# `Trainer` holds what lives on the device; `Progress` holds the plain facts of where the run is.
# Together they are what a checkpoint stores.


# %%
@dataclass
class Progress:
    """Where a run is: plain values only, so that it can be stored as it is."""

    epoch: int = 0
    step: int = 0  # within the epoch; the number of steps done
    best_score: float = -math.inf
    best_epoch: int = -1
    best_source: str = "raw"  # or "ema"
    best_file: str | None = None
    waiting: int = 0  # epochs without a better score since everything trains
    bad_streak: int = 0  # non-finite steps in a row
    seconds: float = 0.0  # training time so far
    epoch_seconds: float = 0.0
    finished: str = ""  # why the run ended, once it has
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Trainer:
    """The moving parts of one run on one device."""

    cfg: EnhancedConfig
    model: EmotionClassifier
    network: Callable[[Tensor], Tensor]  # the model, or its compiled form
    ema: AveragedModel | None
    ema_share: Tensor
    optimizer: torch.optim.AdamW
    scaler: GradScaler
    loss: SoftTargetLoss
    device: torch.device
    amp: str
    meter: Tensor  # sums over the epoch: loss, right answers, images, skipped steps
    finite: Tensor  # for each of the last LOG_EVERY steps, whether it was finite
    guarded: list[list[Tensor]] = field(default_factory=list)  # training BatchNorm's, by type
    expected: int = 0  # tensors that must get a gradient, checked after a thaw
    jitter: ColourJitter = jitter_colours  # or its compiled form


# %% [markdown]
# Building a trainer puts the model on the device, and optimiser, loss and average around it.


# %%
def make_trainer(
    cfg: EnhancedConfig, model: EmotionClassifier, train: EmotionDataset, amp: str | None = None
) -> Trainer:
    """Move `model` to the device and put optimiser, loss, scaler and weight average around it."""
    device = choose_device(cfg)
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).requires_grad_(True)  # begin_epoch decides; a model may come frozen
    amp = amp or choose_amp(cfg, model, device)
    classes = len(train.classes)
    weight = torch.ones(classes)
    if cfg.BALANCE == "weights":
        weight = class_weights(train.split.labels, classes)
    share = torch.zeros((), device=device)
    # One path for all precisions: a scale of 1 changes nothing and still finds what is not finite.
    scaler = GradScaler(device.type, init_scale=2.0**16 if amp == "fp16" else 1.0)
    exact = torch.float32 if device.type == "mps" else torch.float64
    return Trainer(
        cfg, model, model, AveragedModel(model, use_buffers=True) if cfg.EMA_DECAY else None, share,
        make_optimizer(cfg, model), scaler, SoftTargetLoss(weight, cfg.LABEL_SMOOTHING).to(device),
        device, amp, torch.zeros(4, dtype=exact, device=device),
        torch.ones(cfg.LOG_EVERY, dtype=torch.bool, device=device),
    )  # fmt: skip


# %% [markdown]
# #### One training step
#
# First the batch is augmented and mixed on the device. What to do to each image was drawn from the
# seed and the image's position in the epoch, so nothing random has to be remembered.


# %%
def augment_batch(trainer: Trainer, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """Augmented, mixed, normalised images [B, 3, H, W] and their soft targets [B, C]."""
    cfg, spec, first = trainer.cfg, trainer.model.spec, step * trainer.cfg.BATCH_SIZE
    count = len(batch.labels)
    draws = draw_uniforms(cfg.SEED, epoch, first, count, AUGMENT_DRAWS)
    plan = draw_augmentation(cfg, draws)
    images = apply_augmentation(
        batch.images, plan, cfg.IMG_SIZE, spec.mean, spec.std, trainer.jitter
    )
    targets = F.one_hot(batch.labels, len(trainer.loss.weight)).to(images.dtype)
    if mixing_active(cfg, epoch):
        mixing = draw_mixing(cfg, epoch, first, count)
        images, targets = mix_images(images, mixing), mix_targets(targets, mixing)
    return images, targets


# %% [markdown]
# Then the usual order, which matters: unscale the gradients, clip their norm, step, update the
# scale. A batch whose gradients are not finite moves nothing: not the weights, not the optimiser,
# not the average, not the statistics of BatchNorm. The step never waits for the device; what went
# wrong is counted there and read every `LOG_EVERY` steps.


# %%
def train_step(trainer: Trainer, batch: Batch, epoch: int, step: int, steps: int) -> None:
    """One optimisation step on one batch, at position (`epoch`, `step`) of `steps`."""
    cfg, optimizer = trainer.cfg, trainer.optimizer
    torch.manual_seed(step_seed(cfg.SEED, epoch, step))  # for dropout
    set_learning_rates(cfg, optimizer, epoch, step, steps)
    images, targets = augment_batch(trainer, batch, epoch, step)
    before = [torch.cat([t.flatten() for t in group]) for group in trainer.guarded]
    optimizer.zero_grad(set_to_none=True)
    losses, right = backward(trainer, images, targets)
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(norm)
    # The scaler looks at each number; it must also refuse those whose squares overflow together.
    gradients[0].mul_(torch.where(finite, 1.0, math.nan))
    trainer.scaler.unscale_(optimizer)
    norm = norm / trainer.scaler.scale(torch.ones_like(norm))
    nn.utils.clip_grads_with_norm_(trainer.model.parameters(), cfg.GRAD_CLIP, norm)
    trainer.scaler.step(optimizer)
    trainer.scaler.update(None if trainer.amp == "fp16" else 1.0)
    restore_statistics(trainer, before, finite)
    if trainer.ema is not None:
        decay = ema_decay(cfg, epoch * steps + step)
        trainer.ema_share.copy_((1 - decay) * finite)
        update_average(trainer.ema, trainer.model, trainer.ema_share)
    zero = torch.zeros_like(losses)
    done = torch.stack([losses, right, zero + len(images), zero])
    skipped = torch.stack([zero, zero, zero, zero + 1])
    trainer.meter += torch.where(finite, done, skipped)
    trainer.finite[step % cfg.LOG_EVERY] = finite


def restore_statistics(trainer: Trainer, before: list[Tensor], finite: Tensor) -> None:
    """Put the guarded statistics back to `before` unless the step was `finite`.

    A hundred small tensors in a few operations, because each costs a GPU a launch.
    """
    for group, old in zip(trainer.guarded, before, strict=True):
        kept = torch.where(finite, torch.cat([t.flatten() for t in group]), old)
        parts = torch.split(kept, [t.numel() for t in group])
        torch._foreach_copy_(group, [p.view_as(t) for p, t in zip(parts, group, strict=True)])


# %% [markdown]
# Where the memory is too small for a batch, `ACCUMULATE` splits it: the gradients of the parts add
# up to those of the whole, and the learning rate still sees one step.


# %%
def backward(trainer: Trainer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the gradients for a batch; returns its summed loss and its number of right answers.

    Raises:
        MemoryError: when the device runs out of memory, with the setting to change.
    """
    cfg, meter = trainer.cfg, trainer.meter
    losses, right = torch.zeros_like(meter[0]), torch.zeros_like(meter[0])
    try:
        for part, wanted in zip(
            images.chunk(cfg.ACCUMULATE), targets.chunk(cfg.ACCUMULATE), strict=True
        ):
            with precision(trainer.device, trainer.amp):
                scores = trainer.network(part)
                loss = trainer.loss(scores, wanted)
            trainer.scaler.scale(loss / cfg.ACCUMULATE).backward()
            losses += loss.detach() * len(part)
            right += (scores.detach().argmax(1) == wanted.argmax(1)).sum()
    except torch.OutOfMemoryError as error:
        raise MemoryError(
            f"the device ran out of memory at BATCH_SIZE={cfg.BATCH_SIZE}, ACCUMULATE="
            f"{cfg.ACCUMULATE}, IMG_SIZE={cfg.IMG_SIZE}. Set ACCUMULATE={2 * cfg.ACCUMULATE} (the "
            f"same training in smaller parts) or BATCH_SIZE={max(2, cfg.BATCH_SIZE // 2)}"
        ) from error
    return losses, right


# %% [markdown]
# #### Validation
#
# The gap between training and validation says whether the network learns or memorises. The loss
# over augmented, mixed, dropped-out training images cannot tell; so a fixed part of the training
# images, as many as there are validation images, is evaluated exactly as those are.


# %%
def clean_subset(train: EmotionDataset, validation: EmotionDataset) -> npt.NDArray[np.int64]:
    """Positions of a fixed, even spread over `train`, as many as `validation` has images."""
    count = min(len(train), len(validation))
    positions = np.linspace(0, len(train) - 1, count).round()
    return np.asarray(positions, dtype=np.int64)


def validate_epoch(
    trainer: Trainer, datasets: Mapping[str, EmotionDataset]
) -> tuple[dict[str, Any], float, str]:
    """Evaluate the raw and the averaged weights: figures, the monitored score, and whose it is."""
    cfg, val = trainer.cfg, datasets["val"]
    raw = predict(cfg, trainer.model, val, amp=trainer.amp, progress="validating")
    record = {"val_loss": raw.loss, "val_accuracy": raw.accuracy, "val_macro_f1": raw.macro_f1}
    score, source, used = monitored(cfg, raw), "raw", raw
    if trainer.ema is not None:
        ema = predict(cfg, trainer.ema, val, amp=trainer.amp, progress="validating the average")
        record |= {"val_ema_loss": ema.loss, "val_ema_accuracy": ema.accuracy}
        record["val_ema_macro_f1"] = ema.macro_f1
        if monitored(cfg, ema) > score:
            score, source, used = monitored(cfg, ema), "ema", ema
    model = trainer.model if source == "raw" or trainer.ema is None else trainer.ema
    subset = clean_subset(datasets["train"], val)
    clean = predict(cfg, model, datasets["train"], amp=trainer.amp, positions=subset)
    record |= {"train_clean_accuracy": clean.accuracy, "gap": clean.accuracy - used.accuracy}
    return record, score, source


def monitored(cfg: EnhancedConfig, predictions: Predictions) -> float:
    """The figure named by ``MONITOR``, turned so that larger is better; -inf if not a number."""
    if not np.isfinite(predictions.probabilities).all():
        return -math.inf
    value: float = getattr(predictions, cfg.MONITOR)
    value = -value if cfg.MONITOR == "loss" else value
    return value if math.isfinite(value) else -math.inf


# %% [markdown]
# #### Saving and resuming
#
# A checkpoint is the whole state at a position: weights, average, optimiser, scaler, running sums,
# best score, history, and the settings and classes it belongs to. `resume` refuses to go on with
# other settings, other classes or other images, and says which.


# %%
def snapshot(
    trainer: Trainer, progress: Progress, datasets: Mapping[str, EmotionDataset]
) -> dict[str, Any]:
    """The whole state as tensors and plain values."""
    settings = json.loads(config_to_json(trainer.cfg))
    return {
        **dataclasses.asdict(progress),
        "model": trainer.model.state_dict(),
        "ema": trainer.ema.state_dict() if trainer.ema is not None else None,
        "optimizer": trainer.optimizer.state_dict(),
        "scaler": trainer.scaler.state_dict(),
        "meter": trainer.meter,
        "amp": trainer.amp,
        "config": settings,
        "classes": list(datasets["train"].classes),
        "data": {split: datasets[split].fingerprint() for split in ("train", "val")},
    }


# %% [markdown]
# Resuming under changed settings would give a result that neither the old nor the new settings
# explain. So every difference is listed, and the run refused.


# %%
def refuse_other_run(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], saved: Mapping[str, Any]
) -> None:
    """Raise ``ConfigError`` naming every setting in which `saved` was another run than `cfg`."""
    ours = dataclasses.asdict(cfg)
    theirs = {k: tuple(v) if isinstance(v, list) else v for k, v in saved["config"].items()}
    changed = [
        f"  {name}: {theirs.get(name)!r} before, {value!r} now"
        for name, value in ours.items()
        if name not in NEUTRAL_FIELDS and theirs.get(name) != value
    ]
    classes = list(datasets["train"].classes)
    if classes != saved["classes"]:
        changed.append(f"  classes: {saved['classes']} before, {classes} now")
    for name, fingerprint in saved["data"].items():
        if datasets[name].fingerprint() != fingerprint:
            csv = datasets[name].split.csv
            changed.append(f"  the images or the labels in {csv} have changed")
    if changed:
        raise ConfigError(
            "this run was begun with other settings:\n" + "\n".join(changed) + "\n"
            "Set them back to resume it, or choose another RUN_NAME to begin a new run (with "
            "INIT_FROM to start from these weights)"
        )


# %% [markdown]
# Otherwise everything is put back to where it was.


# %%
def resume(
    trainer: Trainer, datasets: Mapping[str, EmotionDataset], saved: Mapping[str, Any]
) -> Progress:
    """Bring `trainer` to the state `saved` and return its progress; raises ``ConfigError``."""
    refuse_other_run(trainer.cfg, datasets, saved)
    trainer.model.load_state_dict(saved["model"])
    if trainer.ema is not None:
        trainer.ema.load_state_dict(saved["ema"])
    trainer.optimizer.load_state_dict(saved["optimizer"])
    trainer.scaler.load_state_dict(saved["scaler"])
    trainer.meter.copy_(saved["meter"])
    return Progress(**{f.name: saved[f.name] for f in dataclasses.fields(Progress)})


# %% [markdown]
# Pressing *stop* must not tear a step in half. While `fit` runs, the first interrupt only raises a
# flag; the step in hand is finished, the state saved, and then the run stops.


# %%
@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """An event that Ctrl-C or Jupyter's stop button sets; a second one interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def note(number: int, frame: Any) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


# %% [markdown]
# `Saver` writes the checkpoints. What happens when the disk is full is your choice
# (`ON_SAVE_ERROR`); in either case the checkpoint before stays untouched.


# %%
class Saver:
    """Writes checkpoints of one run: when one is due, and what to do if the disk refuses."""

    def __init__(
        self, cfg: EnhancedConfig, folder: Path, datasets: Mapping[str, EmotionDataset]
    ) -> None:
        self.cfg, self.folder, self.datasets = cfg, folder, datasets
        self.last, self.steps = time.monotonic(), 0

    def due(self) -> bool:
        """Whether a checkpoint is due; asked once a step."""
        self.steps += 1
        enough = self.cfg.CHECKPOINT_STEPS is not None and self.steps >= self.cfg.CHECKPOINT_STEPS
        return enough or time.monotonic() - self.last >= self.cfg.CHECKPOINT_EVERY

    def save_settings(self) -> None:
        """Write ``config.json`` beside the checkpoints, for people; fails as ``save`` does."""
        text = config_to_json(self.cfg) + "\n"
        try:
            write_atomically(self.folder.parent / "config.json", lambda f: f.write(text.encode()))
        except OSError as error:
            self._complain(error)

    def save(self, trainer: Trainer, progress: Progress) -> bool:
        """Write checkpoint and history; whether the checkpoint was written.

        Raises:
            CheckpointError: if it was not, and ``ON_SAVE_ERROR="stop"``.
        """
        self.last, self.steps = time.monotonic(), 0
        try:
            payload = snapshot(trainer, progress, self.datasets)
            save_checkpoint(self.folder, payload, self.cfg.CHECKPOINT_KEEP)
        except OSError as error:
            self._complain(error)
            return False
        table = self.folder.parent / "history.csv"
        try:
            if progress.history:
                write_history(table, progress.history)
        except OSError as error:  # for people only: the checkpoint holds the same
            tqdm.write(f"WARNING: {table} could not be written ({error})")
        return True

    def save_best(self, trainer: Trainer, progress: Progress, source: str) -> str | None:
        """Write the weights of `source` as the best so far; the file's name, None on failure."""
        averaged = trainer.ema.module if source == "ema" and trainer.ema else trainer.model
        payload = {
            "model": averaged.state_dict(),
            "name": trainer.model.name,
            "classes": list(self.datasets["train"].classes),
            "epoch": progress.epoch,
            "source": source,
        }
        try:
            return save_with_digest(self.folder, f"best-epoch{progress.epoch:03d}", payload).name
        except OSError as error:
            self._complain(error)
            return None

    def _complain(self, error: OSError) -> None:
        free = ""
        with contextlib.suppress(OSError):  # the disk itself may be gone
            free = f"; {shutil.disk_usage(self.folder).free / 1e6:.0f} MB free"
        message = (
            f"the checkpoint could not be written to {self.folder} ({error}{free}); "
            "the one before it is untouched. Free some space, or set OUTPUT_ROOT to another disk"
        )
        if self.cfg.ON_SAVE_ERROR == "stop":
            raise CheckpointError(message) from error
        tqdm.write(f"WARNING: {message}. Training goes on, as ON_SAVE_ERROR says")


# %% [markdown]
# #### One epoch


# %%
def begin_epoch(trainer: Trainer, epoch: int) -> None:
    """Freeze and thaw for `epoch`, and compile again where what trains has changed."""
    cfg, model = trainer.cfg, trainer.model
    set_training_mode(cfg, model, epoch)
    moving = [t for layer in batch_norms(model) if layer.training for t in layer.buffers()]
    by_type = [
        [t for t in moving if t.is_floating_point() == floating] for floating in (True, False)
    ]
    trainer.guarded = [group for group in by_type if group]
    thawed = epoch == 0 or thaw_level(cfg, epoch) != thaw_level(cfg, epoch - 1)
    if cfg.COMPILE and (thawed or trainer.network is model):
        # A graph traced before a thaw would go on training only what it knew.
        torch._dynamo.reset()
        trainer.network, trainer.jitter = torch.compile(model), torch.compile(jitter_colours)
    trainer.expected = sum(p.requires_grad for p in model.parameters())


def check_gradients(trainer: Trainer) -> None:
    """Raise ``RuntimeError`` if a tensor that should train got no gradient in this step."""
    lacking = [n for n, p in trainer.model.named_parameters() if p.requires_grad and p.grad is None]
    if lacking:
        raise RuntimeError(
            f"{len(lacking)} of {trainer.expected} tensors that should train got no gradient, "
            f"first {lacking[0]}; set COMPILE=False, or upgrade torch to 2.12 or newer"
        )


# %% [markdown]
# The steps of an epoch that are already done are skipped, not repeated: order and augmentation of
# the rest do not depend on them.


# %%
def train_epoch(
    trainer: Trainer,
    train: EmotionDataset,
    progress: Progress,
    saver: Saver,
    asked: threading.Event,
) -> None:
    """Train from `progress.step` to the end of the epoch, saving when it is due.

    Raises:
        KeyboardInterrupt: after saving, if `asked` was set.
        FloatingPointError: after too many non-finite steps in a row.
    """
    cfg, epoch = trainer.cfg, progress.epoch
    order = training_order(cfg, train.split.labels, epoch)
    steps, first = steps_per_epoch(cfg, len(train)), progress.step
    batches = batch_slices(order, cfg.BATCH_SIZE, first)[: steps - first]
    loader = make_loader(train, batches, pin=trainer.device.type == "cuda")
    unread: list[Tensor] = []
    label = f"epoch {epoch + 1}/{cfg.EPOCHS}"
    begun, before = time.perf_counter(), progress.epoch_seconds
    with (
        tqdm(total=steps, initial=first, desc=label, unit="step", leave=False) as bar,
        contextlib.closing(fetch_ahead(loader, trainer.device)) as fetched,
    ):
        for step, batch in enumerate(fetched, start=first):
            train_step(trainer, batch, epoch, step, steps)
            if step == first:
                check_gradients(trainer)
            unread.append(batch.positions)
            progress.step = step + 1
            stopping = asked.is_set()
            saving = saver.due() or stopping
            if progress.step % cfg.LOG_EVERY == 0 or progress.step == steps or saving:
                read_device(trainer, train, progress, unread)
                bar.set_postfix(loss=f"{mean_loss(trainer):.3f}")
            progress.epoch_seconds = before + time.perf_counter() - begun
            saved = saving and saver.save(trainer, progress)
            bar.update()
            if stopping:  # asked for later than that, the next step or the epoch's end sees to it
                raise stopped(saved)


def stopped(saved: bool) -> KeyboardInterrupt:
    """What ends a run that was asked to stop, with how to go on."""
    if saved:
        return KeyboardInterrupt("stopped and saved; run this cell again to go on from here")
    return KeyboardInterrupt(
        "stopped, but not saved; free some disk space and run this cell again: it goes on from the "
        "last checkpoint"
    )


# %% [markdown]
# Every `LOG_EVERY` steps the device is asked what happened since. A step that was not finite is
# reported with its images; `MAX_BAD_STEPS` of them in a row end the run, and the last checkpoint
# stays as it is.


# %%
def mean_loss(trainer: Trainer) -> float:
    """Mean training loss of the epoch so far."""
    loss, _, images, _ = trainer.meter.tolist()
    return float(loss / max(images, 1))


def read_device(
    trainer: Trainer, train: EmotionDataset, progress: Progress, unread: list[Tensor]
) -> None:
    """Report the non-finite steps among those not read yet; raises ``FloatingPointError``."""
    every, last = trainer.cfg.LOG_EVERY, progress.step
    flags = trainer.finite.tolist()
    for step, index in zip(range(last - len(unread), last), unread, strict=True):
        progress.bad_streak = 0 if flags[step % every] else progress.bad_streak + 1
        if progress.bad_streak == 0:
            continue
        files = [train.split.files[i] for i in index.tolist()]
        shown = ", ".join(files[:4]) + (f" and {len(files) - 4} more" if len(files) > 4 else "")
        message = (
            f"epoch {progress.epoch + 1}, step {step + 1}: loss or gradients not finite ({shown})"
        )
        if progress.bad_streak >= trainer.cfg.MAX_BAD_STEPS:
            raise FloatingPointError(
                f"{message}; {progress.bad_streak} such steps in a row. The last good checkpoint "
                "is kept. Lower LR_HEAD and LR_BACKBONE or GRAD_CLIP in a new run, or set AMP='off'"
            )
        tqdm.write(f"WARNING: {message}; the step is skipped")
    unread.clear()


# %% [markdown]
# #### The whole run
#
# `fit` puts it together: resume or begin, and then for each epoch train, validate, remember the
# best, save, and report one line. A lock on the folder keeps a second process out; it vanishes
# with the process that holds it, however that ends.


# %%
@dataclass(frozen=True)
class FitResult:
    """The outcome of a run; the best weights are in the model that was passed to `fit`."""

    history: pd.DataFrame
    best_epoch: int  # from 1
    best_source: str
    best_score: float
    amp: str
    device: str
    seconds: float
    images_per_second: float
    finished: str


def fit(
    cfg: EnhancedConfig,
    model: EmotionClassifier,
    datasets: Mapping[str, EmotionDataset],
    folder: Path,
) -> FitResult:
    """Train `model`, or go on with the run in `folder`, and leave the best weights in `model`.

    Raises:
        ConfigError: if `folder` holds a run with other settings, or another process is using it.
        CheckpointError: if every checkpoint is damaged, or none can be written.
        OSError: if a checkpoint is there but cannot be read.
        FloatingPointError: if training diverges.
        KeyboardInterrupt: when stopped, after saving.
    """
    folder.mkdir(parents=True, exist_ok=True)
    set_deterministic(cfg.DETERMINISTIC)
    try:
        with FileLock(folder / ".lock", timeout=0):
            for leftover in [*folder.glob(".*.tmp"), *folder.parent.glob(".*.[0-9]*.tmp")]:
                leftover.unlink()
            return run_epochs(cfg, model, datasets, folder)
    except Timeout as error:
        raise ConfigError(
            f"another process is training in {folder}; wait for it, or choose another RUN_NAME"
        ) from error


# %% [markdown]
# The loop over the epochs reads almost like its description.


# %%
def run_epochs(
    cfg: EnhancedConfig,
    model: EmotionClassifier,
    datasets: Mapping[str, EmotionDataset],
    folder: Path,
) -> FitResult:
    """The epoch loop of `fit`, which holds the folder's lock."""
    train = datasets["train"]
    saved = load_newest(folder)
    trainer = make_trainer(cfg, model, train, saved["amp"] if saved else None)
    progress = resume(trainer, datasets, saved) if saved else Progress()
    saver = Saver(cfg, folder, datasets)
    report_start(trainer, progress)
    saver.save_settings()
    if saved is None:  # keeps the measured precision, and finds a full disk before it costs an hour
        saver.save(trainer, progress)
    with deferred_interrupt() as asked, torch.autograd.set_detect_anomaly(cfg.DEBUG):
        while not progress.finished:
            begin_epoch(trainer, progress.epoch)
            train_epoch(trainer, train, progress, saver, asked)
            end_epoch(trainer, datasets, progress, saver)
            saved_now = saver.save(trainer, progress)
            print(epoch_line(cfg, progress.history[-1]))
            if asked.is_set() and not progress.finished:
                raise stopped(saved_now)
    return finish(trainer, progress, folder)


# %% [markdown]
# At the end of an epoch: validate, compare with the best so far, write a line of history. Patience
# is counted only once everything trains, for each thaw first makes things worse before it makes
# them better.


# %%
def end_epoch(
    trainer: Trainer, datasets: Mapping[str, EmotionDataset], progress: Progress, saver: Saver
) -> None:
    """Validate, note the best, decide about stopping, and move `progress` to the next epoch."""
    cfg, seconds = trainer.cfg, progress.epoch_seconds
    loss, right, images, skipped = trainer.meter.tolist()
    figures, score, source = validate_epoch(trainer, datasets)
    rates = {g["name"].split(".")[0]: g["lr"] for g in trainer.optimizer.param_groups}
    progress.history.append({
        "epoch": progress.epoch + 1,
        "train_loss": loss / images if images else math.nan,
        "train_accuracy": right / images if images else math.nan,
        **figures,
        "lr_head": rates["head"],
        "lr_backbone": rates["backbone"],
        "images_per_second": images / max(seconds, 1e-9),
        "seconds": seconds,
        "memory_mb": memory_in_use(trainer.device),
        "skipped_steps": int(skipped),
    })  # fmt: skip
    everything = thaw_level(cfg, progress.epoch) == 2
    if score > progress.best_score or progress.best_file is None:
        progress.waiting = 0
        if kept := saver.save_best(trainer, progress, source):
            progress.best_file, progress.best_score = kept, score
            progress.best_epoch, progress.best_source = progress.epoch, source
    elif everything:
        progress.waiting += 1
    progress.seconds += seconds
    progress.epoch, progress.step, progress.epoch_seconds = progress.epoch + 1, 0, 0.0
    trainer.meter.zero_()
    if progress.epoch == cfg.EPOCHS:
        progress.finished = "all epochs done"
    elif progress.waiting >= cfg.PATIENCE:
        progress.finished = f"stopped early: no better {cfg.MONITOR} for {cfg.PATIENCE} epochs"


# %% [markdown]
# What you get back is the best model, not the last one.


# %%
def finish(trainer: Trainer, progress: Progress, folder: Path) -> FitResult:
    """Load the best weights into the model and sum the run up."""
    if progress.best_file is None:
        raise CheckpointError(f"no best model could be kept in {folder}; free some disk space")
    best = load_verified(folder / progress.best_file)
    trainer.model.load_state_dict(best["model"])
    trainer.model.eval().requires_grad_(False)
    history = pd.DataFrame(progress.history)
    images = (history["images_per_second"] * history["seconds"]).sum()
    return FitResult(
        history, progress.best_epoch + 1, progress.best_source, progress.best_score, trainer.amp,
        device_name(trainer.device), progress.seconds, images / max(progress.seconds, 1e-9),
        progress.finished,
    )  # fmt: skip


# %% [markdown]
# What a run tells while it lasts: where it starts, and a line an epoch.


# %%
def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return (
        f"{device.type} ({torch.get_num_threads()} threads)"
        if device.type == "cpu"
        else device.type
    )


def memory_in_use(device: torch.device) -> float:
    """Peak device memory in MB on CUDA, else the memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return float(psutil.Process(os.getpid()).memory_info().rss) / 2**20


def report_start(trainer: Trainer, progress: Progress) -> None:
    """Say what trains where, and at what position."""
    amp = {"off": "float32", "bf16": "bfloat16", "fp16": "float16"}[trainer.amp]
    print(f"{trainer.model.name} on {device_name(trainer.device)} in {amp}")
    if progress.finished:
        print(f"this run is complete ({progress.finished}); its best weights are loaded")
    elif progress.epoch or progress.step:
        print(f"resuming at epoch {progress.epoch + 1}, step {progress.step + 1}")


# %% [markdown]
# The line, and the same figures as CSV for later.


# %%
def epoch_line(cfg: EnhancedConfig, row: Mapping[str, Any]) -> str:
    """One epoch in one line."""
    ema = ""
    if "val_ema_macro_f1" in row:
        ema = f" (ema {row['val_ema_accuracy']:.3f} {row['val_ema_macro_f1']:.3f})"
    skipped = f" | {row['skipped_steps']} steps skipped" if row["skipped_steps"] else ""
    return (
        f"epoch {row['epoch']:>3}/{cfg.EPOCHS} | loss {row['train_loss']:.3f} train "
        f"{row['val_loss']:.3f} val | val acc {row['val_accuracy']:.3f} F1 "
        f"{row['val_macro_f1']:.3f}{ema} | gap {row['gap']:+.3f} | lr {row['lr_head']:.1e} "
        f"{row['lr_backbone']:.1e} | {row['images_per_second']:.0f} img/s | "
        f"{row['memory_mb']:.0f} MB{skipped}"
    )


def write_history(path: Path, history: list[dict[str, Any]]) -> None:
    """Write the history as CSV, one row an epoch."""
    text = pd.DataFrame(history).to_csv(index=False)
    write_atomically(path, lambda file: file.write(text.encode()))
