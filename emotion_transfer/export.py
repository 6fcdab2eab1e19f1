"""Weights to hand on: safetensors, a JSON config, a model card; and prediction from them."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from emotion_transfer.augment import prepare_images
from emotion_transfer.checkpoint import CheckpointError, write_atomically
from emotion_transfer.config import ConfigError, EnhancedConfig, cache_size, make_config
from emotion_transfer.data import decode_image, read_image_bytes
from emotion_transfer.model import BACKBONES, EmotionClassifier, build_model
from emotion_transfer.precision import choose_device

# %% [markdown]
# #### Exporting the model
#
# A file of weights alone is useless in a year: nobody remembers the order of the classes or how
# the images were prepared. So three files travel together: `model.safetensors` (a format that
# holds tensors and cannot hold code), `config.json` with the settings, classes and preprocessing,
# and `README.md`, a model card that says what the model was trained on and how good it is.


# %%
def export_model(
    folder: Path,
    cfg: EnhancedConfig,
    model: EmotionClassifier,
    classes: Sequence[str],
    facts: Mapping[str, Any],
) -> Path:
    """Write weights, config and model card to `folder`; `facts` are the run's summary."""
    spec = BACKBONES[model.name]
    tensors = {name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}
    description = {
        "model": model.name,
        "classes": list(classes),
        "image_size": cfg.IMG_SIZE,
        "resize": cache_size(cfg),
        "mean": spec.mean,
        "std": spec.std,
        "synthetic": facts["synthetic"],
        "metrics": facts["metrics"],
        "config": dataclasses.asdict(cfg),
    }
    weights, text = save_tensors(tensors), json.dumps(description, indent=2) + "\n"
    write_atomically(folder / "model.safetensors", lambda file: file.write(weights))
    write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
    card = model_card(cfg, classes, facts)
    write_atomically(folder / "README.md", lambda file: file.write(card.encode()))
    return folder


# %% [markdown]
# The model card is written from the run's own numbers. It also says what the model must not be used
# for, because that is easily forgotten once a file travels alone.


# %%
def model_card(cfg: EnhancedConfig, classes: Sequence[str], facts: Mapping[str, Any]) -> str:
    """What a user of the weights must know, in Markdown, from the run's own numbers."""
    rows = "\n".join(
        f"| {name} | {e['value']:.3f} | {e['low']:.3f} to {e['high']:.3f} |"
        for name, e in facts["metrics"]["test"].items()
    )
    warning = (
        "\n> **Trained on the synthetic sample.** Its pictures are drawn by a program; the figures "
        "say nothing about emotions in photographs.\n"
        if facts["synthetic"]
        else ""
    )
    return f"""---
library_name: pytorch
pipeline_tag: image-classification
tags: [emotion, {cfg.MODEL_NAME}]
---

# {cfg.MODEL_NAME} for the emotion an image evokes
{warning}
Trained on {facts["dataset"]} for {facts["epochs"]} epochs at {cfg.IMG_SIZE} pixels, from the
weights {facts["weights"]}.

Classes, in the order of the outputs: {", ".join(classes)}.

| test metric | value | 95 % interval |
|---|---|---|
{rows}

## Use

`python -m emotion_transfer.predict --model FOLDER IMAGE...` with this folder. An image is resized
to {cache_size(cfg)} pixels on its short side, its centre {cfg.IMG_SIZE} x {cfg.IMG_SIZE} is cut
out and normalised with the mean and standard deviation in `config.json`.

## Limits

The classes are what annotators said a picture evokes in *them*; people differ. The model judges
pictures, not people: it must not be used to infer what somebody feels. It inherits whatever bias
its pictures and its annotators had, and the licence terms of the data it was trained on.
"""


# %% [markdown]
# #### Predicting with an export
#
# Loading checks before it trusts: the architecture must be known, the classes must be distinct
# names, and every tensor must have the name and shape that the network expects.


# %%
EXPORT_ERRORS = (  # what reading a damaged or hostile export may raise
    *(OSError, ValueError, KeyError, TypeError, RecursionError),
    *(ConfigError, SafetensorError),
)


@dataclass(frozen=True)
class ExportedModel:
    """A loaded export: the network in eval mode, its classes and its settings."""

    model: EmotionClassifier
    classes: tuple[str, ...]
    cfg: EnhancedConfig
    synthetic: bool  # trained on the built-in sample


def load_export(folder: Path, device: str = "cpu") -> ExportedModel:
    """Load what ``export_model`` wrote.

    Raises:
        CheckpointError: if a file is missing, damaged, or does not fit the others.
        ConfigError: for a device that this machine does not have.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        cfg = make_config({**about["config"], "WEIGHTS": None})
        tensors = load_tensors((folder / "model.safetensors").read_bytes())
        classes = exported_classes(about, cfg, tensors)
    except EXPORT_ERRORS as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{folder} is no usable export ({reason})") from error
    model = build_model(dataclasses.replace(cfg, INIT_FROM=None), len(classes))
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{folder / 'model.safetensors'} does not fit: {error}") from error
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all() or (name.endswith("running_var") and tensor.min() < 0):
            raise CheckpointError(
                f"{folder / 'model.safetensors'} holds numbers that no training gives: {name}"
            )
    model.to(choose_device(dataclasses.replace(cfg, DEVICE=device)))
    synthetic = about.get("synthetic") is True
    return ExportedModel(model.eval().requires_grad_(False), classes, cfg, synthetic)


def exported_classes(
    about: Mapping[str, Any], cfg: EnhancedConfig, tensors: Mapping[str, torch.Tensor]
) -> tuple[str, ...]:
    """The class names in `about`, the content of an export's config.json.

    Raises:
        ValueError: if they are no names, or `about` contradicts the settings or the weights.
    """
    classes, spec = about["classes"], BACKBONES[cfg.MODEL_NAME]
    named = isinstance(classes, list) and all(
        isinstance(c, str) and c.strip() and c.isprintable() for c in classes
    )
    if not named or len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError("the classes in config.json must be distinct, printable names")
    expected = {
        "model": cfg.MODEL_NAME, "image_size": cfg.IMG_SIZE, "resize": cache_size(cfg),
        "mean": list(spec.mean), "std": list(spec.std),
    }  # fmt: skip
    if wrong := [name for name, value in expected.items() if about.get(name) != value]:
        raise ValueError(f"{', '.join(wrong)} in config.json contradict the settings there")
    last = tensors.get("head.output.weight")
    if last is None or len(last) != len(classes):
        raise ValueError(f"model.safetensors is not for {len(classes)} classes")
    return tuple(classes)


# %% [markdown]
# Prediction decodes and crops exactly as evaluation did.


# %%
@torch.no_grad()
def predict_files(exported: ExportedModel, paths: Sequence[Path]) -> npt.NDArray[np.float64]:
    """Class probabilities [N, C] of image files.

    Raises:
        ImageError: for a file that is no usable image.
    """
    cfg, spec = exported.cfg, BACKBONES[exported.model.name]
    device = next(exported.model.parameters()).device
    answers = []
    for path in paths:
        pixels = decode_image(read_image_bytes(path), cache_size(cfg))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device)
        scores = exported.model(prepare_images(image, cfg.IMG_SIZE, spec.mean, spec.std))
        answers.append(scores.double().softmax(1)[0].cpu().numpy())
    return np.stack(answers)


def top_classes(
    probabilities: npt.NDArray[np.float64], classes: Sequence[str], k: int = 3
) -> list[tuple[str, float]]:
    """The `k` most probable classes of one image with their probabilities, best first."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [(classes[i], float(probabilities[i])) for i in order]
