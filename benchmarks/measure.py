"""Timing by interleaved repeats, and the memory of a process."""

import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

Row = dict[str, Any]


def make_row(labels: Mapping[str, Any], unit: str, repeats: list[float]) -> Row:
    """One line of a table: labels, the raw repeats and their median."""
    return {**labels, "unit": unit, "median": statistics.median(repeats), "repeats": repeats}


def interleave(
    paths: Mapping[str, Callable[[], float]], repeats: int, label: str
) -> dict[str, list[float]]:
    """Rates of every path: each once to warm up, then A B C, B C A, ... `repeats` times over."""
    names = list(paths)
    found: dict[str, list[float]] = {name: [] for name in names}
    with tqdm(total=len(names) * (repeats + 1), desc=label, unit="run", leave=False) as bar:
        for turn in range(repeats + 1):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                bar.set_postfix_str(name)
                rate = paths[name]()
                if turn:
                    found[name].append(rate)
                bar.update()
    return found


def rate_for(seconds: float, work: Callable[[], int]) -> float:
    """Images a second of `work`, which does a batch and says how many, repeated for `seconds`."""
    done, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds or not done:
        done += work()
    return done / taken


def synchronise(device: torch.device) -> None:
    """Wait until `device` has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch on `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def anonymous_memory() -> int:
    """RssAnon of this process in bytes: what it holds in memory that is no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("this kernel does not report RssAnon")


@contextmanager
def peak_anonymous_memory(every: float = 0.02) -> Iterator[dict[str, int]]:
    """A dict whose `before` and `peak` hold RssAnon in bytes once the block has ended."""
    found = {"before": anonymous_memory(), "peak": 0}
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found["peak"] = max(found["peak"], anonymous_memory())
            stop.wait(every)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        stop.set()
        watcher.join()
        found["peak"] = max(found["peak"], anonymous_memory())


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
