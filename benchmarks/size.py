"""Part "size": what a data set fifty times as large costs in time an image and in memory.

Each size runs in a process of its own, ``python -m benchmarks.size``, so that memory is its own.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks.measure import (
    Row,
    anonymous_memory,
    cores,
    make_row,
    peak_anonymous_memory,
    threads,
)
from benchmarks.pictures import cached_dataset, make_files, make_split, repeat_files
from benchmarks.plan import Plan
from emotion_toolbox.batches import batch_slices, fetch_ahead
from emotion_toolbox.draws import epoch_order

SMALL_SOURCE = (160, 120)
BATCH = 32
REPEATS = 5


def measure_set(root: Path, cache: Path, side: int, reads: int) -> dict[str, Any]:
    """Build the cache of the images under `root`, then read it in random order, over and over.

    Each repeat reads `reads` images, so that small sets are not measured by their start alone.
    """
    found: dict[str, Any] = {"base": anonymous_memory()}
    split = make_split(root)
    found["images"], found["after_list"] = len(split), anonymous_memory()
    start = time.perf_counter()
    with peak_anonymous_memory() as build:
        dataset = cached_dataset(split, cache, side, cores())
    found["build_seconds"] = time.perf_counter() - start
    found["build_peak"] = build["peak"]
    found["after_build"] = anonymous_memory()
    passes: list[float] = []
    epochs = range(-(-reads // len(split)))
    with threads(1), peak_anonymous_memory() as read:
        for _ in range(REPEATS + 1):  # the first brings the pages into memory
            order = np.concatenate([epoch_order(0, epoch, len(split)) for epoch in epochs])
            batches = batch_slices(order[:reads], BATCH)
            start, seen = time.perf_counter(), 0
            for batch in fetch_ahead(dataset, batches, torch.device("cpu")):
                seen += len(batch.labels)
            passes.append((time.perf_counter() - start) / seen)
    found["read_seconds_per_image"] = passes[1:]
    found["read_peak"] = read["peak"]
    found["index_file"] = next(cache.glob("*.npz")).stat().st_size
    return found


def run(plan: Plan, device: torch.device, work: Path) -> dict[str, Any]:
    """Measure every size of set in a process of its own."""
    source = make_files(work / "small", SMALL_SOURCE, plan.files)
    rows: list[Row] = []
    sets: list[dict[str, Any]] = []
    for count in tqdm(plan.set_sizes, desc="size", unit="set", leave=False):
        root, cache = work / f"set-{count}", work / f"cache-set-{count}"
        repeat_files(root, source, count)
        spec = (str(root), str(cache), str(plan.set_side), str(plan.set_reads))
        command = [sys.executable, "-m", "benchmarks.size", *spec]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found = json.loads(done.stdout.splitlines()[-1])
        shutil.rmtree(cache)
        shutil.rmtree(root)
        sets.append(found)
        labels = {"images": count}
        reads = [1e6 * seconds for seconds in found["read_seconds_per_image"]]
        built = 1e6 * found["build_seconds"] / count
        rows += [
            make_row({**labels, "what": "read in random order"}, "us/image", reads),
            make_row({**labels, "what": "cache built"}, "us/image", [built]),
            make_row({**labels, "what": "peak RssAnon, build"}, "MB", [found["build_peak"] / 1e6]),
            make_row({**labels, "what": "peak RssAnon, reading"}, "MB", [found["read_peak"] / 1e6]),
        ]
    return {"rows": rows, "sets": sets, **growth(sets), "side": plan.set_side}


def growth(sets: list[dict[str, Any]]) -> dict[str, Any]:
    """Anonymous memory in bytes an image, by which the largest set exceeds the smallest."""
    first, last = sets[0], sets[-1]
    more = max(1, last["images"] - first["images"])
    return {
        "index_bytes_per_image": (last["after_build"] - first["after_build"]) / more,
        "read_bytes_per_image": (last["read_peak"] - first["read_peak"]) / more,
        "build_bytes_per_image": (last["build_peak"] - first["build_peak"]) / more,
        "index_file_bytes_per_image": last["index_file"] / last["images"],
    }


if __name__ == "__main__":
    print(json.dumps(measure_set(Path(sys.argv[1]), Path(sys.argv[2]), *map(int, sys.argv[3:5]))))
