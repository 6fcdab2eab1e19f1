"""MixUp and CutMix: who is mixed with whom, how strongly, and what becomes of the targets."""

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms.v2 import CutMix

from emotion_transfer.config import make_config
from emotion_transfer.mixing import Mixing, draw_mixing, mix_images, mix_targets, mixing_active

ALWAYS = {"MIX_PROB": 1.0, "IMG_SIZE": 64}


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device(request.param)


def area(box):
    return ((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).numpy()


def make_images(count, size=64):
    images = torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))
    return images.contiguous(memory_format=torch.channels_last)


# --- drawing


def test_strengths_are_functions_of_the_position():
    cfg = make_config({"MIX_PROB": 0.7})
    whole, part = draw_mixing(cfg, 2, 0, 64), draw_mixing(cfg, 2, 24, 16)
    assert torch.equal(part.lam, whole.lam[24:40]) and torch.equal(part.box, whole.box[24:40])
    other = draw_mixing(cfg, 3, 0, 64)
    assert not torch.equal(other.lam, whole.lam)
    assert not torch.equal(other.partner, whole.partner)


@pytest.mark.parametrize("count", [0, 1, 2, 33])
def test_partners_are_a_permutation_of_the_slice(count):
    mixing = draw_mixing(make_config(ALWAYS), 0, 5, count)
    assert sorted(mixing.partner.tolist()) == list(range(count))
    assert mixing.lam.shape == (count,) and mixing.box.shape == (count, 4)
    assert mixing.lam.dtype == torch.float32
    assert mixing.partner.dtype == mixing.box.dtype == torch.int64


def test_every_partner_is_equally_likely():
    cfg = make_config(ALWAYS)
    pairs = np.zeros((4, 4))
    for step in range(1200):
        pairs[np.arange(4), draw_mixing(cfg, 0, 4 * step, 4).partner.numpy()] += 1
    assert all(stats.chisquare(row).pvalue > 1e-4 for row in pairs)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_mixup_strengths_are_beta(alpha):
    cfg = make_config({**ALWAYS, "MIXUP_ALPHA": alpha, "CUTMIX_ALPHA": 0.0})
    mixing = draw_mixing(cfg, 0, 0, 5000)
    assert not area(mixing.box).any()
    assert stats.kstest(mixing.lam.double().numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_boxes_are_distributed_as_torchvisions(alpha):
    size = 512
    cfg = make_config({**ALWAYS, "IMG_SIZE": size, "MIXUP_ALPHA": 0.0, "CUTMIX_ALPHA": alpha})
    mixing = draw_mixing(cfg, 0, 0, 4000)
    assert mixing.box.min() >= 0 and mixing.box.max() <= size
    torch.manual_seed(0)
    reference = CutMix(alpha=alpha, num_classes=2)
    images = torch.empty(2, 3, 1, 1).expand(2, 3, size, size)
    drawn = [reference.make_params([images]) for _ in range(3000)]
    boxes = np.array([params["box"] for params in drawn])
    for mine, theirs in zip(mixing.box.T.numpy(), boxes.T, strict=True):
        assert stats.ks_2samp(mine, theirs).pvalue > 1e-3
    shares = [params["lam_adjusted"] for params in drawn]
    assert stats.ks_2samp(mixing.lam.numpy(), shares).pvalue > 1e-3


def test_the_share_is_that_of_the_pixels():
    cfg = make_config({**ALWAYS, "MIXUP_ALPHA": 0.0})
    mixing = draw_mixing(cfg, 0, 0, 500)
    np.testing.assert_allclose(mixing.lam.numpy(), 1 - area(mixing.box) / 64**2, atol=1e-7)


def test_mix_prob_and_the_two_kinds():
    n = 6000
    mixing = draw_mixing(make_config({"MIX_PROB": 0.4, "MIXUP_ALPHA": 1.0}), 0, 0, n)
    mixed, cut = (mixing.lam < 1).numpy(), area(mixing.box) > 0
    assert stats.binomtest(int(mixed.sum()), n, 0.4).pvalue > 1e-3
    assert stats.binomtest(int(cut.sum()), int(mixed.sum()), 0.5).pvalue > 1e-3
    assert not (cut & ~mixed).any()


@pytest.mark.parametrize(
    ("settings", "epoch", "active"),
    [
        ({}, 0, True),
        ({"EPOCHS": 10, "MIX_OFF_EPOCHS": 3}, 6, True),
        ({"EPOCHS": 10, "MIX_OFF_EPOCHS": 3}, 7, False),
        ({"EPOCHS": 10, "MIX_OFF_EPOCHS": 0}, 9, True),
        ({"EPOCHS": 2, "MIX_OFF_EPOCHS": 3}, 0, False),
        ({"MIX_PROB": 0.0}, 0, False),
        ({"MIXUP_ALPHA": 0.0, "CUTMIX_ALPHA": 0.0}, 0, False),
        ({"MIXUP_ALPHA": 0.0}, 0, True),
        ({"CUTMIX_ALPHA": 0.0}, 0, True),
    ],
)
def test_when_mixing_is_active(settings, epoch, active):
    cfg = make_config({"MIX_PROB": 1.0, **settings})
    assert mixing_active(cfg, epoch) is active
    mixing = draw_mixing(cfg, epoch, 0, 100)
    assert bool((mixing.lam < 1).any()) is active
    images, targets = make_images(100, 8), torch.eye(100)
    if not active:
        assert torch.equal(mix_images(images, mixing), images)
        assert torch.equal(mix_targets(targets, mixing), targets)


# --- applying


def test_images_are_mixed_as_the_papers_say(device):
    cfg = make_config({"MIX_PROB": 0.7, "MIXUP_ALPHA": 1.0, "IMG_SIZE": 64})
    images, mixing = make_images(24).to(device), draw_mixing(cfg, 0, 0, 24)
    before = images.clone()
    found = mix_images(images, mixing)
    assert torch.equal(images, before)
    assert found.is_contiguous(memory_format=torch.channels_last)
    kinds = set()
    for row in range(24):
        other, lam = images[int(mixing.partner[row])], mixing.lam[row].item()
        left, top, right, bottom = mixing.box[row].tolist()
        if right > left:
            expected = images[row].clone()
            expected[:, top:bottom, left:right] = other[:, top:bottom, left:right]
            assert torch.equal(found[row], expected)
        elif lam == 1:
            assert torch.equal(found[row], images[row])
        else:
            expected = lam * images[row] + (1 - lam) * other
            torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-6)
        kinds.add((right > left, lam == 1))
    assert kinds == {(True, False), (False, True), (False, False)}


def test_targets_are_mixed_in_the_same_proportion(device):
    mixing = Mixing(
        partner=torch.tensor([2, 0, 1]),
        lam=torch.tensor([0.25, 1.0, 0.5]),
        box=torch.zeros(3, 4, dtype=torch.int64),
    )
    targets = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0.5, 0.5]], device=device)
    expected = [[0.25, 0.375, 0.375], [0, 1, 0], [0, 0.75, 0.25]]
    torch.testing.assert_close(mix_targets(targets, mixing).cpu(), torch.tensor(expected))


def test_the_target_is_the_mean_of_the_picture():
    """Where each image shows the number of its class everywhere, picture and target must agree."""
    cfg = make_config({**ALWAYS, "MIXUP_ALPHA": 1.0})
    shown = torch.arange(20.0)
    mixing = draw_mixing(cfg, 0, 0, 20)
    pictures = mix_images(shown[:, None, None, None].expand(20, 3, 64, 64).clone(), mixing)
    targets = mix_targets(torch.eye(20), mixing)
    torch.testing.assert_close(targets.sum(1), torch.ones(20))
    torch.testing.assert_close(
        pictures.double().mean((1, 2, 3)).float(), targets @ shown, rtol=0, atol=1e-4
    )


def test_a_partner_that_is_mixed_itself_is_read_unmixed():
    mixing = Mixing(
        partner=torch.tensor([1, 0]),
        lam=torch.tensor([0.0, 0.75]),
        box=torch.tensor([[0, 0, 0, 0], [0, 0, 2, 2]]),
    )
    images = make_images(2, 4)
    found = mix_images(images, mixing)
    assert torch.equal(found[0], images[1])
    assert torch.equal(found[1, :, :2, :2], images[0, :, :2, :2])


def test_cuda_is_never_waited_for():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    images, targets = make_images(16).cuda(), torch.eye(16).cuda()
    mixing = draw_mixing(make_config(ALWAYS), 0, 0, 16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mix_images(images, mixing)
        mix_targets(targets, mixing)
    finally:
        torch.cuda.set_sync_debug_mode("default")
