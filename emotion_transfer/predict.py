"""Predict the emotion of images: ``python -m emotion_transfer.predict IMAGE...``."""

import argparse
import json
import os
import sys
from pathlib import Path

import psutil

from emotion_transfer.checkpoint import CheckpointError
from emotion_transfer.config import ConfigError, resolve_path
from emotion_transfer.data import ImageError
from emotion_transfer.export import load_export, predict_files, top_classes


def newest_export() -> Path:
    """The export written last under ``outputs/``; raises ``CheckpointError`` if there is none."""
    found = resolve_path("outputs").glob("*/export/model.safetensors")
    files = sorted(found, key=lambda file: file.stat().st_mtime)
    if not files:
        raise CheckpointError(
            f"no export under {resolve_path('outputs')}; run the notebook, or name one: --model"
        )
    return files[-1].parent


DECODING_MEMORY = 2_500_000_000  # bytes


def limit_memory(more: int) -> None:
    """Let this process take at most `more` bytes on top of what it has; on Linux only.

    A hostile file can make a decoder ask for any amount; then it is refused like any other bad one.
    """
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = psutil.Process().memory_info().data + more
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def positive(text: str) -> int:
    """A whole number from 1; raises ``ValueError``."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m emotion_transfer.predict", description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", type=Path, help="an export folder (default: the newest run's)")
    parser.add_argument("--top", type=positive, default=3, help="classes to show (default 3)")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def main(arguments: list[str] | None = None, memory: int | None = None) -> int:
    """Print the top classes of every image; 1 if any image or the model was unusable.

    With `memory`, the images may take so many bytes once the model is loaded.
    """
    args = make_parser().parse_args(arguments)
    try:
        folder = args.model or newest_export()
        exported = load_export(folder, args.device)
    except (CheckpointError, ConfigError) as error:
        print(error, file=sys.stderr)
        return 1
    if args.model is None:
        about = ", trained on the synthetic sample" if exported.synthetic else ""
        print(f"using the newest export, {folder}{about}; --model names another", file=sys.stderr)
    if memory is not None:
        limit_memory(memory)
    failed = False
    for path in args.images:
        shown = os.fsencode(path).decode(errors="backslashreplace")  # a name may be any bytes
        try:
            answer = top_classes(predict_files(exported, [path])[0], exported.classes, args.top)
        except ImageError as error:
            print(f"{shown}: {error}", file=sys.stderr)
            failed = True
            continue
        if args.json:
            print(json.dumps({"image": shown, "top": answer}))
        else:
            print(f"{shown}: " + ", ".join(f"{name} {p:.1%}" for name, p in answer))
    return int(failed)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(main(memory=DECODING_MEMORY))
