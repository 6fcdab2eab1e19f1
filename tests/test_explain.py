"""Grad-CAM against its definition, computed by hand with hooks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_run import install_small_network, small_config

from emotion_transfer.config import make_config
from emotion_transfer.explain import grad_cam
from emotion_transfer.model import build_model

LAST = {  # the last layer that still knows where things are
    "resnet50": lambda backbone: backbone.layer4,
    "efficientnet_b0": lambda backbone: backbone.features[8],
    "efficientnet_lite0": lambda backbone: backbone.bn2,
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


def by_hand(model, layer, images, targets):
    """Selvaraju et al. (2017), equations 1 and 2; maps [B, H, W] before they are scaled to 0..1."""
    kept = {}

    def keep(module, inputs, output):
        kept["map"] = output
        output.retain_grad()

    handle = layer.register_forward_hook(keep)
    scores = model(images.clone().requires_grad_())
    scores.gather(1, torch.as_tensor(targets)[:, None]).sum().backward()
    handle.remove()
    weights = kept["map"].grad.mean(dim=(2, 3), keepdim=True)
    maps = F.relu((weights * kept["map"]).sum(1, keepdim=True)).detach()
    large = F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)
    return large[:, 0].numpy()


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
    found = grad_cam(model, images, targets)
    assert found.shape == (3, 96, 96) and found.dtype == np.float32
    for ours, theirs in zip(found, expected, strict=True):
        assert theirs.max() > 0, "the test would show nothing"
        np.testing.assert_allclose(ours, theirs / theirs.max(), atol=2e-3)
        assert ours.min() >= 0 and ours.max() == pytest.approx(1)
    one = grad_cam(model, images[1:2], targets[1:2])  # no image depends on its neighbours
    np.testing.assert_allclose(one[0], found[1], atol=2e-3)


def test_it_leaves_no_trace(tmp_path):
    """Frozen as `fit` leaves it; neither the model nor the images come back changed."""
    model = build_model(small_config(tmp_path), 3).requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():  # as in a notebook that only predicts
        first = grad_cam(model, images, np.array([0, 1]))
    again = grad_cam(model, images, np.array([0, 1]))
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
    heat = grad_cam(model, images, np.array([1]))[0]
    top, left = np.unravel_index(heat.argmax(), heat.shape)
    assert top < 8 and left >= 20 and heat[24:, :8].max() < 0.05
    assert grad_cam(model, images, np.array([2])).max() == 0  # it only speaks against this one
    assert np.isfinite(grad_cam(model, images, np.array([0]))).all()
