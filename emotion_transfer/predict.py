"""Predict the emotion of images: ``python -m emotion_transfer.predict IMAGE...``."""

import argparse
import json
import sys
from pathlib import Path

from emotion_transfer.checkpoint import CheckpointError
from emotion_transfer.config import resolve_path
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


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m emotion_transfer.predict", description=__doc__)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--model", type=Path, help="an export folder (default: the newest run's)")
    parser.add_argument("--top", type=int, default=3, help="classes to show (default 3)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Print the top classes of every image; 1 if any image or the model was unusable."""
    args = make_parser().parse_args(arguments)
    try:
        exported = load_export(args.model or newest_export(), args.device)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        return 1
    failed = False
    for path in args.images:
        try:
            answer = top_classes(predict_files(exported, [path])[0], exported.classes, args.top)
        except ImageError as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed = True
            continue
        if args.json:
            print(json.dumps({"image": str(path), "top": answer}))
        else:
            print(f"{path}: " + ", ".join(f"{name} {p:.1%}" for name, p in answer))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
