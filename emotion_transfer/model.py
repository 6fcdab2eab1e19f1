"""The classifier: a pretrained backbone, a new head, and what of them trains when."""

# %% [markdown]
# The backbone is a [ResNet](https://arxiv.org/abs/1512.03385) or an
# [EfficientNet](https://arxiv.org/abs/1905.11946). The head turns its features into one score a
# class. Instead of one large step from 2048 features to 8 classes the *reduction* halves the width
# twice; each step is a linear map, a batch normalisation, a ReLU and dropout, strong at first
# (`DROPOUT`), then half as strong. `HEAD = "linear"` is that one large step, the *output*.
# `"multilevel"` is one too, but the output also sees what earlier stages found, averaged over the
# picture: colours and textures, of which a network that learnt to name objects throws much away on
# its way up ([Evci et al. 2022](https://arxiv.org/abs/2201.03529)).
#
# A head of random numbers has to learn from nothing, and a few hundred pictures it learns by heart
# before the backbone has moved. `START = "probe"`, part of the profile for small sets, begins
# elsewhere ([Kumar et al. 2022](https://arxiv.org/abs/2202.10054)): the output *begins as the
# linear probe*, the logistic regression on the frozen features. With the reduction beside it, whose
# last layer then begins at zero, the two are added up. The network is the probe at first, and
# training can only add to it.

# %%
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from emotion_toolbox.backbones import (
    BACKBONES, BackboneSpec, batch_norms, make_backbone, pooled_features,
)  # fmt: skip
from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.probes import linear_probe
from emotion_toolbox.settings import settings_hash
from emotion_transfer.config import EnhancedConfig, thaw_epochs, train_size

Datasets = Mapping[str, EmotionDataset]
Answer = dict[str, Any]  # probabilities [N, C] of the test images, a note and, of training, a curve


class Head(nn.ModuleDict):
    """Class scores [B, C] from pooled features [B, F]: the sum of what its parts say."""

    def forward(self, features: Tensor) -> Tensor:
        return torch.stack([part(features) for part in self.values()]).sum(0)


def make_reduction(features: int, classes: int, dropout: float) -> nn.Sequential:
    """Features [B, F] to scores [B, C] in three steps."""
    half, quarter = features // 2, features // 4
    return nn.Sequential(  # the BatchNorms add the biases
        nn.Linear(features, half, bias=False), nn.BatchNorm1d(half), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(half, quarter, bias=False), nn.BatchNorm1d(quarter), nn.ReLU(),
        nn.Dropout(dropout / 2), nn.Linear(quarter, classes),
    )  # fmt: skip


def make_head(features: int, classes: int, dropout: float, kind: str, start: str) -> Head:
    """The head of a `kind` (HEAD) that begins as `start` (START) says."""
    head = Head()
    if kind != "progressive" or start == "probe":
        head["output"] = nn.Linear(features, classes)
    if kind == "progressive":
        head["reduction"] = reduction = make_reduction(features, classes, dropout)
        if start == "probe":  # it adds nothing at first
            for parameter in reduction[-1].parameters():
                nn.init.zeros_(parameter)
    return head


# %% [markdown]
# Backbone and head together are the classifier. It knows its *stages* by name, from the one that
# sees pixels to the one that decides: that is all that freezing and thawing need.


# %%
class EmotionClassifier(nn.Module):
    """Backbone and head: normalised images [B, 3, H, W] to class scores (logits) [B, C]."""

    made_for: str | None = None  # hash of its settings, so that no other run trains it by mistake

    def __init__(self, name: str, spec: BackboneSpec, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.name, self.spec, self.backbone, self.head = name, spec, backbone, head

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(pooled_features(self.backbone, self.spec, images))
        return scores

    def stage_modules(self) -> dict[str, list[nn.Module]]:
        """The backbone's stages from input to output, then the head."""
        part = self.backbone.get_submodule
        stages = {name: [part(c) for c in parts] for name, parts in self.spec.stages.items()}
        return {**stages, "head": [self.head]}


# %% [markdown]
# The probe takes one pass over the pictures for their features; how strongly the regression is
# regularised is chosen by cross-validation on the training pictures (`linear_probe??`). With
# `START = "probe"` its weights become the output's; it is a baseline in any case.


# %%
def backbone_spec(cfg: EnhancedConfig) -> BackboneSpec:
    """What is known of the backbone of `cfg`; without `levels` where the head does not see them."""
    spec = BACKBONES[cfg.MODEL_NAME]
    return spec if cfg.HEAD == "multilevel" else dataclasses.replace(spec, levels={})


def find_probe(cfg: EnhancedConfig, datasets: Datasets, folder: Path) -> Answer:
    """The linear probe on the untouched backbone of `cfg`, kept in `folder`."""
    network = cfg.MODEL_NAME, cfg.WEIGHTS, cfg.SEED, cfg.IMG_SIZE
    asked = backbone_spec(cfg), cfg.MONITOR, cfg.BATCH_SIZE, cfg.DEVICE
    return linear_probe(datasets, folder, network, *asked)


def build_model(
    cfg: EnhancedConfig, classes: int, probe: Answer | None = None
) -> EmotionClassifier:
    """The network of `cfg` for that many classes, on the CPU; its head begins as `probe`."""
    torch.manual_seed(cfg.SEED)
    name, weights, spec = cfg.MODEL_NAME, None if cfg.INIT_FROM else cfg.WEIGHTS, backbone_spec(cfg)
    backbone = make_backbone(name, weights, cfg.IMG_SIZE, train_size(cfg))
    head = make_head(spec.width, classes, cfg.DROPOUT, cfg.HEAD, cfg.START)
    if probe is not None:
        begin = {name: torch.from_numpy(probe[name]) for name in ("weight", "bias")}
        head["output"].load_state_dict(begin)
    model = EmotionClassifier(name, spec, backbone, head).to(memory_format=torch.channels_last)
    model.made_for = settings_hash(cfg)
    return model


# %% [markdown]
# A backbone that moves at once, under a head that is still learning, would be washed out. So it is
# *frozen* at first and the head trains alone, for `WARMUP_EPOCHS`; then the last stages *thaw*,
# whose features are the most specific, and later everything does. Which of the three holds is a
# function of the epoch and nothing else, so a resumed run cannot thaw differently.


# %%
def thaw_level(cfg: EnhancedConfig, epoch: int) -> int:
    """0: the head trains alone; 1: the last stages too; 2: everything. `epoch` counts from 0."""
    return sum(epoch >= start for start in thaw_epochs(cfg))


def trainable_stages(model: EmotionClassifier, level: int) -> frozenset[str]:
    """Names of the stages that train at a thaw level."""
    return frozenset(({"head"}, {"head", *model.spec.last_stages}, model.stage_modules())[level])


# %% [markdown]
# Frozen means two things: no gradient, and no change of the running statistics inside BatchNorm
# layers, which PyTorch moves in training mode even where the weights stand still. The backbone's
# statistics stay at ImageNet's even once thawed (`BACKBONE_BATCHNORM = "frozen"`): batches of 32
# emotional photographs estimate them worse than a million images did.


# %%
def set_training_mode(cfg: EnhancedConfig, model: EmotionClassifier, epoch: int) -> None:
    """Set gradients and train/eval modes of every stage for `epoch`, counted from 0."""
    active = trainable_stages(model, thaw_level(cfg, epoch))
    model.train()
    model.backbone.eval().requires_grad_(thaw_level(cfg, epoch) == 2)  # what is in no stage
    for stage, modules in model.stage_modules().items():
        for module in modules:
            module.requires_grad_(stage in active).train(stage in active)
    if cfg.BACKBONE_BATCHNORM == "frozen":
        for layer in batch_norms(model.backbone):
            layer.eval()


# %% [markdown]
# The optimiser gives head and backbone rates of their own ([Rates](#Rates) says which). An output
# that begins as the probe has learnt already, so it moves as slowly as the backbone: at the rate of
# what begins at zero it would forget in a few steps what the regression had found. All parameter
# groups exist from the first step, for groups added later confuse schedules and
# checkpoints. Weight decay
# ([Loshchilov and Hutter 2019](https://arxiv.org/abs/1711.05101)) pulls weights towards zero, which
# makes no sense for the scales and shifts of normalisation layers: these and the biases go without.


# %%
def make_optimizer(cfg: EnhancedConfig, model: EmotionClassifier) -> torch.optim.AdamW:
    """AdamW over four groups: head and backbone, each with and without weight decay."""
    groups, named = [], list(model.named_parameters())
    slow = ("backbone.", "head.output.") if cfg.START == "probe" else ("backbone.",)
    for part, rate in (("head", cfg.LR_HEAD), ("backbone", cfg.LR_BACKBONE)):
        parameters = [p for name, p in named if name.startswith(slow) == (part == "backbone")]
        for kind, decay in (("decay", cfg.WEIGHT_DECAY), ("plain", 0.0)):
            chosen = [p for p in parameters if (p.ndim > 1) == (kind == "decay")]
            rates = {"lr": rate, "base_lr": rate, "weight_decay": decay}
            groups.append({"name": f"{part}.{kind}", "params": chosen, **rates})
    return torch.optim.AdamW(groups, fused=next(model.parameters()).device.type in ("cuda", "cpu"))
