"""Predictions against a plain loop, figures against scikit-learn, Grad-CAM by its definition."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, log_loss
from small_run import install_small_network, memory_datasets, small_config

from emotion_toolbox.measures import Predictions
from emotion_toolbox.probes import grad_cam, predict
from emotion_transfer.config import make_config
from emotion_transfer.model import build_model, set_training_mode


def ask(cfg, model, dataset, **options) -> Predictions:
    return predict(model, dataset, size=cfg.IMG_SIZE, batch_size=cfg.BATCH_SIZE, **options)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


@pytest.fixture
def cfg(tmp_path):
    return small_config(tmp_path, BATCH_SIZE=10)  # 12 validation images: the last batch is ragged


@pytest.fixture
def model(cfg):
    model = build_model(cfg, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that the answers differ
    return model


def plain_loop(cfg, model, dataset) -> np.ndarray:
    """Probabilities image by image: centre crop, normalise, softmax."""
    model, answers = copy.deepcopy(model).eval(), []
    spec, size = model.spec, cfg.IMG_SIZE
    for index in range(len(dataset)):
        pixels = dataset[index][0].double() / 255
        first = (pixels.shape[1] - size) // 2
        pixels = pixels[:, first : first + size, first : first + size]
        mean, std = (torch.tensor(v).double()[:, None, None] for v in (spec.mean, spec.std))
        with torch.no_grad():
            scores = model(((pixels - mean) / std).float()[None])
        answers.append(scores.double().softmax(1)[0].numpy())
    return np.stack(answers)


def test_every_image_is_counted_once_and_in_order(cfg, model):
    for name, dataset in memory_datasets(size=36).items():
        found = ask(cfg, model, dataset)
        np.testing.assert_array_equal(found.labels, dataset.split.labels)
        np.testing.assert_allclose(found.probabilities, plain_loop(cfg, model, dataset), atol=1e-5)
        assert len(found.labels) == len(dataset), name
        assert found.probabilities.dtype == np.float64


def test_the_figures_are_scikit_learns(cfg, model):
    dataset = memory_datasets()["train"]
    dataset.split.labels[:4] = 1
    found = ask(cfg, model, dataset)
    assert found.accuracy == accuracy_score(found.labels, found.predicted)
    assert found.macro_f1 == f1_score(found.labels, found.predicted, average="macro")
    expected = log_loss(found.labels, found.probabilities, labels=range(3))
    assert found.loss == pytest.approx(expected, rel=1e-6)


def test_a_class_that_does_not_occur_counts_as_zero():
    """The figure must not rise because a class is missing from the answers."""
    labels = np.array([0, 0, 1, 1])
    found = Predictions(labels, np.eye(4)[[0, 0, 1, 1]], 0.0)
    assert found.accuracy == 1 and found.macro_f1 == pytest.approx(0.5)


@pytest.mark.parametrize("positions", [[0], [11, 3, 7], list(range(12))[::-1]])
def test_a_choice_of_positions(cfg, model, positions):
    dataset = memory_datasets()["val"]
    whole = ask(cfg, model, dataset)
    part = ask(cfg, model, dataset, positions=np.array(positions))
    np.testing.assert_array_equal(part.labels, whole.labels[positions])
    np.testing.assert_allclose(part.probabilities, whole.probabilities[positions], atol=1e-6)


@pytest.mark.parametrize("amp", ["off", "bf16"])
def test_evaluation_leaves_no_trace(cfg, model, amp):
    set_training_mode(cfg, model, 1)  # some stages train, some do not
    state = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    ask(cfg, model, memory_datasets()["val"], amp=amp)
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled() and all(p.grad is None for p in model.parameters())


def test_half_precision_is_close(cfg, model):
    dataset = memory_datasets()["val"]
    full, half = (ask(cfg, model, dataset, amp=amp) for amp in ("off", "bf16"))
    np.testing.assert_allclose(half.probabilities, full.probabilities, atol=0.05)
    np.testing.assert_allclose(half.probabilities.sum(1), 1, atol=1e-12)


# --- Grad-CAM ------------------------------------------------------------------------------------

LAST = {  # the last layer that still knows where things are
    "resnet50": lambda backbone: backbone.layer4,
    "efficientnet_b0": lambda backbone: backbone.features[8],
    "efficientnet_lite0": lambda backbone: backbone.bn2,
}


def by_hand(model, layer, images, targets):
    """Selvaraju et al. (2017), equations 1 and 2; maps [B, h, w] before they are scaled to 0..1."""
    kept = {}

    def keep(module, inputs, output):
        kept["map"] = output
        output.retain_grad()

    handle = layer.register_forward_hook(keep)
    scores = model(images.clone().requires_grad_())
    scores.gather(1, torch.as_tensor(targets)[:, None]).sum().backward()
    handle.remove()
    weights = kept["map"].grad.mean(dim=(2, 3), keepdim=True)
    return F.relu((weights * kept["map"]).sum(1)).detach().numpy()


@pytest.mark.parametrize("name", LAST)
def test_the_maps_are_those_of_the_definition(name):
    weights = "DEFAULT" if name == "efficientnet_lite0" else None
    cfg = make_config({"MODEL_NAME": name, "WEIGHTS": weights, "HEAD": "linear"})
    model = build_model(cfg, 4).eval()
    if name == "efficientnet_b0":  # with random weights its signal dies out
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(module.weight, mode="fan_in")
    images = torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    maps = [by_hand(model, LAST[name](model.backbone), images, [c] * 3) for c in range(4)]
    targets = np.array([m.max((1, 2)) for m in maps]).argmax(0)  # where there is most to see
    expected = np.stack([maps[c][i] for i, c in enumerate(targets)])
    model.zero_grad()
    layer = LAST[name](model.backbone)
    found = grad_cam(model, layer, images, targets)
    assert found.shape == (3, 3, 3) and found.dtype == np.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.max() > 0, "the test would show nothing"
        np.testing.assert_allclose(ours, theirs / theirs.max(), atol=2e-3)
        assert ours.min() >= 0 and ours.max() == pytest.approx(1)
    one = grad_cam(model, layer, images[1:2], targets[1:2])  # no image depends on its neighbours
    np.testing.assert_allclose(one[0], found[1], atol=2e-3)


def test_it_leaves_no_trace(tmp_path):
    """Frozen as `fit` leaves it; neither the model nor the images come back changed."""
    model = build_model(small_config(tmp_path), 3).requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # as in a notebook that only predicts
        first = grad_cam(model, model.backbone.conv2, images, np.array([0, 1]))
    again = grad_cam(model, model.backbone.conv2, images, np.array([0, 1]))
    np.testing.assert_array_equal(first, again)
    assert not images.requires_grad and images.grad is None
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._backward_hooks)]
    assert not hooks


def test_it_finds_the_place_that_speaks_for_a_class(tmp_path):
    """A network that looks for brightness, shown a bright corner."""
    model = build_model(small_config(tmp_path, HEAD="linear"), 3).eval()
    backbone = model.backbone
    with torch.no_grad():
        for convolution in (backbone.conv1, backbone.conv2):
            convolution.weight.fill_(1 / convolution.weight[0].numel())
        model.head.output.weight.fill_(0)
        model.head.output.weight[1] = 1
        model.head.output.weight[2] = -1
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, :8, 20:] = 5
    heat = grad_cam(model, model.backbone.conv2, images, np.array([1]))[0]
    top, left = np.unravel_index(heat.argmax(), heat.shape)
    assert heat.shape == (4, 4) and top == 0 and left >= 2 and heat[3, 0] < 0.05
    assert (
        grad_cam(model, model.backbone.conv2, images, np.array([2])).max() == 0
    )  # it only speaks against this one
    assert np.isfinite(grad_cam(model, model.backbone.conv2, images, np.array([0]))).all()
