"""Random numbers as functions of their position."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from emotion_toolbox.device import seed_everything, set_deterministic
from emotion_toolbox.draws import (
    DrawStream,
    balanced_order,
    draw_uniforms,
    epoch_order,
    step_seed,
)


@pytest.mark.parametrize("columns", [1, 4, 6, 35])
def test_a_slice_of_an_epoch_is_drawn_by_itself(columns):
    whole = draw_uniforms(42, 3, 0, 100, columns)
    assert whole.shape == (100, columns) and whole.dtype == np.float64
    for first, count in [(0, 1), (17, 40), (99, 1), (50, 0)]:
        part = draw_uniforms(42, 3, first, count, columns)
        np.testing.assert_array_equal(part, whole[first : first + count])


def test_uniforms_are_those_of_an_advanced_philox():
    generator = np.random.Philox(
        key=np.array([7, 0], dtype=np.uint64),
        counter=np.array([0, 5, int(DrawStream.MIX), 0], dtype=np.uint64),
    )
    generator.advance(30 * 2)  # 6 columns take two blocks of four
    expected = np.random.Generator(generator).random((10, 8))[:, :6]
    np.testing.assert_array_equal(draw_uniforms(7, 5, 30, 10, 6, DrawStream.MIX), expected)


def test_positions_beyond_any_epoch_cost_nothing():
    assert draw_uniforms(0, 0, 10**15, 2, 35).shape == (2, 35)


def test_uniforms_are_uniform_and_independent():
    sets = [
        draw_uniforms(seed, epoch, 0, 5000, 4, stream)
        for seed, epoch, stream in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    columns = np.concatenate(sets, axis=1)
    assert columns.min() >= 0 and columns.max() < 1
    assert len(np.unique(columns)) == columns.size
    assert all(stats.kstest(column, "uniform").pvalue > 1e-4 for column in columns.T)
    correlation = np.corrcoef(columns.T) - np.eye(columns.shape[1])
    assert np.abs(correlation).max() < 5 / np.sqrt(len(columns))
    following = [np.corrcoef(column[1:], column[:-1])[0, 1] for column in columns.T]
    assert np.abs(following).max() < 5 / np.sqrt(len(columns))


def test_the_numbers_never_change():
    """A run may be resumed after an upgrade, so these are part of the contract."""
    expected = [[0.8201981478608876, 0.18924562408645496, 0.8676608148821462]]
    np.testing.assert_array_equal(draw_uniforms(42, 0, 0, 1, 3), expected)
    assert epoch_order(42, 1, 8).tolist() == [2, 1, 5, 6, 4, 7, 3, 0]
    assert step_seed(42, 1, 2) == 4430405742407254328


@pytest.mark.parametrize("arguments", [(-1, 0, 0, 1), (0, -1, 0, 1), (0, 0, -1, 1), (0, 0, 0, -1)])
def test_negative_positions_are_refused(arguments):
    with pytest.raises((OverflowError, ValueError)):
        draw_uniforms(*arguments, 4)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_epoch_order_is_a_permutation(n):
    order = epoch_order(42, 0, n)
    assert order.dtype == np.int64
    np.testing.assert_array_equal(np.sort(order), np.arange(n))
    np.testing.assert_array_equal(order, epoch_order(42, 0, n))
    if n == 1000:
        assert (order != epoch_order(42, 1, n)).mean() > 0.9
        assert (order != epoch_order(43, 0, n)).mean() > 0.9


def test_every_permutation_is_equally_likely():
    orders = [tuple(epoch_order(1, epoch, 4)) for epoch in range(4800)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_balanced_order_draws_classes_equally_and_images_equally_within():
    labels = np.repeat([0, 2, 5], [10, 50, 340])
    np.random.default_rng(0).shuffle(labels)
    order = balanced_order(3, 0, labels, 30_000)
    drawn = labels[order]
    assert set(drawn) == {0, 2, 5} and order.dtype == np.int64
    assert stats.chisquare([(drawn == c).sum() for c in (0, 2, 5)]).pvalue > 1e-4
    for c in (0, 2, 5):
        members = np.flatnonzero(labels == c)
        counts = np.array([(order == m).sum() for m in members])
        assert stats.chisquare(counts).pvalue > 1e-4


def test_balanced_order_is_a_function_of_the_position():
    labels = np.array([0, 1, 1, 1, 2])
    np.testing.assert_array_equal(
        balanced_order(3, 1, labels, 40)[:25], balanced_order(3, 1, labels, 25)
    )
    assert (balanced_order(3, 1, labels, 40) != balanced_order(3, 2, labels, 40)).any()


def test_step_seeds_are_distinct_and_well_mixed():
    seeds = np.array([step_seed(42, e, s) for e in range(20) for s in range(200)])
    assert len(np.unique(seeds)) == len(seeds)
    assert seeds.min() >= 0 and isinstance(step_seed(42, 0, 0), int)
    bits = (seeds[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 5 * 0.5 / np.sqrt(len(seeds))
    torch.manual_seed(int(seeds.max()))  # PyTorch takes all of the range


def test_seed_everything_repeats_all_three_generators():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_set_deterministic_switches_both_ways(monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        set_deterministic(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
        set_deterministic(False)
        assert not torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.deterministic and torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
