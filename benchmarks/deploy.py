"""ONNX against PyTorch: ``python -m benchmarks.deploy --model FOLDER --data DIR``.

FOLDER is an export, or a run that has one; DIR the data it was trained on. Both answer to the test
images of DIR, decoded once. Latency is that of one image, throughput that of batches of 32; each
repeat times all of them in turn, and what is given is the median of the ratios within repeats,
between their extremes. On a machine that does other work, take --threads 1: several wait for the
last of them. Last, how far probabilities move where a file is made square with Pillow or
torchvision alone instead of by this project's decoder: the largest change of an image, its median
and extremes over the images.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from benchmarks.measure import cores, interleave, threads
from benchmarks.results import describe_machine, describe_versions
from emotion_toolbox.cache import DecodedPixels
from emotion_toolbox.device import choose_device
from emotion_toolbox.export import ExportedModel, load_export, predict_squares
from emotion_toolbox.paired import resample_mean
from emotion_toolbox.pixels import Floats
from emotion_toolbox.tables import load_splits
from emotion_transfer.commands.onnx import (
    INPUT,
    OUTPUT,
    Squares,
    calibration_squares,
    export_onnx,
    open_onnx,
    quantize,
)
from emotion_transfer.commands.predict import find_export, network_of

Answer = Callable[[Squares], Any]
Differences = dict[str, list[float]]  # for each image, of its probabilities the largest


def seconds_an_image(answer: Answer, squares: Squares, batch: int, at_least: float) -> float:
    """Seconds an image of `answer`, asked in batches for some seconds."""
    batch, done, start = min(batch, len(squares)), 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < at_least or not done:
        first = done % (len(squares) - batch + 1)
        answer(squares[first : first + batch])
        done += batch
    return taken / done


def spread(values: list[float]) -> dict[str, float]:
    """The median and the extremes."""
    low, value, high = np.percentile(values, [0, 50, 100])
    return {"value": float(value), "low": float(low), "high": float(high)}


def plain_squares(file: Path, side: int, size: int) -> dict[str, npt.NDArray[np.uint8]]:
    """An image file, resized to `side` and cropped to `size` pixels, with other libraries alone."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    square = ImageOps.fit(image, (side, side), Image.Resampling.BICUBIC)
    resized = resize(image, [side], InterpolationMode.BICUBIC)
    made = {"pillow": square, "torchvision": resized}
    return {name: np.asarray(center_crop(picture, [size])) for name, picture in made.items()}


def compare_preparations(exported: ExportedModel, files: list[Path], found: Floats) -> Differences:
    """The largest change of a probability of each file against `found` [N, C], by library."""
    squares = [plain_squares(file, exported.resize, exported.image_size) for file in files]
    changes = {}
    for name in squares[0]:
        answers = [predict_squares(exported, [made[name]])[0] for made in squares]
        changes[f"{name}_probability_difference"] = np.abs(answers - found).max(1).tolist()
    return changes


def make_paths(
    exported: ExportedModel, root: Path, count: int
) -> tuple[dict[str, Answer], dict[str, float]]:
    """What answers to decoded pictures, on `count` threads, and the sizes of the files in MB."""
    with tempfile.TemporaryDirectory() as work:
        full = export_onnx(exported, Path(work) / "full.onnx")
        small = quantize(full, calibration_squares(exported, root), Path(work) / "int8.onnx")
        sizes = {"onnx_mb": full.stat().st_size / 1e6, "int8_mb": small.stat().st_size / 1e6}
        sessions = {"onnx": open_onnx(full, count), "int8": open_onnx(small, count)}
    answers: dict[str, Answer] = {"torch": lambda some: predict_squares(exported, list(some))}
    for name, session in sessions.items():
        answers[name] = partial(run_session, session)
    return answers, sizes


def run_session(session: Any, squares: Squares) -> Any:
    """Probabilities [N, C] of decoded pictures."""
    return session.run([OUTPUT], {INPUT: squares})[0]


def measure(folder: Path, root: Path, repeats: int, at_least: float, count: int) -> dict[str, Any]:
    """The summary, and what it was taken from, on `count` threads."""
    exported = load_export(folder, network_of)
    test = load_splits(root).splits["test"]
    pixels = DecodedPixels(test, exported.resize, cores(), exported.fit)
    squares = pixels[np.arange(len(test))]
    answers, sizes = make_paths(exported, root, count)
    parts = [slice(i, i + 32) for i in range(0, len(squares), 32)]
    found = {n: np.concatenate([ask(squares[p]) for p in parts]) for n, ask in answers.items()}
    hits = {name: (p.argmax(1) == test.labels).astype(float) for name, p in found.items()}
    times = {
        batch: interleave(
            {n: partial(seconds_an_image, a, squares, batch, at_least) for n, a in answers.items()},
            repeats, f"batches of {batch}",
        )
        for batch in (1, 32)
    }  # fmt: skip

    def against_torch(name: str, batch: int) -> dict[str, float]:
        pairs = zip(times[batch][name], times[batch]["torch"], strict=True)
        return spread([mine / theirs for mine, theirs in pairs])

    difference = np.abs(found["onnx"] - found["torch"]).max(1)
    worst = float(difference.max())
    summary = {
        "onnx_max_probability_difference": {"value": worst, "low": worst, "high": worst},
        "onnx_latency_vs_torch": against_torch("onnx", 1),
        "int8_latency_vs_torch": against_torch("int8", 1),
        "onnx_time_in_batches_vs_torch": against_torch("onnx", 32),
        "int8_time_in_batches_vs_torch": against_torch("int8", 32),
        "int8_accuracy_difference": resample_mean((hits["int8"] - hits["torch"])[None]).to_json(),
    }
    if exported.fit == "crop":
        files = [test.path(index) for index in range(len(test))]
        plain = compare_preparations(exported, files, found["torch"])
        summary |= {name: spread(changes) for name, changes in plain.items()}
    accuracy = {name: float(right.mean()) for name, right in hits.items()}
    return {
        "summary": summary, "accuracy": accuracy, **sizes, "images": len(test), "threads": count,
        "image_size": exported.image_size,
        "seconds_an_image": {str(batch): found for batch, found in times.items()},
    }  # fmt: skip


def figures_tables(result: dict[str, Any]) -> tuple[str, str]:
    """The summary as the two Markdown tables of docs/deployment.md."""

    def show(name: str, form: str, scale: float = 1) -> str:
        value, low, high = (
            scale * result["summary"][name][key] for key in ("value", "low", "high")
        )
        return f"{value:{form}} [{low:{form}}, {high:{form}}]"

    latency, batches = (
        " | ".join(show(f"{name}_{what}_vs_torch", ".2f") for name in ("onnx", "int8"))
        for what in ("latency", "time_in_batches")
    )
    largest = result["summary"]["onnx_max_probability_difference"]["value"]
    files = [
        "| | ONNX | int8 |",
        "|---|---|---|",
        f"| time for one picture, PyTorch's being 1 | {latency} |",
        f"| the same in batches of 32 | {batches} |",
        f"| largest difference of a probability | {largest:.1e} | |",
        f"| accuracy less PyTorch's, points | | {show('int8_accuracy_difference', '+.1f', 100)} |",
        f"| size of the file, MB | {result['onnx_mb']:.1f} | {result['int8_mb']:.1f} |",
    ]
    squares = [
        "| square made by | largest change of a probability |",
        "|---|---|",
        f"| Pillow: `fit`, as above | {show('pillow_probability_difference', '.3f')} |",
        f"| torchvision: `Resize` | {show('torchvision_probability_difference', '.3f')} |",
    ]
    return "\n".join(files), "\n".join(squares)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.deploy", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", type=Path, help="default: the newest under outputs/")
    parser.add_argument("--data", type=Path, required=True, help="DATA_ROOT")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="of one repeat")
    parser.add_argument("--threads", type=int, default=cores(), help="default: one a core")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/deploy.json"))
    args = parser.parse_args(arguments)
    with threads(args.threads):
        asked = args.repeats, args.seconds, args.threads
        result = measure(find_export(args.model), args.data, *asked)
    versions = {**describe_versions(), "onnxruntime": version("onnxruntime")}
    result |= {"machine": describe_machine(choose_device("cpu")), "versions": versions}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(*figures_tables(result), json.dumps(result["summary"], indent=1), sep="\n\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
