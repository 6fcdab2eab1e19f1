"""Write the lists of images that the notebook reads: of folders, EmoSet-118K, tables, archives."""

import argparse
import dataclasses
import re
import shutil
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from emotion_toolbox.audit import audit_data, look_alikes
from emotion_toolbox.batches import make_datasets
from emotion_toolbox.cache import decode_data
from emotion_toolbox.errors import DataError
from emotion_toolbox.figures import plot_image_grid, save_figure
from emotion_toolbox.files import absolute, count_threads, in_threads, resolve_path
from emotion_toolbox.prepare import SPLIT, WHERE, Source, describe, drafting, write_data
from emotion_toolbox.sources import is_emoset, read_source
from emotion_toolbox.tables import load_splits

EMOSET_OUTPUT = "data/processed/EmoSet_splits"
AUDIT_SIDE = 128  # pixels; enough for a perceptual hash
EXAMPLE = """examples:
  python -m emotion_transfer prepare pictures                 one folder a class
  python -m emotion_transfer prepare path/to/EmoSet-118K --audit
  python -m emotion_transfer prepare list.csv --images-root /photos"""


def default_output(source: Path) -> Path:
    """Where a source is written without ``--output``."""
    if is_emoset(source):
        return resolve_path(EMOSET_OUTPUT)
    name = source.name if source.is_dir() else re.sub(r"(\.tar)?\.\w+$", "", source.name)
    return resolve_path("data/processed") / name


def image_header(path: Path) -> tuple[int, int] | str:
    """Width and height from the file's header, else why there is none ("missing", ...)."""
    if not path.is_file():
        return "missing"
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # a decoder may raise anything on a damaged file
        return f"{type(error).__name__}: {error}".replace(str(path), path.name)


def summarise_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Lowest, median and highest width and height in pixels, for stats.json."""
    table = np.array(sizes, dtype=int).reshape(-1, 2)
    summary: dict[str, Any] = {"images": len(table)}
    for name, column in zip(("width", "height"), table.T, strict=True):
        if len(column):
            low, middle, high = np.percentile(column, [0, 50, 100])
            summary[name] = {"min": int(low), "median": float(middle), "max": int(high)}
    return summary


def look_at_images(source: Source, *, sizes: bool, skip_missing: bool) -> Source:
    """The source with the rows whose image exists, and with facts about the images.

    An image that exists but has no readable header stays in: the notebook names it, and decides by
    MAX_BAD_FRACTION.

    Raises:
        DataError: if an image is missing, unless `skip_missing`; if training loses all images of a
            class, or a split all of its images.
    """
    table = source.table
    paths = [source.images_root / path for path in table["path"]]
    heads: list[tuple[int, int] | str]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        if sizes:
            heads = in_threads(image_header, paths, "reading image sizes")
        else:
            found = in_threads(Path.is_file, paths, "looking for the images")
            heads = ["" if there else "missing" for there in found]
    missing = [i for i, head in enumerate(heads) if head == "missing"]
    if missing and not skip_missing:
        text = describe_missing(paths[missing[0]], table[WHERE].iloc[missing[0]])
        raise DataError(
            f"{text} ({len(missing)} of {len(table)} are); restore it, or leave such images out "
            "with --skip-missing"
        )
    kept = table.drop(index=table.index[missing])
    bad = [
        f"{path}: {head}"
        for path, head in zip(table["path"], heads, strict=True)
        if isinstance(head, str) and head not in ("", "missing")
    ]
    facts: dict[str, Any] = {**source.facts, "left_out_missing": len(missing)}
    facts["emptied"] = find_emptied(table, kept)
    if sizes:
        facts["image_sizes"] = summarise_sizes([h for h in heads if not isinstance(h, str)])
        facts["unreadable"] = {"images": len(bad), "first": bad[:10]}
    return dataclasses.replace(source, table=kept, facts=facts)


def describe_missing(path: Path, where: str) -> str:
    """That `path`, which `where` names, is missing, and what is there in another case."""
    what = "is a link to nothing" if path.is_symlink() else "is missing"
    names = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    alike = [n for n in names if n != path.name and n.casefold() == path.name.casefold()]
    hint = "".join(f", while {name} is there" for name in alike[:1])
    return f"{where}: the image {path} {what}{hint}" if where != str(path) else f"{path} {what}"


def find_emptied(table: pd.DataFrame, kept: pd.DataFrame) -> list[str]:
    """The splits' classes ("val/awe") of which `table` has images and `kept` has none.

    Raises:
        DataError: if one of them is in training, or all of a split.
    """
    lost = set(zip(table[SPLIT], table["label"], strict=True))
    lost -= set(zip(kept[SPLIT], kept["label"], strict=True))
    names = sorted(f"{split}/{label}" for split, label in lost)
    gone = set(table[SPLIT]) - set(kept[SPLIT])
    if gone or any(split == "train" for split, _ in lost):
        raise DataError(f"--skip-missing leaves no image of {', '.join(names)}; restore some")
    return names


def check_room(how: str, source: Source, output: Path, overwrite: bool) -> None:
    """Raise ``DataError`` if the images cannot be brought into ``output/images``."""
    root = source.images_root
    if root.is_relative_to(output) or output.is_relative_to(root):
        raise DataError(
            f"--images {how}: {root} and {output} lie in one another; leave out --images, so that "
            "the images stay where they are, or choose another --output"
        )
    if (output / "images").exists() and not overwrite:
        raise DataError(
            f"{output / 'images'} exists; add --overwrite to replace it, or choose another --output"
        )
    if how == "copy":
        paths = [root / path for path in source.table["path"]]
        needed = sum(in_threads(lambda path: path.stat().st_size, paths))
        disk = next(folder for folder in (output, *output.parents) if folder.is_dir())
        free = shutil.disk_usage(disk).free
        if needed > free:
            raise DataError(
                f"the copies need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; leave "
                "out --images copy, or use --images link"
            )


def bring_images(how: str, source: Source, images: Path) -> Source:
    """Copy or link every image of `source` into `images`; raises ``DataError`` if that fails."""
    pairs = [(source.images_root / path, images / path) for path in source.table["path"]]
    for folder in sorted({target.parent for _, target in pairs}):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        if how == "copy":
            in_threads(lambda pair: shutil.copyfile(*pair), pairs, "copying images")
        else:
            in_threads(lambda pair: pair[1].symlink_to(pair[0]), pairs, "linking images")
    except OSError as error:
        raise DataError(f"--images {how} does not work here ({error}); leave it out") from error
    return dataclasses.replace(source, images_root=images)


def prepare(args: argparse.Namespace) -> Path:
    """Write the data folder that `args` ask for, say what it holds, and return it."""
    output = absolute(args.output or default_output(absolute(args.source)))
    write = partial(
        write_data, output=output, shares=args.split, seed=args.seed, resplit=args.resplit
    )
    with drafting(output, overwrite=args.overwrite) as draft:
        images = draft / "images"
        source = read_source(
            args.source, images, images_root=args.images_root, attributes=not args.no_attributes
        )
        source = look_at_images(source, sizes=not args.no_sizes, skip_missing=args.skip_missing)
        stay = args.images == "reference" or source.images_root.is_relative_to(images)
        if not stay:
            check_room(args.images, source, output, args.overwrite)
        stats = write(source, draft)
        if not stay:  # now that all is known to be right
            stats = write(bring_images(args.images, source, images), draft)
    print(describe(stats, output))
    if width := stats.get("image_sizes", {}).get("width"):
        height = stats["image_sizes"]["height"]
        print(
            f"sizes: median {width['median']:g}x{height['median']:g}, from {width['min']} to "
            f"{width['max']} pixels wide and {height['min']} to {height['max']} high"
        )
    if stats["left_out_missing"]:
        print(f"left out: {stats['left_out_missing']} missing images")
    if stats["emptied"]:
        print(f"warning: --skip-missing leaves no image of {', '.join(stats['emptied'])}")
    if (bad := stats.get("unreadable", {})).get("images"):
        print(f"warning: {bad['images']} images cannot be read, e.g. {bad['first'][0]}")
    return output


def audit_folder(output: Path, images_root: Path | None) -> int:
    """Check every image of the set in `output`, audit it, and print what was found.

    Look-alikes are kept as CSV and as a picture. Returns 1 where images are damaged or one stands
    in two splits, which a run would refuse.

    Raises:
        DataError: if the tables themselves cannot be used.
    """
    listed = load_splits(output, images_root)
    decoded = decode_data(listed, AUDIT_SIDE, cache_dir=None, threads=count_threads(None))
    datasets = {name: data for name, data in make_datasets(decoded).items() if len(data)}
    pairs, findings = audit_data(datasets, 4)
    for bad in decoded.bad.to_dict("records"):
        place = f"{output / bad['split']}.csv row {bad['row']}"
        print(f"unusable: {place} ({bad['file']}): {bad['reason']}")
    for _, copies in decoded.repeated.groupby("hash"):
        rows = copies.to_dict("records")
        places = [f"{row['split']}.csv row {row['row']} ({row['file']})" for row in rows]
        print("identical: " + " and ".join(places))
    print("\n".join(findings))
    if len(pairs):
        folder = resolve_path("outputs") / f"audit-{output.name}"
        folder.mkdir(parents=True, exist_ok=True)
        pairs.to_csv(folder / "look_alikes.csv", index=False)
        pictures = plot_image_grid(*look_alikes(datasets, pairs, 24), columns=4)
        save_figure(pictures, folder, "look_alikes")
        print(f"look-alikes, as a table and as a picture: {folder}")
    return int(len(decoded.bad) > 0 or len(decoded.repeated) > 0)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer prepare",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    source = "a folder of class folders (split into train, val, test or not), EmoSet-118K, a table "
    source += "(CSV, JSON lines, Parquet), FER2013, or an archive (.zip, .tar) of any of them"
    add("source", type=Path, nargs="?", metavar="SOURCE", help=source)
    output = "folder to write (default: data/processed/ and the name of SOURCE)"
    add("--output", type=Path, metavar="DIR", help=output)
    bring = "leave the images where they are (default), copy them to DIR/images, or link to them"
    add("--images", choices=("reference", "copy", "link"), default="reference", help=bring)
    root = "where the paths in a table start (default: its folder)"
    add("--images-root", type=Path, metavar="DIR", help=root)
    split = "shares for a source that is not split (default: 80 5 15, more val for a small set)"
    names = ("TRAIN", "VAL", "TEST")
    add("--split", type=float, nargs=3, metavar=names, help=split)
    add("--seed", type=int, default=42, help="of that split (default: 42)")
    add("--resplit", action="store_true", help="split anew, whatever splits SOURCE has")
    add("--no-attributes", action="store_true", help="do not read EmoSet's annotations")
    add("--no-sizes", action="store_true", help="do not read the images' headers")
    add("--skip-missing", action="store_true", help="leave out rows whose image is missing")
    add("--overwrite", action="store_true", help="replace another data set in DIR")
    audit = "afterwards, or without SOURCE, look for duplicates, contradictions and damage in DIR"
    add("--audit", action="store_true", help=audit)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if the folder was written, 1 with one line on stderr if not."""
    parser = make_parser()
    args = parser.parse_args(arguments)
    if args.split and not (np.isfinite(args.split).all() and min(args.split) > 0):
        parser.error(f"--split {' '.join(map(str, args.split))}: give three numbers above 0")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: give a number from 0 to {2**32 - 1}")
    if args.source is None and not args.audit:
        parser.error("name a SOURCE, or give --audit to look at what is prepared already")
    try:
        if args.source is None:
            return audit_folder(resolve_path(args.output or EMOSET_OUTPUT), args.images_root)
        output = prepare(args)
        return audit_folder(output, None) if args.audit else 0
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
