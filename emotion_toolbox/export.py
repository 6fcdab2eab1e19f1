"""Weights to hand on: safetensors, a JSON config, a model card; and prediction from them."""

import json
import re
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

from emotion_toolbox.backbones import BACKBONES, LITES, BackboneSpec, refuse_nonfinite
from emotion_toolbox.decoding import FITS, PAD_COLOUR, decode_image, read_image_bytes
from emotion_toolbox.device import choose_device
from emotion_toolbox.errors import ExportError
from emotion_toolbox.files import write_atomically, write_text
from emotion_toolbox.measures import TEMPERATURES, apply_temperature
from emotion_toolbox.pixels import Floats, prepare_images
from emotion_toolbox.tables import MIKELS_CLASSES

FITTED = {  # the same with Pillow alone, for the model card
    "crop": "ImageOps.fit(image, size, Image.BICUBIC)",
    "pad": f"ImageOps.pad(image, size, Image.BICUBIC, {PAD_COLOUR})",
    "squash": "image.resize(size, Image.BICUBIC)",
}
PRIVATE = ("DATA_ROOT", "IMAGES_ROOT", "OUTPUT_ROOT", "CACHE_DIR", "INIT_FROM", "WEIGHTS")  # paths
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # what a terminal obeys, half characters


def export_model(
    folder: Path, model: nn.Module, classes: Sequence[str], settings: Mapping[str, Any],
    resize: int, facts: Mapping[str, Any],
) -> Path:  # fmt: skip
    """Write weights, config and model card to `folder`.

    `settings` make the model again, images are resized to `resize` pixels before the crop, and
    `facts` are the run's summary. Raises ``ExportError`` for class names that cannot be read back.
    """
    spec = BACKBONES[settings["MODEL_NAME"]]
    tensors = {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
    description = {
        "model": settings["MODEL_NAME"],
        "classes": checked_classes(list(classes)),
        "image_size": settings["IMG_SIZE"],
        "resize": resize,
        "fit": settings["FIT"],
        "mean": spec.mean,
        "std": spec.std,
        "tta": settings["TTA"],
        "temperature": facts["temperature"],
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


def model_card(about: Mapping[str, Any], facts: Mapping[str, Any], model: nn.Module) -> str:
    """What a user of the weights must know, in Markdown, from the run's own numbers."""
    name, classes, dataset = about["model"], about["classes"], literal(about["dataset"])
    numbered = "\n".join(f"{i}. {literal(label)}" for i, label in enumerate(classes))
    origin = Path(facts["weights"]).name  # no path of this machine
    if origin.startswith(("DEFAULT", "IMAGENET")):
        origin = f"ImageNet weights ({origin})"
    else:
        origin = "random weights" if origin == "none" else f"the weights in {literal(origin)}"
    rows = "\n".join(
        f"| {metric} | {e['value']:.3f} | {e['low']:.3f} to {e['high']:.3f} |"
        for metric, e in facts["metrics"]["test"].items()
    )
    feeling = set(classes) <= set(MIKELS_CLASSES)
    task = "the emotion an image evokes" if feeling else f"the classes of {dataset}"
    limits = (
        "The classes are what annotators said a picture evokes in *them*; people differ. The model "
        "judges pictures, not people: it must not be used to infer what somebody feels."
        if feeling
        else "It knows these classes only, and answers with one of them whatever it is shown."
    )
    warning = (
        "\n> **Trained on the synthetic sample.** Its pictures are drawn by a program; the figures "
        "say nothing about photographs.\n"
        if facts["synthetic"]
        else ""
    )
    of_timm = f"tf_{name}" if name in LITES else name.partition("timm:")[2]
    backbone, head = model.get_submodule("backbone"), model.get_submodule("head")
    fitting = ", dynamic_img_size=True" * getattr(backbone, "dynamic_img_size", False)
    make = f'timm.create_model("{of_timm}"{fitting})' if of_timm else f"torchvision.models.{name}()"
    spec = getattr(model, "spec", BACKBONES[name])
    whole, forward = ("Model", written_levels(spec)) if spec.levels else ("nn.Sequential", "")
    layers = re.sub(r", eps=.*?\)", ")", written(head))  # defaults, of which older torch lacks one
    return f"""---
library_name: pytorch
pipeline_tag: image-classification
tags: [{"emotion, " if feeling else ""}{name}]
---

# {name} for {task}
{warning}
Trained on {dataset} for {facts["epochs"]} epochs at {about["image_size"]} pixels, from {origin}.

Classes, by the number of the output:

{numbered}

| test metric | value | 95 % interval |
|---|---|---|
{rows}

## Use

`python -m emotion_transfer predict --model FOLDER IMAGE...` with this folder. Without this project:

```python
import json, torch, {make.partition(".")[0]}
from collections import OrderedDict
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import functional as F
about = json.load(open("config.json"))
backbone = {make}
backbone.set_submodule("{BACKBONES[name].output}", nn.Identity())
class Head(nn.ModuleDict):
    def forward(self, features):
        return sum(part(features) for part in self.values())
head = {layers}
{forward}model = {whole}(OrderedDict(backbone=backbone, head=head)).eval()
model.load_state_dict(load_file("model.safetensors"))
image = ImageOps.exif_transpose(Image.open("picture.jpg")).convert("RGB")
size = (about["resize"], about["resize"])
square = {FITTED[about["fit"]]}
pixels = F.to_tensor(F.center_crop(square, about["image_size"]))
views = [F.normalize(pixels, about["mean"], about["std"])[None]]
if about["tta"]:
    views.append(views[0].flip(3))
shares = sum(model(view).softmax(1)[0] for view in views) ** (1 / about["temperature"])
print(dict(zip(about["classes"], (shares / shares.sum()).tolist())))
```

## Limits

{limits} It inherits whatever bias its pictures and its annotators had, and the licence terms of the
data it was trained on.
"""


def written(module: nn.Module) -> str:
    """The Python that makes `module`, a layer or layers with names."""
    if isinstance(module, nn.ModuleDict):
        parts = [f"{name}={written(part)}" for name, part in module.items()]
        return f"Head(dict({', '.join(parts)}))"
    inner = ", ".join(map(written, module.children()))
    return f"nn.Sequential({inner})" if inner else f"nn.{module}"


def written_levels(spec: BackboneSpec) -> str:
    """The Python of a ``Model`` whose head sees ``pooled_features`` with levels."""
    parts = [part for stage in spec.stages.values() for part in stage]
    pooled = [spec.stages[stage][-1] for stage in spec.levels] + parts[-1:]
    return f"""class Model(nn.Sequential):
    def forward(self, maps):
        found = []
        for part in {parts}:
            maps = self.backbone.get_submodule(part)(maps)
            if part in {pooled}:
                found.append(maps.mean((2, 3)))
        return self.head(torch.cat(found, 1))
"""


def literal(text: str) -> str:
    """`text` as a code span, which Markdown leaves as it is."""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " * (text != text.strip(" `"))
    return f"{fence}{pad}{text}{pad}{fence}"


@dataclass(frozen=True)
class ExportedModel:
    """A loaded export: the network in eval mode, its classes and how its images are prepared."""

    model: nn.Module
    spec: BackboneSpec
    classes: tuple[str, ...]
    image_size: int
    resize: int
    fit: str
    tta: bool  # whether an answer is the mean over an image and its mirror image
    temperature: float  # by which its logits are divided
    synthetic: bool  # trained on the built-in sample


def load_export(
    folder: Path, make_model: Callable[[dict[str, Any], int], nn.Module], device: str = "cpu"
) -> ExportedModel:
    """Load what ``export_model`` wrote; `make_model` gives the network for settings and classes.

    Raises ``ExportError`` if a file is missing, damaged, or does not fit the others, and
    ``ConfigError`` for a device that this machine does not have.
    """
    try:
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_tensors((folder / "model.safetensors").read_bytes())
        classes, settings = checked_classes(about["classes"]), {**about["config"], "WEIGHTS": None}
        settings.pop("AUDIT", None)  # older exports hold this former setting
        sizes = {len(t) for key, t in tensors.items() if key.startswith("head.") and t.ndim}
        if len(classes) not in sizes:  # before a head is made
            raise ValueError(f"model.safetensors is not for {len(classes)} classes")
        model = make_model(settings, len(classes))
        name, size, resize = settings["MODEL_NAME"], settings["IMG_SIZE"], about["resize"]
        if not size <= resize <= 2 * size:
            raise ValueError("resize in config.json does not fit IMG_SIZE")
        if (fit := about.get("fit", "crop")) not in FITS:
            raise ValueError(f"fit in config.json is {fit!r:.80}, none of {', '.join(FITS)}")
        low, high = TEMPERATURES
        temperature = about.get("temperature", 1)  # older exports have none
        if type(temperature) not in (int, float) or not low <= temperature <= high:
            raise ValueError(f"temperature in config.json must be from {low:g} to {high:g}")
        if type(tta := about.get("tta", False)) is not bool:
            raise ValueError("tta in config.json must be true or false")
        model.load_state_dict(tensors)
        refuse_nonfinite(model, "model.safetensors")
    except Exception as error:  # a damaged or hostile file may raise anything
        kind, reason = type(error).__name__, " ".join(str(error).strip().splitlines()[:3])
        raise ExportError(f"{folder} is no usable export ({kind}: {reason})") from error
    model.to(choose_device(device)).eval().requires_grad_(False)
    spec, synthetic = BACKBONES[name], about.get("synthetic") is True
    return ExportedModel(model, spec, classes, size, resize, fit, tta, temperature, synthetic)


def checked_classes(classes: Any) -> tuple[str, ...]:
    """The class names of an export; raises ``ExportError`` if they are none."""
    named = isinstance(classes, list) and all(
        isinstance(name, str) and name.strip() and not CONTROL.search(name) for name in classes
    )
    if not named or len(set(classes)) != len(classes) or len(classes) < 2:
        raise ExportError("the classes must be distinct names, without control characters")
    return tuple(classes)


def predict_files(exported: ExportedModel, paths: Sequence[Path]) -> Floats:
    """Class probabilities [N, C] of image files; raises ``ImageError`` for one that is none."""
    size, fit = exported.resize, exported.fit
    squares = [decode_image(read_image_bytes(path), size, fit) for path in paths]
    return predict_squares(exported, squares)


@torch.no_grad()
def predict_squares(exported: ExportedModel, squares: Sequence[npt.NDArray[np.uint8]]) -> Floats:
    """Class probabilities [N, C] of N decoded images, uint8 [resize, resize, 3], in one batch."""
    images = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2)
    images = images.to(next(exported.model.parameters()).device)
    inputs = prepare_images(images, exported.image_size, exported.spec.mean, exported.spec.std)
    views = (inputs, inputs.flip(3)) if exported.tta else (inputs,)
    shares = torch.stack([exported.model(view).cpu().double().softmax(1) for view in views])
    return apply_temperature(shares.mean(0).numpy(), exported.temperature)


def top_classes(
    probabilities: Floats, classes: Sequence[str], k: int = 3
) -> list[tuple[str, float]]:
    """The `k` most probable classes of one image with their probabilities, best first."""
    order = np.argsort(-probabilities, kind="stable")[:k]
    return [(classes[i], float(probabilities[i])) for i in order]
