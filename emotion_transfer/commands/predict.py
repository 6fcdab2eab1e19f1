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
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import psutil
from torch import nn
from tqdm import tqdm

from emotion_toolbox.cache import work_ahead
from emotion_toolbox.ensembles import (
    VIEWS,
    Ensemble,
    Preparation,
    Square,
    make_ensemble,
    predict_together,
    prepare_picture,
)
from emotion_toolbox.errors import ExportError, ImageError
from emotion_toolbox.export import load_export, top_classes
from emotion_toolbox.files import resolve_path, write_text
from emotion_toolbox.prepare import count_suffixes, in_words, is_litter, list_files
from emotion_transfer.config import make_config
from emotion_transfer.model import build_model

T = TypeVar("T", str, Path)
EXAMPLE = """examples:
  python -m emotion_transfer predict picture.jpg
  python -m emotion_transfer predict holiday/ --csv answers.csv
  python -m emotion_transfer predict --model outputs/RUN_NAME --json *.jpg
  python -m emotion_transfer predict --model outputs/ONE --model outputs/OTHER picture.jpg
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


def load_ensemble(
    given: Sequence[Path] | None, device: str, views: str | None = None
) -> tuple[Ensemble, list[Path]]:
    """The exports that were named, and their folders; None: the export written last."""
    folders = [find_export(folder) for folder in given or (None,)]
    members = [load_export(folder, network_of, device) for folder in folders]
    return make_ensemble(members, folders, views), folders


def threshold_of(folder: Path) -> float:
    """The confidence below which an export is not sure; 0 where none was chosen for it.

    Raises ``ExportError`` for one that cannot be.
    """
    about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    value = about.get("threshold", 0.0)
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise ExportError(f"threshold in {folder / 'config.json'} must be from 0 to 1")
    return float(value)


def prepare(
    path: str | os.PathLike[str], preparations: Sequence[Preparation]
) -> list[Square] | ImageError:
    """An image as its squares, uint8 [side, side, 3] each, or why it has none."""
    try:
        if ADDRESS.match(os.fspath(path)):
            raise ImageError("an address; download the picture and give the file")
        return prepare_picture(Path(path), preparations)
    except ImageError as error:
        return error


def in_batches(
    ensemble: Ensemble, paths: Sequence[T]
) -> Iterator[tuple[Sequence[T], list[list[Square] | ImageError]]]:
    """The paths and their squares, a batch at a time, prepared ahead by threads."""
    size = max(1, BATCH_PIXELS // max(member.image_size for member in ensemble.members) ** 2)
    make = partial(prepare, preparations=ensemble.preparations)
    squares = work_ahead(make, paths, threads=THREADS, depth=2 * size, name="decode")
    for first in range(0, len(paths), size):
        yield paths[first : first + size], list(islice(squares, size))


def answers(
    ensemble: Ensemble, paths: Sequence[str]
) -> Iterator[tuple[str, npt.NDArray[np.float64] | ImageError]]:
    """Each path with its class probabilities [C], or why it has none, in order."""
    for some, batch in in_batches(ensemble, paths):
        good = [squares for squares in batch if not isinstance(squares, ImageError)]
        found = iter(predict_together(ensemble, good) if good else ())
        for path, squares in zip(some, batch, strict=True):
            yield path, squares if isinstance(squares, ImageError) else next(found)


def shown(path: str) -> str:
    """A path as text; a name may be any bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def positive(text: str) -> int:
    """A whole number from 1; raises ``ValueError``."""
    if (number := int(text)) < 1:
        raise ValueError
    return number


def share(text: str) -> float:
    """A number from 0 to 1; raises ``ValueError``."""
    if not 0 <= (number := float(text)) <= 1:
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
    which = "an export, or a run that has one (default: the newest); several answer together"
    add("--model", type=Path, action="append", help=which)
    views = "views of a picture that are averaged (default: as the export says)"
    add("--tta", choices=VIEWS, help=views)
    unsure = "not sure below this probability (default: what `threshold` chose; 0: always sure)"
    add("--threshold", type=share, metavar="P", help=unsure)
    add("--top", type=positive, default=3, help="classes to show (default 3)")
    add("--device", default="cpu", help="cpu (default), cuda, mps or auto")
    add("--json", action="store_true", help="one JSON object a line")
    add("--csv", type=table_file, metavar="FILE", help="write a table with every class")
    return parser


def predict(args: argparse.Namespace, ensemble: Ensemble, threshold: float) -> int:
    """Answer every image asked for; 1 if any was unusable."""
    rows, failed, classes = [], 0, ensemble.classes
    left_out = Counter[str]()
    images = list(find_images(args.images, left_out))
    if left_out := +left_out:
        print(f"left out: {in_words(left_out)}", file=sys.stderr)
    if not images:
        print(f"no images in {', '.join(args.images)}", file=sys.stderr)
        return 1
    quiet = len(images) < BAR_FROM or not sys.stderr.isatty()
    bar: dict[str, Any] = {"unit": "image", "file": sys.stderr, "disable": quiet}
    for path, found in tqdm(answers(ensemble, images), "predicting", len(images), **bar):
        name = shown(path)
        if isinstance(found, ImageError):
            tqdm.write(f"{name}: {found}", file=sys.stderr)
            failed += 1
            continue
        top = top_classes(found, classes, args.top)
        sure = {"sure": top[0][1] >= threshold} if threshold else {}
        if args.csv:
            rows.append([name, top[0][0], *sure.values(), *found.tolist()])
        elif args.json:
            tqdm.write(json.dumps({"image": name, **sure, "top": top}))
        else:
            said = ", ".join(f"{label} {p:.1%}" for label, p in top)
            tqdm.write(f"{name}: {said if sure.get('sure', True) else f'not sure ({said})'}")
    if args.csv:
        table, extra = io.StringIO(newline=""), ["sure"] if threshold else []
        csv.writer(table).writerows([["path", "predicted", *extra, *classes], *rows])
        write_text(args.csv, table.getvalue())
        print(f"{args.csv}: {len(rows)} images, {failed} unusable", file=sys.stderr)
    return int(failed > 0)


def main(arguments: list[str] | None = None, memory: int | None = DECODING_MEMORY) -> int:
    """Print the top classes of every image; 1 if any image was unusable.

    The model once loaded, a thread may take so many bytes of `memory`; None: any amount.
    """
    args = make_parser().parse_args(arguments)
    ensemble, folders = load_ensemble(args.model, args.device, args.tta)
    if args.model is None:
        about = ", trained on the synthetic sample" if ensemble.members[0].synthetic else ""
        print(
            f"using the newest export, {folders[0]}{about}; --model names another", file=sys.stderr
        )
    threshold = args.threshold
    if threshold is None:  # one chosen for a member does not hold for an ensemble
        threshold = threshold_of(folders[0]) if len(folders) == 1 else 0.0
    if memory is not None:
        limit_memory(THREADS * memory)
    try:
        return predict(args, ensemble, threshold)
    except BrokenPipeError:  # who reads has had enough, as `head` has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
