"""Attribute heads: while it trains, the network also learns to tell the pictures' attributes.

An auxiliary loss, as EmoSet's authors add one (Yang et al., ICCV 2023). The heads are linear, on
the pooled features beside the head of the emotions, and gone when training is done: the model, its
export and all that reads them are as without.

Every cost here is linear in numbers that stand for the target, *statistics*: so MixUp and CutMix
mix these as they mix the emotions' targets, and that gives the mix of the two costs; where all are
zero the value is missing and costs nothing.
"""

import abc
import argparse
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emotion_toolbox.attributes import Attribute, choose_columns, read_attributes
from emotion_toolbox.backbones import pooled_features
from emotion_toolbox.batches import Batch, EmotionDataset, batch_slices
from emotion_toolbox.device import choose_amp, choose_device, eval_mode, precision
from emotion_toolbox.errors import ConfigError, DataError
from emotion_toolbox.keeper import FitResult
from emotion_toolbox.pixels import prepare_images, send_to
from emotion_toolbox.settings import setting
from emotion_toolbox.tables import EmotionData
from emotion_transfer.config import EnhancedConfig, train_size
from emotion_transfer.engine import Augment, Trainer, fit
from emotion_transfer.mixing import draw_mixing, mix_targets, mixing_active
from emotion_transfer.model import EmotionClassifier

LEAST = 5  # training images; a rarer value is not learnt
WEIGHT = 0.3


@dataclass(frozen=True)
class AttributeConfig(EnhancedConfig):
    """The settings of a run with attribute heads: its identity has them, and the columns' text."""

    ATTRIBUTES: tuple[str, ...] = setting((), "columns to learn beside the emotions")
    ATTRIBUTE_WEIGHT: float = setting(WEIGHT, "of their loss", low=0, high=100)
    ATTRIBUTE_DATA: str = setting("none", "hash of these columns of the training table")


def add_attributes(
    cfg: EnhancedConfig, names: Sequence[str], weight: float, listed: EmotionData
) -> EnhancedConfig:
    """`cfg` with heads for the attributes `names`; itself where there are none.

    Raises ``DataError`` for a column that there is not, ``ConfigError`` under ``torchrun``.
    """
    if not names:
        return cfg
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("--attributes is for a single process; start it without torchrun")
    text = choose_columns(listed.splits["train"], names).to_csv()
    digest = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
    chosen = tuple(dict.fromkeys(names))
    return AttributeConfig(
        **vars(cfg), ATTRIBUTES=chosen, ATTRIBUTE_WEIGHT=weight, ATTRIBUTE_DATA=digest
    )


# --- what is learnt -----------------------------------------------------------------------------


class Target(abc.ABC):
    """How one attribute is learnt, from what the training images have.

    `bias` [A] are the outputs of a head that knows only how frequent each value is. Multiplied by
    `scale`, that head's costs are 1 in the mean over the training images, those without a value
    among them: so attributes with many values, or few images, count as much as others.
    """

    bias: Tensor

    def __init__(self, attribute: Attribute, where: Path) -> None:
        self.name = attribute.name
        self.learn(attribute)
        rows = self.statistics(attribute)
        self.width = rows.shape[1]
        base = float(self.cost(self.bias.expand(len(rows), -1), rows.float()).mean())
        if not base > 1e-6:
            raise DataError(
                f"{where} has no two values of {self.name} with {LEAST} images each; leave it out "
                "of --attributes"
            )
        self.scale = 1 / base

    @abc.abstractmethod
    def learn(self, attribute: Attribute) -> None:
        """Note the values of the training images, and `bias`."""

    @abc.abstractmethod
    def statistics(self, attribute: Attribute) -> Tensor:
        """What ``cost`` needs of N images, [N, S], bool or float32; zeros for a missing value."""

    @abc.abstractmethod
    def cost(self, outputs: Tensor, statistics: Tensor) -> Tensor:
        """The cost [B] of a head's `outputs` [B, A] for float `statistics` [B, S]."""


class Number(Target):
    """A number z, standardised: the squared error. Statistics: 1, z, z²."""

    def learn(self, attribute: Attribute) -> None:
        numbers = attribute.numbers if attribute.numbers is not None else np.zeros(1)
        self.mean, self.deviation = float(np.nanmean(numbers)), float(np.nanstd(numbers))
        self.bias = torch.zeros(1)

    def statistics(self, attribute: Attribute) -> Tensor:
        if attribute.numbers is None:  # in another split, text
            return torch.zeros(len(attribute.cells), 3)
        z = (attribute.numbers - self.mean) / (self.deviation or 1.0)
        rows = np.nan_to_num(
            np.stack([np.ones_like(z), z, z * z], axis=1) * np.isfinite(z)[:, None]
        )
        return torch.from_numpy(rows).float()

    def cost(self, outputs: Tensor, statistics: Tensor) -> Tensor:
        known, z, square = statistics.unbind(1)
        return known * outputs[:, 0] ** 2 - 2 * z * outputs[:, 0] + square


class Category(Target):
    """One of K values: cross-entropy. Statistics: one-hot."""

    def learn(self, attribute: Attribute) -> None:
        counts = Counter(value for cell in attribute.cells for value in cell)
        self.values = sorted(value for value, count in counts.items() if count >= LEAST)
        self.bias = torch.tensor([float(counts[value]) for value in self.values]).log()

    def statistics(self, attribute: Attribute) -> Tensor:
        number = {value: i for i, value in enumerate(self.values)}
        rows = torch.zeros(len(attribute.cells), len(self.values), dtype=torch.bool)
        for row, cell in zip(rows, attribute.cells, strict=True):
            row[[number[value] for value in cell if value in number]] = True
        return rows

    def cost(self, outputs: Tensor, statistics: Tensor) -> Tensor:
        return -(statistics * outputs.log_softmax(1)).sum(1)


class Several(Category):
    """Any number of K values: binary cross-entropy. Statistics: which it has, and a last 1."""

    def learn(self, attribute: Attribute) -> None:
        super().learn(attribute)
        known = sum(map(bool, attribute.cells))
        # smoothed, for a value that all images have: its logit is finite
        self.bias = ((self.bias.exp() + 1) / (known + 2)).logit()

    def statistics(self, attribute: Attribute) -> Tensor:
        known = torch.tensor([bool(cell) for cell in attribute.cells])
        return torch.cat([super().statistics(attribute), known[:, None]], 1)

    def cost(self, outputs: Tensor, statistics: Tensor) -> Tensor:
        has, known = statistics[:, :-1], statistics[:, -1:]
        return (known * F.softplus(outputs) - has * outputs).sum(1)


def make_target(attribute: Attribute, where: Path) -> Target:
    """How `attribute` of the training table `where` is learnt; ``DataError`` if it cannot be."""
    kind = Number if attribute.numbers is not None else Several if attribute.several else Category
    return kind(attribute, where)


def attribute_loss(targets: Sequence[Target], outputs: Tensor, statistics: Tensor) -> Tensor:
    """The scaled cost of B images, the mean over them and over the attributes.

    `outputs` [B, A] and `statistics` [B, S] of all `targets` stand side by side.
    """
    parts = torch.split(outputs.to(statistics.dtype), [len(one.bias) for one in targets], 1)
    rows = torch.split(statistics, [one.width for one in targets], 1)
    each = zip(targets, parts, rows, strict=True)
    return torch.stack([one.scale * one.cost(part, row).mean() for one, part, row in each]).mean()


# --- the network and its training ---------------------------------------------------------------


class AttributeClassifier(EmotionClassifier):
    """A classifier with linear heads for attributes, which share its backbone and its head.

    In training mode it gives the class scores and the heads' outputs side by side, [B, C + A];
    otherwise the class scores, [B, C]. The heads begin as knowing how frequent each value is.
    """

    def __init__(self, model: EmotionClassifier, targets: Sequence[Target]) -> None:
        super().__init__(model.name, model.spec, model.backbone, model.head)
        self.made_for = model.made_for
        bias = torch.cat([one.bias for one in targets])
        self.attributes = nn.Linear(self.spec.width, len(bias))
        nn.init.zeros_(self.attributes.weight)
        self.attributes.bias = nn.Parameter(bias)

    def forward(self, images: Tensor) -> Tensor:
        features = pooled_features(self.backbone, self.spec, images)
        scores: Tensor = self.head(features)
        return torch.cat([scores, self.attributes(features)], 1) if self.training else scores

    def stage_modules(self) -> dict[str, list[nn.Module]]:
        """The backbone's stages, then the heads."""
        return {**super().stage_modules(), "head": [self.head, self.attributes]}


class AttributeTrainer(Trainer):
    """A trainer whose loss has the attributes' beside that of the emotions.

    `statistics` are those of all training images, of each of `targets` [N, S]. What the meter
    counts is the emotions' loss, as in a run without attributes.
    """

    def __init__(
        self, cfg: AttributeConfig, model: AttributeClassifier, train: EmotionDataset,
        amp: str | None = None, augment: Augment | None = None, *, targets: Sequence[Target],
        statistics: Sequence[Tensor],
    ) -> None:  # fmt: skip
        if amp is None:  # that of the same run without attributes
            plain = EmotionClassifier(model.name, model.spec, model.backbone, model.head)
            plain.to(choose_device(cfg.DEVICE)).requires_grad_(True)
            amp = choose_amp(cfg.AMP, plain, train_size(cfg), measure=not cfg.DETERMINISTIC)
        super().__init__(cfg, model, train, amp, augment)
        self.weight, self.targets, self.statistics = cfg.ATTRIBUTE_WEIGHT, targets, statistics
        self.augment_images, self.augment = self.augment, self.augment_all
        self.backward = self.backward_all

    def augment_all(
        self, trainer: Trainer, batch: Batch, epoch: int, step: int
    ) -> tuple[Tensor, Tensor]:
        """What ``augment_batch`` gives, with mixed statistics beside the targets, [B, C + S]."""
        images, targets = self.augment_images(trainer, batch, epoch, step)
        rows = torch.cat([part[batch.positions].float() for part in self.statistics], 1)
        if mixing_active(self.cfg, epoch):
            count = len(batch.labels)
            rows = mix_targets(
                rows, draw_mixing(self.cfg, epoch, step * self.cfg.BATCH_SIZE, count)
            )
        return images, torch.cat([targets, send_to(rows, images.device)], 1)

    def backward_all(
        self, trainer: Trainer, images: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``backward``, for both losses."""
        parts, classes = self.cfg.ACCUMULATE, len(self.train.classes)
        losses = right = torch.zeros((), dtype=self.meter.sums.dtype, device=self.device)
        for part, wanted in zip(images.chunk(parts), targets.chunk(parts), strict=True):
            with precision(self.device, self.amp):
                answers = self.network(part)
                scores, emotions = answers[:, :classes], wanted[:, :classes]
                loss = self.loss(scores, emotions)
                more = attribute_loss(self.targets, answers[:, classes:], wanted[:, classes:])
            self.scaler.scale((loss + self.weight * more) / parts).backward()
            losses = losses + loss.detach() * len(part)
            right = right + (scores.detach().argmax(1) == emotions.argmax(1)).sum()
        return losses, right


@torch.no_grad()
def judge_heads(
    model: AttributeClassifier, targets: Sequence[Target], attributes: Mapping[str, Attribute],
    data: EmotionDataset, size: int, batch_size: int,
) -> dict[str, float]:  # fmt: skip
    """What each head costs on `data`, as a share of what knowing the frequencies costs.

    1: it has learnt nothing; of a number, 1 less the coefficient of determination; NaN: no image
    there has a value that a head knows.
    """
    device, outputs = next(model.parameters()).device, []
    with eval_mode(model):
        for rows in batch_slices(np.arange(len(data)), batch_size):
            images = data.batch(rows).images.to(device)
            inputs = prepare_images(images, size, model.spec.mean, model.spec.std)
            features = pooled_features(model.backbone, model.spec, inputs)
            outputs.append(model.attributes(features).float().cpu())
    parts, found = torch.split(torch.cat(outputs), [len(one.bias) for one in targets], 1), {}
    for one, part in zip(targets, parts, strict=True):
        statistics = one.statistics(attributes[one.name]).float()
        frequencies = one.cost(one.bias.expand(part.shape), statistics).sum()
        found[one.name] = float(one.cost(part, statistics).sum() / frequencies)
    return found


def fit_model(
    cfg: EnhancedConfig, model: EmotionClassifier, datasets: Mapping[str, EmotionDataset],
    folder: Path, augment: Augment | None = None, parts: Sequence[Callable[..., Any]] = (),
) -> FitResult:  # fmt: skip
    """``fit``, with heads for the attributes that `cfg` has; `model` is without them at the end.

    `parts` make the trainer of a run without, and the keeper.
    """
    if not isinstance(cfg, AttributeConfig) or not cfg.ATTRIBUTES:
        return fit(cfg, model, datasets, folder, augment, *parts)
    seen = {
        name: read_attributes(datasets[name].split, datasets[name].pixels, cfg.ATTRIBUTES)
        for name in ("train", "val")
    }
    train = seen["train"].values()
    targets = [make_target(one, datasets["train"].split.csv) for one in train]
    statistics = [target.statistics(one) for target, one in zip(targets, train, strict=True)]
    whole = AttributeClassifier(model, targets)
    make_trainer = partial(AttributeTrainer, targets=targets, statistics=statistics)
    result = fit(cfg, whole, datasets, folder, augment, make_trainer, *parts[1:])
    costs = judge_heads(whole, targets, seen["val"], datasets["val"], cfg.IMG_SIZE, cfg.BATCH_SIZE)
    shown = ", ".join(f"{n} {'unknown there' if c != c else f'{c:.2f}'}" for n, c in costs.items())
    print(f"attribute heads on validation images (1: nothing learnt): {shown}", flush=True)
    return result


# --- options of the commands --------------------------------------------------------------------


def add_attribute_options(parser: argparse.ArgumentParser) -> None:
    """Give a command ``--attributes`` and ``--attribute-weight``."""
    what = "learn these attributes too: columns of the CSV, or brightness and colorfulness"
    parser.add_argument("--attributes", nargs="+", default=[], metavar="NAME", help=what)
    weight = f"of their loss (default {WEIGHT})"
    parser.add_argument("--attribute-weight", type=float, metavar="WEIGHT", help=weight)


def attributes_of(args: argparse.Namespace) -> tuple[Sequence[str], float]:
    """Names and weight that those options gave; raises ``ConfigError`` for a weight alone."""
    weight = args.attribute_weight
    if weight is not None and not args.attributes:
        raise ConfigError(f"--attribute-weight {weight:g} needs --attributes NAME ...")
    return args.attributes, WEIGHT if weight is None else weight
