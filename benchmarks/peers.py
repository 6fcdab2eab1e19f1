"""What others do: the usual notebook's pipeline, torchvision's presets, timm's loader and steps."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm.data
import timm.loss
import timm.optim
import timm.utils
import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as v1

from emotion_toolbox.backbones import BACKBONES, IMAGENET_MEAN, IMAGENET_STD
from emotion_toolbox.device import precision
from emotion_toolbox.pixels import BLUR_RADIUS
from emotion_toolbox.tables import Split
from emotion_transfer.augment import BLUR_SIGMA, CROP_RATIO, ERASE_AREA, ERASE_RATIO
from emotion_transfer.config import EnhancedConfig

Transform = Callable[[Image.Image], Tensor]
TIMM: Any = timm  # most of it has no types


class PillowDataset(Dataset[tuple[Tensor, int]]):
    """One image at a time, as most notebooks read them."""

    def __init__(self, split: Split, transform: Transform) -> None:
        self.split, self.transform = split, transform

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.split.path(index)) as image:
            return self.transform(image.convert("RGB")), int(self.split.labels[index])


def usual_transform(cfg: EnhancedConfig) -> Transform:
    """The augmentation of `cfg` by torchvision's transforms on Pillow images."""
    blur = v1.GaussianBlur(2 * BLUR_RADIUS + 1, BLUR_SIGMA)
    ratio = (1 / CROP_RATIO, CROP_RATIO)
    spec = BACKBONES[cfg.MODEL_NAME]
    chain: Transform = v1.Compose([
        v1.RandomResizedCrop(cfg.IMG_SIZE, cfg.CROP_SCALE, ratio),
        v1.RandomHorizontalFlip(cfg.FLIP_PROB),
        v1.RandomRotation(cfg.ROTATION, v1.InterpolationMode.BILINEAR),
        v1.ColorJitter(cfg.BRIGHTNESS, cfg.CONTRAST, cfg.SATURATION, cfg.HUE),
        v1.RandomApply([blur], cfg.BLUR_PROB),
        v1.ToTensor(),
        v1.Normalize(spec.mean, spec.std),
        v1.RandomErasing(cfg.ERASE_PROB, ERASE_AREA, ERASE_RATIO),
    ])  # fmt: skip
    return chain


def preset_transform(size: int, *, recipe: bool) -> Transform:
    """``ClassificationPresetTrain`` of torchvision's references: its defaults, or the new recipe.

    The recipe adds TrivialAugment and random erasing. Nothing here rotates, blurs or jitters hue
    unless TrivialAugment draws it.
    """
    steps: list[Any] = [v1.RandomResizedCrop(size), v1.RandomHorizontalFlip(0.5)]
    steps += [v1.TrivialAugmentWide()] if recipe else []
    steps += [v1.PILToTensor(), v1.ConvertImageDtype(torch.float)]
    steps += [v1.Normalize(IMAGENET_MEAN, IMAGENET_STD)]
    steps += [v1.RandomErasing(0.1)] if recipe else []
    chain: Transform = v1.Compose(steps)
    return chain


def timm_loader(root: Path, size: int, batch: int, *, recipe: bool) -> DataLoader[Any]:
    """timm's loader over a folder of classes, in this process: its defaults, or RandAugment."""
    # no mstd: its larger magnitudes ask Pillow to posterise to 0 bits, which Pillow 13 refuses
    extra: dict[str, Any] = {"auto_augment": "rand-m9-inc1", "re_prob": 0.25} if recipe else {}
    loader: DataLoader[Any] = TIMM.data.create_loader(
        TIMM.data.ImageDataset(str(root)), (3, size, size), batch, is_training=True,
        num_workers=0, persistent_workers=False, use_prefetcher=False,
        device=torch.device("cpu"), **extra,
    )  # fmt: skip
    return loader


def make_timm_step(
    cfg: EnhancedConfig, images: Tensor, targets: Tensor, amp: str, *, compiled: bool
) -> Callable[[], None]:
    """One step as timm's ``train.py`` takes it: channels_last, clipping, ModelEmaV3."""
    device = images.device
    name = {"efficientnet_lite0": "tf_efficientnet_lite0"}.get(cfg.MODEL_NAME, cfg.MODEL_NAME)
    model = TIMM.create_model(name, num_classes=targets.shape[1])
    model = model.to(device, memory_format=torch.channels_last).train()
    optimizer = TIMM.optim.create_optimizer_v2(
        model, opt="adamw", lr=cfg.LR_BACKBONE, weight_decay=cfg.WEIGHT_DECAY, fused=True
    )
    ema = TIMM.utils.ModelEmaV3(model, decay=cfg.EMA_DECAY)
    network = torch.compile(model) if compiled else model
    scaler = TIMM.utils.NativeScaler() if amp == "fp16" else None
    criterion = TIMM.loss.SoftTargetCrossEntropy()
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        with precision(device, amp):
            loss = criterion(network(images), targets)
        optimizer.zero_grad()
        if scaler is not None:
            scaler(loss, optimizer, clip_grad=cfg.GRAD_CLIP, parameters=model.parameters())
        else:
            loss.backward()
            TIMM.utils.dispatch_clip_grad(model.parameters(), cfg.GRAD_CLIP)
            optimizer.step()
        ema.update(model, step=count)

    return step


def make_torchvision_step(
    cfg: EnhancedConfig, images: Tensor, labels: Tensor, classes: int, amp: str, *, compiled: bool
) -> Callable[[], None]:
    """One step as torchvision's reference takes it: NCHW, and the loss read every time.

    (AdamW instead of its SGD, so that all optimise alike.)
    """
    device = images.device
    images = images.contiguous()
    model = torchvision_network(cfg, classes).to(device).train()
    network = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), cfg.LR_BACKBONE)
    scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
    criterion = nn.CrossEntropyLoss(label_smoothing=cfg.LABEL_SMOOTHING)

    def step() -> None:
        with precision(device, amp):
            loss = criterion(network(images), labels)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()

    return step


def torchvision_network(cfg: EnhancedConfig, classes: int) -> nn.Module:
    """The network as notebooks build it; timm's where torchvision has none of the name."""
    if cfg.MODEL_NAME == "efficientnet_lite0":
        lite0: nn.Module = TIMM.create_model("tf_efficientnet_lite0", num_classes=classes)
        return lite0
    network: nn.Module = torchvision.models.get_model(
        cfg.MODEL_NAME, weights=None, num_classes=classes
    )
    return network


class UsualNotebook:
    """The usual notebook: Pillow, torchvision's transforms, worker processes, float32, Adam."""

    def __init__(
        self, cfg: EnhancedConfig, split: Split, batch: int, workers: int, device: torch.device
    ) -> None:
        self.device = device
        self.loader = DataLoader(
            PillowDataset(split, usual_transform(cfg)), batch, shuffle=True, num_workers=workers,
            pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        )  # fmt: skip
        self.model = torchvision_network(cfg, int(split.labels.max()) + 1).to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), cfg.LR_BACKBONE)
        self.criterion = nn.CrossEntropyLoss()

    def epoch(self) -> float:
        """Images a second of a whole epoch; its workers live on from one to the next."""
        self.model.train()
        seen, right, total, start = 0, 0, 0.0, time.perf_counter()
        for images, labels in self.loader:
            images, labels = images.to(self.device), labels.to(self.device)
            self.optimizer.zero_grad()
            scores = self.model(images)
            loss = self.criterion(scores, labels)
            loss.backward()
            self.optimizer.step()
            total += loss.item() * len(images)
            right += (scores.argmax(1) == labels).sum().item()
            seen += len(images)
        return seen / (time.perf_counter() - start)

    def close(self) -> None:
        """Stop the workers."""
        self.loader._iterator = None
