"""Attribute heads: their costs against closed forms, masks, mixing, whole runs, and the export."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from scipy.stats import entropy
from small_run import as_arguments, file_datasets, install_small_network, listed, small_config

from emotion_toolbox.attributes import make_attribute, read_attributes
from emotion_toolbox.errors import ConfigError, DataError
from emotion_toolbox.keeper import list_checkpoints, load_verified
from emotion_toolbox.sample import draw_sample
from emotion_transfer import __main__ as program
from emotion_transfer import engine
from emotion_transfer.commands import attribute_heads
from emotion_transfer.commands.attribute_heads import (
    AttributeClassifier,
    AttributeTrainer,
    Category,
    Number,
    Several,
    add_attributes,
    attribute_loss,
    fit_model,
    judge_heads,
    make_target,
)
from emotion_transfer.commands.train import train_model
from emotion_transfer.mixing import draw_mixing
from emotion_transfer.model import build_model

HERE = Path("train.csv")
NAMES = ("shade", "things", "warmth")
SHADES = ["dark"] * 9 + ["light"] * 6 + ["rare"] * 2 + [""] * 3
THINGS = ["cat", "cat|dog", "dog", "", "cat|dog|fox"] * 4
WARMTH = [*np.linspace(-3, 9, 17).astype(str), "", "", ""]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


@pytest.fixture
def targets():
    texts = zip(NAMES, (SHADES, THINGS, WARMTH), strict=True)
    return [make_target(make_attribute(*pair), HERE) for pair in texts]


def statistics_of(targets) -> list[torch.Tensor]:
    columns = zip(targets, (SHADES, THINGS, WARMTH), strict=True)
    return [one.statistics(make_attribute(one.name, c)).double() for one, c in columns]


def noise(*shape, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --- costs --------------------------------------------------------------------------------------


def test_each_kind_of_column_has_its_target(targets):
    shade, things, warmth = targets
    assert [type(one) for one in targets] == [Category, Several, Number]
    assert shade.values == ["dark", "light"] and things.values == ["cat", "dog"]  # no fox: 4 images
    assert (warmth.mean, warmth.deviation) == pytest.approx((3, np.linspace(-3, 9, 17).std()))


def test_costs_are_pytorchs_and_missing_values_cost_nothing(targets):
    shade, things, warmth = targets
    a, b, c = statistics_of(targets)
    outputs = noise(20, 5)
    known = torch.arange(20) < 15
    wanted = torch.tensor([0] * 9 + [1] * 6 + [0] * 5)
    expected = F.cross_entropy(outputs[:, :2], wanted, reduction="none") * known
    torch.testing.assert_close(shade.cost(outputs[:, :2], a), expected)

    has = torch.tensor([["cat" in t, "dog" in t] for t in THINGS]).double()
    each = F.binary_cross_entropy_with_logits(outputs[:, 2:4], has, reduction="none").sum(1)
    torch.testing.assert_close(
        things.cost(outputs[:, 2:4], b), each * torch.tensor([bool(t) for t in THINGS])
    )

    z = (torch.linspace(-3, 9, 17, dtype=torch.float64) - warmth.mean) / warmth.deviation
    found = warmth.cost(outputs[:, 4:], c)
    torch.testing.assert_close(found[:17], (outputs[:17, 4] - z) ** 2, rtol=1e-6, atol=1e-6)
    assert found[17:].abs().sum() == 0


def test_knowing_the_frequencies_alone_costs_one(targets):
    shade, things, warmth = targets
    for one, rows in zip(targets, statistics_of(targets), strict=True):
        bias = one.bias.double().requires_grad_()
        cost = one.cost(bias.expand(20, -1), rows).mean()
        assert one.scale * cost.item() == pytest.approx(1)
        (gradient,) = torch.autograd.grad(cost, bias)
        assert gradient.abs().max() < 0.05  # the least, but for the smoothing of shares
    assert 1 / shade.scale == pytest.approx(15 / 20 * entropy([9, 6]), rel=1e-5)
    assert 1 / warmth.scale == pytest.approx(17 / 20, rel=1e-5)


def test_the_gradient_is_the_closed_form(targets):
    rows = torch.cat(statistics_of(targets), 1)
    outputs = noise(20, 5).requires_grad_()
    (found,) = torch.autograd.grad(attribute_loss(targets, outputs, rows), outputs)
    o, (shade, things, warmth) = outputs.detach(), targets
    one_hot, has, seen, known, z = torch.split(rows, [2, 2, 1, 1, 2], 1)
    parts = [
        shade.scale * (o[:, :2].softmax(1) * one_hot.sum(1, keepdim=True) - one_hot),
        things.scale * (o[:, 2:4].sigmoid() * seen - has),
        warmth.scale * 2 * (o[:, 4:] * known - z[:, :1]),
    ]
    torch.testing.assert_close(found, torch.cat(parts, 1) / (20 * 3), rtol=1e-10, atol=1e-12)


def test_mixed_statistics_cost_what_the_two_do(targets):
    for one, rows in zip(targets, statistics_of(targets), strict=True):
        outputs, lam = noise(20, len(one.bias), seed=1), torch.linspace(0, 1, 20).double()
        other = rows.flip(0)
        mixed = torch.lerp(other, rows, lam[:, None])
        expected = lam * one.cost(outputs, rows) + (1 - lam) * one.cost(outputs, other)
        torch.testing.assert_close(one.cost(outputs, mixed), expected)


def test_parts_of_a_batch_add_up(targets):
    rows, outputs = torch.cat(statistics_of(targets), 1), noise(20, 5)
    parts = [
        attribute_loss(targets, o, r) for o, r in zip(outputs.chunk(4), rows.chunk(4), strict=True)
    ]
    torch.testing.assert_close(sum(parts) / 4, attribute_loss(targets, outputs, rows))


def test_what_the_training_images_lack_is_missing_elsewhere(targets):
    shade, things, warmth = targets
    assert shade.statistics(make_attribute("x", ["green", "dark"])).tolist() == [
        [False, False], [True, False],
    ]  # fmt: skip
    assert things.statistics(make_attribute("x", ["emu|cat", "emu"])).tolist() == [
        [True, False, True], [False, False, True],
    ]  # fmt: skip
    assert not warmth.statistics(make_attribute("x", ["hot", "1"])).any()


@pytest.mark.parametrize(
    "texts", [["a"] * 20, ["a"] * 18 + ["b"] * 2, [str(i) + "x" for i in range(20)], ["3"] * 20]
)
def test_a_column_without_two_values_is_an_error(texts):
    with pytest.raises(DataError, match=r"train\.csv has no two values of shade with 5 images"):
        make_target(make_attribute("shade", texts), HERE)


# --- training -----------------------------------------------------------------------------------


def add_columns(root: Path) -> None:
    """Shades that are seen (classes), things that are not, and a number; some missing."""
    for split in ("train", "val", "test"):
        table = pd.read_csv(root / f"{split}.csv")
        count = len(table)
        table["shade"] = ["" if i % 5 == 4 else table["label"][i] for i in range(count)]
        table["things"] = (["cat", "cat|dog", "dog", ""] * count)[:count]
        table["warmth"] = [i % 7 for i in range(count)]
        table.to_csv(root / f"{split}.csv", index=False)


@pytest.fixture
def cfg(tiny_root, tmp_path):
    add_columns(tiny_root)
    return small_config(tmp_path, ALLOW_DUPLICATES=True)


def with_heads(cfg, names=NAMES, weight: float = 0.3):
    return add_attributes(cfg, names, weight, listed(cfg))


def final(folder: Path) -> dict:
    saved = load_verified(list_checkpoints(folder / "checkpoints")[0])
    timings = {"seconds", "images_per_second", "memory_mb"}
    history = [{k: v for k, v in row.items() if k not in timings} for row in saved["history"]]
    return {**saved, "history": history, "epoch_seconds": 0}


def assert_equal(ours, theirs, where: str = "") -> None:
    """Nested states are equal, bit for bit."""
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(*pair, f"{where}[{i}]")
    else:
        assert ours == theirs or ours != ours, where


def make_trainer(cfg):
    """A trainer with heads, and its training images."""
    train = file_datasets(cfg)["train"]
    seen = read_attributes(train.split, train.pixels, cfg.ATTRIBUTES)
    targets = [make_target(one, train.split.csv) for one in seen.values()]
    statistics = [t.statistics(one) for t, one in zip(targets, seen.values(), strict=True)]
    model = AttributeClassifier(build_model(cfg, 3), targets)
    return AttributeTrainer(cfg, model, train, targets=targets, statistics=statistics), train


@pytest.mark.parametrize("mixed", [0.0, 1.0])
def test_each_image_has_the_attributes_of_its_row_and_of_its_partner(cfg, mixed):
    trainer, train = make_trainer(with_heads(dataclasses.replace(cfg, MIX_PROB=mixed)))
    batch = train.batch([7, 2, 19, 4])
    images, targets = trainer.augment(trainer, batch, 1, 2)
    plain, alone = engine.augment_batch(trainer, batch, 1, 2)
    assert torch.equal(images, plain) and torch.equal(targets[:, :3], alone)
    rows = torch.cat([s[[7, 2, 19, 4]].float() for s in trainer.statistics], 1)
    if mixed:
        plan = draw_mixing(trainer.cfg, 1, 2 * cfg.BATCH_SIZE, 4)
        lam = plan.lam[:, None]
        assert (lam < 1).any()
        rows = lam * rows + (1 - lam) * rows[plan.partner]
    torch.testing.assert_close(targets[:, 3:], rows)


def test_the_emotions_loss_and_its_gradient_are_those_without_heads(cfg):
    """At first the heads pass nothing back, for they begin at zero."""
    trainer, train = make_trainer(with_heads(cfg))
    plain = engine.Trainer(cfg, build_model(cfg, 3), train)
    batch = train.batch([7, 2, 19, 4])
    for one in (trainer, plain):
        engine.begin_epoch(one, 3)
        torch.manual_seed(0)
        one.found = one.backward(one, *one.augment(one, batch, 3, 0))
    assert_equal(trainer.found, plain.found)
    for name, parameter in plain.model.named_parameters():
        torch.testing.assert_close(trainer.model.get_parameter(name).grad, parameter.grad)
    assert trainer.model.attributes.weight.grad.abs().sum() > 0


def test_without_weight_the_run_is_that_without_heads(cfg, tmp_path):
    datasets = file_datasets(cfg)
    own, _ = train_model(with_heads(cfg, weight=0), datasets, tmp_path / "a")
    plain, _ = train_model(cfg, datasets, tmp_path / "b")
    ours, theirs = final(tmp_path / "a"), final(tmp_path / "b")
    for name, tensor in plain.state_dict().items():  # the norm that clips is rounded otherwise
        torch.testing.assert_close(own.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert type(own) is type(plain) and own.state_dict().keys() == plain.state_dict().keys()
    assert ours["model"].keys() - theirs["model"].keys() == {"attributes.weight", "attributes.bias"}
    train_model(with_heads(cfg, weight=3), datasets, tmp_path / "c")
    moved = final(tmp_path / "c")["model"]["backbone.conv1.weight"]
    assert not torch.allclose(moved, theirs["model"]["backbone.conv1.weight"], rtol=1e-3)


def test_a_run_that_was_killed_ends_with_the_same_bits(cfg, tmp_path, monkeypatch):
    cfg = dataclasses.replace(with_heads(cfg), CHECKPOINT_STEPS=1)
    datasets = file_datasets(cfg)
    whole, _ = train_model(cfg, datasets, tmp_path / "a")
    step, done = engine.train_step, []

    def dying(*args):
        done.append(step(*args))
        if len(done) in (4, 12):
            raise KeyboardInterrupt

    monkeypatch.setattr(engine, "train_step", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_model(cfg, datasets, tmp_path / "b")
    resumed, _ = train_model(cfg, datasets, tmp_path / "b")
    assert len(done) > 24  # some steps twice
    assert_equal(resumed.state_dict(), whole.state_dict())
    assert_equal(final(tmp_path / "b"), final(tmp_path / "a"))


def test_the_precision_is_that_of_a_run_without_heads(cfg, monkeypatch):
    asked = []

    def choose(wanted, model, *rest, measure):
        asked.append(model(torch.zeros(2, 3, 32, 32)))
        return "off"

    monkeypatch.setattr(attribute_heads, "choose_amp", choose)
    trainer, _ = make_trainer(with_heads(dataclasses.replace(cfg, AMP="auto")))
    assert trainer.amp == "off" and asked[0].shape == (2, 3)


def test_a_known_attribute_is_learnt_better_than_chance(tmp_path, capsys):
    """The brightness of drawn pictures, by a network of random weights."""
    draw_sample(tmp_path / "tiny", counts={"train": 8, "val": 4, "test": 1}, size=32)
    cfg = small_config(
        tmp_path, EPOCHS=8, THAW_EPOCHS=(0, 0), BATCH_SIZE=16, START="random", MIX_PROB=0.0
    )
    cfg = with_heads(cfg, ("brightness",), weight=1)
    datasets = file_datasets(cfg)
    train_model(cfg, datasets, tmp_path / "run")
    said = capsys.readouterr().out
    cost = float(said.rpartition("brightness ")[2])
    assert "(1: nothing learnt)" in said and cost < 0.6

    saved = final(tmp_path / "run")
    seen = {
        n: read_attributes(datasets[n].split, datasets[n].pixels, ["brightness"])
        for n in ("train", "val")
    }
    targets = [make_target(seen["train"]["brightness"], HERE)]
    model = AttributeClassifier(build_model(cfg, 8), targets)
    before = judge_heads(model, targets, seen["val"], datasets["val"], 32, 7)
    assert before["brightness"] == pytest.approx(1)
    model.load_state_dict(saved["model"])
    found = judge_heads(model, targets, seen["val"], datasets["val"], 32, 7)
    assert found["brightness"] < 0.6


# --- whose run it is ----------------------------------------------------------------------------


def train(cfg, *more: str) -> int:
    return program.main(["train", *more, "--set", *as_arguments(cfg)])


def test_the_export_is_that_of_a_run_without_heads(cfg, tmp_path, capsys):
    cfg = dataclasses.replace(cfg, EPOCHS=1, BASELINES=("majority",), THAW_EPOCHS=(0, 0))
    assert train(cfg) == 0
    assert train(cfg, "--attributes", *NAMES) == 0
    assert "attribute heads on validation images" in capsys.readouterr().out
    runs = sorted((tmp_path / "outputs").iterdir(), key=lambda p: p.stat().st_mtime)
    assert len(runs) == 2  # RUN_NAME "auto" tells them apart
    plain, own = (json.loads((run / "export/config.json").read_text()) for run in runs)
    assert plain.keys() == own.keys() and plain["config"] == own["config"]
    ours, theirs = (load_file(run / "export" / "model.safetensors") for run in runs)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    asked = json.loads((runs[1] / "config.json").read_text())
    assert asked["ATTRIBUTES"] == list(NAMES) and asked["ATTRIBUTE_WEIGHT"] == 0.3
    image = str(tmp_path / "tiny" / "test" / "calm_000.jpg")
    assert program.main(["predict", "--model", str(runs[1]), image]) == 0


def test_a_run_with_heads_and_one_without_are_never_mixed(cfg, tmp_path):
    datasets, own = file_datasets(cfg), with_heads(cfg)
    fit_model(own, build_model(own, 3), datasets, tmp_path / "a" / "checkpoints")
    changed = {
        "ATTRIBUTES": cfg,
        "ATTRIBUTE_WEIGHT": with_heads(cfg, weight=0.5),
        r"\('shade',\) now": with_heads(cfg, ["shade"]),
    }
    for said, other in changed.items():
        with pytest.raises(ConfigError, match=f"(?s)begun with other settings.*{said}"):
            fit_model(other, build_model(other, 3), datasets, tmp_path / "a" / "checkpoints")
    table = tmp_path / "tiny" / "train.csv"
    table.write_text(table.read_text().replace("cat|dog", "cat", 1))
    other = with_heads(cfg)
    with pytest.raises(ConfigError, match="ATTRIBUTE_DATA: '[0-9a-f]{8}' before"):
        fit_model(other, build_model(other, 3), datasets, tmp_path / "a" / "checkpoints")
    fit_model(cfg, build_model(cfg, 3), datasets, tmp_path / "b" / "checkpoints")
    with pytest.raises(ConfigError, match=r"ATTRIBUTES: None before, \('shade'"):
        fit_model(own, build_model(own, 3), datasets, tmp_path / "b" / "checkpoints")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--attributes", "mood"), "train.csv has no attribute 'mood'; there are: shade, things"),
        (("--attributes", "label"), "no attribute 'label'"),
        (("--attribute-weight", "1"), "--attribute-weight 1 needs --attributes NAME"),
        (("--attributes", "shade", "--attribute-weight", "-1"), "ATTRIBUTE_WEIGHT=-1.0 must be a"),
    ],
)
def test_the_command_names_what_is_wrong(cfg, tmp_path, capsys, more, said):
    assert train(cfg, *more) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "outputs").exists()


def test_several_processes_are_refused(cfg, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(cfg, "--attributes", "shade") == 1
    assert "--attributes is for a single process" in capsys.readouterr().err


def test_heads_are_an_ingredient(cfg, tmp_path, capsys):
    cfg = dataclasses.replace(cfg, EPOCHS=1, THAW_EPOCHS=(0, 0), START="random")
    asked = ("ablate", "--seeds", "2", "--only", "attribute heads")
    assert program.main([*asked, "--set", *as_arguments(cfg)]) == 1
    assert "no ingredient 'attribute heads' here" in capsys.readouterr().err
    assert program.main([*asked, "--attributes", *NAMES, "--set", *as_arguments(cfg)]) == 0
    said = capsys.readouterr().out
    assert said.count("without attribute heads (ATTRIBUTES=())") == 2
    assert said.count("attribute heads on validation images") == 2
    (file,) = tmp_path.glob("outputs/*/ablation/ablation.json")
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["worth"]["attribute heads"]["included"] and found["seeds"] == 2
    assert found["settings"]["ATTRIBUTES"] == list(NAMES)
