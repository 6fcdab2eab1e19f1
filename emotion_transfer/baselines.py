"""Baselines trained in the same run, on the same images, and judged by the same test."""

# %% [markdown]
# Four baselines, each trained here, in this run:
#
# * **majority**: always the most frequent class; costs nothing;
# * **linear probe**: logistic regression on the features of the *untouched* backbone; costs one
#   pass over the images. A fine-tune that does not beat it is not worth its time;
# * **from random weights**: the same network without ImageNet, for a few epochs, all of it trained
#   from the first step at the head's rate: it shows where the curve begins, not where it would end;
# * **plain fine-tune**: the same backbone, everything trained from the first step at one rate, with
#   crops and flips only. That rate, 1e-4, is not tuned: a part of the distance to it may be that.

# %%
import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from emotion_toolbox.keeper import keep_result
from emotion_toolbox.probes import predict
from emotion_toolbox.settings import settings_hash
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.engine import fit
from emotion_transfer.model import Answer, Datasets, build_model, find_probe


def majority(cfg: EnhancedConfig, datasets: Datasets, folder: Path) -> Answer:
    """The class frequencies of the training split as the answer to every image."""
    train, test = datasets["train"], datasets["test"]
    counts = np.bincount(train.split.labels, minlength=len(train.classes))
    answer = np.tile(counts / counts.sum(), (len(test), 1))
    return {"probabilities": answer, "note": f"always {train.classes[int(counts.argmax())]}"}


# %% [markdown]
# The probe is the one with which training may begin (`START`). The other two run through the engine
# above with other settings: the plain fine-tune switches off most of what this notebook adds (the
# cosine, weight decay and clipping stay).


# %%
def scratch_config(cfg: EnhancedConfig) -> EnhancedConfig:
    """The same recipe from random weights: all of it trains from the start, at the head's rate."""
    return dataclasses.replace(
        cfg, WEIGHTS=None, INIT_FROM=None, START="random", EPOCHS=min(cfg.EPOCHS, 4),
        LR_BACKBONE=cfg.LR_HEAD, BACKBONE_BATCHNORM="train", WARMUP_EPOCHS=0, THAW_EPOCHS=(0, 0),
    )  # fmt: skip


def plain_config(cfg: EnhancedConfig) -> EnhancedConfig:
    """The settings of the plain fine-tune that belongs to `cfg`."""
    off = ("MIXUP_ALPHA", "CUTMIX_ALPHA", "MIX_PROB", "LABEL_SMOOTHING", "EMA_DECAY", "DROPOUT",
           "ROTATION", "BRIGHTNESS", "CONTRAST", "SATURATION", "HUE", "BLUR_PROB",
           "ERASE_PROB")  # fmt: skip
    without: dict[str, Any] = dict.fromkeys(off, 0.0)
    return dataclasses.replace(
        cfg, **without, START="random", HEAD="linear", LR_HEAD=1e-4, LR_BACKBONE=1e-4,
        BALANCE="none", TRAIN_SIZE=None, BACKBONE_BATCHNORM="train", WARMUP_EPOCHS=0,
        THAW_EPOCHS=(0, 0), PATIENCE=cfg.EPOCHS, INIT_FROM=None,
    )  # fmt: skip


def trained(cfg: EnhancedConfig, datasets: Datasets, folder: Path) -> Answer:
    """What a network trained as `cfg` says answers, with its validation accuracy by epoch."""
    model = build_model(cfg, len(datasets["train"].classes))
    result = fit(cfg, model, datasets, folder / "checkpoints")
    ask = partial(predict, size=cfg.IMG_SIZE, batch_size=cfg.BATCH_SIZE, amp=result.amp)
    p = ask(model, datasets["test"], progress="testing").probabilities
    note, curve = f"best epoch {result.best_epoch} of {cfg.EPOCHS}", result.history["val_accuracy"]
    return {"probabilities": p, "note": note, "curve": curve.to_numpy()}


# %% [markdown]
# A baseline that is done is kept beside the run, and read back as long as neither the settings nor
# the images have changed.

# %%
BASELINE_MAKERS: dict[str, Callable[[EnhancedConfig, Datasets, Path], Answer]] = {
    "majority": majority,
    "linear_probe": find_probe,
    "from_scratch": lambda cfg, data, folder: trained(scratch_config(cfg), data, folder),
    "plain_finetune": lambda cfg, data, folder: trained(plain_config(cfg), data, folder),
}


def run_baseline(name: str, cfg: EnhancedConfig, datasets: Datasets, folder: Path) -> Answer:
    """Train baseline `name`, or read its answer from `folder` where it is kept."""
    key = "-".join([settings_hash(cfg), *(data.fingerprint() for data in datasets.values())])
    make = BASELINE_MAKERS[name]
    found = keep_result(folder / f"{name}.npz", key, lambda: make(cfg, datasets, folder / name))
    print(f"{name.replace('_', ' ')}: {found['note']}")
    return found
