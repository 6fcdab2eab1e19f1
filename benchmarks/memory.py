"""Part "memory": what a training step takes, by batch size.

On a CPU each size runs in a process of its own, ``python -m benchmarks.memory``.
"""

import dataclasses
import gc
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from benchmarks.measure import Row, make_row, peak_anonymous_memory
from benchmarks.plan import Plan
from benchmarks.settings import bench_config
from benchmarks.step import our_step, precisions, random_batch, ready_trainer
from emotion_toolbox.device import memory_advice
from emotion_toolbox.errors import DeviceMemoryError

STEPS = 3
PARTS_OF_LARGEST = 4


def variants(plan: Plan, device: torch.device) -> list[tuple[int, int, str]]:
    """(batch size, ACCUMULATE, precision) of every measurement."""
    found = [(b, 1, amp) for amp in precisions(device) for b in plan.memory_batches]
    largest = plan.memory_batches[-1]
    if largest // PARTS_OF_LARGEST >= 2:
        found.append((largest, PARTS_OF_LARGEST, precisions(device)[-1]))
    return found


def measure_steps(
    plan: Plan, device: torch.device, batch: int, accumulate: int, amp: str
) -> dict[str, float]:
    """Peak MB of a few steps: on the device, and of this process."""
    cuda = device.type == "cuda"
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cfg = bench_config(plan, device, BATCH_SIZE=batch, ACCUMULATE=accumulate)
    with memory_advice(batch, accumulate, cfg.IMG_SIZE):
        step = our_step(ready_trainer(cfg, amp), random_batch(cfg, device, batch))
        with peak_anonymous_memory() as anonymous:
            for _ in range(STEPS):
                step()
    peak = torch.cuda.max_memory_allocated() if cuda else anonymous["peak"]
    return {"peak_mb": peak / 1e6, "process_mb": anonymous["peak"] / 1e6}


def run(plan: Plan, device: torch.device, work: Path) -> dict[str, Any]:
    """Measure every variant, as far as they fit."""
    rows: list[Row] = []
    left_out: list[str] = []
    for batch, accumulate, amp in tqdm(variants(plan, device), desc="memory", leave=False):
        labels = {"batch": batch, "accumulate": accumulate, "precision": amp}
        if device.type == "cuda":
            try:
                found = measure_steps(plan, device, batch, accumulate, amp)
            except DeviceMemoryError as error:
                left_out.append(f"batch {batch}, {amp}: {error}")
                continue
        else:
            spec = json.dumps([dataclasses.asdict(plan), batch, accumulate, amp])
            command = [sys.executable, "-m", "benchmarks.memory", spec]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
        rows.append(make_row(labels, "MB", [found["peak_mb"]]))
    return {"rows": rows, "left_out": left_out}


if __name__ == "__main__":
    fields, size, pieces, kind = json.loads(sys.argv[1])
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    print(json.dumps(measure_steps(Plan(**fields), torch.device("cpu"), size, pieces, kind)))
