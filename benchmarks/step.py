"""Part "step": the training step alone, on synthetic tensors, against timm's and torchvision's."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import Row, interleave, make_row, synchronise
from benchmarks.peers import make_timm_step, make_torchvision_step
from benchmarks.pictures import CLASSES
from benchmarks.plan import Plan
from benchmarks.settings import bench_config
from emotion_toolbox.batches import Batch, EmotionDataset
from emotion_toolbox.cache import ChosenPixels
from emotion_toolbox.device import cpu_has_bf16
from emotion_toolbox.tables import Split
from emotion_transfer.config import EnhancedConfig, cache_size
from emotion_transfer.engine import Trainer, begin_epoch, train_step
from emotion_transfer.model import build_model

# What timm's step does, by our settings: all BatchNorm layers train, one linear layer on top.
LIKE_TIMM = {"HEAD": "linear", "BACKBONE_BATCHNORM": "train", "BALANCE": "none"}
STEPS_A_LOG = 20


def random_batch(cfg: EnhancedConfig, device: torch.device, count: int) -> Batch:
    """Random uint8 images on `device`, as ``fetch_ahead`` leaves them there."""
    generator = torch.Generator().manual_seed(0)
    side = cache_size(cfg)
    images = torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count) % len(CLASSES)
    return Batch(images.to(device).permute(0, 3, 1, 2), labels.to(device), torch.arange(count))


class NoPixels(ChosenPixels):
    """A source that is never read."""

    def __init__(self) -> None:
        pass


def label_only_dataset(count: int) -> EmotionDataset:
    """What a ``Trainer`` needs to know of a data set: its labels."""
    labels = np.arange(count) % len(CLASSES)
    split = Split("train", Path("train.csv"), Path(), [""] * count, labels, np.arange(count))
    return EmotionDataset(split, CLASSES, NoPixels())


def ready_trainer(
    cfg: EnhancedConfig, amp: str, prepared: tuple[Tensor, Tensor] | None = None
) -> Trainer:
    """A trainer of ours; with `prepared` images and targets, it does no augmentation."""
    augment = None if prepared is None else lambda *_: prepared
    model, train = build_model(cfg, len(CLASSES)), label_only_dataset(cfg.BATCH_SIZE * 8)
    trainer = Trainer(cfg, model, train, amp, augment)
    begin_epoch(trainer, 0)
    return trainer


def our_step(trainer: Trainer, batch: Batch) -> Callable[[], None]:
    """``train_step`` on `batch`, over and over."""
    number = -1

    def step() -> None:
        nonlocal number
        number = (number + 1) % 1000
        train_step(trainer, batch, 0, number, 1000)
        if number % STEPS_A_LOG == 0:
            trainer.meter.read()  # as the epoch does

    return step


def make_steps(plan: Plan, device: torch.device, amp: str, compiled: bool) -> dict[str, Any]:
    """The steps to compare in one precision, by name."""
    size = {"BATCH_SIZE": plan.step_batch, "COMPILE": compiled}
    same = bench_config(plan, device, **size, **LIKE_TIMM)
    ours = bench_config(plan, device, **size)
    batch = random_batch(ours, device, plan.step_batch)
    images = torch.randn(plan.step_batch, 3, plan.train_size, plan.train_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    targets = F.one_hot(batch.labels, len(CLASSES)).float()
    prepared = images, targets
    steps: dict[str, Callable[[], None]] = {
        "ours, as timm's": our_step(ready_trainer(same, amp, prepared), batch),
        "timm": make_timm_step(same, images, targets, amp, compiled=compiled),
        "torchvision": make_torchvision_step(
            same, images, batch.labels, len(CLASSES), amp, compiled=compiled
        ),
        "ours, as it ships, without augmentation": our_step(
            ready_trainer(ours, amp, prepared), batch
        ),
        "ours, as it ships": our_step(ready_trainer(ours, amp), batch),
    }
    if not compiled:
        head = bench_config(plan, device, **size, THAW_EPOCHS=(1, 1))
        steps["ours, head alone (frozen backbone)"] = our_step(ready_trainer(head, amp), batch)
    return steps


def rate_of_steps(
    step: Callable[[], None], count: int, batch: int, device: torch.device
) -> Callable[[], float]:
    """Images a second of `count` steps."""

    def measure() -> float:
        synchronise(device)
        start = time.perf_counter()
        for _ in range(count):
            step()
        synchronise(device)
        return count * batch / (time.perf_counter() - start)

    return measure


def largest_costs(plan: Plan, device: torch.device, amp: str, count: int = 8) -> list[Row]:
    """The operations that our step as it ships spends most device time in."""
    cfg = bench_config(plan, device, BATCH_SIZE=plan.step_batch)
    step = our_step(ready_trainer(cfg, amp), random_batch(cfg, device, plan.step_batch))
    cuda = device.type == "cuda"
    for _ in range(3):
        step()
    synchronise(device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        for _ in range(3):
            step()
        synchronise(device)
    own = "self_device_time_total" if cuda else "self_cpu_time_total"
    found = [e for e in profiler.key_averages() if e.key.startswith("aten::")]
    total = sum(getattr(e, own) for e in found) or 1
    found.sort(key=lambda e: getattr(e, own), reverse=True)
    return [{"operation": e.key, "share": getattr(e, own) / total} for e in found[:count]]


def precisions(device: torch.device) -> list[str]:
    """float32 and, last, what the device does best; a CPU without units for bfloat16 only that."""
    if device.type != "cuda":
        return ["off", "bf16"] if cpu_has_bf16() else ["off"]
    native = torch.cuda.is_bf16_supported(including_emulation=False)
    return ["off", "bf16" if native else "fp16"]


def run(plan: Plan, device: torch.device, work: Path) -> dict[str, Any]:
    """Measure all steps in each precision, eager and (on a GPU) compiled."""
    torch.backends.cudnn.benchmark = True  # as ``fit`` does
    rows: list[Row] = []
    variants = [(amp, False) for amp in precisions(device)]
    if plan.compiled_steps:
        variants.append((precisions(device)[-1], True))
    for amp, compiled in variants:
        steps = make_steps(plan, device, amp, compiled)
        paths = {
            name: rate_of_steps(step, plan.steps, plan.step_batch, device)
            for name, step in steps.items()
        }
        label = f"step, {amp}{', compiled' if compiled else ''}"
        for name, rates in interleave(paths, plan.repeats, label).items():
            labels = {"step": name, "precision": amp, "compiled": compiled}
            rows.append(make_row(labels, "images/s", rates))
        del steps, paths
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"rows": rows, "largest_costs": largest_costs(plan, device, precisions(device)[-1])}
