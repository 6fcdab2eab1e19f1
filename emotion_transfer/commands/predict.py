"""Say what pictures are: files, folders, wildcards, or a list of paths on standard input."""

import argparse
import csv
import glob
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
from torch import nn
from tqdm import tqdm

from emotion_toolbox.cache import work_ahead
from emotion_toolbox.decoding import decode_image, read_image_bytes
from emotion_toolbox.errors import ExportError, ImageError
from emotion_toolbox.export import ExportedModel, load_export, predict_squares, top_classes
from emotion_toolbox.files import resolve_path, write_text
from emotion_toolbox.prepare import count_suffixes, in_words, is_litter, list_files
from emotion_transfer.config import make_config
from emotion_transfer.model import build_model

EXAMPLE = """examples:
  python -m emotion_transfer predict picture.jpg
  python -m emotion_transfer predict holiday/ --csv answers.csv
  python -m emotion_transfer predict --model outputs/RUN_NAME --json *.jpg
  find . -name "*.jpg" -print0 | python -m emotion_transfer predict -"""
DECODING_MEMORY = 2_500_000_000  # bytes a thread
THREADS = 2  # decode while the network works
BATCH_PIXELS = 2**20  # 20 images of 224 x 224
BAR_FROM = 20  # images
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # two letters: C:// is a disk
HIDDEN = "hidden or of a system"


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


def find_images(asked: Iterable[str], left_out: Counter[str]) -> Iterator[str]:
    """The paths `asked` for, with folders, wildcards (which Windows leaves) and lists expanded.

    What lies beside the images is counted in `left_out`, by suffix.
    """
    for text in asked:
        if text == "-":
            yield from find_images(read_list(sys.stdin.buffer.read()), left_out)
        elif os.path.isdir(text):
            images, others, litter = list_files(Path(text))
            left_out += count_suffixes(others)
            left_out[HIDDEN] += litter.total() - litter["empty folder"]
            yield from map(str, images)
        elif glob.has_magic(text) and not os.path.lexists(text):
            yield from match_files(text, left_out) or [text]
        else:
            yield text


def match_files(pattern: str, left_out: Counter[str]) -> list[str]:
    """The files that a wildcard fits; names beginning with a dot only where it says so."""
    asked, found = Path(pattern).parts, []
    for file in filter(os.path.isfile, sorted(glob.glob(pattern, recursive=True))):
        names = [name for name in Path(file).parts if name not in asked and name[0] != "."]
        if any(map(is_litter, names)):
            left_out[HIDDEN] += 1
        else:
            found.append(file)
    return found


def read_list(data: bytes) -> list[str]:
    """The paths in a list: one a line, quoted or not, or as ``find -print0`` separates them."""
    text = data.removeprefix(b"\xef\xbb\xbf").decode(sys.getfilesystemencoding(), "surrogateescape")
    if "\0" in text:
        return list(filter(None, text.split("\0")))
    lines = filter(str.strip, re.split("\r?\n", text))
    bare = partial(re.sub, r"""^\s*(["']?)(.*?)\1\s*$""", r"\2")
    return [line if os.path.lexists(line) else bare(line) for line in lines]


def limit_memory(more: int) -> None:
    """Let this process take at most `more` bytes on top of what it has; on Linux only.

    A hostile file can make a decoder ask for any amount; then it is refused like any other bad one.
    """
    if sys.platform == "linux":
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        most = psutil.Process().memory_info().data + more
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))


def decode(path: str, side: int, fit: str) -> npt.NDArray[np.uint8] | ImageError:
    """An image as its square, uint8 [side, side, 3], or why it has none."""
    try:
        if ADDRESS.match(path):
            raise ImageError("an address; download the picture and give the file")
        return decode_image(read_image_bytes(Path(path)), side, fit)
    except ImageError as error:
        return error


def answers(
    exported: ExportedModel, paths: Sequence[str]
) -> Iterator[tuple[str, npt.NDArray[np.float64] | ImageError]]:
    """Each path with its class probabilities [C], or why it has none, in order."""
    size = max(1, BATCH_PIXELS // exported.image_size**2)
    prepare = partial(decode, side=exported.resize, fit=exported.fit)
    squares = work_ahead(prepare, paths, threads=THREADS, depth=2 * size, name="decode")
    for first in range(0, len(paths), size):
        batch = list(islice(squares, size))
        good = [square for square in batch if not isinstance(square, ImageError)]
        found = iter(predict_squares(exported, good) if good else ())
        for path, square in zip(paths[first : first + size], batch, strict=True):
            yield path, square if isinstance(square, ImageError) else next(found)


def shown(path: str) -> str:
    """A path as text; a name may be any bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def positive(text: str) -> int:
    """A whole number from 1; raises ``ValueError``."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def table_file(text: str) -> Path:
    """Where a table can be written; raises ``argparse.ArgumentTypeError``."""
    path = Path(os.path.realpath(text))  # of a link, what it leads to
    good = path.is_file() or not os.path.exists(text)
    if not (good and path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise argparse.ArgumentTypeError(f"{text} cannot be written; is its folder there?")
    return path


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
    add("--csv", type=table_file, metavar="FILE", help="write a table with every class")
    return parser


def predict(args: argparse.Namespace, exported: ExportedModel) -> int:
    """Answer every image asked for; 1 if any was unusable."""
    rows, failed, classes = [], 0, exported.classes
    left_out = Counter[str]()
    images = list(find_images(args.images, left_out))
    if left_out := +left_out:
        print(f"left out: {in_words(left_out)}", file=sys.stderr)
    if not images:
        print(f"no images in {', '.join(args.images)}", file=sys.stderr)
        return 1
    quiet = len(images) < BAR_FROM or not sys.stderr.isatty()
    bar: dict[str, Any] = {"unit": "image", "file": sys.stderr, "disable": quiet}
    for path, found in tqdm(answers(exported, images), "predicting", len(images), **bar):
        name = shown(path)
        if isinstance(found, ImageError):
            tqdm.write(f"{name}: {found}", file=sys.stderr)
            failed += 1
            continue
        top = top_classes(found, classes, args.top)
        if args.csv:
            rows.append([name, top[0][0], *found.tolist()])
        elif args.json:
            tqdm.write(json.dumps({"image": name, "top": top}))
        else:
            tqdm.write(f"{name}: " + ", ".join(f"{label} {p:.1%}" for label, p in top))
    if args.csv:
        table = io.StringIO(newline="")
        csv.writer(table).writerows([["path", "predicted", *classes], *rows])
        write_text(args.csv, table.getvalue())
        print(f"{args.csv}: {len(rows)} images, {failed} unusable", file=sys.stderr)
    return int(failed > 0)


def main(arguments: list[str] | None = None, memory: int | None = DECODING_MEMORY) -> int:
    """Print the top classes of every image; 1 if any image was unusable.

    The model once loaded, a thread may take so many bytes of `memory`; None: any amount.
    """
    args = make_parser().parse_args(arguments)
    folder = find_export(args.model)
    exported = load_export(folder, network_of, args.device)
    if args.model is None:
        about = ", trained on the synthetic sample" if exported.synthetic else ""
        print(f"using the newest export, {folder}{about}; --model names another", file=sys.stderr)
    if memory is not None:
        limit_memory(THREADS * memory)
    try:
        return predict(args, exported)
    except BrokenPipeError:  # who reads has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
