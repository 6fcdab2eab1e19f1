"""The learning rate against its closed form and against PyTorch's schedulers."""

import math

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from emotion_transfer.config import make_config
from emotion_transfer.schedule import cycle_bounds, learning_rate, rates_at

SETTINGS = [
    ({"EPOCHS": 12, "THAW_EPOCHS": (3, 7)}, [(0, 3), (3, 7), (7, 12)]),
    ({"EPOCHS": 40}, [(0, 3), (3, 10), (10, 40)]),
    ({"EPOCHS": 6, "THAW_EPOCHS": (0, 0)}, [(0, 6)]),
    ({"EPOCHS": 6, "THAW_EPOCHS": (2, 2)}, [(0, 2), (2, 6)]),
    ({"EPOCHS": 6, "THAW_EPOCHS": (4, 9)}, [(0, 4), (4, 6)]),
    ({"EPOCHS": 2, "THAW_EPOCHS": (5, 9)}, [(0, 2)]),
    ({"EPOCHS": 12, "THAW_EPOCHS": (3, 7), "RESTARTS": False}, [(0, 12)]),
    ({"EPOCHS": 1}, [(0, 1)]),
]


def rates(cfg, base, steps):
    return [
        learning_rate(cfg, base, epoch, step, steps)
        for epoch in range(cfg.EPOCHS)
        for step in range(steps)
    ]


def pytorchs(make, base, count):
    """The rates of a PyTorch scheduler over `count` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=base)
    scheduler, found = make(optimizer), []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(("settings", "bounds"), SETTINGS)
def test_a_cycle_begins_at_every_thaw(settings, bounds):
    assert cycle_bounds(make_config(settings)) == bounds


@pytest.mark.parametrize(("settings", "bounds"), SETTINGS)
@pytest.mark.parametrize("base", [3e-3, 3e-5])
def test_the_rates_are_those_of_pytorchs_schedulers(settings, bounds, base):
    cfg, steps = make_config({**settings, "MIN_LR": 1e-6}), 50
    count = cfg.EPOCHS * steps

    def cosines(optimizer):
        parts = [CosineAnnealingLR(optimizer, (b - a) * steps - 1, 1e-6) for a, b in bounds]
        return SequentialLR(optimizer, parts, [a * steps for a, _ in bounds[1:]])

    def warm_up(optimizer):
        return LinearLR(optimizer, 1 / steps, 1.0, steps - 1)

    annealed, rising = pytorchs(cosines, base, count), pytorchs(warm_up, 1.0, count)
    expected = [a * b for a, b in zip(annealed, rising, strict=True)]
    assert rates(cfg, base, steps) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_closed_form():
    cfg, steps, base = make_config({"EPOCHS": 8, "THAW_EPOCHS": (2, 4)}), 5, 0.01
    first = learning_rate(cfg, base, 0, 0, steps)
    assert first == pytest.approx(base / steps)  # a fifth of the warm-up, at the cosine's top
    for epoch, start in ((2, 2), (4, 4)):
        assert learning_rate(cfg, base, epoch, 0, steps) == pytest.approx(base)  # full height again
        assert learning_rate(cfg, base, epoch - 1, steps - 1, steps) == pytest.approx(cfg.MIN_LR)
        position = 3 / (2 * steps - 1) if start == 2 else 3 / (4 * steps - 1)
        middle = cfg.MIN_LR + (base - cfg.MIN_LR) * (1 + math.cos(math.pi * position)) / 2
        assert learning_rate(cfg, base, epoch, 3, steps) == pytest.approx(middle)


@pytest.mark.parametrize(("settings", "bounds"), SETTINGS)
@pytest.mark.parametrize("steps", [2, 3, 17, 1000])
def test_the_last_step_has_exactly_the_lowest_rate(settings, bounds, steps):
    cfg = make_config(settings)
    assert learning_rate(cfg, 3e-3, cfg.EPOCHS - 1, steps - 1, steps) == cfg.MIN_LR
    found = rates(cfg, 3e-3, steps)
    assert max(found) <= 3e-3 and min(found) > 0


def test_within_a_cycle_the_rate_only_falls():
    cfg, steps = make_config({"EPOCHS": 9, "THAW_EPOCHS": (3, 5)}), 11
    for start, end in cycle_bounds(cfg):
        found = rates(cfg, 1.0, steps)[max(start, 1) * steps : end * steps]
        assert all(a > b for a, b in zip(found, found[1:], strict=False))


def test_odd_cases():
    cfg = make_config({"EPOCHS": 1})
    assert learning_rate(cfg, 3e-3, 0, 0, 1) == 3e-3  # a single step is no reason not to train
    assert learning_rate(cfg, 0.0, 0, 2, 5) == 0  # a backbone told to stand still does
    assert learning_rate(cfg, 1e-9, 0, 4, 5) == 1e-9  # never raised to MIN_LR


def test_it_is_a_pure_function_of_the_position():
    cfg, steps = make_config({"EPOCHS": 9, "THAW_EPOCHS": (3, 5)}), 7
    forwards = {(e, s): learning_rate(cfg, 1.0, e, s, steps) for e in range(9) for s in range(7)}
    for (epoch, step), rate in reversed(forwards.items()):
        assert learning_rate(cfg, 1.0, epoch, step, steps) == rate


@pytest.mark.parametrize(("settings", "frozen"), [({}, 3), ({"THAW_EPOCHS": (0, 4)}, 0)])
def test_a_backbone_that_is_frozen_has_no_rate(settings, frozen):
    cfg = make_config({"EPOCHS": 8, **settings})
    for epoch, step in ((e, s) for e in range(8) for s in (0, 3, 6)):
        head, backbone = rates_at(cfg, epoch, step, 7)
        assert head == learning_rate(cfg, cfg.LR_HEAD, epoch, step, 7)
        expected = learning_rate(cfg, cfg.LR_BACKBONE, epoch, step, 7)
        assert math.isnan(backbone) if epoch < frozen else backbone == expected
