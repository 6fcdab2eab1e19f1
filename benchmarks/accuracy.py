"""Does the fast path cost accuracy? ``python -m benchmarks.accuracy --data DIR``.

Trains pairs of runs that differ in one thing: ours augments cached images in batches on the device;
its twin opens every file anew and augments it by torchvision's transforms on Pillow images. The
engine, its settings, the order of the images, MixUp and CutMix are the same, and within a pair so
are the seed and the head's first weights. DIR is a folder written by
``python -m emotion_transfer.prepare``.

The twin is evaluated by torchvision's Resize and CenterCrop, ours from its cache. An interrupted
comparison goes on where it stopped if ``--work`` names the same folder.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision import transforms as v1
from tqdm.auto import tqdm

from benchmarks.peers import Transform, usual_transform
from benchmarks.results import describe_machine, describe_versions
from emotion_transfer import engine
from emotion_transfer.cache import cache_size, check_images
from emotion_transfer.config import EnhancedConfig, make_config, parse_setting, resolve_path
from emotion_transfer.data import Split, load_data
from emotion_transfer.engine import Trainer, fit
from emotion_transfer.evaluation import predict
from emotion_transfer.loader import Batch, EmotionDataset, make_datasets
from emotion_transfer.model import BACKBONES, EmotionClassifier, build_model
from emotion_transfer.precision import choose_device, precision
from emotion_transfer.seeding import seed_everything

ARMS = ("ours", "torchvision")
PLACES = ("DATA_ROOT", "IMAGES_ROOT", "CACHE_DIR", "OUTPUT_ROOT")  # of no interest elsewhere


def open_images(split: Split, positions: Sequence[int], transform: Transform) -> Tensor:
    """Images [B, 3, H, W] of `positions`, opened and transformed one by one."""
    images = []
    for position in positions:
        with Image.open(split.path(position)) as image:
            images.append(transform(image.convert("RGB")))
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


@contextmanager
def torchvision_augmentation(split: Split, cfg: EnhancedConfig) -> Iterator[None]:
    """Let the engine train on images that are opened and augmented by torchvision."""
    transform, original = usual_transform(cfg), engine.augment_batch
    positions: list[int] = []

    def augment_batch(trainer: Trainer, batch: Batch, *place: int) -> tuple[Tensor, Tensor]:
        positions[:] = batch.positions.tolist()
        return original(trainer, batch, *place)

    def apply_augmentation(images: Tensor, *_: Any) -> Tensor:
        return open_images(split, positions, transform).to(images.device)

    with (
        mock.patch.object(engine, "augment_batch", augment_batch),
        mock.patch.object(engine, "apply_augmentation", apply_augmentation),
    ):
        yield


@torch.no_grad()
def torchvision_accuracy(
    cfg: EnhancedConfig, model: EmotionClassifier, dataset: EmotionDataset, amp: str
) -> float:
    """Accuracy on images that torchvision opened, resized, cropped and normalised."""
    spec = BACKBONES[cfg.MODEL_NAME]
    transform = v1.Compose([
        v1.Resize(cache_size(cfg)), v1.CenterCrop(cfg.IMG_SIZE),
        v1.ToTensor(), v1.Normalize(spec.mean, spec.std),
    ])  # fmt: skip
    device, right = next(model.parameters()).device, 0
    model.eval()
    for first in range(0, len(dataset), cfg.BATCH_SIZE):
        positions = range(first, min(first + cfg.BATCH_SIZE, len(dataset)))
        with precision(device, amp):
            scores = model(open_images(dataset.split, positions, transform).to(device))
        labels = torch.from_numpy(dataset.split.labels[positions])
        right += int((scores.argmax(1).cpu() == labels).sum())
    return right / len(dataset)


def train_arm(
    cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], arm: str, folder: Path
) -> float:
    """Test accuracy in percent of one run."""
    seed_everything(cfg.SEED)
    model = build_model(cfg, len(datasets["train"].classes))
    if arm == "ours":
        result = fit(cfg, model, datasets, folder)
        return 100 * predict(cfg, model, datasets["test"], amp=result.amp).accuracy
    with torchvision_augmentation(datasets["train"].split, cfg):
        result = fit(cfg, model, datasets, folder)
    return 100 * torchvision_accuracy(cfg, model, datasets["test"], result.amp)


def paired_interval(differences: Sequence[float], level: float = 0.95) -> dict[str, float | None]:
    """Mean of paired differences with Student's t interval; no interval for a single pair."""
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    margin = (
        stats.t.ppf(0.5 + level / 2, count - 1) * np.std(differences, ddof=1) / math.sqrt(count)
    )
    return {"mean": mean, "low": float(mean - margin), "high": float(mean + margin)}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="DATA_ROOT")
    parser.add_argument("--seeds", type=int, default=5, help="pairs of runs")
    parser.add_argument("--work", type=Path, help="where to keep cache and runs")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/accuracy.json"))
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    return parser


def compare(cfg: EnhancedConfig, seeds: int, work: Path) -> dict[str, Any]:
    """Accuracies of both arms for every seed, and the interval of their difference."""
    checked = check_images(cfg, load_data(cfg))
    datasets = make_datasets(cfg, checked)
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with tqdm(total=seeds * len(ARMS), desc="runs", unit="run") as bar:
        for seed in range(seeds):
            seeded = make_config({**vars(cfg), "SEED": seed})
            for arm in ARMS:
                folder = work / f"{arm}-{seed}" / "checkpoints"
                found[arm].append(train_arm(seeded, datasets, arm, folder))
                bar.update()
    pairs = list(zip(found["ours"], found["torchvision"], strict=True))
    return {
        "data": resolve_path(cfg.DATA_ROOT).name,
        "settings": {name: v for name, v in vars(cfg).items() if name not in PLACES},
        "images": {name: len(dataset) for name, dataset in datasets.items()},
        "test_accuracy_percent": found,
        "difference_points": paired_interval([ours - theirs for ours, theirs in pairs]),
    }


def main(arguments: list[str] | None = None) -> int:
    """Compare, print and write the result."""
    args = make_parser().parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        cfg = make_config({
            "MODEL_NAME": "efficientnet_lite0", "IMG_SIZE": 112, "EPOCHS": 8, "WARMUP_EPOCHS": 1,
            "LR_BACKBONE": 3e-4, "MIX_OFF_EPOCHS": 2, "AUDIT": False,
            **dict(map(parse_setting, args.set)),
            "DATA_ROOT": str(args.data), "CACHE_DIR": str(work / "cache"),
        })  # fmt: skip
        result = compare(cfg, args.seeds, work)
    result |= {
        "machine": describe_machine(choose_device(cfg)), "versions": describe_versions(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["difference_points"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
