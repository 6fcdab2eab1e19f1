"""``python -m benchmarks``: measure, print a table, and write JSON, markdown and a figure."""

import argparse
import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import epoch, input_path, memory, size, step
from benchmarks.figure import save_figure
from benchmarks.plan import HALVES, PARTS, Plan, choose_plan
from benchmarks.results import (
    Results,
    as_table,
    describe_machine,
    describe_versions,
    load_results,
    machine_slug,
    merge_results,
    save_results,
)

RUNNERS: dict[str, Callable[[Plan, torch.device, Path], dict[str, Any]]] = {
    "input": input_path.run, "step": step.run, "epoch": epoch.run, "size": size.run,
    "memory": memory.run,
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--part", nargs="+", choices=PARTS, help="only these parts")
    parser.add_argument("--half", type=int, choices=HALVES, help="input and step, or the rest")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--work", type=Path, help="an existing folder for pictures and caches")
    parser.add_argument("--cpu", action="store_true", help="the CPU, although there is a GPU")
    parser.add_argument("--repeats", type=int, help="fewer or more than the plan's")
    parser.add_argument("--quick", action="store_true", help="tiny sizes; meaningless figures")
    return parser


def run_part(name: str, plan: Plan, device: torch.device, work: Path) -> dict[str, Any]:
    """One part's result, with its duration and the load of the machine before and after."""
    load, start = round(os.getloadavg()[0], 1), time.perf_counter()
    found = RUNNERS[name](plan, device, work)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "load_average": [load, round(os.getloadavg()[0], 1)],
        **found,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the parts asked for; each is merged into the results as soon as it is done."""
    args = make_parser().parse_args(arguments)
    cuda = torch.cuda.is_available() and not args.cpu
    device = torch.device("cuda" if cuda else "cpu")
    plan = choose_plan(cuda=cuda, quick=args.quick)
    plan = dataclasses.replace(plan, repeats=args.repeats or plan.repeats)
    results: Results = {
        "machine": describe_machine(device),
        "versions": describe_versions(),
        "plan": {
            k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(plan).items()
        },
        "parts": {},
    }
    file = args.out / f"{machine_slug(results['machine'])}{'-quick' if args.quick else ''}.json"
    with tempfile.TemporaryDirectory(dir=args.work, prefix="benchmark-") as folder:
        for name in args.part or (HALVES[args.half] if args.half else PARTS):
            print(f"part {name}", flush=True)
            results["parts"][name] = run_part(name, plan, device, Path(folder))
            results = merge_results(load_results(file), results)
            save_results(file, results)
    table = as_table(results)
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    save_figure(file.with_suffix(".png"), results)
    print(f"\n{table}\n{file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
