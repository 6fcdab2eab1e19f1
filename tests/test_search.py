"""The search: its spaces, its trials under pruning, kills and company, and what it leaves."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from search_worker import ABOUT, SPACES, known, run
from small_run import as_arguments, install_small_network, small_config

from emotion_toolbox import trial_figures
from emotion_toolbox.errors import ConfigError, DivergedError
from emotion_toolbox.trials import Space, best_of, importances, open_study, trials_table
from emotion_transfer import __main__ as program
from emotion_transfer import engine
from emotion_transfer.commands import search
from emotion_transfer.commands.search import choose_spaces, parse_space

optuna = pytest.importorskip("optuna", reason="the extra search is not installed")
ROOT = Path(__file__).parents[1]


# --- spaces -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "space"),
    [
        ("LR_BACKBONE=1e-5..1e-3:log", Space(1e-5, 1e-3, log=True)),
        ("DROPOUT=0..0.6", Space(0.0, 0.6)),
        ("EPOCHS=2..12", Space(2, 12, whole=True)),
        ("TRAIN_SIZE=32..64", Space(32, 64, whole=True)),
        ("FIT=crop,pad", Space(choices={"crop": "crop", "pad": "pad"})),
        ("RESTARTS=true,false", Space(choices={"True": True, "False": False})),
        ("TRAIN_SIZE=None,96", Space(choices={"None": None, "96": 96})),
        ("THAW_EPOCHS=None,(0,0),[1, 2]",
         Space(choices={"None": None, "(0, 0)": (0, 0), "(1, 2)": (1, 2)})),
        ("DROPOUT=0,0.5", Space(choices={"0.0": 0.0, "0.5": 0.5})),
        ("INIT_FROM=../a,../b", Space(choices={"../a": "../a", "../b": "../b"})),
    ],
)  # fmt: skip
def test_a_space_is_read(text, space):
    assert parse_space(text) == (text.partition("=")[0], space)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("LR_BACKBNE=1..2", "no setting is called 'LR_BACKBNE'; did you mean LR_BACKBONE"),
        ("LR_HEAD", "LR_HEAD='' must be a number"),
        ("LR_HEAD=0.1..20", "LR_HEAD=20.0 must be a number from 1e-12 to 10"),
        ("DROPOUT=-1..0.5", "DROPOUT=-1.0 must be a number from 0 to 0.95"),
        ("DROPOUT=0.5..0.1", "the first number must be the smaller one"),
        ("DROPOUT=0..0.5:log", "0 has no logarithm"),
        ("DROPOUT=0..nan", "DROPOUT='nan' must be a number"),
        ("EPOCHS=1..2.5", "EPOCHS=2.5 must be a whole number"),
        ("TRAIN_SIZE=None..64", "the first number must be the smaller one"),
        ("HEAD=linear,wide", "HEAD='wide' must be one of"),
        ("HEAD=linear..progressive", "HEAD='linear..progressive' must be one of"),
        ("THAW_EPOCHS=(2,1),None", "THAW_EPOCHS=(2, 1) must be a list of 2, never falling"),
        ("CACHE_DIR=a,b", "CACHE_DIR changes nothing that is learnt"),
        ("MONITOR=loss,accuracy", "trials are judged by MONITOR"),
    ],
)
def test_a_wrong_space_is_refused(text, said):
    with pytest.raises(ConfigError) as refused:
        parse_space(text)
    assert said in str(refused.value)


def test_default_spaces_leave_out_what_is_fixed():
    spaces, fixed = choose_spaces([], {"DROPOUT": 0.1})
    assert spaces.keys() | {"DROPOUT"} == {t.partition("=")[0] for t in search.DEFAULT_SPACES}
    assert fixed == {"DROPOUT": 0.1}


def test_one_value_is_no_space():
    spaces, fixed = choose_spaces(["EPOCHS=8", "DROPOUT=0..0.5"], {"SEED": 1})
    assert spaces.keys() == {"DROPOUT"} and fixed == {"SEED": 1, "EPOCHS": 8}
    with pytest.raises(ConfigError, match="nothing to search"):
        choose_spaces(["EPOCHS=8"], {})
    for texts, fixed in ((["EPOCHS=1..2"], {"EPOCHS": 3}), (["EPOCHS=1..2", "EPOCHS=4"], {})):
        with pytest.raises(ConfigError, match="EPOCHS is given twice"):
            choose_spaces(texts, fixed)


# --- trials of a known function -----------------------------------------------------------------


def test_the_best_of_a_known_function_is_found(tmp_path):
    study = run(tmp_path, total=25)
    best, table = best_of(study), trials_table(study, list(SPACES))
    assert len(table) == 25 and best.value == table["score"].max()
    assert best.value > 0.3 and best.params["z"] == "b" and abs(best.params["x"] - 1) < 0.8
    assert table["score"].tail(5).mean() > table["score"].head(10).mean()  # drawn at random
    assert importances(study).keys() == SPACES.keys()


def test_the_seed_and_the_number_give_a_trial(tmp_path):
    tables = [trials_table(run(tmp_path / name, total=5, seed=seed), list(SPACES))
              for name, seed in (("a", 3), ("b", 3), ("c", 4))]  # fmt: skip
    pd.testing.assert_frame_equal(tables[0], tables[1])
    assert not tables[0]["x"].isin(tables[2]["x"]).any()
    assert tables[0]["x"].nunique() == len(tables[0])


def test_what_lies_below_the_median_is_pruned(tmp_path):
    """As the rule says: the best score so far is below the median of complete trials there."""
    reached = {}

    def objective(trial):
        goal = known(trial)
        for epoch in range(6):
            reached[trial.number] = epoch
            trial.report(goal + epoch, epoch)
            if epoch < 5 and trial.should_prune():
                raise optuna.TrialPruned
        return goal

    trials = run(tmp_path, objective, 18).get_trials()
    pruned = [t for t in trials if t.state.name == "PRUNED"]
    assert pruned and all(reached[t.number] < 5 for t in pruned)
    for trial in trials:
        others = [t for t in trials[: trial.number] if t.state.name == "COMPLETE"]
        for epoch, _ in sorted(trial.intermediate_values.items()):
            best = max(v for e, v in trial.intermediate_values.items() if e <= epoch)
            there = [t.intermediate_values[epoch] for t in others]
            below = len(others) >= 5 and epoch < 5 and best < np.median(there)
            assert below == (trial in pruned and epoch == reached[trial.number])


# --- kills and company --------------------------------------------------------------------------


def worker(folder: Path, *arguments: int) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "tests" / "search_worker.py"), str(folder)]
    return subprocess.Popen(
        [*command, *map(str, arguments)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="a signal of POSIX")
def test_a_killed_trial_is_taken_up_and_counted_once(tmp_path):
    killed = worker(tmp_path / "killed", 6, 3)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    study = open_study(tmp_path / "killed" / "search.db", ABOUT)
    assert [t.state.name for t in study.get_trials()] == ["COMPLETE"] * 3 + ["RUNNING"]

    resumed, numbers = run(tmp_path / "killed", total=6), list(range(6))
    table = trials_table(resumed, list(SPACES))
    assert table["trial"].tolist() == numbers and set(table["state"]) == {"complete"}
    whole = trials_table(run(tmp_path / "whole", total=6), list(SPACES))
    columns = ["trial", "score", *SPACES]
    pd.testing.assert_frame_equal(table[columns], whole[columns])
    run(tmp_path / "killed", total=6)  # nothing more to do
    assert len(resumed.get_trials()) == 6
    assert not list((tmp_path / "killed").glob(".trial-*"))


def test_two_workers_share_the_total(tmp_path):
    both = [worker(tmp_path, 10) for _ in range(2)]
    said = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    done = [[int(line.split()[1]) for line in out.splitlines()] for out, _ in said]
    assert sorted(done[0] + done[1]) == list(range(10)) and all(done)
    study = open_study(tmp_path / "search.db", ABOUT)
    assert len({t.params["x"] for t in study.get_trials()}) == 10  # none draws what the other drew


def test_an_error_leaves_the_trial_to_the_next(tmp_path):
    def broken(trial):
        known(trial)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        run(tmp_path, broken, 3)
    table = trials_table(run(tmp_path, total=3), list(SPACES))
    assert table["state"].tolist() == ["complete"] * 3


# --- the study's file ---------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["text", "page"])
def test_a_damaged_file_is_named(tmp_path, damage):
    run(tmp_path, total=2)
    file = tmp_path / "search.db"
    content = bytearray(file.read_bytes())
    content = bytearray(b"no database") if damage == "text" else content
    content[4096:-4096] = b"\xff" * len(content[4096:-4096])
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"search\.db (is damaged|cannot be used).*delete it"):
        run(tmp_path, total=3)
    assert file.read_bytes() == content


def test_a_study_of_something_else_is_refused(tmp_path):
    open_study(tmp_path / "search.db", {"--space": "x", "train.csv": "1"})
    with pytest.raises(ConfigError) as refused:
        open_study(tmp_path / "search.db", {"--space": "x", "train.csv": "2"})
    assert "train.csv: 1 before, 2 now" in str(refused.value)
    assert "choose another --study" in str(refused.value)
    open_study(tmp_path / "search.db", {"--space": "x", "train.csv": "1"})


# --- figures ------------------------------------------------------------------------------------


def test_figures_show_every_trial(tmp_path):
    table = pd.DataFrame({
        "trial": range(5), "state": ["complete", "refused", "pruned", "complete", "complete"],
        "score": [0.5, None, 0.2, -np.inf, 0.6], "x": [-4.0, 0.0, 1.0, 2.0, 4.0],
        "start": [0.3, None, None, 0.3, 0.3], "y": [1e-4, 1.0, 1e-2, 1e-2, 1.0],
        "z": ["a", "b", "b", "a", "b"],
    })  # fmt: skip
    (ax,) = trial_figures.plot_trials(table, "score").axes
    drawn = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert drawn["before training"] == [[0, 0.3], [1, 0.3]]
    assert drawn["complete (2)"] == [[0, 0.5], [4, 0.6]] and drawn["pruned (1)"] == [[2, 0.2]]
    ax = trial_figures.plot_parallel(table, SPACES, "score").axes[0]
    lines = [line.get_ydata().tolist() for line in ax.lines if len(line.get_ydata()) == 3]
    assert lines == [pytest.approx([5 / 8, 0.5, 0.75]), [0, 0, 0.25], [1, 1, 0.75]]
    shares = {"x": 0.7, "y": 0.3}
    (ax,) = trial_figures.plot_importances(shares).axes
    assert [bar.get_width() for bar in ax.patches] == list(shares.values())


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def cfg(tiny_root, tmp_path, monkeypatch):
    install_small_network(monkeypatch)
    return small_config(tmp_path, EPOCHS=2, THAW_EPOCHS=(0, 0), BASELINES=("majority",))


SPACE = ("LR_HEAD=0.01..0.3:log", "HEAD=linear,progressive")


def command(cfg, *more: str, space=SPACE, study: str = "mine") -> int:
    named = {text.partition("=")[0] for text in space}
    given = [text for text in as_arguments(cfg) if text.partition("=")[0] not in named]
    return program.main(["search", "--study", study, *more, "--space", *space, "--set", *given])


def folder_of(cfg, study: str = "mine") -> Path:
    return Path(cfg.OUTPUT_ROOT) / f"search-{study}"


def test_train_takes_the_best_settings(cfg, capsys):
    cfg = dataclasses.replace(cfg, MONITOR="loss")
    assert command(cfg, "--trials", "3") == 0
    folder, said = folder_of(cfg), capsys.readouterr().out
    table = pd.read_csv(folder / "trials.csv")
    assert table["state"].tolist() == ["complete"] * 3
    assert all(f"trial {number}: loss 0." in said for number in range(3))
    left = {
        p.name for p in folder.iterdir() if p.name[0] != "." and not p.name.startswith("probe-")
    }
    assert left == {"search.db", "trials.csv", "best.json", "figures"}
    figures = {p.name for p in (folder / "figures").iterdir()}
    assert {"history.png", "parallel.png"} <= figures

    best = table.loc[table["score"].idxmax()]
    settings = json.loads((folder / "best.json").read_text(encoding="utf-8"))
    assert (settings["LR_HEAD"], settings["HEAD"]) == (best["LR_HEAD"], best["HEAD"])
    assert f"train --config {folder}/best.json" in said
    named = ["--set", "RUN_NAME=again"]
    assert program.main(["train", "--config", f"{folder}/best.json", *named]) == 0
    history = pd.read_csv(Path(cfg.OUTPUT_ROOT) / "again" / "history.csv")
    losses = history[["val_loss", "val_ema_loss"]].min(axis=1)
    assert losses[0] == pytest.approx(-best["start"], rel=1e-12)
    losses = losses[1:]
    assert losses.min() == pytest.approx(-best["score"], rel=1e-12)
    assert history["epoch"][losses.idxmin()] == best["best_epoch"]

    (folder / "trials.csv").unlink()
    assert command(cfg, "--trials", "3") == 0  # is done
    pd.testing.assert_frame_equal(pd.read_csv(folder / "trials.csv"), table)


def test_a_trial_that_was_stopped_goes_on_in_the_middle(cfg, monkeypatch, capsys):
    assert command(cfg, "--trials", "2", study="whole") == 0
    steps, step = [], engine.train_step

    def interrupted(*args):
        steps.append(args[2:4])
        if len(steps) == 20:  # six an epoch, two epochs a trial
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
        step(*args)

    monkeypatch.setattr(engine, "train_step", interrupted)
    assert command(cfg, "--trials", "2") == 130
    assert len(steps) == 20 and (folder_of(cfg) / "figures" / "history.png").exists()
    assert command(cfg, "--trials", "2") == 0
    assert len(steps) == 24 and steps[20] == (1, 2)
    whole, stopped = (
        pd.read_csv(folder_of(cfg, name) / "trials.csv") for name in ("whole", "mine")
    )
    pd.testing.assert_frame_equal(stopped, whole)


def test_settings_that_do_not_go_together_are_refused_with_the_reason(cfg, capsys):
    small = dataclasses.replace(cfg, EPOCHS=1)
    assert command(small, "--trials", "5", space=["TRAIN_SIZE=32,64", "BATCH_SIZE=4,32"]) == 0
    table = pd.read_csv(folder_of(cfg) / "trials.csv")
    good = (table["TRAIN_SIZE"] == 32) & (table["BATCH_SIZE"] == 4)
    assert table["state"].tolist() == ["complete" if one else "refused" for one in good]
    assert not good.all()
    large = table["note"][table["TRAIN_SIZE"] == 64]
    assert large.str.contains("TRAIN_SIZE=64 must not exceed IMG_SIZE=32").all()
    assert "refused: " in capsys.readouterr().out


def test_divergence_is_a_refusal_too(cfg, monkeypatch):
    def diverging(*given):
        raise DivergedError("not finite")

    monkeypatch.setattr(engine, "train_step", diverging)
    assert command(cfg, "--trials", "2") == 0
    table = pd.read_csv(folder_of(cfg) / "trials.csv")
    assert table["state"].tolist() == ["refused"] * 2
    assert table["note"].tolist() == ["not finite"] * 2
    assert not list(folder_of(cfg).glob("trial-*"))
    assert not (folder_of(cfg) / "best.json").exists()


@pytest.mark.parametrize(
    ("more", "space", "said"),
    [
        ((), ["LR_HED=1..2"], "no setting is called 'LR_HED'"),
        ((), ["DROPOUT=0..3"], "DROPOUT=3.0 must be a number from 0 to 0.95"),
        (("--study", "a/b"), SPACE, "must be a plain folder name"),
        (("--config", "absent.json"), SPACE, "--config absent.json: give a file of"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(cfg, capsys, more, space, said):
    study = more[1] if "--study" in more else "mine"
    assert command(cfg, *(more if "--config" in more else ()), space=space, study=study) == 1
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) <= 2
    assert not Path(cfg.OUTPUT_ROOT).exists()


def test_another_search_needs_another_name(cfg, tiny_root, capsys):
    assert command(cfg, "--trials", "1") == 0
    assert command(cfg, "--trials", "2", space=["LR_HEAD=0.01..0.2:log", "HEAD=linear"]) == 1
    assert "--space: HEAD=linear,progressive LR_HEAD=0.01..0.3:log" in capsys.readouterr().err
    assert command(dataclasses.replace(cfg, WEIGHT_DECAY=0.5), "--trials", "2") == 1
    assert "--set WEIGHT_DECAY: 0.0001 before, 0.5 now" in capsys.readouterr().err
    rows = (tiny_root / "val.csv").read_text(encoding="utf-8").splitlines()
    (tiny_root / "val.csv").write_text("\n".join(rows[:-1]) + "\n", encoding="utf-8")
    assert command(cfg, "--trials", "2") == 1
    assert "val.csv: " in capsys.readouterr().err
    assert len(pd.read_csv(folder_of(cfg) / "trials.csv")) == 1


def test_without_the_extra_it_says_what_to_install(cfg, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert command(cfg) == 1
    err = capsys.readouterr().err
    assert 'optuna is not installed; pip install -e ".[search]"' in err and err.count("\n") == 1
    assert not Path(cfg.OUTPUT_ROOT).exists()


# --- train --config -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", 'give a file of {"NAME": value, ...}'),
        ("[1]", 'give a file of {"NAME": value, ...}'),
        ('{"EPOCS": 3}', "no setting is called 'EPOCS'; did you mean EPOCHS"),
        ('{"EPOCHS": 0}', "EPOCHS=0 must be a whole number from 1"),
    ],
)
def test_a_wrong_file_of_settings_is_named(tmp_path, capsys, content, said):
    file = tmp_path / "settings.json"
    file.write_text(content, encoding="utf-8")
    assert program.main(["train", "--config", str(file)]) == 1
    err = capsys.readouterr().err
    assert f"--config {file}: " in err and said in err and len(err.splitlines()) <= 2
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


def test_what_is_set_wins_over_the_file(cfg, tmp_path):
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**dataclasses.asdict(cfg), "EPOCHS": 3}), encoding="utf-8")
    changed = ["--set", "EPOCHS=1", "RUN_NAME=set"]
    assert program.main(["train", "--config", str(file), *changed]) == 0
    assert pd.read_csv(Path(cfg.OUTPUT_ROOT) / "set" / "history.csv")["epoch"].tolist() == [0, 1]
