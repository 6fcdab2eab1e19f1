"""Train the small network as the command ``train`` does: ``torchrun shared_runner.py SPEC.json``.

The specification holds a folder, settings, and maybe which process kills itself once, in which of
its training steps.
"""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from small_run import SmallNetwork, install_small_network, small_config

from emotion_toolbox.errors import NAMED_ERRORS
from emotion_transfer import engine
from emotion_transfer.commands import distributed
from emotion_transfer.commands.train import train

GIVEN = "DATASET DATA_ROOT CACHE_DIR OUTPUT_ROOT MODEL_NAME WEIGHTS IMG_SIZE BATCH_SIZE EPOCHS " \
    "THAW_EPOCHS MIX_OFF_EPOCHS LR_HEAD LR_BACKBONE DROPOUT EMA_DECAY NUM_WORKERS DEVICE AMP " \
    "BOOTSTRAP START"  # fmt: skip


def signal_once(number: int, rank: int, step: int, note: Path) -> None:
    """Let the process `rank` send itself a signal once, in its `step`-th training step."""
    original, count = engine.train_step, 0

    def counting(*args):
        nonlocal count
        count += 1
        if count == step and distributed.rank() == rank and not note.exists():
            note.touch()
            os.kill(os.getpid(), number)
        original(*args)

    engine.train_step = counting


def main(spec: dict) -> int:
    """Train; the exit status of the command."""
    patch = pytest.MonkeyPatch()
    install_small_network(patch)
    made = SmallNetwork.__init__

    def without_dropout(self):
        made(self)
        self.drop.p = 0.0

    patch.setattr(SmallNetwork, "__init__", without_dropout)
    folder = Path(spec["folder"])
    cfg = small_config(folder, DROPOUT=0.0, **spec["settings"])
    if sent := spec.get("signal"):
        signal_once(getattr(signal, sent["name"]), sent["rank"], sent["step"], folder / "sent")
    given = {*GIVEN.split(), *spec["settings"]}
    try:
        train({name: getattr(cfg, name) for name in given})
    except (*NAMED_ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))))
