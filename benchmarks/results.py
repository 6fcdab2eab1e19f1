"""The file of results: machine, versions, the parts' rows with raw repeats, and a summary."""

import json
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import psutil
import timm
import torch
import torchvision

from benchmarks.measure import Row, cores

Results = dict[str, Any]

# The memory-bound limits of a step in images a second, for devices whose bandwidth was measured.
FLOORS = {("NVIDIA H100", "resnet50", 224): 7400.0}


def processor_name() -> str:
    """The CPU's model."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    machine: dict[str, Any] = {
        "device": device.type, "cpu": processor_name(), "cores": cores(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1), "system": platform.system(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_gb": round(properties.total_memory / 1e9, 1),
            "capability": f"{properties.major}.{properties.minor}",
        }
    return machine


def describe_versions() -> dict[str, str | None]:
    """Versions of what does the work."""
    return {
        "python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "torchvision": torchvision.__version__, "timm": timm.__version__,
        "numpy": np.__version__, "pillow": PIL.__version__,
    }  # fmt: skip


def machine_slug(machine: Mapping[str, Any]) -> str:
    """A file name for the device: ``nvidia-h100-80gb-hbm3`` or ``cpu-amd-epyc-2-cores``."""
    name = machine.get("gpu") or f"cpu {machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def merge_results(old: Results | None, new: Results) -> Results:
    """`new` with the parts that only `old` has, if that is of a like machine and equal versions."""
    same = old is not None and _conditions(old) == _conditions(new)
    parts = {**(old["parts"] if old and same else {}), **new["parts"]}
    merged = {**new, "parts": parts}
    merged["summary"] = summarise(merged)
    return merged


def _conditions(results: Results) -> list[Any]:
    """What must be equal for two measurements to stand in one file."""
    machine = [results["machine"].get(name) for name in ("device", "gpu", "cpu", "cores")]
    plan = {name: value for name, value in results["plan"].items() if name != "repeats"}
    return [*machine, results["versions"], plan]


def median_of(results: Results, part: str, **labels: Any) -> float | None:
    """The median of the row of `part` with these labels, None where it was not measured."""
    rows: list[Row] = results["parts"].get(part, {}).get("rows", [])
    for row in rows:
        if all(row.get(name) == value for name, value in labels.items()):
            return float(row["median"])
    return None


def ratio(one: float | None, other: float | None) -> float | None:
    """`one` / `other`, None where either is lacking."""
    return None if one is None or not other else one / other


def _input_summary(results: Results) -> dict[str, float | None]:
    def rate(path: str, source: str = "500x375") -> float | None:
        return median_of(results, "input", path=path, source=source)

    large, usual = "1024x768", "usual notebook"
    peers = {
        "torchvision_preset": "torchvision preset", "torchvision_recipe": "torchvision recipe",
        "timm": "timm loader", "timm_randaugment": "timm loader, RandAugment",
    }  # fmt: skip
    return {
        "input_vs_usual_per_core": ratio(rate("ours"), rate(usual)),
        "input_vs_usual_per_core_large": ratio(rate("ours", large), rate(usual, large)),
        "input_compiled_vs_usual_per_core": ratio(rate("ours, jitter compiled"), rate(usual)),
        "input_compiled_vs_usual_per_core_large": ratio(
            rate("ours, jitter compiled", large), rate(usual, large)
        ),
        "gather_vs_usual_per_core": ratio(rate("ours, gather alone"), rate(usual)),
        **{f"input_vs_{k}_per_core": ratio(rate("ours"), rate(v)) for k, v in peers.items()},
        "input_uncached_vs_usual_per_core": ratio(rate("ours, CACHE=False"), rate(usual)),
    }


def _step_summary(results: Results) -> dict[str, float | None]:
    like, ships = "ours, as timm's", "ours, as it ships"
    rows: list[Row] = results["parts"].get("step", {}).get("rows", [])
    eager = {r["precision"]: r["median"] for r in rows if r["step"] == ships and not r["compiled"]}
    fast = max(eager, key=lambda precision: eager[precision], default=None)

    def rate(step: str, precision: str | None = fast, compiled: bool = False) -> float | None:
        return median_of(results, "step", step=step, precision=precision, compiled=compiled)

    best = rate(ships)
    return {
        "step_vs_timm": ratio(rate(like), rate("timm")),
        "step_vs_timm_float32": ratio(rate(like, "off"), rate("timm", "off")),
        "step_vs_timm_compiled": ratio(rate(like, fast, True), rate("timm", fast, True)),
        "step_vs_torchvision": ratio(rate(like), rate("torchvision")),
        "step_with_augmentation_vs_without": ratio(
            best, rate("ours, as it ships, without augmentation")
        ),
        "step_amp_vs_float32": ratio(eager.get("bf16", eager.get("fp16")), eager.get("off")),
        "step_share_of_floor": ratio(best, floor_of(results)),
    }


def floor_of(results: Results) -> float | None:
    """The memory-bound limit of the step on this device, where it is known."""
    plan, gpu = results["plan"], results["machine"].get("gpu", "")
    for (name, model, size), floor in FLOORS.items():
        if gpu.startswith(name) and (plan["model"], plan["train_size"]) == (model, size):
            return floor
    return None


def _epoch_summary(results: Results) -> dict[str, float | None]:
    def rate(epoch: str) -> float | None:
        return median_of(results, "epoch", epoch=epoch)

    ours, every = rate("ours, from the cache"), rate("usual notebook, a worker a core")
    ships = rate("usual notebook, 4 workers")
    return {
        "epoch_vs_resident_tensors": ratio(ours, rate("ours, on resident tensors")),
        "epoch_vs_usual_notebook": ratio(ours, ships if ships is not None else every),
        "epoch_vs_usual_notebook_all_cores": ratio(ours, every),
        "device_wait_percent": rate("ours, device waits for data"),
    }


def _size_summary(results: Results) -> dict[str, float | None]:
    part = results["parts"].get("size", {})
    sizes = [s["images"] for s in part.get("sets", [])] or [0]
    what = "read in random order"
    times = [median_of(results, "size", images=s, what=what) for s in (sizes[-1], sizes[0])]
    peaks = [s[k] for s in part.get("sets", []) for k in ("build_peak", "read_peak")]
    return {
        "read_time_largest_vs_smallest_set": ratio(*times),
        "index_bytes_per_image": part.get("index_bytes_per_image"),
        "anonymous_memory_peak_gb": max(peaks) / 1e9 if peaks else None,
    }


def summarise(results: Results) -> dict[str, float | None]:
    """Ratios of medians; above 1, ours is faster. None where not applicable or not measured."""
    found = {
        **_input_summary(results),
        **_step_summary(results),
        **_epoch_summary(results),
        **_size_summary(results),
    }
    return {name: None if value is None else float(f"{value:.4g}") for name, value in found.items()}


def load_results(file: Path) -> Results | None:
    """What `file` holds, None where there is none."""
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None


def save_results(file: Path, results: Results) -> None:
    """Write `results` as JSON."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def as_table(results: Results) -> str:
    """All medians with their ranges, and the summary, as markdown."""
    machine = results["machine"]
    lines = [f"# {machine.get('gpu') or machine['cpu']}", ""]
    lines += [f"{machine['cores']} cores of {machine['cpu']}; " + _versions(results), ""]
    lines += ["| summary | |", "|---|---|"]
    lines += [f"| {k} | {'' if v is None else f'{v:g}'} |" for k, v in results["summary"].items()]
    for name, part in results["parts"].items():
        load = part["load_average"]
        lines += ["", f"## {name}", "", f"Load average {load[0]} before, {load[1]} after."]
        lines += ["", "| what | median | range | unit |", "|---|---|---|---|"]
        lines += [_table_line(row) for row in part["rows"]]
        if costs := part.get("largest_costs"):
            shares = ", ".join(f"{c['operation']} {c['share']:.0%}" for c in costs)
            lines += ["", f"Largest costs of the step: {shares}."]
    return "\n".join(lines) + "\n"


def _versions(results: Results) -> str:
    return ", ".join(f"{name} {v}" for name, v in results["versions"].items() if v)


def _table_line(row: Row) -> str:
    labels = [
        str(value) if isinstance(value, str) else f"{name} {value}"
        for name, value in row.items()
        if name not in ("unit", "median", "repeats") and value is not False
    ]
    spread = ""
    if len(row["repeats"]) > 1:
        spread = f"{_figure(min(row['repeats']))} to {_figure(max(row['repeats']))}"
    return f"| {', '.join(labels)} | {_figure(row['median'])} | {spread} | {row['unit']} |"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
