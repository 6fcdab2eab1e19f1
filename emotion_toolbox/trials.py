"""Trials of settings, by Optuna: a study in a file that processes share and no kill harms.

Optuna chooses the values and keeps what they came to. Which trials are in work is known by locks,
which a process that dies leaves at once: its trial is taken up by the next that looks.
"""

import contextlib
import logging
import math
import sqlite3
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from tqdm.auto import tqdm
from tqdm.contrib import DummyTqdmFile

from emotion_toolbox.errors import ConfigError
from emotion_toolbox.extras import need

STUDY = "search"  # its name in the file


@dataclass(frozen=True)
class Space:
    """The values of one setting: from `low` to `high`, or `choices` by what they are called."""

    low: float = 0.0
    high: float = 0.0
    whole: bool = False  # numbers only
    log: bool = False  # drawn evenly from the logarithms
    choices: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.choices:
            return ",".join(self.choices)
        return f"{self.low!r}..{self.high!r}{':log' if self.log else ''}"

    def suggest(self, trial: Any, name: str) -> Any:
        """The value that `trial` is to have."""
        if self.choices:
            return self.choices[trial.suggest_categorical(name, list(self.choices))]
        if self.whole:
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log)


class Claim(NamedTuple):
    """A trial, and the lock that says it is in work."""

    trial: Any
    lock: FileLock


# --- the file -----------------------------------------------------------------------------------


def check_database(file: Path) -> None:
    """Raise ``ConfigError`` if `file` is there and is no sound SQLite database."""
    if not file.exists():
        return
    try:
        with contextlib.closing(sqlite3.connect(file, timeout=60)) as database:
            found = database.execute("PRAGMA quick_check").fetchone()[0]
    except sqlite3.Error as error:
        found = str(error)
    if found != "ok":
        said = f"{file} is damaged ({found})"
        raise ConfigError(f"{said}; delete it to search anew, or choose another --study")


def open_study(file: Path, about: Mapping[str, str]) -> Any:
    """The study in `file`, which is made where it is not there; `about` says what it is of.

    Scores are maximised. A trial whose best score so far is below the median of the others' at
    that epoch is pruned ("median stopping rule", Golovin et al. 2017, Google Vizier).
    Raises ``ConfigError`` if Optuna is not installed, the file is damaged or of something else.
    """
    optuna = need("optuna", "search")
    optuna.logging.set_verbosity(logging.WARNING)
    file.parent.mkdir(parents=True, exist_ok=True)
    with choosing(file.parent):
        check_database(file)
        try:
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            study = optuna.create_study(
                storage=storage, study_name=STUDY, direction="maximize", load_if_exists=True,
                pruner=optuna.pruners.MedianPruner(),
            )  # fmt: skip
        except (optuna.exceptions.OptunaError, RuntimeError) as error:
            raise ConfigError(
                f"{file} cannot be used ({error}); delete it, or choose another --study"
            ) from error
        before = study.user_attrs.get("about", about)
        changed = [
            f"  {k}: {before.get(k)} before, {v} now"
            for k, v in about.items()
            if before.get(k) != v
        ]
        if changed:
            advice = "Set them back to go on with it, or choose another --study"
            raise ConfigError("\n".join([f"{file} was begun with other", *changed, advice]))
        study.set_user_attr("about", about)
    return study


# --- which trial --------------------------------------------------------------------------------


def choosing(folder: Path) -> FileLock:
    """The lock of who chooses or ends a trial."""
    return FileLock(folder / ".lock")


def make_sampler(seed: int, number: int) -> Any:
    """What draws the values of trial `number`.

    A tree-structured Parzen estimator (TPE, Bergstra et al. 2011), which takes the trials in work
    elsewhere for bad ones, so as not to repeat them.
    """
    optuna = need("optuna", "search")
    state = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(seed=state, constant_liar=True)


def claim_trial(study: Any, folder: Path, total: int, seed: int) -> Claim | None:
    """A trial that a process has left, or else a new one; None where `total` are done or in work.

    What is drawn follows from `seed` and the trial's number, so a search that was stopped goes on
    as it would have.
    """
    trial_class = need("optuna", "search").Trial

    def lock_of(number: int) -> FileLock:
        lock = FileLock(folder / f".trial-{number:04d}.lock", timeout=0)
        lock.acquire()
        return lock

    with choosing(folder):
        known = study.get_trials(deepcopy=False)
        for left in known:
            if not left.state.is_finished():
                with contextlib.suppress(Timeout):
                    lock = lock_of(left.number)
                    study.sampler = make_sampler(seed, left.number)
                    return Claim(trial_class(study, left._trial_id), lock)
        if len(known) >= total:
            return None
        lock = lock_of(len(known))
        study.sampler = make_sampler(seed, len(known))
        return Claim(study.ask(), lock)


def run_trials(
    study: Any, objective: Callable[[Any], float], folder: Path, total: int, seed: int,
    report: Callable[[Any], object],
) -> None:  # fmt: skip
    """Try until `total` trials are done, here or in other processes; `report` after each.

    `objective` gives the score of a trial, or raises ``optuna.TrialPruned``. What else it raises
    ends the search, and leaves the trial to whoever goes on.
    """
    optuna = need("optuna", "search")
    above: Any = DummyTqdmFile(sys.stdout)  # what is printed goes above the bars
    with tqdm(total=total, desc="trials", unit="trial") as bar, contextlib.redirect_stdout(above):
        while (claim := claim_trial(study, folder, total, seed)) is not None:
            trial, lock = claim
            try:
                try:
                    found: dict[str, Any] = {"values": objective(trial)}
                except optuna.TrialPruned:
                    found = {"state": optuna.trial.TrialState.PRUNED}
                with choosing(folder):
                    told = study.tell(trial, **found)
            finally:
                lock.release()
            Path(lock.lock_file).unlink(missing_ok=True)  # nobody asks for it any more
            report(told)
            bar.update(count_done(study) - bar.n)


# --- what came of them --------------------------------------------------------------------------


def count_done(study: Any) -> int:
    """How many trials have ended."""
    return sum(t.state.is_finished() for t in study.get_trials(deepcopy=False))


def best_of(study: Any) -> Any:
    """The complete trial with the highest score; None where none has a finite one."""
    try:
        best = study.best_trial
    except ValueError:
        return None
    return best if math.isfinite(best.value) else None


def trials_table(study: Any, names: list[str]) -> pd.DataFrame:
    """A row a trial: number, state, scores, epochs, the settings `names`, and a note."""
    rows = []
    for trial in study.get_trials(deepcopy=False):
        kept, state = trial.user_attrs, trial.state.name.lower()
        rows.append({
            "trial": trial.number, "state": "refused" if "refused" in kept else state,
            "score": trial.value, "start": kept.get("start"), "best_epoch": kept.get("best_epoch"),
            "epochs": max(trial.intermediate_values, default=None),
            **{name: trial.params.get(name) for name in names}, "note": kept.get("refused", ""),
        })  # fmt: skip
    return pd.DataFrame(rows).astype({"best_epoch": "Int64", "epochs": "Int64"})


def importances(study: Any) -> dict[str, float]:
    """How much of the differences between scores each setting explains, the most first.

    By Optuna's default evaluator; empty where too few trials are done, or all alike.
    """
    optuna = need("optuna", "search")
    complete = study.get_trials(deepcopy=False, states=[optuna.trial.TrialState.COMPLETE])
    values = {trial.value for trial in complete}
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return {}
    return dict(optuna.importance.get_param_importances(study))
