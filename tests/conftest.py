"""Shared fixtures: a tiny data set in the form of the data contract, and a configuration for it."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from emotion_transfer.config import EnhancedConfig, make_config

together = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))  # processes that share the cores
torch.set_num_threads(max(1, min(2, torch.get_num_threads() // together)))
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it only once

TINY_CLASSES = ("calm", "joy", "rage")
TINY_COUNTS = {"train": 8, "val": 4, "test": 4}  # images a class


def draw_noise(rng: np.random.Generator, label: int, size: tuple[int, int]) -> Image.Image:
    """A noisy picture of `size` (width, height) whose mean colour depends on `label`."""
    width, height = size
    base = np.full((height, width, 3), 70.0)
    base[..., label % 3] = 180
    return Image.fromarray(np.clip(rng.normal(base, 30), 0, 255).astype(np.uint8))


def write_tiny_data(root: Path, seed: int = 0) -> Path:
    """Write train, val and test of three classes, no two images alike, and return `root`."""
    rng = np.random.default_rng(seed)
    for split, count in TINY_COUNTS.items():
        rows = ["path,label"]
        (root / split).mkdir(parents=True)
        for i in range(count * len(TINY_CLASSES)):
            label = i % len(TINY_CLASSES)
            path = f"{split}/{TINY_CLASSES[label]}_{i:03d}.{'png' if i % 4 == 3 else 'jpg'}"
            width, height = rng.integers(40, 70, 2).tolist()
            draw_noise(rng, label, (width, height)).save(root / path, quality=90)
            rows.append(f"{path},{TINY_CLASSES[label]}")
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    numbers = {name: i for i, name in enumerate(TINY_CLASSES)}
    (root / "label_map.json").write_text(json.dumps(numbers), encoding="utf-8")
    return root


@pytest.fixture(scope="session")
def tiny_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny data set, drawn once; read it only, and change a copy (`tiny_root`)."""
    return write_tiny_data(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def tiny_root(tiny_template: Path, tmp_path: Path) -> Path:
    """A test's own folder with train.csv, val.csv, test.csv (3 classes, 24, 12, 12 images)."""
    root = tmp_path / "tiny"
    shutil.copytree(tiny_template, root)
    return root


@pytest.fixture
def tiny_config(tiny_root: Path, tmp_path: Path) -> Callable[..., EnhancedConfig]:
    """A function of overrides that gives a small, quick configuration over `tiny_root`."""

    def make(**overrides: Any) -> EnhancedConfig:
        return make_config(
            {
                "DATASET": "files",
                "DATA_ROOT": str(tiny_root),
                "CACHE_DIR": str(tmp_path / "cache"),
                "OUTPUT_ROOT": str(tmp_path / "outputs"),
                "IMG_SIZE": 32,
                "BATCH_SIZE": 4,
                "MODEL_NAME": "efficientnet_lite0",
                "NUM_WORKERS": 1,
                **overrides,
            }
        )

    return make
