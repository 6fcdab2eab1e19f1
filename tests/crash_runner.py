"""Train in processes that are killed: ``python crash_runner.py SPEC.json``.

The specification names a folder and a list of jobs. Each job forks a child that trains there, and
may be killed: after a share of the first job's time, at a call of a function of ``os``, or by its
own SIGINT. The outcome of every job goes to standard output, one JSON object a line. Forking one
process that has imported everything already makes twenty kills a matter of seconds.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
from small_run import file_datasets, install_small_network, small_config

from emotion_transfer import engine
from emotion_transfer.model import build_model

KILLED, FAILED, STOPPED = -signal.SIGKILL, 3, 130


def kill_at(function: str, call: int, when: str, number: int) -> None:
    """Let this process die before, or after, a certain call of a function of ``os``."""
    original, count = getattr(os, function), 0

    def counting(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call and when == "before":
            os.kill(os.getpid(), number)
        result = original(*args, **kwargs)
        if count == call and when == "after":
            os.kill(os.getpid(), number)
        return result

    setattr(os, function, counting)


def interrupt_at(step: int) -> None:
    """Send SIGINT to this process while it is in its `step`-th training step."""
    original, count = engine.train_step, 0

    def counting(*args):
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGINT)
        original(*args)

    engine.train_step = counting


def train(folder: Path, job: dict) -> int:
    """What a child does; its exit status."""
    install_small_network(pytest.MonkeyPatch())
    cfg = small_config(folder, **job.get("settings", {}))
    if "kill_at" in job:
        kill_at(*job["kill_at"], signal.SIGKILL)
    if "interrupt_at" in job:
        interrupt_at(job["interrupt_at"])
    model = build_model(cfg, 3)
    torch.manual_seed(os.getpid())  # a run must not depend on what was drawn before it
    run = Path(cfg.OUTPUT_ROOT) / job.get("run", "run")
    try:
        result = engine.fit(cfg, model, file_datasets(cfg), run / "checkpoints")
    except KeyboardInterrupt as stopped:
        print(json.dumps({"stopped": str(stopped)}), flush=True)
        return STOPPED
    outcome = {"best_epoch": result.best_epoch, "best_source": result.best_source}
    torch.save({**outcome, "model": model.state_dict()}, run / "result.pt")
    return 0


def run_job(folder: Path, job: dict, reference: float) -> dict:
    """Fork, train, perhaps kill, and say how it ended."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        status = FAILED
        try:
            status = train(folder, job)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if "kill_share" in job:
        time.sleep(job["kill_share"] * reference)
        os.kill(child, signal.SIGKILL)  # not reaped yet, so the number is still its own
    _, raw = os.waitpid(child, 0)
    return {"status": os.waitstatus_to_exitcode(raw), "seconds": time.perf_counter() - started}


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    reference = 0.0
    for job in spec["jobs"]:
        outcome = run_job(Path(spec["folder"]), job, reference)
        reference = reference or outcome["seconds"]
        print("\n" + json.dumps({"outcome": outcome}), flush=True)  # a kill may leave half a line


if __name__ == "__main__":
    main()
