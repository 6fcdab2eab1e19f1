"""Search for better settings: trials judged by validation images, the hopeless ones cut short."""

import argparse
import dataclasses
import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt
import pandas as pd

from emotion_toolbox.batches import EmotionDataset, steps_per_epoch
from emotion_toolbox.device import seed_everything
from emotion_toolbox.errors import ConfigError, DeviceMemoryError, DivergedError
from emotion_toolbox.extras import need
from emotion_toolbox.figures import save_figure
from emotion_toolbox.files import write_text
from emotion_toolbox.keeper import Keeper
from emotion_toolbox.measures import Predictions
from emotion_toolbox.report import figure_note, make_run_folder
from emotion_toolbox.settings import (
    check_values,
    kind_of,
    normalised,
    settings_hash,
    shaping_values,
)
from emotion_toolbox.tables import EmotionData
from emotion_toolbox.trial_figures import plot_importances, plot_parallel, plot_trials
from emotion_toolbox.trials import (
    Space,
    best_of,
    importances,
    open_study,
    run_trials,
    trials_table,
)
from emotion_transfer.commands.settings import parse_setting
from emotion_transfer.commands.train import (
    add_settings,
    choose_settings,
    make_model,
    open_data,
    settings_of,
)
from emotion_transfer.config import EnhancedConfig, cache_size, make_config
from emotion_transfer.engine import fit

Settings = dict[str, Any]
DEFAULT_SPACES = (
    "LR_BACKBONE=1e-5..1e-3:log", "LR_HEAD=3e-4..3e-2:log", "HEAD=linear,progressive",
    "DROPOUT=0..0.6", "WEIGHT_DECAY=1e-6..1e-1:log", "LABEL_SMOOTHING=0..0.2", "MIX_PROB=0..1",
)  # fmt: skip
RANGE = re.compile(r"(.+?)\.\.(.+?)(:log)?")
COMMA = re.compile(r",(?![^(\[]*[)\]])")  # outside of brackets
EXAMPLE = f"""spaces: NAME=LOW..HIGH, NAME=LOW..HIGH:log (drawn evenly from the logarithms), or
NAME=A,B,C. Without any: {" ".join(DEFAULT_SPACES)}

example: python -m emotion_transfer search --trials 30 --set DATA_ROOT=data/processed/pictures \\
           EPOCHS=8 --space LR_BACKBONE=1e-5..1e-3:log HEAD=linear,progressive
The same command goes on with the same search, and helps it while it runs, in a second shell."""


# --- spaces -------------------------------------------------------------------------------------


def check_value(f: dataclasses.Field[Any], text: str) -> Any:
    """The value of the field that `text` means; raises ``ConfigError`` if it is impossible."""
    value = normalised(parse_setting(EnhancedConfig, f"{f.name}={text}")[1], kind_of(f.type)[0])
    alone = dataclasses.field(metadata=f.metadata)
    check_values(dataclasses.make_dataclass("Alone", [(f.name, f.type, alone)])(value))
    return value


def parse_space(text: str) -> tuple[str, Space]:
    """The setting that ``NAME=...`` names, and its values; raises ``ConfigError``."""
    name, _, values = (part.strip() for part in text.partition("="))
    fields = EnhancedConfig.__dataclass_fields__
    if name not in fields:
        make_config({name: None})  # which says what there is
    f, refused = fields[name], f"--space {text}: "
    if f.metadata["neutral"]:
        raise ConfigError(f"{refused}{name} changes nothing that is learnt; give it by --set")
    if name == "MONITOR":
        raise ConfigError(f"{refused}trials are judged by {name}; give it by --set")
    kind, count, _ = kind_of(f.type)
    number = kind in (int, float) and count is None
    ends = RANGE.fullmatch(values) if number else None
    if ends is None:
        choices = [check_value(f, part) for part in COMMA.split(values)]
        return name, Space(choices={str(choice): choice for choice in choices})
    low, high = (check_value(f, part) for part in ends.group(1, 2))
    if None in (low, high) or low >= high:
        raise ConfigError(f"{refused}the first number must be the smaller one")
    if ends[3] and low <= 0:
        raise ConfigError(f"{refused}0 has no logarithm; begin above it, or leave out :log")
    return name, Space(low, high, kind is int, bool(ends[3]))


def choose_spaces(texts: Sequence[str], fixed: Settings) -> tuple[dict[str, Space], Settings]:
    """The spaces of more than one value, and the settings `fixed` with those of one value.

    Without `texts`, the default spaces of what is not fixed. Raises ``ConfigError``.
    """
    spaces: dict[str, Space] = {}
    for name, space in map(parse_space, texts or DEFAULT_SPACES):
        if texts and (name in spaces or name in fixed):
            raise ConfigError(f"{name} is given twice; give it once, by --space or by --set")
        spaces[name] = space
    single = {n: next(iter(s.choices.values())) for n, s in spaces.items() if len(s.choices) == 1}
    fixed = fixed | single
    spaces = {name: space for name, space in spaces.items() if name not in fixed}
    if not spaces:
        raise ConfigError("nothing to search: every space has one value only")
    return spaces, fixed


# --- a trial ------------------------------------------------------------------------------------


def refuse(trial: Any, error: Exception) -> NoReturn:
    """End a trial whose settings cannot be trained with; why stands in its record."""
    trial.set_user_attr("refused", " ".join(str(error).split()))
    raise need("optuna", "search").TrialPruned


def settings_of_trial(
    trial: Any, spaces: Mapping[str, Space], fixed: Settings
) -> tuple[EnhancedConfig, EmotionData]:
    """What a trial trains with, and on; refuses settings that do not go together."""
    chosen = {name: space.suggest(trial, name) for name, space in spaces.items()}
    try:
        cfg, listed = choose_settings(fixed | chosen)
        images = len(listed.splits["train"])
        if images < cfg.BATCH_SIZE:
            raise ConfigError(f"{images} training images do not fill BATCH_SIZE={cfg.BATCH_SIZE}")
    except ConfigError as error:
        refuse(trial, error)
    return cfg, listed


def scores_by_epoch(history: pd.DataFrame, monitor: str) -> npt.NDArray[np.float64]:
    """Of the better of raw and averaged weights at the start and after each epoch, [1 + epochs]."""
    names = [name for name in (f"val_{monitor}", f"val_ema_{monitor}") if name in history]
    values = history[names].to_numpy(dtype=np.float64) * (-1 if monitor == "loss" else 1)
    return np.asarray(np.where(np.isnan(values), -np.inf, values).max(axis=1))


def train_trial(
    trial: Any, cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset], scratch: Path
) -> float:
    """Train in `scratch`, or go on there, and return the score of the best epoch.

    The start does not count: a probe that no trial betters would make all trials equal. The probe
    itself is shared by the trials of a search.
    """

    def on_epoch(row: Mapping[str, Any], answers: Predictions) -> None:
        if row["epoch"] == 0:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # after a kill an epoch is reported again
            trial.report(answers.score(cfg.MONITOR), row["epoch"])
        if row["epoch"] < cfg.EPOCHS and trial.should_prune():
            raise need("optuna", "search").TrialPruned

    seed_everything(cfg.SEED)
    model = make_model(cfg, datasets, scratch.parent / f"probe-{cfg.MODEL_NAME}-{cfg.IMG_SIZE}")
    make_keeper = partial(Keeper, on_epoch=on_epoch)
    result = fit(cfg, model, datasets, scratch / "checkpoints", make_keeper=make_keeper)
    scores = scores_by_epoch(result.history, cfg.MONITOR)
    trial.set_user_attr("start", float(scores[0]))
    trial.set_user_attr("best_epoch", int(scores[1:].argmax()) + 1)
    return float(scores[1:].max())


def make_objective(
    spaces: Mapping[str, Space], fixed: Settings, folder: Path
) -> Callable[[Any], float]:
    """The function from a trial to its score on the validation images; larger is better."""
    opened: dict[tuple[Any, ...], dict[str, EmotionDataset]] = {}

    def objective(trial: Any) -> float:
        cfg, listed = settings_of_trial(trial, spaces, fixed)
        how = cache_size(cfg), cfg.FIT, cfg.DEBUG and cfg.BATCH_SIZE
        if how not in opened:
            opened[how] = open_data(cfg, listed)[1]
        try:
            return train_trial(trial, cfg, opened[how], scratch_of(folder, trial.number))
        except (DivergedError, DeviceMemoryError) as error:
            refuse(trial, error)

    return objective


def scratch_of(folder: Path, number: int) -> Path:
    """Where a trial trains; nothing of it stays once the trial has ended."""
    return folder / f"trial-{number:04d}"


def describe_trial(trial: Any, study: Any, monitor: str) -> str:
    """What came of a trial, in one line."""
    shown = [(n, f"{v:.3g}" if isinstance(v, float) else v) for n, v in trial.params.items()]
    values = ", ".join(f"{name}={value}" for name, value in shown)
    if "refused" in trial.user_attrs:
        found = f"refused: {trial.user_attrs['refused']}"
    elif trial.state.name == "PRUNED":
        found = f"pruned after epoch {max(trial.intermediate_values)}"
    else:  # the score of a loss is negative
        found = f"{monitor} {abs(trial.value):.3f} in epoch {trial.user_attrs['best_epoch']}"
        start = trial.user_attrs["start"]
        found += f", no better than its start, {abs(start):.3f}" * (trial.value <= start)
    best = best_of(study)
    lead = "" if best is None else f"; best: trial {best.number}, {abs(best.value):.3f}"
    return f"trial {trial.number}: {found} ({values}){lead}"


# --- the search ---------------------------------------------------------------------------------


def name_search(study: str | None, cfg: EnhancedConfig, listed: EmotionData, spaces: Any) -> str:
    """The name of the search's folder: the one asked for, or one with a hash of what it is of."""
    if study is None:
        facts = [settings_hash(cfg), *(s.fingerprint() for s in listed.splits.values())]
        facts += [f"{name}={space}" for name, space in sorted(spaces.items())]
        source = "sample" if listed.synthetic else listed.root.name
        study = f"{source}-{hashlib.sha256(' '.join(facts).encode()).hexdigest()[:8]}"
    return f"search-{study}"


def identity_of(
    cfg: EnhancedConfig, listed: EmotionData, spaces: Mapping[str, Space]
) -> dict[str, str]:
    """What must stay as it is while a search goes on, by name, in words."""
    kept = shaping_values(cfg)
    shown = {f"--set {name}": str(value) for name, value in kept.items() if name not in spaces}
    data = {f"{name}.csv": split.fingerprint() for name, split in listed.splits.items()}
    drawn = " ".join(f"{name}={space}" for name, space in sorted(spaces.items()))
    return {"--space": drawn, **data, **shown}


def write_tables(study: Any, folder: Path, spaces: Mapping[str, Space], fixed: Settings) -> None:
    """Write ``trials.csv`` and, once a trial is complete, the best settings to ``best.json``."""
    write_text(folder / "trials.csv", trials_table(study, list(spaces)).to_csv(index=False))
    best = best_of(study)
    if best is not None:
        chosen = {n: s.choices.get(best.params[n], best.params[n]) for n, s in spaces.items()}
        write_text(folder / "best.json", json.dumps(fixed | chosen, indent=2) + "\n")


def write_figures(
    study: Any, folder: Path, spaces: Mapping[str, Space], score: str, note: str
) -> None:
    """Draw the search's course, what mattered, and which values went with which scores."""
    table = trials_table(study, list(spaces))
    figures = {
        "history": plot_trials(table, score), "parallel": plot_parallel(table, spaces, score)
    }  # fmt: skip
    if shares := importances(study):
        figures["importance"] = plot_importances(shares)
    for name, figure in figures.items():
        save_figure(figure, folder / "figures", name, note=note)


def search(settings: Settings, texts: Sequence[str], trials: int, name: str | None) -> Path:
    """Search, or go on with it, until so many `trials` are done; returns the search's folder."""
    need("optuna", "search")
    spaces, fixed = choose_spaces(texts, settings)
    first = {n: next(iter(spaces[n].choices.values())) for n in ("MODEL_NAME",) if n in spaces}
    cfg, listed = choose_settings(fixed | first)
    if "BATCH_SIZE" not in spaces:
        steps_per_epoch(len(listed.splits["train"]), cfg.BATCH_SIZE)
    name = name_search(name, cfg, listed, spaces)
    folder = make_run_folder(dataclasses.replace(cfg, RUN_NAME=name), listed)
    study = open_study(folder / "search.db", identity_of(cfg, listed, spaces))
    print(folder, flush=True)

    def report(trial: Any) -> None:
        shutil.rmtree(scratch_of(folder, trial.number), ignore_errors=True)
        print(describe_trial(trial, study, cfg.MONITOR))
        write_tables(study, folder, spaces, fixed)

    objective = make_objective(spaces, fixed, folder)
    try:
        run_trials(study, objective, folder, trials, cfg.SEED, report)
    finally:
        if best_of(study) is not None:
            write_tables(study, folder, spaces, fixed)
            note = figure_note(listed.synthetic, cfg.MODEL_NAME, cfg.DEBUG)
            score = {"macro_f1": "macro F1", "loss": "loss, negative"}.get(cfg.MONITOR, cfg.MONITOR)
            write_figures(study, folder, spaces, f"validation {score}", note)
    return folder


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and search."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer search",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--space", nargs="+", action="extend", default=[], metavar="NAME=VALUES", help="see below")
    add("--trials", type=int, default=20, help="how many in all, with those done before")
    add("--study", metavar="NAME", help="writes to search-NAME; default: data and a hash")
    add_settings(parser)
    args = parser.parse_args(arguments)
    if args.trials < 1:
        parser.error(f"--trials {args.trials}: give 1 or more")
    folder = search(settings_of(args), args.space, args.trials, args.study)
    if (folder / "best.json").exists():
        print(f"train with the best: python -m emotion_transfer train --config {folder}/best.json")
    return 0
