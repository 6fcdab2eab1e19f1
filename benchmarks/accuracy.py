"""Does the fast path cost accuracy? ``python -m benchmarks.accuracy --data DIR``.

Trains pairs of runs that differ in one thing: ours augments cached images in batches on the device;
its twin opens every file anew and augments it by torchvision's transforms on Pillow images. The
engine, its settings, the order of the images, MixUp and CutMix are the same, and within a pair so
are the seed and the head's first weights. DIR is a folder written by
``python -m emotion_transfer prepare``.

The twin is evaluated by torchvision's Resize and CenterCrop, ours from its cache: that is FIT
"crop", so no other is taken. An interrupted comparison goes on where it stopped if ``--work`` names
the same folder.
"""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import stats
from torch import Tensor
from torchvision import transforms as v1
from tqdm.auto import tqdm

from benchmarks.peers import Transform, usual_transform
from benchmarks.results import describe_machine, describe_versions
from emotion_toolbox.batches import Batch, EmotionDataset
from emotion_toolbox.device import choose_device, precision, seed_everything
from emotion_toolbox.files import resolve_path
from emotion_toolbox.probes import predict
from emotion_toolbox.sample import load_data
from emotion_toolbox.tables import Split
from emotion_transfer.commands.settings import parse_setting
from emotion_transfer.commands.train import open_data
from emotion_transfer.config import EnhancedConfig, cache_size, make_config
from emotion_transfer.engine import Augment, Trainer, fit
from emotion_transfer.mixing import draw_mixing, mix_images, mix_targets, mixing_active
from emotion_transfer.model import EmotionClassifier, build_model

ARMS = ("ours", "torchvision")
PLACES = ("DATA_ROOT", "IMAGES_ROOT", "CACHE_DIR", "OUTPUT_ROOT")  # of no interest elsewhere


def open_images(split: Split, positions: Sequence[int], transform: Transform) -> Tensor:
    """Images [B, 3, H, W] of `positions`, opened and transformed one by one."""
    images = []
    for position in positions:
        with Image.open(split.path(position)) as image:
            images.append(transform(image.convert("RGB")))
    return torch.stack(images).contiguous(memory_format=torch.channels_last)


def torchvision_augmentation(cfg: EnhancedConfig) -> Augment:
    """What ``augment_batch`` does, with images that torchvision opens and augments one by one."""
    transform = usual_transform(cfg)

    def augment(trainer: Trainer, batch: Batch, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        opened = open_images(trainer.train.split, batch.positions.tolist(), transform)
        images = opened.to(trainer.device)
        targets = F.one_hot(batch.labels, len(trainer.loss.weight)).to(images.dtype)
        if mixing_active(cfg, epoch):
            mixing = draw_mixing(cfg, epoch, step * cfg.BATCH_SIZE, len(batch.labels))
            images, targets = mix_images(images, mixing), mix_targets(targets, mixing)
        return images, targets

    return augment


@torch.no_grad()
def torchvision_accuracy(
    cfg: EnhancedConfig, model: EmotionClassifier, dataset: EmotionDataset, amp: str
) -> float:
    """Accuracy on images that torchvision opened, resized, cropped and normalised."""
    spec = model.spec
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
    test = datasets["test"]
    if arm == "ours":
        amp = fit(cfg, model, datasets, folder).amp
        found = predict(model, test, size=cfg.IMG_SIZE, batch_size=cfg.BATCH_SIZE, amp=amp)
        return 100 * found.accuracy
    amp = fit(cfg, model, datasets, folder, torchvision_augmentation(cfg)).amp
    return 100 * torchvision_accuracy(cfg, model, test, amp)


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
    _, datasets = open_data(cfg, load_data(cfg.DATASET, cfg.DATA_ROOT, cfg.IMAGES_ROOT))
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
    parser = make_parser()
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        work = args.work or Path(scratch)
        cfg = make_config({
            "MODEL_NAME": "efficientnet_lite0", "IMG_SIZE": 112, "EPOCHS": 8, "WARMUP_EPOCHS": 1,
            "LR_BACKBONE": 3e-4, "MIX_OFF_EPOCHS": 2,
            **dict(parse_setting(EnhancedConfig, text) for text in args.set),
            "DATA_ROOT": str(args.data), "CACHE_DIR": str(work / "cache"),
        })  # fmt: skip
        if cfg.FIT != "crop":
            parser.error(f'FIT={cfg.FIT} is not what the twin does; leave it at "crop"')
        result = compare(cfg, args.seeds, work)
    result |= {
        "machine": describe_machine(choose_device(cfg.DEVICE)), "versions": describe_versions(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["difference_points"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
