"""The learning-rate finder: on quadratics, in closed form; on small runs, without a trace."""

import copy
import dataclasses
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from small_run import (
    as_arguments,
    file_datasets,
    install_small_network,
    memory_datasets,
    small_config,
)

from complete_notebook import STAGES
from emotion_toolbox.errors import DataError, DeviceMemoryError, DivergedError
from emotion_toolbox.measures import (
    FEW_STEPS,
    Estimate,
    RangeTest,
    describe_rate,
    range_test,
    suggest_rate,
)
from emotion_toolbox.report import make_run_folder
from emotion_transfer import __main__ as program
from emotion_transfer import finder
from emotion_transfer.commands import lr as command
from emotion_transfer.commands.settings import parse_setting
from emotion_transfer.commands.train import answer, choose_settings, make_model
from emotion_transfer.config import EnhancedConfig
from emotion_transfer.engine import fit, train_step
from emotion_transfer.finder import find_rates
from emotion_transfer.model import build_model
from notebook_builder import build, is_toolbox


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


# --- the test and what it suggests ---------------------------------------------------------------


def descent(curvature: float, noise: float = 0.0):
    """Gradient descent on curvature / 2 * w**2 from w = 1, as a step of ``range_test``.

    Every step's loss has the same noise in each descent, as a batch that is harder has.
    """
    w = 1.0

    def step(number: int, rate: float) -> float:
        nonlocal w
        loss = curvature / 2 * w**2 + noise * random.Random(number).random()
        w -= rate * curvature * w
        return loss

    return step


def quadratic(curvature: float, noise: float = 0.0, steps: int = 60) -> pd.DataFrame:
    """The range test of a quadratic whose best rate is 1 / `curvature`."""
    pair = descent(curvature, noise), descent(curvature, noise)
    return range_test(*pair, 1e-4 / curvature, 10 / curvature, steps)


@pytest.mark.parametrize("curvature", [0.01, 1.0, 300.0])
def test_the_losses_of_a_quadratic_are_those_of_its_closed_form(curvature):
    table = quadratic(curvature)
    rates = np.geomspace(1e-4, 10, 60)[: len(table)] / curvature
    np.testing.assert_allclose(table["rate"], rates, rtol=1e-12)
    left = np.cumprod([1.0, *(1 - rates[:-1] * curvature)])  # of w, before each step
    np.testing.assert_allclose(table["loss"], curvature / 2 * left**2, rtol=1e-9)
    np.testing.assert_array_equal(table["still"], curvature / 2)
    weights = 0.8 ** np.arange(len(table))[::-1]
    smooth = np.average(table["loss"] - table["still"], weights=weights)
    assert table["change"].iloc[-1] == pytest.approx(smooth)


@pytest.mark.parametrize("curvature", [0.01, 1.0, 300.0])
@pytest.mark.parametrize("noise", [0.0, 0.3, 3.0])
def test_a_quadratic_is_advised_below_its_best_rate_whatever_its_scale(curvature, noise):
    table = quadratic(curvature, noise * curvature)
    assert 0.1 <= suggest_rate(table) * curvature <= 1  # 1 / curvature is best, twice it diverges
    assert suggest_rate(table) * curvature == pytest.approx(suggest_rate(quadratic(1.0)), rel=1e-6)


def test_it_ends_once_the_loss_has_doubled():
    table = range_test(descent(1.0), descent(1.0), 1e-2, 1000, 60)
    assert len(table) < 60 and 2 < table["rate"].iloc[-1] < 1000
    smooth = table[["loss", "still"]].ewm(alpha=0.2).mean()
    assert (smooth["loss"] > 2 * smooth["still"]).tolist() == [False] * (len(table) - 1) + [True]


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("which", [0, 1])
def test_a_loss_that_is_not_finite_ends_it_and_is_not_kept(wrong, which):
    fall = descent(1.0)
    steps = [fall, lambda number, rate: 0.5]
    good = steps[which]
    steps[which] = lambda number, rate: wrong if number == 25 else good(number, rate)
    table = range_test(*steps, 1e-3, 10.0, 60)
    assert len(table) == 25 and np.isfinite(table.to_numpy()).all()
    advice = suggest_rate(table)
    assert advice is None or advice in table["rate"].to_numpy()


def test_no_suggestion_without_a_clear_fall():
    flat = range_test(lambda *_: 1.0, lambda *_: 1.0, 1e-3, 1.0, 60)
    rising = range_test(lambda n, _: 1 + n / 100, lambda *_: 1.0, 1e-3, 1.0, 60)
    hardly = range_test(lambda n, _: 1 - n / 10_000, lambda *_: 1.0, 1e-3, 1.0, 60)
    assert [suggest_rate(table) for table in (flat, rising, hardly)] == [None] * 3
    assert suggest_rate(quadratic(1.0).iloc[: FEW_STEPS - 1]) is None
    assert suggest_rate(flat.iloc[:0]) is None


@pytest.mark.parametrize("middle", [3e-4, 1e-2])
def test_the_suggestion_is_the_steepest_place_of_a_smooth_curve(middle):
    """A logistic fall over the logarithm of the rate, then a rise that must not matter."""
    rates = np.geomspace(1e-6, 1, 601)
    fall = -1 / (1 + (middle / rates) ** 3)
    change = fall + (rates > 0.5) * 50
    table = pd.DataFrame({"rate": rates, "loss": 2 + change, "still": 2.0, "change": change})
    steepest = rates[np.gradient(fall, np.log(rates)).argmin()]
    assert steepest == pytest.approx(middle, rel=0.03)
    assert suggest_rate(table) == pytest.approx(steepest, rel=0.03)


def test_no_suggestion_hangs_on_a_single_step():
    """Losses that only scatter, some about one deep dot, hardly ever lead to a suggestion."""
    found = []
    for seed in range(200):
        rng = np.random.default_rng(seed)
        scatter = rng.normal(0, np.geomspace(1e-4, 0.1, 40))  # grows with the rate, as it does
        scatter[30] -= 0.1 * (seed % 2)
        table = range_test(lambda n, _, s=scatter: 1 + s[n], lambda *_: 1.0, 1e-6, 0.1, 40)
        found.append(suggest_rate(table) is not None)
    assert np.mean(found) < 0.1


def test_a_first_loss_that_is_not_finite_is_an_error():
    with pytest.raises(DivergedError, match="look for NaN"):
        range_test(lambda *_: math.nan, lambda *_: 1.0, 1e-3, 1.0, 60)


# --- on a network --------------------------------------------------------------------------------


def find(cfg, datasets=None, *, steps: int = 12, model=None):
    datasets = datasets or memory_datasets()
    model = model or build_model(cfg, 3)
    return find_rates(cfg, model, datasets["train"], steps)


def generators():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


def test_it_leaves_no_trace(tmp_path):
    """A run after it ends bit for bit as one without; model and generators are as they were."""
    cfg, datasets, ends = small_config(tmp_path, EPOCHS=3), memory_datasets(), []
    for number, finds in enumerate((False, True)):
        model = build_model(cfg, 3)
        model.backbone.eval().requires_grad_(False)
        state = copy.deepcopy(model.state_dict())
        modes = [(m.training, id(m)) for m in model.modules()]
        wanted = [(p.requires_grad, p.grad, id(p)) for p in model.parameters()]
        before = generators()
        if finds:
            find(cfg, datasets, model=model)
            assert generators() == before
            assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
            assert modes == [(m.training, id(m)) for m in model.modules()]
            assert wanted == [(p.requires_grad, p.grad, id(p)) for p in model.parameters()]
            assert not torch.are_deterministic_algorithms_enabled()
        result = fit(cfg, model, datasets, tmp_path / str(number))
        timed = ["seconds", "images_per_second", "memory_mb"]
        ends.append((model.state_dict(), result.history.drop(columns=timed)))
    (ours, history), (theirs, other) = ends
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    pd.testing.assert_frame_equal(history, other, check_exact=True)


def test_a_second_test_gives_the_same_numbers(tmp_path):
    cfg = small_config(tmp_path)
    first, again = find(cfg), find(cfg)
    for name in ("LR_HEAD", "LR_BACKBONE"):
        pd.testing.assert_frame_equal(first[name].table, again[name].table, check_exact=True)
        assert first[name].given == getattr(cfg, name)


@pytest.fixture
def steps(monkeypatch):
    """What each step of a finder finds, in a list that grows."""
    seen: list[dict] = []

    def noted(trainer, batch, epoch, step, steps):
        model = trainer.model
        train_step(trainer, batch, epoch, step, steps)
        seen.append(
            {
                "rates": {g["name"]: g["lr"] for g in trainer.optimizer.param_groups},
                "trains": {n for n, p in model.named_parameters() if p.requires_grad},
                "moving": {n for n, m in model.named_modules() if m.training},
                "rows": batch.positions.tolist(),
                "mixes": trainer.cfg.MIX_OFF_EPOCHS == 0,
            }
        )

    monkeypatch.setattr(finder, "train_step", noted)
    return seen


@pytest.mark.parametrize("thaws", [(1, 2), (1, 9), (9, 9), (0, 0)])
def test_each_group_rises_alone_under_the_conditions_of_training(tmp_path, thaws, steps):
    cfg = small_config(tmp_path, THAW_EPOCHS=thaws)
    level, model = sum(start < cfg.EPOCHS for start in thaws), build_model(cfg, 3)
    found = find(cfg, model=model)
    assert list(found) == ["LR_HEAD", "LR_BACKBONE"][: 1 + (level > 0)]

    size = 2 * len(found["LR_HEAD"].table)
    head, rest = steps[:size], steps[size:]
    for (own, still), rate in zip(pairs(head), found["LR_HEAD"].table["rate"], strict=True):
        assert all(n.startswith("head.") for n in own["trains"] | still["trains"])
        assert (own["rates"]["head.decay"], still["rates"]["head.decay"]) == (rate, 0)
        assert own["rows"] == still["rows"]
    if level == 0:
        assert not rest
        return
    warm, rest = rest[:6], rest[6:]
    for step in warm:
        assert all(n.startswith("head.") for n in step["trains"])
        assert step["rates"]["head.plain"] == cfg.LR_HEAD
    thawed = {"head", "backbone.conv2", "backbone.bn2"} | ({"backbone"} if level == 2 else set())
    expected = {n for n, _ in model.named_parameters() if n.startswith(tuple(thawed))}
    expected -= {n for n in expected if n.startswith("backbone.classifier")}
    for (own, still), rate in zip(pairs(rest), found["LR_BACKBONE"].table["rate"], strict=True):
        assert own["trains"] == expected and own["moving"] == still["moving"]
        assert (own["rates"]["backbone.plain"], still["rates"]["backbone.plain"]) == (rate, 0)
        assert own["rates"]["head.decay"] == still["rates"]["head.decay"] == cfg.LR_HEAD
        assert own["rows"] == still["rows"]


def pairs(steps: list[dict]):
    return zip(steps[::2], steps[1::2], strict=True)


def test_at_the_first_step_both_twins_are_alike_and_a_group_that_rises_makes_the_difference(
    tmp_path,
):
    found = find(small_config(tmp_path), steps=30)
    for test in found.values():
        assert test.table["loss"].iloc[0] == test.table["still"].iloc[0]
        apart = (test.table["loss"] - test.table["still"]).abs()
        assert (apart.iloc[5:] > 0).all() and apart.iloc[:5].max() < 1e-3 < apart.iloc[-1]


def test_a_head_that_is_all_probe_moves_at_the_rate_of_the_backbone_and_is_not_tested(tmp_path):
    whole = {"START": "probe", "HEAD": "linear"}
    assert list(find(small_config(tmp_path, **whole))) == ["LR_BACKBONE"]
    never = small_config(tmp_path, **whole, THAW_EPOCHS=(9, 9))
    assert [test.suggested for test in find(never).values()] == [None]  # there is nothing to say


@pytest.mark.parametrize("batch", [4, 8])
def test_a_lack_of_memory_names_the_remedy(tmp_path, monkeypatch, batch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(finder, "train_step", full)
    with pytest.raises(DeviceMemoryError, match=f"BATCH_SIZE={batch}, ACCUMULATE=1"):
        find(small_config(tmp_path, BATCH_SIZE=batch))


def test_generators_are_as_before_where_it_fails(tmp_path, monkeypatch):
    def fails(trainer, *_, **__):
        torch.rand(3)
        raise RuntimeError("stopped")

    monkeypatch.setattr(finder, "train_step", fails)
    before = generators()
    with pytest.raises(RuntimeError, match="stopped"):
        find(small_config(tmp_path))
    assert generators() == before


@pytest.mark.parametrize(("off", "mixes"), [(1, True), (4, False), (9, False)])
def test_it_mixes_where_training_does(tmp_path, off, mixes, steps):
    find(small_config(tmp_path, MIX_OFF_EPOCHS=off), steps=4)
    assert {step["mixes"] for step in steps} == {mixes}


def test_a_small_set_is_repeated_in_another_order(tmp_path, steps):
    cfg = small_config(tmp_path, BATCH_SIZE=8, THAW_EPOCHS=(9, 9))
    data = memory_datasets(counts={"train": 3, "val": 4, "test": 4})  # nine images: one batch
    find(cfg, data, steps=6)
    rows = [tuple(step["rows"]) for step in steps[::2]]
    assert len(rows) == len(set(rows)) == 6 and all(len(set(r)) == 8 for r in rows)


@pytest.mark.parametrize("balance", ["weights", "sampler", "none"])
def test_it_works_with_two_classes_whatever_balances_them(tmp_path, balance):
    cfg, datasets = small_config(tmp_path, BALANCE=balance), memory_datasets()
    train = datasets["train"]
    two = np.flatnonzero(train.split.labels < 2)
    train.split, train.classes = train.split.select(two), train.classes[:2]
    train.pixels = memory_pixels(train.pixels, two)
    found = find_rates(cfg, build_model(cfg, 2), train, 12)
    assert all(len(test.table) == 12 or len(test.table) > 3 for test in found.values())


def memory_pixels(pixels, chosen):
    return type(pixels)(pixels.array[chosen])


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["head", "backbone"])
def test_weights_that_are_nan_are_named(tmp_path, part):
    cfg = small_config(tmp_path)
    model = build_model(cfg, 3)
    with torch.no_grad():
        next(model.get_submodule(part).parameters()).fill_(math.nan)
    with pytest.raises(DivergedError, match="first loss is not finite: look .* INIT_FROM"):
        find(cfg, model=model)


def test_fewer_images_than_a_batch(tmp_path):
    with pytest.raises(DataError, match="24 training images do not fill one batch; set BATCH_SIZE"):
        find(small_config(tmp_path, BATCH_SIZE=32))


# --- in the notebook -----------------------------------------------------------------------------


def test_the_notebook_tests_the_rates_before_it_trains_and_keeps_the_picture():
    cells = [c for c in build(STAGES).cells if c.cell_type == "code" and not is_toolbox(c)]
    tested, trained = (
        next(i for i, cell in enumerate(cells) if f"= {call}(cfg, model" in cell.source)
        for call in ("find_rates", "fit")
    )
    assert tested + 1 == trained and 'name="range_tests"' in cells[tested].source
    assert not any("emotion_transfer.commands" in cell.source for cell in cells)


# --- the command ---------------------------------------------------------------------------------


def run(cfg, *more: str) -> int:
    return program.main(["lr", "--set", *as_arguments(cfg), *more])


@pytest.fixture
def cfg(tiny_root, tmp_path):
    return small_config(tmp_path)


def test_the_command_says_and_draws_what_it_found(cfg, capsys):
    assert run(cfg) == 0
    lines = capsys.readouterr().out.splitlines()
    datasets = file_datasets(cfg)
    model = make_model(cfg, datasets, command.Path(lines[-1]).parent.parent)
    found = find_rates(cfg, model, datasets["train"])
    assert lines[1:3] == [describe_rate(name, test) for name, test in found.items()]
    assert "0.1 is set" in lines[1] and "0.02 is set" in lines[2]
    picture = command.Path(lines[-1])
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.parent.parent.parent.is_dir()
    assert not (picture.parent.parent / "checkpoints").exists()


def test_the_command_of_a_backbone_that_never_thaws(cfg, capsys):
    assert run(cfg, "THAW_EPOCHS=(9,9)") == 0
    assert "LR_BACKBONE: the backbone never thaws" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("BATCH_SIZE=32", "24 training images do not fill one batch"),
        ("LR_HAED=1", "did you mean LR_HEAD"),
        ("DATA_ROOT=nowhere", "nowhere"),
    ],
)
def test_the_command_names_what_is_wrong(cfg, capsys, more, said):
    assert run(cfg, more) == 1
    error = capsys.readouterr().err.strip().splitlines()[-3:]
    assert any(said in line for line in error)


def test_short_runs_say_which_rate_won_and_by_how_much(cfg):
    cfg = dataclasses.replace(cfg, START="random")  # else the start is as good as it gets
    datasets, folder = file_datasets(cfg), command.Path(cfg.OUTPUT_ROOT)
    folder.mkdir(parents=True)
    tried = command.compare_rates(cfg, datasets, folder, [0.0, 0.02, 5.0], epochs=2)
    assert {run.rate for run in tried} == {0.0, 0.02, 5.0}
    assert [run.score for run in tried] == sorted((run.score for run in tried), reverse=True)
    assert (tried[0].behind.value, tried[0].behind.low, tried[0].behind.high) == (0, 0, 0)
    assert [p.name for p in folder.iterdir()] in ([], ["baselines"])  # no run's files of its own
    for run in tried:  # each is the run that these settings give by themselves
        own = dataclasses.replace(
            cfg, LR_BACKBONE=run.rate, EPOCHS=2, WARMUP_EPOCHS=0, THAW_EPOCHS=(0, 0)
        )
        model = make_model(own, datasets, folder)
        result = fit(own, model, datasets, folder / f"own-{run.rate}")
        found = answer(own, model, datasets["val"], result.amp)
        assert run.score == pytest.approx(found.macro_f1)


def test_the_command_compares_rates_and_refuses_impossible_ones(cfg, capsys):
    asked = ["lr", "--epochs", "1", "--runs", "0.01", "0.02", "--set", *as_arguments(cfg)]
    assert program.main(asked) == 0
    said = capsys.readouterr().out
    assert "won with a validation macro_f1 of" in said and "nothing has been changed" in said
    assert program.main([*asked[:3], "--runs", "99", *asked[6:]]) == 1
    assert "LR_BACKBONE=99.0 must be a number from 0" in capsys.readouterr().err


def test_auto_trains_at_the_rate_that_short_runs_preferred(cfg, capsys, monkeypatch):
    monkeypatch.setattr(command, "AUTO_RATES", (0.0, 0.02))
    asked = [text for text in as_arguments(cfg) if not text.startswith("LR_BACKBONE")]
    settings = dict(parse_setting(EnhancedConfig, text) for text in asked)
    chosen, listed = choose_settings({**settings, "LR_BACKBONE": "auto"})
    said = capsys.readouterr().out
    assert f"LR_BACKBONE={chosen.LR_BACKBONE:g} won with a validation" in said
    usual = choose_settings(settings)[0]
    assert chosen == dataclasses.replace(usual, LR_BACKBONE=chosen.LR_BACKBONE)
    folder = make_run_folder(usual, listed)
    tried = command.compare_rates(usual, file_datasets(usual), folder, (0.0, 0.02), 2)
    assert tried[0].rate == chosen.LR_BACKBONE

    monkeypatch.setattr(command, "compare_rates", None)  # taken up again, nothing is tried again
    assert choose_settings({**settings, "LR_BACKBONE": "auto"})[0] == chosen
    assert "kept in" in capsys.readouterr().out
    assert program.main(["train", "--set", *asked, "LR_BACKBONE=automatic"]) == 1
    assert "LR_BACKBONE='automatic' must be a number" in capsys.readouterr().err


def test_what_it_says_of_rates_that_are_alike_and_that_are_not():
    def tried(rate, *behind):
        return command.Tried(rate, 0.5, Estimate(*behind))

    said = command.describe_rates(
        [tried(0.1, 0, 0, 0), tried(0.2, 0.1, 0.05, 0.2), tried(0.3, 0.1, -0.05, 0.2)], "accuracy"
    ).splitlines()
    assert [("chance" in line) for line in said] == [False, False, True]


def test_what_it_says_without_a_suggestion():
    test = RangeTest(pd.DataFrame(), 0.003, None)
    assert "no suggestion" in describe_rate("LR_HEAD", test)
