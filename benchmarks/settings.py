"""The configuration that the measurements use."""

from typing import Any

import torch

from benchmarks.plan import Plan
from emotion_transfer.config import EnhancedConfig, make_config


def bench_config(plan: Plan, device: torch.device, **overrides: Any) -> EnhancedConfig:
    """The defaults at the size of `plan`, from random weights, all layers training from epoch 0."""
    return make_config({
        "DATASET": "files", "MODEL_NAME": plan.model, "WEIGHTS": None, "IMG_SIZE": plan.train_size,
        "BATCH_SIZE": plan.epoch_batch, "WARMUP_EPOCHS": 0, "THAW_EPOCHS": (0, 0),
        "CHECKPOINT_EVERY": 1e9, "DEVICE": device.type, **overrides,
    })  # fmt: skip
