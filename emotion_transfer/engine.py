"""The training engine: a step, an epoch, and `fit`, which survives being killed."""

# %% [markdown]
# `Trainer` holds the moving parts on one device. The *average* is an exponential moving average
# (EMA) of the weights: they jitter from step to step around something better than each of them, and
# it follows at a distance. What the trainer is, `state_dict` says in full, as tensors and plain
# values: that is what a checkpoint stores.

# %%
import contextlib
import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emotion_toolbox.backbones import batch_norms
from emotion_toolbox.batches import Batch, EmotionDataset, batch_slices, fetch_ahead, training_order
from emotion_toolbox.device import (
    Meter, StatisticsGuard, choose_amp, choose_device, device_name, keep_freed_memory, make_scaler,
    memory_advice, memory_in_use, move_average, precision, set_deterministic, void_unless,
)  # fmt: skip
from emotion_toolbox.draws import draw_uniforms, step_seed
from emotion_toolbox.keeper import FitResult, Keeper, Progress, Resumable
from emotion_toolbox.pixels import jitter_colours
from emotion_toolbox.probes import predict
from emotion_transfer.augment import AUGMENT_DRAWS, apply_augmentation, draw_augmentation
from emotion_transfer.config import EnhancedConfig, train_size
from emotion_transfer.losses import SoftTargetLoss, class_weights
from emotion_transfer.mixing import draw_mixing, mix_images, mix_targets, mixing_active
from emotion_transfer.model import EmotionClassifier, make_optimizer, set_training_mode, thaw_level
from emotion_transfer.schedule import learning_rate, rates_at

Augment = Callable[["Trainer", Batch, int, int], tuple[Tensor, Tensor]]  # as augment_batch


class Trainer(Resumable):
    """A model in training, with all that its steps need, on one device."""

    model: EmotionClassifier
    network: Callable[..., Tensor]

    def __init__(
        self, cfg: EnhancedConfig, model: EmotionClassifier, train: EmotionDataset,
        amp: str | None = None, augment: Augment | None = None,
    ) -> None:  # fmt: skip
        self.cfg, self.model, self.train, self.device = cfg, model, train, choose_device(cfg.DEVICE)
        keep_freed_memory()
        model.to(self.device).requires_grad_(True)  # begin_epoch decides what trains
        self.amp = amp or choose_amp(cfg.AMP, model, train_size(cfg), measure=not cfg.DETERMINISTIC)
        weight = class_weights(train.split.labels, len(train.classes))
        weight = weight if cfg.BALANCE == "weights" else torch.ones_like(weight)
        self.loss = SoftTargetLoss(weight, cfg.LABEL_SMOOTHING).to(self.device)
        self.optimizer = make_optimizer(cfg, model)
        self.scaler = make_scaler(self.device, self.amp)
        self.average = copy.deepcopy(model).requires_grad_(False) if cfg.EMA_DECAY else None
        self.meter, self.backward = Meter(self.device), backward
        self.guard, self.augment = StatisticsGuard([]), augment or augment_batch
        self.network, self.jitter = model, jitter_colours  # or their compiled forms
        self.predict = partial(predict, size=cfg.IMG_SIZE, batch_size=cfg.BATCH_SIZE, amp=self.amp)


# %% [markdown]
# A batch is augmented and mixed where the network is. What is done to which image was drawn from
# the seed and the image's position in the epoch, so nothing random has to be remembered.


# %%
def augment_batch(trainer: Trainer, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:
    """Augmented, mixed, normalised images [B, 3, H, W] and their soft targets [B, C]."""
    cfg, spec = trainer.cfg, trainer.model.spec
    first, count = step * cfg.BATCH_SIZE, len(batch.labels)
    plan = draw_augmentation(cfg, draw_uniforms(cfg.SEED, epoch, first, count, AUGMENT_DRAWS))
    asked = plan, train_size(cfg), spec.mean, spec.std, trainer.jitter
    images = apply_augmentation(batch.images, *asked)
    targets = F.one_hot(batch.labels, len(trainer.loss.weight)).to(images.dtype)
    if mixing_active(cfg, epoch):
        mixing = draw_mixing(cfg, epoch, first, count)
        images, targets = mix_images(images, mixing), mix_targets(targets, mixing)
    return images, targets


# %% [markdown]
# Forward and back, in the chosen precision (`AMP`): most products can be computed with 16 bits
# instead of 32, which GPUs, and some CPUs, do much faster. Where the memory is too small for a
# batch, `ACCUMULATE` splits it: the gradients of the parts add up to those of the whole, and it is
# still one step.


# %%
def backward(trainer: Trainer, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Fill the gradients for a batch; returns its summed loss and its number of right answers."""
    parts = trainer.cfg.ACCUMULATE
    losses = right = torch.zeros((), dtype=trainer.meter.sums.dtype, device=trainer.device)
    for part, wanted in zip(images.chunk(parts), targets.chunk(parts), strict=True):
        with precision(trainer.device, trainer.amp):
            scores = trainer.network(part)
            loss = trainer.loss(scores, wanted)
        trainer.scaler.scale(loss / parts).backward()
        losses = losses + loss.detach() * len(part)
        right = right + (scores.detach().argmax(1) == wanted.argmax(1)).sum()
    return losses, right


# %% [markdown]
# The step itself. The order matters: unscale the gradients (float16 needs them scaled up), clip
# their norm to `GRAD_CLIP`, so that no odd batch can throw the weights far off, step, update the
# scale. A batch whose gradients are not finite moves nothing: not the
# weights, not the optimiser, not the average, not the statistics of BatchNorm. Nothing here waits
# for the device; what went wrong is counted there.
#
# The average begins short, or it would remember the random start: its decay grows as
# (1 + n) / (10 + n) with the number of steps n until it reaches `EMA_DECAY`; 0.999 it reaches after
# nine thousand steps only, so on a small set the setting is hardly felt.


# %%
def train_step(trainer: Trainer, batch: Batch, epoch: int, step: int, steps: int) -> None:
    """One optimisation step on one batch, at position (`epoch`, `step`) of `steps`."""
    cfg, model, optimizer, scaler = trainer.cfg, trainer.model, trainer.optimizer, trainer.scaler
    torch.manual_seed(step_seed(cfg.SEED, epoch, step))  # for dropout
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(cfg, group["base_lr"], epoch, step, steps)
    images, targets = trainer.augment(trainer, batch, epoch, step)
    optimizer.zero_grad(set_to_none=True)
    loss, right = trainer.backward(trainer, images, targets)

    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    finite = torch.isfinite(nn.utils.get_total_norm(gradients))
    void_unless(finite, gradients)  # the scaler then skips the step
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), cfg.GRAD_CLIP)
    scaler.step(optimizer)
    scaler.update()

    trainer.guard.restore_unless(finite)
    if trainer.average is not None:
        done = epoch * steps + step
        decay = min(cfg.EMA_DECAY, (1 + done) / (10 + done))
        move_average(trainer.average, model, (1 - decay) * finite)
    trainer.meter.add(step, loss, right, len(images), finite)


# %% [markdown]
# An epoch begins: freeze and thaw what is due.


# %%
def begin_epoch(trainer: Trainer, epoch: int) -> None:
    """Freeze and thaw for `epoch`, and compile again where what trains has changed."""
    cfg, model = trainer.cfg, trainer.model
    set_training_mode(cfg, model, epoch)
    trainer.guard = StatisticsGuard(batch_norms(model))
    thawed = epoch == 0 or thaw_level(cfg, epoch) != thaw_level(cfg, epoch - 1)
    if cfg.COMPILE and (thawed or trainer.network is model):
        torch._dynamo.reset()  # a graph traced before a thaw would train only what it knew
        trainer.network, trainer.jitter = torch.compile(model), torch.compile(jitter_colours)


# %% [markdown]
# #### Validation
#
# Raw and averaged weights are judged on the validation images; the better of the two counts, and is
# kept where it is the best so far.
# The gap between training and validation says whether the network learns or memorises. The loss
# over augmented, mixed images cannot tell; so a fixed part of the training images, as many as there
# are validation images, is evaluated exactly as those are.


# %%
def validate_epoch(
    trainer: Trainer, val: EmotionDataset, progress: Progress, keeper: Keeper
) -> dict[str, float]:
    """The epoch's figures; the better of raw and averaged weights is kept if it is the best yet."""
    networks = {"raw": trainer.model} | ({"ema": trainer.average} if trainer.average else {})
    found = {name: trainer.predict(net, val, progress=name) for name, net in networks.items()}
    source = max(found, key=lambda name: found[name].score(trainer.cfg.MONITOR))
    network, score = networks[source], found[source].score(trainer.cfg.MONITOR)
    about = {"name": network.name, "classes": list(val.classes), "source": source}
    keeper.save_best(progress, score, found[source], {"model": network.state_dict(), **about})

    spread = np.linspace(0, len(trainer.train) - 1, min(len(trainer.train), len(val)))
    seen = trainer.predict(network, trainer.train, positions=spread.round().astype(int))
    figures = {"train_clean_accuracy": seen.accuracy, "gap": seen.accuracy - found[source].accuracy}
    for name, one in found.items():
        prefix = "val" if name == "raw" else "val_ema"
        figures |= {f"{prefix}_{f}": getattr(one, f) for f in ("loss", "accuracy", "macro_f1")}
    return figures


# %% [markdown]
# The start is judged too, as epoch 0: a network that begins as the linear probe (`START`) and never
# gets better than it ends as the probe. After `PATIENCE` epochs without a
# better one training ends (*early stopping*), counted only once all has thawed that will, for each
# thaw first makes things worse before it makes them better.


# %%
def end_epoch(
    trainer: Trainer, val: EmotionDataset, steps: int, progress: Progress, keeper: Keeper
) -> None:
    """Validate, and move `progress` to the next epoch or to the end."""
    cfg, epoch, totals = trainer.cfg, progress.epoch, trainer.meter.read()
    figures = validate_epoch(trainer, val, progress, keeper)
    highest = np.max([rates_at(cfg, epoch, step, steps) for step in range(steps)], axis=0)
    rates = dict(zip(("lr_head", "lr_backbone"), highest.tolist(), strict=True))
    row = {"train_loss": totals.loss, "train_accuracy": totals.accuracy, **figures, **rates,
           "skipped_steps": totals.skipped, "memory_mb": memory_in_use(trainer.device)}  # fmt: skip
    thawed = thaw_level(cfg, epoch) == thaw_level(cfg, cfg.EPOCHS)
    progress.end_epoch(row, totals.images, cfg.EPOCHS, cfg.PATIENCE if thawed else None)
    trainer.meter.sums.zero_()


# %% [markdown]
# #### The whole run
#
# An epoch is step after step, beginning with the first that is still to do, so a resumed run skips
# what it has done. The order of the images is a function of the seed and the epoch, like everything
# random here. `keeper.watch` shows the bar, saves when it is time, and ends the run between two
# steps where you press *stop*.
#
# `fit` puts it together: begin or go on, then epoch after epoch. `Keeper` (`Keeper??` shows it)
# writes checkpoints that are whole or absent, so a run that was killed goes on in the middle of its
# epoch, to the very same bits. What you get back is the best model, not the last one.


# %%
def run_epoch(trainer: Trainer, val: EmotionDataset, progress: Progress, keeper: Keeper) -> None:
    """Train, validate, save and report one epoch, or what is left of it."""
    cfg, train = trainer.cfg, trainer.train
    which, balanced = {"seed": cfg.SEED, "epoch": progress.epoch}, cfg.BALANCE == "sampler"
    order = training_order(train.split.labels, cfg.BATCH_SIZE, balanced=balanced, **which)
    steps = len(order) // cfg.BATCH_SIZE
    slices = batch_slices(order, cfg.BATCH_SIZE, progress.step)
    begin_epoch(trainer, progress.epoch)
    with contextlib.closing(fetch_ahead(train, slices, trainer.device)) as batches:
        for step, batch in keeper.watch(trainer, batches, steps, progress):
            train_step(trainer, batch, progress.epoch, step, steps)
    end_epoch(trainer, val, steps, progress, keeper)
    keeper.end_epoch(trainer, progress, cfg.EPOCHS)


def fit(
    cfg: EnhancedConfig, model: EmotionClassifier, datasets: Mapping[str, EmotionDataset],
    folder: Path, augment: Augment | None = None, make_trainer: Callable[..., Trainer] = Trainer,
    make_keeper: Callable[..., Keeper] = Keeper,
) -> FitResult:  # fmt: skip
    """Train `model`, or go on with the run in `folder`, and leave the best weights in `model`.

    Raises ``ConfigError`` for another run's folder, ``CheckpointError`` where nothing can be read
    or kept, ``DivergedError``, ``DeviceMemoryError``, and ``Stopped`` once stopped and saved.
    """
    set_deterministic(cfg.DETERMINISTIC)
    when = cfg.CHECKPOINT_EVERY, cfg.CHECKPOINT_STEPS, cfg.CHECKPOINT_KEEP, cfg.ON_SAVE_ERROR
    keeper = make_keeper(folder, *when, cfg.MAX_BAD_STEPS)
    with keeper.lock(), memory_advice(cfg.BATCH_SIZE, cfg.ACCUMULATE, train_size(cfg)):
        saved = keeper.begin(cfg, model, datasets)
        trainer = make_trainer(cfg, model, datasets["train"], (saved or {}).get("amp"), augment)
        progress = keeper.resume(trainer, saved)
        if not progress.history:
            start = validate_epoch(trainer, datasets["val"], progress, keeper)
            progress.history.append({"epoch": 0, **start})
            keeper.report(progress, cfg.EPOCHS)
        with torch.autograd.set_detect_anomaly(cfg.DEBUG):
            while not progress.finished:
                run_epoch(trainer, datasets["val"], progress, keeper)
        model.load_state_dict(keeper.load_best(progress)["model"])
        model.eval().requires_grad_(False)
        return progress.result(trainer.amp, device_name(trainer.device))
