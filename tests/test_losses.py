"""The loss against PyTorch's own, in double precision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emotion_transfer.losses import SoftTargetLoss, class_weights

CLASSES = 5


@pytest.fixture
def batch():
    """Scores [12, C] of a size at which the loss is neither flat nor saturated, and labels."""
    generator = torch.Generator().manual_seed(3)
    scores = 4 * torch.randn(12, CLASSES, generator=generator, dtype=torch.float64)
    return scores, torch.randint(CLASSES, (12,), generator=generator)


def reference(scores, labels, weight, smoothing):
    """Each image's own class weight times its unweighted, smoothed cross-entropy, [B]."""
    unweighted = F.cross_entropy(scores, labels, reduction="none", label_smoothing=smoothing)
    return weight.double()[labels] * unweighted


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_labels(batch, smoothing, weighted):
    scores, labels = batch
    weight = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0]) if weighted else torch.ones(CLASSES)
    expected = reference(scores, labels, weight, smoothing).mean()
    found = SoftTargetLoss(weight, smoothing)(scores.float(), F.one_hot(labels, CLASSES).float())
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    if not weighted:
        plain = torch.nn.CrossEntropyLoss(label_smoothing=smoothing)(scores, labels)
        assert found.item() == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_target_costs_the_mixture_of_the_costs(batch, smoothing):
    scores, first = batch
    second = first.flip(0)
    share = torch.linspace(0, 1, len(first), dtype=torch.float64)
    weight = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0])
    expected = (
        share * reference(scores, first, weight, smoothing)
        + (1 - share) * reference(scores, second, weight, smoothing)
    ).mean()
    hot = [F.one_hot(labels, CLASSES).double() for labels in (first, second)]
    targets = (share[:, None] * hot[0] + (1 - share[:, None]) * hot[1]).float()
    found = SoftTargetLoss(weight, smoothing)(scores.float(), targets)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_is_that_of_the_reference(batch):
    scores, labels = batch
    weight = torch.tensor([0.2, 3.0, 1.0, 0.5, 2.0])
    theirs = scores.clone().requires_grad_()
    reference(theirs, labels, weight, 0.1).mean().backward()
    ours = scores.float().requires_grad_()
    SoftTargetLoss(weight, 0.1)(ours, F.one_hot(labels, CLASSES).float()).backward()
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-4, atol=1e-7)
    p, q = scores.softmax(1), 0.9 * F.one_hot(labels, CLASSES) + 0.1 / CLASSES  # closed form
    expected = weight[labels, None] * (p - q) / len(labels)
    torch.testing.assert_close(ours.grad.double(), expected, rtol=1e-4, atol=1e-7)


def test_weights_do_not_distort_the_smoothing():
    """The scores that cost least are the smoothed target itself, whatever the class weights.

    PyTorch's weights the smoothing too, which moves the optimum towards heavy classes (104776).
    """
    weight, label, smoothing = torch.tensor([10.0, 1.0, 1.0, 1.0, 0.1]), 1, 0.2
    target = torch.full((CLASSES,), smoothing / CLASSES)
    target[label] += 1 - smoothing
    scores = target.log()[None].requires_grad_()
    SoftTargetLoss(weight, smoothing)(
        scores, F.one_hot(torch.tensor([label]), CLASSES).float()
    ).backward()
    assert scores.grad.abs().max() < 1e-6
    theirs = target.log()[None].requires_grad_()
    F.cross_entropy(theirs, torch.tensor([label]), weight, label_smoothing=smoothing).backward()
    assert theirs.grad.abs().max() > 0.1  # what is avoided


def test_half_precision_scores_are_summed_in_full(batch):
    scores, labels = batch
    targets = F.one_hot(labels, CLASSES).float()
    loss = SoftTargetLoss(torch.ones(CLASSES), 0.1)
    for dtype in (torch.bfloat16, torch.float16):
        found = loss(scores.to(dtype), targets)
        assert found.dtype == torch.float32
        assert found.item() == pytest.approx(loss(scores.to(dtype).float(), targets).item())


def test_extreme_scores_stay_finite():
    scores = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    for label in range(3):
        target = F.one_hot(torch.tensor([label]), 3).float()
        loss = SoftTargetLoss(torch.ones(3), 0.1)(scores, target)
        assert torch.isfinite(loss) and torch.isfinite(torch.autograd.grad(loss, scores)[0]).all()


@pytest.mark.parametrize("counts", [[5, 5, 5], [1, 10, 100], [3, 0, 9]])
def test_class_weights_average_one_over_the_images(counts):
    labels = np.repeat(np.arange(3), counts)
    weight = class_weights(labels, 3).double().numpy()
    assert weight[labels].mean() == pytest.approx(1)
    present = [c for c in range(3) if counts[c]]
    products = [weight[c] * counts[c] for c in present]  # every class carries the same total
    assert products == pytest.approx([products[0]] * len(present))
    assert all(weight[c] == 0 for c in range(3) if not counts[c])


def test_class_weights_are_sklearns():
    from sklearn.utils.class_weight import compute_class_weight

    labels = np.random.default_rng(0).choice(4, 200, p=[0.5, 0.3, 0.15, 0.05]).astype(np.int64)
    expected = compute_class_weight("balanced", classes=np.arange(4), y=labels)
    np.testing.assert_allclose(class_weights(labels, 4), expected, rtol=1e-6)


def test_the_weights_travel_with_the_loss():
    loss = SoftTargetLoss(torch.ones(3), 0.1)
    assert "weight" in loss.state_dict()
    assert loss.to(torch.float64).weight.dtype == torch.float64
