"""The ablations: what counts as an ingredient, the paired arithmetic, and that they go on."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from small_run import as_arguments, file_datasets, install_small_network, small_config

from benchmarks import ablations
from emotion_transfer import __main__ as program
from emotion_transfer.commands import ablate
from emotion_transfer.commands.ablate import WHOLE, ingredients, worth
from emotion_transfer.config import SMALL_PROFILE, make_config


@pytest.fixture(autouse=True)
def small(monkeypatch):
    install_small_network(monkeypatch)


@pytest.fixture
def cfg(tiny_root, tmp_path):
    return small_config(tmp_path, EPOCHS=1, THAW_EPOCHS=(0, 0), START="random")


def run(cfg, *more: str) -> int:
    return program.main(["ablate", *more, "--set", *as_arguments(cfg)])


def results(cfg):
    (file,) = ablate.Path(cfg.OUTPUT_ROOT).glob("*/ablation/ablation.json")
    return json.loads(file.read_text(encoding="utf-8"))


# --- what is an ingredient ----------------------------------------------------------------------


def test_documented_ingredients_are_there():
    documented = {
        "start from the probe", "mixing", "label smoothing", "class weights", "weight averaging",
        "staged thawing", "two learning rates", "frozen BatchNorm", "restarts", "colour", "erasing",
        "test-time augmentation", "progressive head", "multi-level features",
    }  # fmt: skip
    assert ingredients(make_config()).keys() == documented


@pytest.mark.parametrize("settings", [{}, SMALL_PROFILE, {"EMA_DECAY": 0, "BALANCE": "sampler"}])
def test_every_ingredient_changes_something_and_back(settings):
    cfg = make_config(settings)
    for name, (change, inside) in ingredients(cfg).items():
        varied = dataclasses.replace(cfg, **change)
        assert varied != cfg, name
        back = ingredients(varied)
        if name in back:  # what the recipe has is out now, and the other way round
            assert back[name][1] != inside, name


def test_what_cannot_be_told_apart_is_left_out():
    assert not {"restarts", "two learning rates"} & ingredients(make_config(SMALL_PROFILE)).keys()


# --- the arithmetic -----------------------------------------------------------------------------


def frame(**hits):
    return pd.DataFrame([
        {"seed": seed, "variant": name.replace("_", " "), "hits": np.array(row, dtype=bool)}
        for name, rows in hits.items() for seed, row in enumerate(rows)
    ])  # fmt: skip


def test_worth_is_with_less_without_whichever_the_recipe_has():
    known = {"mixing": ({}, True), "erasing": ({}, False)}
    runs = frame(
        the_recipe=[[1, 1, 1, 0], [1, 1, 0, 0]],
        mixing=[[1, 0, 0, 0], [1, 1, 0, 0]],
        erasing=[[1, 1, 1, 1], [1, 1, 1, 1]],
    )
    found = worth(runs, known)
    assert found["mixing"].value == pytest.approx(5 / 8 - 3 / 8)
    assert found["erasing"].value == pytest.approx(1 - 5 / 8)
    assert all(e.low <= e.value <= e.high for e in found.values())


def test_an_equal_variant_is_worth_nothing_for_certain():
    hits = np.random.default_rng(0).random((3, 50)) < 0.6
    found = worth(frame(the_recipe=hits, mixing=hits), {"mixing": ({}, True)})["mixing"]
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_the_interval_of_one_seed_is_that_of_paired_differences():
    rng = np.random.default_rng(1)
    ours, other = rng.random((2, 1, 4000)) < [[[0.7]], [[0.6]]]
    found = worth(frame(the_recipe=ours, mixing=other), {"mixing": ({}, True)})["mixing"]
    difference = ours.astype(float) - other
    error = 1.96 * difference.std() / math.sqrt(difference.size)
    assert found.high - found.low == pytest.approx(2 * error, rel=0.05)


# --- the command --------------------------------------------------------------------------------


def test_a_run_that_is_done_is_not_repeated(cfg, capsys, monkeypatch):
    asked = "--seeds", "2", "--only", "mixing", "test-time augmentation"
    assert run(cfg, *asked) == 0
    first, said = results(cfg), capsys.readouterr().out
    assert said.count("--- seed") == 4  # the mirror images need no training of their own
    assert "without mixing (MIX_PROB=0.0)" in said
    assert first["worth"].keys() == {"mixing", "test-time augmentation"}
    assert (first["split"], first["images"], first["seeds"]) == ("val", 12, 2)
    (folder,) = ablate.Path(cfg.OUTPUT_ROOT).glob("*/ablation")
    left = {p.name for p in folder.iterdir() if not p.name.startswith("val-")}
    assert left - {"baselines"} == {"ablation.png", "ablation.csv", "ablation.json"}

    monkeypatch.setattr(ablate, "train_once", None)
    assert run(cfg, *asked) == 0
    assert results(cfg) == first
    next(folder.glob("val-mixing-*.json")).unlink()
    with pytest.raises(TypeError):
        run(cfg, *asked)


def test_records_of_other_settings_are_made_again(cfg, capsys):
    named = dataclasses.replace(cfg, RUN_NAME="mine")
    asked = "--seeds", "1", "--only", "erasing"
    assert run(named, *asked) == 0
    capsys.readouterr()
    assert run(dataclasses.replace(named, LR_HEAD=0.05), *asked) == 0
    assert capsys.readouterr().out.count("--- seed") == 2


def test_the_recipe_is_what_a_run_of_its_own_answers(cfg):
    assert run(cfg, "--seeds", "1", "--only", "erasing", "--split", "test") == 0
    datasets = file_datasets(cfg)
    for name, change in ((WHOLE, {}), ("erasing", {"ERASE_PROB": 0.0})):
        own = dataclasses.replace(cfg, **change)
        folder = ablate.Path(cfg.OUTPUT_ROOT) / f"own-{name}"
        found = ablate.train_once(own, datasets, folder, folder / "scratch", "test")
        (file,) = ablate.Path(cfg.OUTPUT_ROOT).glob(
            f"*/ablation/test-{name.replace(' ', '-')}-*.json"
        )
        kept = json.loads(file.read_text(encoding="utf-8"))
        assert kept["hits"]["True"] == ablate.pack_hits(found[True].predicted == found[True].labels)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--only", "luck"), "no ingredient 'luck' here; there are start from the probe"),
        (("--seeds", "0"), "--seeds 0: give 1 or more"),
        (("--split", "train"), "invalid choice: 'train'"),
    ],
)
def test_the_command_names_what_is_wrong(cfg, capsys, more, said):
    try:
        status = run(cfg, *more)
    except SystemExit as error:
        status = error.code
    assert status != 0
    assert said in capsys.readouterr().err
    assert WHOLE not in capsys.readouterr().out


def test_the_table_of_ablations_is_that_of_the_notebook_and_of_the_runs():
    found = ablations.load_ablations()
    text = (Path(__file__).parents[1] / "notebooks" / "sections" / "12_comparison.py").read_text(
        encoding="utf-8"
    )
    shown = [line.removeprefix("# ") + "\n" for line in text.splitlines() if line[:3] == "# |"]
    assert "".join(shown) == ablations.as_markdown(found)
    for kept in found.values():
        assert kept["split"] == "val" and kept["settings"]["MODEL_NAME"] == "efficientnet_lite0"


def test_a_table_of_ablations_marks_what_chance_alone_does_not_do():
    def made(**worth):
        accuracy = {"value": 0.5, "low": 0.4, "high": 0.6}
        keys = ("value", "low", "high", "included")
        return {
            "accuracy": accuracy,
            "worth": {name: dict(zip(keys, each, strict=True)) for name, each in worth.items()},
        }

    table = ablations.as_markdown({
        "a_b": made(mixing=(0.012, 0.001, 0.02, True), colour=(-0.01, -0.03, 0.01, False)),
        "c": made(mixing=(-0.02, -0.03, -0.01, False)),
    }).splitlines()  # fmt: skip
    assert table[0] == "| ingredient | in the recipe | a b | c |"
    assert table[2].endswith("| 0.500 [0.400, 0.600] | 0.500 [0.400, 0.600] |")
    assert table[3] == "| mixing | on some | **+1.2 [+0.1, +2.0]** | **-2.0 [-3.0, -1.0]** |"
    assert table[4] == "| colour | no | -1.0 [-3.0, +1.0] |  |"
