"""Weights to hand on: safetensors, a JSON config, a model card; and prediction from them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from emotion_toolbox.backbones import BACKBONES
from emotion_toolbox.decoding import decode_image, read_image_bytes
from emotion_toolbox.device import choose_device
from emotion_toolbox.emotions import MIKELS_CLASSES
from emotion_toolbox.errors import ExportError
from emotion_toolbox.files import write_atomically, write_text
from emotion_toolbox.pixels import prepare_images

PRIVATE = ("DATA_ROOT", "IMAGES_ROOT", "OUTPUT_ROOT", "CACHE_DIR", "INIT_FROM", "WEIGHTS")  # paths


def export_model(
    folder: Path,
    model: nn.Module,
    classes: Sequence[str],
    settings: Mapping[str, Any],
    resize: int,
    facts: Mapping[str, Any],
) -> Path:
    """Write weights, config and model card to `folder`.

    `settings` make the model again, images are resized to `resize` pixels before the crop, and
    `facts` are the run's summary.
    """
    name, size = settings["MODEL_NAME"], settings["IMG_SIZE"]
    spec = BACKBONES[name]
    tensors = {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
    description = {
        "model": name,
        "classes": list(classes),
        "image_size": size,
        "resize": resize,
        "mean": spec.mean,
        "std": spec.std,
        "synthetic": facts["synthetic"],
        "dataset": facts["dataset"],
        "metrics": facts["metrics"],
        "config": {key: value for key, value in settings.items() if key not in PRIVATE},
    }
    weights = save_tensors(tensors)
    write_atomically(folder / "model.safetensors", lambda file: file.write(weights))
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
    write_text(folder / "README.md", model_card(description, facts, model))
    return folder


LOADERS = {  # a backbone that others make, and what its last layer is called there
    "resnet50": ("torchvision.models.resnet50()", "fc"),
    "efficientnet_b0": ("torchvision.models.efficientnet_b0()", "classifier"),
    "efficientnet_lite0": ('timm.create_model("tf_efficientnet_lite0")', "classifier"),
}


def model_card(about: Mapping[str, Any], facts: Mapping[str, Any], model: nn.Module) -> str:
    """What a user of the weights must know, in Markdown, from the run's own numbers."""
    name, classes = about["model"], about["classes"]
    rows = "\n".join(
        f"| {metric} | {e['value']:.3f} | {e['low']:.3f} to {e['high']:.3f} |"
        for metric, e in facts["metrics"]["test"].items()
    )
    feeling = set(classes) <= set(MIKELS_CLASSES)
    task = "the emotion an image evokes" if feeling else f"the classes of {about['dataset']}"
    warning = (
        "\n> **Trained on the synthetic sample.** Its pictures are drawn by a program; the figures "
        "say nothing about photographs.\n"
        if facts["synthetic"]
        else ""
    )
    limits = (
        "The classes are what annotators said a picture evokes in *them*; people differ. The model "
        "judges pictures, not people: it must not be used to infer what somebody feels. It inherits"
        if feeling
        else "It knows these classes only, and answers with one of them whatever it is shown. It "
        "inherits"
    )
    make, last = LOADERS.get(name, (f"your.{name}()", "classifier"))
    head = "\n".join(f"    {line}" for line in str(model.get_submodule("head")).splitlines())
    return f"""---
library_name: pytorch
pipeline_tag: image-classification
tags: [{"emotion, " if feeling else ""}{name}]
---

# {name} for {task}
{warning}
Trained on {about["dataset"]} for {facts["epochs"]} epochs at {about["image_size"]} pixels, from the
weights {facts["weights"]}.

Classes, in the order of the outputs: {", ".join(classes)}.

| test metric | value | 95 % interval |
|---|---|---|
{rows}

## Use

`python -m emotion_transfer predict --model FOLDER IMAGE...` with this folder. Without this project:

```python
import json, torch, {make.partition(".")[0]}
from collections import OrderedDict
from PIL import Image
from safetensors.torch import load_file
from torch import nn
about = json.load(open("config.json"))
tensors = load_file("model.safetensors")
backbone = {make}
backbone.{last} = nn.Identity()
head = {loader_of(model.get_submodule("head"))}
model = nn.Sequential()
model.backbone, model.head = backbone, head
model.load_state_dict(tensors)
model.eval()
image = Image.open("picture.jpg").convert("RGB")
side, crop, size = min(image.size), about["resize"], about["image_size"]
image = image.crop(((image.width - side) // 2, (image.height - side) // 2,
                    (image.width + side) // 2, (image.height + side) // 2))
pixels = torch.tensor(list(image.resize((crop, crop), Image.BICUBIC).getdata())) / 255
first = (crop - size) // 2
pixels = pixels.view(crop, crop, 3)[first:first + size, first:first + size]
pixels = ((pixels - torch.tensor(about["mean"])) / torch.tensor(about["std"])).permute(2, 0, 1)
with torch.no_grad():
    print(dict(zip(about["classes"], model(pixels[None]).softmax(1)[0].tolist())))
```

An image is turned upright, its centre square is resized to {about["resize"]} pixels (Pillow's
bicubic filter, antialiased), of which the centre {about["image_size"]} x {about["image_size"]} is
taken, scaled to 0..1 and normalised with `mean` and `std` of `config.json`. The head:

{head}

## Limits

{limits} whatever bias its pictures and its annotators had, and the licence terms of the data it was
trained on.
"""


def loader_of(head: nn.Module) -> str:
    """Python that makes the same layers under the same names."""
    layers = ", ".join(f"{name}=nn.{layer}" for name, layer in head.named_children())
    return f"nn.Sequential(OrderedDict({layers}))"


@dataclass(frozen=True)
class ExportedModel:
    """A loaded export: the network in eval mode, its classes and how its images are prepared."""

    model: nn.Module
    classes: tuple[str, ...]
    image_size: int
    resize: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    synthetic: bool  # trained on the built-in sample


def load_export(
    folder: Path, make_model: Callable[[dict[str, Any], int], nn.Module], device: str = "cpu"
) -> ExportedModel:
    """Load what ``export_model`` wrote; `make_model` gives the network for settings and classes.

    Raises:
        ExportError: if a file is missing, damaged, or does not fit the others.
        ConfigError: for a device that this machine does not have.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_tensors((folder / "model.safetensors").read_bytes())
        classes, settings = checked_classes(about), {**about["config"], "WEIGHTS": None}
        last = tensors.get("head.output.weight")
        if last is None or len(last) != len(classes):
            raise ValueError(f"model.safetensors is not for {len(classes)} classes")
        model = make_model(settings, len(classes))
        spec = BACKBONES[settings["MODEL_NAME"]]
        expected = {
            "model": settings["MODEL_NAME"], "image_size": settings["IMG_SIZE"],
            "mean": list(spec.mean), "std": list(spec.std),
        }  # fmt: skip
        if wrong := [name for name, value in expected.items() if about[name] != value]:
            raise ValueError(f"{', '.join(wrong)} in config.json contradict the settings there")
        if not about["image_size"] <= about["resize"] <= 2 * about["image_size"]:
            raise ValueError("resize in config.json does not fit image_size")
        model.load_state_dict(tensors)
    except Exception as error:  # a damaged or hostile file may raise anything
        reason = str(error).strip().splitlines()[:3]
        raise ExportError(
            f"{folder} is no usable export ({type(error).__name__}: {' '.join(reason)})"
        ) from error
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all() or (name.endswith("running_var") and tensor.min() < 0):
            raise ExportError(
                f"{folder / 'model.safetensors'} holds numbers that no training gives: {name}"
            )
    model.to(choose_device(device)).eval().requires_grad_(False)
    return ExportedModel(
        model, classes, about["image_size"], about["resize"],
        spec.mean, spec.std, about.get("synthetic") is True,
    )  # fmt: skip


def checked_classes(about: Mapping[str, Any]) -> tuple[str, ...]:
    """The class names of an export; raises ``ValueError`` if they are none."""
    classes = about["classes"]
    named = isinstance(classes, list) and all(
        isinstance(c, str) and c.strip() and c.isprintable() for c in classes
    )
    if not named or len(set(classes)) != len(classes) or len(classes) < 2:
        raise ValueError("the classes in config.json must be distinct, printable names")
    return tuple(classes)


@torch.no_grad()
def predict_files(exported: ExportedModel, paths: Sequence[Path]) -> npt.NDArray[np.float64]:
    """Class probabilities [N, C] of image files; raises ``ImageError`` for one that is none."""
    device, answers = next(exported.model.parameters()).device, []
    for path in paths:
        pixels = decode_image(read_image_bytes(path), exported.resize)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].to(device)
        inputs = prepare_images(image, exported.image_size, exported.mean, exported.std)
        answers.append(exported.model(inputs).double().softmax(1)[0].cpu().numpy())
    return np.stack(answers)


def top_classes(
    probabilities: npt.NDArray[np.float64], classes: Sequence[str], k: int = 3
) -> list[tuple[str, float]]:
    """The `k` most probable classes of one image with their probabilities, best first."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [(classes[i], float(probabilities[i])) for i in order]
