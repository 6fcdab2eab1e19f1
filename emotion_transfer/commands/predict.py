"""Say what pictures are: files, folders, wildcards, or a list of paths on standard input."""

import argparse
import csv
import glob
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
from torch import nn
from tqdm import tqdm

from emotion_toolbox.errors import ExportError, ImageError
from emotion_toolbox.export import ExportedModel, load_export, predict_files, top_classes
from emotion_toolbox.files import resolve_path
from emotion_toolbox.prepare import list_files
from emotion_transfer.config import make_config
from emotion_transfer.model import build_model

EXAMPLE = """examples:
  python -m emotion_transfer predict picture.jpg
  python -m emotion_transfer predict holiday/ --csv answers.csv
  python -m emotion_transfer predict --model outputs/RUN_NAME --json *.jpg"""
DECODING_MEMORY = 2_500_000_000  # bytes
BAR_FROM = 20  # images


def find_export(given: Path | None) -> Path:
    """The export in a run's folder or the folder itself; None: the one written last.

    Raises:
        ExportError: if there is none.
    """
    if given is not None:
        for folder in (given, given / "export"):
            if (folder / "model.safetensors").is_file():
                return folder
        raise ExportError(
            f"--model {given}: give the folder of an export (with model.safetensors and "
            "config.json), or of a run that has one (outputs/RUN_NAME)"
        )
    files = resolve_path("outputs").glob("*/export/model.safetensors")
    newest = max(files, key=lambda file: file.stat().st_mtime, default=None)
    if newest is None:
        raise ExportError(
            f"no export under {resolve_path('outputs')}; run the notebook, or name one: --model"
        )
    return newest.parent


def network_of(settings: dict[str, Any], classes: int) -> nn.Module:
    """The network that the settings of an export describe."""
    return build_model(make_config(settings), classes)


def find_images(asked: Sequence[str]) -> Iterator[Path]:
    """The files that were `asked` for, folders and wildcards (which Windows leaves) expanded."""
    for text in asked:
        if text == "-":
            yield from (Path(line.rstrip("\r\n")) for line in sys.stdin if line.strip())
        elif Path(text).is_dir():
            yield from list_files(Path(text))[0]
        elif glob.has_magic(text) and not os.path.lexists(text):
            yield from map(Path, sorted(glob.glob(text, recursive=True)) or [text])
        else:
            yield Path(text)


def limit_memory(more: int) -> None:
    """Let this process take at most `more` bytes on top of what it has; on Linux only.

    A hostile file can make a decoder ask for any amount; then it is refused like any other bad one.
    """
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = psutil.Process().memory_info().data + more
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def answer(exported: ExportedModel, path: Path, top: int) -> list[tuple[str, float]]:
    """The top classes of an image; raises ``ImageError``."""
    if str(path).partition(":")[0] in ("http", "https", "ftp"):
        raise ImageError("a web address; download the picture and give the file")
    return top_classes(predict_files(exported, [path])[0], exported.classes, top)


def shown(path: Path) -> str:
    """A path as text; a name may be any bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def positive(text: str) -> int:
    """A whole number from 1; raises ``ValueError``."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer predict",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="a file, a folder, a wildcard, or - for a list")
    add("--model", type=Path, help="an export, or a run that has one (default: the newest)")
    add("--top", type=positive, default=3, help="classes to show (default 3)")
    add("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    add("--json", action="store_true", help="one JSON object a line")
    add("--csv", type=Path, metavar="FILE", help="write a table with the share of every class")
    return parser


def predict(args: argparse.Namespace, exported: ExportedModel) -> int:
    """Answer every image asked for; 1 if any was unusable."""
    rows, failed = [], 0
    images = list(find_images(args.images))
    if not images:
        print(f"no images in {', '.join(args.images)}", file=sys.stderr)
        return 1
    quiet = len(images) < BAR_FROM or not sys.stderr.isatty()
    for path in tqdm(images, "predicting", unit="image", file=sys.stderr, disable=quiet):
        try:
            top = answer(exported, path, len(exported.classes) if args.csv else args.top)
        except ImageError as error:
            tqdm.write(f"{shown(path)}: {error}", file=sys.stderr)
            failed += 1
            continue
        if args.csv:
            rows.append({"path": shown(path), "predicted": top[0][0], **dict(top)})
        elif args.json:
            print(json.dumps({"image": shown(path), "top": top}))
        else:
            print(f"{shown(path)}: " + ", ".join(f"{name} {p:.1%}" for name, p in top))
    if args.csv:
        with args.csv.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, ["path", "predicted", *exported.classes])
            table.writeheader()
            table.writerows(rows)
        print(f"{args.csv}: {len(rows)} images, {failed} unusable", file=sys.stderr)
    return int(failed > 0)


def main(arguments: list[str] | None = None, memory: int | None = DECODING_MEMORY) -> int:
    """Print the top classes of every image; 1 if any image was unusable.

    The images may take so many bytes of `memory` once the model is loaded; None: any amount.
    """
    args = make_parser().parse_args(arguments)
    folder = find_export(args.model)
    exported = load_export(folder, network_of, args.device)
    if args.model is None:
        about = ", trained on the synthetic sample" if exported.synthetic else ""
        print(f"using the newest export, {folder}{about}; --model names another", file=sys.stderr)
    if memory is not None:
        limit_memory(memory)
    try:
        return predict(args, exported)
    except BrokenPipeError:  # who reads has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
