"""The classifier: a pretrained backbone, a new head, and what of them trains when."""

# %% [markdown]
# The backbone is a [ResNet](https://arxiv.org/abs/1512.03385) or an
# [EfficientNet](https://arxiv.org/abs/1905.11946). The head turns its features into one score a
# class. Instead of one large step from 2048 features to 8 classes it halves the width twice; each
# step is a linear map, a batch normalisation, a ReLU and dropout, strong at first (`DROPOUT`), then
# half as strong.

# %%
import torch
from torch import Tensor, nn

from emotion_toolbox.backbones import BACKBONES, batch_norms, make_backbone
from emotion_toolbox.settings import settings_hash
from emotion_transfer.config import EnhancedConfig, thaw_epochs


def make_head(features: int, classes: int, dropout: float, kind: str) -> nn.Sequential:
    """The classifier on pooled features [B, F]; `kind` is "progressive" or "linear"."""
    head, width = nn.Sequential(), features
    for step in (1, 2) if kind == "progressive" else ():
        head.add_module(f"linear{step}", nn.Linear(width, width // 2, bias=False))
        head.add_module(f"norm{step}", nn.BatchNorm1d(width // 2))  # which adds a bias
        head.add_module(f"relu{step}", nn.ReLU(inplace=True))
        head.add_module(f"dropout{step}", nn.Dropout(dropout / step))
        width //= 2
    head.add_module("output", nn.Linear(width, classes))
    return head


# %% [markdown]
# Backbone and head together are the classifier. It knows its *stages* by name, from the one that
# sees pixels to the one that decides: that is all that freezing and thawing need.


# %%
class EmotionClassifier(nn.Module):
    """Backbone and head: normalised images [B, 3, H, W] to class scores (logits) [B, C]."""

    made_for: str | None = None  # hash of its settings, so that no other run trains it by mistake

    def __init__(self, name: str, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.name, self.spec = name, BACKBONES[name]
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.backbone(images))
        return scores

    def stage_modules(self) -> dict[str, list[nn.Module]]:
        """The backbone's stages from input to output, then the head."""
        part = self.backbone.get_submodule
        stages = {name: [part(c) for c in parts] for name, parts in self.spec.stages.items()}
        return {**stages, "head": [self.head]}


def build_model(cfg: EnhancedConfig, classes: int) -> EmotionClassifier:
    """The network of `cfg` for that many classes, in channels_last memory, on the CPU."""
    torch.manual_seed(cfg.SEED)
    backbone = make_backbone(cfg.MODEL_NAME, None if cfg.INIT_FROM else cfg.WEIGHTS)
    head = make_head(BACKBONES[cfg.MODEL_NAME].features, classes, cfg.DROPOUT, cfg.HEAD)
    model = EmotionClassifier(cfg.MODEL_NAME, backbone, head).to(memory_format=torch.channels_last)
    model.made_for = settings_hash(cfg)
    return model


# %% [markdown]
# A fresh head sends large, random gradients into the backbone and would wash out what it has learnt
# ([Kumar et al. 2022](https://arxiv.org/abs/2202.10054)). So the backbone is *frozen* at first and
# the head trains alone, for `WARMUP_EPOCHS`; then the last stages *thaw*, whose features are the
# most specific, and later everything does. Which of the three holds is a function of the epoch and
# nothing else, so a resumed run cannot thaw differently.


# %%
def thaw_level(cfg: EnhancedConfig, epoch: int) -> int:
    """0: the head trains alone; 1: the last stages too; 2: everything. `epoch` counts from 0."""
    return sum(epoch >= start for start in thaw_epochs(cfg))


def trainable_stages(model: EmotionClassifier, level: int) -> frozenset[str]:
    """Names of the stages that train at a thaw level."""
    stages = ({"head"}, {"head", *model.spec.last_stages}, model.stage_modules())
    return frozenset(stages[level])


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
    model.backbone.eval()
    for stage, modules in model.stage_modules().items():
        for module in modules:
            module.requires_grad_(stage in active).train(stage in active)
    if cfg.BACKBONE_BATCHNORM == "frozen":
        for layer in batch_norms(model.backbone):
            layer.eval()


# %% [markdown]
# The optimiser gives head and backbone rates of their own ([Rates](#Rates) says which). All
# parameter groups exist from the first step, for groups added later confuse schedules and
# checkpoints. Weight decay
# ([Loshchilov and Hutter 2019](https://arxiv.org/abs/1711.05101)) pulls weights towards zero, which
# makes no sense for the scales and shifts of normalisation layers: these and the biases go without.


# %%
def make_optimizer(cfg: EnhancedConfig, model: EmotionClassifier) -> torch.optim.AdamW:
    """AdamW over four groups: head and backbone, each with and without weight decay."""
    groups = []
    for part, rate in (("head", cfg.LR_HEAD), ("backbone", cfg.LR_BACKBONE)):
        parameters = list(model.get_submodule(part).parameters())
        for kind, decay in (("decay", cfg.WEIGHT_DECAY), ("plain", 0.0)):
            chosen = [p for p in parameters if (p.ndim > 1) == (kind == "decay")]
            rates = {"lr": rate, "base_lr": rate, "weight_decay": decay}
            groups.append({"name": f"{part}.{kind}", "params": chosen, **rates})
    return torch.optim.AdamW(groups, fused=next(model.parameters()).device.type in ("cuda", "cpu"))
