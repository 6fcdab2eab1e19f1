"""How others fine-tune: fastai, timm's ``train.py`` and the Keras guide, each by its defaults.

All begin with the same packaged ImageNet weights of EfficientNet-Lite0, see images of the same
size, and go through the training images as often. The rest is theirs, as far as it can be.
"""

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import timm.data
import timm.loss
import timm.optim
import timm.scheduler
import timm.utils
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms as v1

from benchmarks.measure import cores
from benchmarks.peers import PillowDataset, Transform
from emotion_toolbox.backbones import BACKBONES, PACKAGED, make_backbone
from emotion_toolbox.device import choose_device, seed_everything
from emotion_toolbox.tables import EmotionData, Split, load_splits

TIMM: Any = timm  # most of it has no types
TIMM_NAME = "tf_efficientnet_lite0"
SPEC = BACKBONES[PACKAGED[0]]
Loader = Iterable[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Task:
    """What every arm is asked: train on the data in `root`; its clock runs from now on."""

    root: Path
    size: int  # of the images, in pixels
    epochs: int
    seed: int
    start: float = field(default_factory=time.perf_counter)

    def seconds(self) -> float:
        """Since the task was set."""
        return time.perf_counter() - self.start


class Answer(NamedTuple):
    """`predicted` classes of the test images, int64 [N]; and what happened on the way."""

    predicted: npt.NDArray[np.int64]
    curve: list[tuple[float, float]]  # after each epoch: seconds so far, validation accuracy
    settings: dict[str, Any]


@torch.no_grad()
def classify(network: nn.Module, loader: Loader, device: torch.device) -> npt.NDArray[np.int64]:
    """The classes [N] that `network` finds most likely, in the order of `loader`."""
    network.eval()
    return np.concatenate([network(x.to(device)).argmax(1).cpu().numpy() for x, _ in loader])


def train_pass(
    network: nn.Module, loader: Loader, device: torch.device, criterion: nn.Module,
    optimizer: torch.optim.Optimizer, after: Callable[[], None] = lambda: None,
) -> None:  # fmt: skip
    """One pass over `loader`, calling `after` each step; modes are left as they are."""
    for images, labels in loader:
        loss = criterion(network(images.to(device)), labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after()


# --- timm ---------------------------------------------------------------------------------------

TIMM_DEFAULTS = {  # of train.py, where nothing else is said
    "opt": "sgd (Nesterov)", "momentum": 0.9, "weight_decay": 2e-5,
    "lr": "0.1 * batch / 256", "sched": "cosine to 0, by epoch", "warmup_lr": 1e-5,
    "smoothing": 0.1, "scale": [0.08, 1.0], "hflip": 0.5, "color_jitter": 0.4, "mixup": 0.0,
    "reprob": 0.0, "train_interpolation": "random", "workers": 4, "model_ema_decay": 0.9998,
    "crop_pct": "of the network, 0.875",
    # its defaults are made for 1.3 million images and 300 epochs; on a small set they would be
    # four steps an epoch, most of them at the first rate, and an average that never moves
    "batch_size": "32, not 128", "warmup_epochs": "5, at most a quarter of all",
    "model_ema": "on, with --model-ema-warmup", "chosen": "best validation accuracy of the average",
}  # fmt: skip


def timm_network(classes: int) -> nn.Module:
    """timm's network with the packaged weights and its own new classifier."""
    network: nn.Module = TIMM.create_model(TIMM_NAME, num_classes=classes)
    state = network.state_dict() | make_backbone(*PACKAGED).state_dict()
    network.load_state_dict(state)
    return network


def timm_loader(
    split: Split, network: nn.Module, task: Task, device: torch.device, *, training: bool = False
) -> Any:
    """The loader that train.py makes for one split."""
    about = TIMM.data.resolve_data_config({"input_size": (3, task.size, task.size)}, model=network)
    how = {"is_training": True, "interpolation": "random"} if training else {}
    batch = min(32, len(split)) if training else 32
    dataset: Any = PillowDataset(split, None)  # timm sets its own
    return TIMM.data.create_loader(
        dataset, batch_size=batch, num_workers=4, re_mode="pixel", device=device,
        **{name: v for name, v in about.items() if name != "crop_mode"} | how,
    )  # fmt: skip


def finetune_timm(task: Task) -> Answer:
    """timm's ``train.py`` on this set; what differs from its defaults stands in TIMM_DEFAULTS."""
    data, device = load_splits(task.root), choose_device()
    seed_everything(task.seed)
    network = timm_network(len(data.classes)).to(device)
    loaders = {
        name: timm_loader(split, network, task, device, training=name == "train")
        for name, split in data.splits.items()
    }
    rate = 0.1 * loaders["train"].loader.batch_size / 256
    optimizer = TIMM.optim.create_optimizer_v2(
        network, opt="sgd", lr=rate, weight_decay=2e-5, momentum=0.9
    )
    scheduler, _ = TIMM.scheduler.create_scheduler_v2(
        optimizer, "cosine", num_epochs=task.epochs, warmup_lr=1e-5,
        warmup_epochs=min(5, task.epochs // 4),
    )  # fmt: skip
    average = TIMM.utils.ModelEmaV3(network, decay=0.9998, use_warmup=True)
    criterion, count = TIMM.loss.LabelSmoothingCrossEntropy(0.1), 0

    def move_average() -> None:
        nonlocal count
        count += 1
        average.update(network, step=count)

    curve: list[tuple[float, float]] = []
    best, best_state = -1.0, network.state_dict()
    for epoch in range(task.epochs):
        network.train()
        train_pass(network, loaders["train"], device, criterion, optimizer, move_average)
        found = classify(average.module, loaders["val"], device)
        accuracy = float((found == data.splits["val"].labels).mean())
        curve.append((task.seconds(), accuracy))
        if accuracy > best:
            best, best_state = accuracy, copy.deepcopy(average.module.state_dict())
        scheduler.step(epoch + 1)
    average.module.load_state_dict(best_state)
    settings = TIMM_DEFAULTS | {"lr": rate, "warmup_epochs": min(5, task.epochs // 4)}
    return Answer(classify(average.module, loaders["test"], device), curve, settings)


# --- the Keras guide ----------------------------------------------------------------------------

KERAS_GUIDE = {
    "source": "keras.io/guides/transfer_learning", "batch_size": 64, "dropout": 0.2,
    "first": "head alone, Adam(1e-3), two thirds of the epochs", "then": "all, Adam(1e-5)",
    "batchnorm": "inference mode throughout", "resize": "both sides, without keeping the aspect",
    "augmentation": "horizontal flip, rotation by at most a tenth of a turn, reflected edges",
    "workers": "a core each", "chosen": "last epoch",
}  # fmt: skip


def keras_transform(size: int, *, training: bool) -> Transform:
    """Resizing, RandomFlip("horizontal") and RandomRotation(0.1) as the guide has them."""
    turn = [  # a quarter of the side is more than the corners of a turned square look beyond it
        v1.RandomHorizontalFlip(), v1.Pad(size // 4, padding_mode="reflect"),
        v1.RandomRotation(36, v1.InterpolationMode.BILINEAR), v1.CenterCrop(size),
    ]  # fmt: skip
    chain: Transform = v1.Compose([
        v1.Resize((size, size)), *(turn if training else ()),
        v1.ToTensor(), v1.Normalize(SPEC.mean, SPEC.std),
    ])  # fmt: skip
    return chain


def finetune_keras_like(task: Task) -> Answer:
    """The two phases of the Keras guide: the new layer first, then everything at a low rate."""
    data, device = load_splits(task.root), choose_device()
    seed_everything(task.seed)
    loaders = {
        name: DataLoader(
            PillowDataset(split, keras_transform(task.size, training=name == "train")), 64,
            shuffle=name == "train", num_workers=cores(), persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
        for name, split in data.splits.items()
    }  # fmt: skip
    backbone, output = make_backbone(*PACKAGED), nn.Linear(SPEC.features, len(data.classes))
    nn.init.xavier_uniform_(output.weight)  # as Dense begins
    nn.init.zeros_(output.bias)
    network = nn.Sequential(backbone, nn.Dropout(0.2), output).to(device)
    curve: list[tuple[float, float]] = []
    last = task.epochs // 3
    for thawed, epochs, rate in ((False, task.epochs - last, 1e-3), (True, last, 1e-5)):
        backbone.requires_grad_(thawed)
        trained = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(trained, rate, eps=1e-7)
        for _ in range(epochs):
            network.train()
            backbone.eval()
            train_pass(network, loaders["train"], device, nn.CrossEntropyLoss(), optimizer)
            found = classify(network, loaders["val"], device)
            curve.append((task.seconds(), float((found == data.splits["val"].labels).mean())))
    return Answer(classify(network, loaders["test"], device), curve, KERAS_GUIDE)


# --- fastai -------------------------------------------------------------------------------------

FASTAI_DEFAULTS = {
    "call": "vision_learner(...).fine_tune(epochs - 1), after its one frozen epoch",
    "base_lr": 2e-3, "batch_size": 64, "item_tfms": "Resize(size)",
    "batch_tfms": "aug_transforms(), Normalize", "workers": "a core each, at most 16",
    "batchnorm": "trains throughout (train_bn)", "chosen": "last epoch",
}  # fmt: skip


def fastai_table(data: EmotionData) -> pd.DataFrame:
    """Training and validation images as ``DataBlock`` reads them."""
    return pd.concat([
        pd.DataFrame({
            "path": [str(split.path(i)) for i in range(len(split))],
            "label": [data.classes[label] for label in split.labels],
            "is_valid": name == "val",
        })
        for name, split in data.splits.items() if name != "test"
    ], ignore_index=True)  # fmt: skip


def finetune_fastai(task: Task) -> Answer:
    """``vision_learner`` and ``fine_tune``, with fastai's head, augmentation and loaders."""
    import fastai.vision.all as fastai  # an extra

    data, device = load_splits(task.root), choose_device()
    seed_everything(task.seed)
    curve: list[tuple[float, float]] = []

    class NoteEpoch(fastai.Callback):
        order = 60  # after the Recorder

        def after_epoch(self) -> None:
            curve.append((task.seconds(), float(self.recorder.values[-1][-1])))

    block = fastai.DataBlock(
        blocks=(fastai.ImageBlock, fastai.CategoryBlock(vocab=list(data.classes), sort=False)),
        get_x=fastai.ColReader("path"), get_y=fastai.ColReader("label"),
        splitter=fastai.ColSplitter(), item_tfms=fastai.Resize(task.size),
        batch_tfms=[*fastai.aug_transforms(), fastai.Normalize.from_stats(SPEC.mean, SPEC.std)],
    )  # fmt: skip
    batch = min(64, len(data.splits["train"]))  # for the last, incomplete one is dropped
    loaders = block.dataloaders(fastai_table(data), bs=batch, device=device)
    learner = fastai.vision_learner(
        loaders, TIMM_NAME, pretrained=False, metrics=fastai.accuracy, cbs=NoteEpoch()
    )
    learner.model[0].model.load_state_dict(make_backbone(*PACKAGED).state_dict())
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(task.epochs - 1)
        learner.remove_cb(NoteEpoch)  # testing ends an epoch, too
        test = data.splits["test"]
        files = pd.DataFrame({"path": [str(test.path(i)) for i in range(len(test))]})
        scores, _ = learner.get_preds(dl=loaders.test_dl(files))
    return Answer(scores.argmax(1).numpy(), curve, FASTAI_DEFAULTS)
