"""A network, a data set and settings so small that whole runs take a second.

Importable from a test and from a process of its own, because runs are killed there.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from emotion_toolbox import backbones
from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.sample import load_data
from emotion_toolbox.tables import EmotionData, Split
from emotion_transfer.commands.train import open_data
from emotion_transfer.config import EnhancedConfig, make_config, profile_for

torch.set_num_threads(1)  # for so little work, threads cost more than they bring

CLASSES = ("calm", "joy", "rage")  # those of the `tiny_root` fixture
COUNTS = {"train": 8, "val": 4, "test": 4}  # a class
FEATURES = 8


class SmallNetwork(nn.Module):
    """Two convolutions with BatchNorm, and dropout in the backbone as EfficientNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, FEATURES, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(FEATURES)
        self.drop = nn.Dropout(0.1)
        self.classifier = nn.Linear(FEATURES, 1000)

    def forward(self, images):
        x = torch.relu(self.bn1(self.conv1(images)))
        x = torch.relu(self.bn2(self.conv2(x)))
        return self.classifier(self.drop(x.mean((2, 3))))


SMALL_SPEC = backbones.BackboneSpec(
    FEATURES,
    (0.5, 0.4, 0.6),
    (0.2, 0.3, 0.25),
    {"first": ("conv1", "bn1"), "last": ("drop", "conv2", "bn2")},
    ("last",),
)


def install_small_network(patch: pytest.MonkeyPatch) -> None:
    """Make "small" one of the models, until `patch` is undone; its weights are random."""
    original = backbones.make_imagenet_model
    patch.setitem(backbones.BACKBONES, "small", SMALL_SPEC)
    patch.setattr(
        backbones,
        "make_imagenet_model",
        lambda name: SmallNetwork() if name == "small" else original(name),
    )


def small_config(folder: Path, **overrides) -> EnhancedConfig:
    """Four epochs of six steps in which head, last stage and all of it train in turn."""
    settings = {
        "DATASET": "files", "DATA_ROOT": str(folder / "tiny"), "CACHE_DIR": str(folder / "cache"),
        "START": "probe",
        "OUTPUT_ROOT": str(folder / "outputs"), "MODEL_NAME": "small", "WEIGHTS": None,
        "IMG_SIZE": 32, "BATCH_SIZE": 4, "EPOCHS": 4, "THAW_EPOCHS": (1, 2), "MIX_OFF_EPOCHS": 1,
        "LR_HEAD": 0.1, "LR_BACKBONE": 0.02, "DROPOUT": 0.1, "EMA_DECAY": 0.9,
        "NUM_WORKERS": 1, "DEVICE": "cpu", "AMP": "off", "BOOTSTRAP": 100,
    }  # fmt: skip
    return make_config({**settings, **overrides})


def as_arguments(cfg: EnhancedConfig) -> list[str]:
    """What ``--set`` is given for a command to choose `cfg`, whatever profile the data have."""
    profile = profile_for(0, cfg.IMG_SIZE, synthetic=False)
    return [
        f"{f.name}={getattr(cfg, f.name)}"
        for f in dataclasses.fields(cfg)
        if getattr(cfg, f.name) != f.default or f.name in profile
    ]


def draw_pixels(seed: int, label: int, size: int) -> np.ndarray:
    """An image whose colour leans to its class: uint8 [size, size, 3]."""
    rng = np.random.default_rng([seed, label])
    centre = np.array([[70, 90, 200], [220, 190, 60], [190, 50, 50]])[label]
    noise = rng.normal(0, 50, (size, size, 3)) + rng.normal(0, 40, 3)
    return (centre + noise).clip(0, 255).astype(np.uint8)


def listed(cfg: EnhancedConfig) -> EmotionData:
    """The splits that `cfg` points to."""
    return load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT)


def file_datasets(cfg: EnhancedConfig) -> dict[str, EmotionDataset]:
    """The datasets of `cfg` as a run makes them, from files."""
    return open_data(cfg, listed(cfg))[1]


class ArrayPixels:
    """Images that lie in memory."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __getitem__(self, index):
        return self.array[index]


def memory_datasets(size: int = 37, counts=None) -> dict[str, EmotionDataset]:
    """The same kind of data without any file."""
    datasets = {}
    for number, (name, count) in enumerate((counts or COUNTS).items()):
        labels = np.arange(count * len(CLASSES)) % len(CLASSES)
        pixels = [draw_pixels(100 * number + i, label, size) for i, label in enumerate(labels)]
        files = [f"{name}/{i}.png" for i in range(len(labels))]
        split = Split(name, Path(f"{name}.csv"), Path(), files, labels, np.arange(len(labels)) + 2)
        datasets[name] = EmotionDataset(split, CLASSES, ArrayPixels(np.stack(pixels)))
    return datasets
