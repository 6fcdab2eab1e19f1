"""A search for the best of a known function: ``python search_worker.py FOLDER TRIALS [DIE_IN]``.

A process of its own, so that it can be killed in trial number DIE_IN, and have company. It prints
the number of each trial that it did.
"""

import math
import os
import signal
import sys
import time
from pathlib import Path

from emotion_toolbox.trials import Space, open_study, run_trials

SPACES = {
    "x": Space(-4.0, 4.0),
    "y": Space(1e-4, 1.0, log=True),
    "z": Space(choices={"a": 0.0, "b": 0.5}),
}
ABOUT = {"--space": "x, y and z"}


def known(trial) -> float:
    """Highest, 0.5, at x = 1, y = 0.01, z = b."""
    x, y, z = (space.suggest(trial, name) for name, space in SPACES.items())
    return z - (x - 1) ** 2 / 4 - (math.log10(y) + 2) ** 2 / 4


def run(folder: Path, objective=known, total: int = 12, seed: int = 3):
    """The study in `folder`, once `total` trials are done."""
    study = open_study(folder / "search.db", ABOUT)
    run_trials(study, objective, folder, total, seed, report=lambda trial: None)
    return study


def main() -> None:
    die_in = int(sys.argv[3]) if len(sys.argv) > 3 else -1

    def objective(trial):
        score = known(trial)
        trial.report(score - 1, 0)
        if trial.number == die_in:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)  # as long as the other worker needs to begin
        print("did", trial.number, flush=True)
        return score

    run(Path(sys.argv[1]), objective, int(sys.argv[2]))


if __name__ == "__main__":
    main()
