"""``python -m emotion_transfer.prepare SOURCE``: write the data folder that the notebook reads.

SOURCE is the official EmoSet-118K folder, a tree of class folders, or a CSV. What is written is
described in ``data/README.md``: train.csv, val.csv, test.csv, label_map.json and stats.json.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import uuid
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from sklearn.model_selection import train_test_split

from emotion_transfer.audit import audit_data, pair_pictures, show_audit
from emotion_transfer.cache import check_images
from emotion_transfer.config import EnhancedConfig, make_config, project_root, resolve_path
from emotion_transfer.data import SPLITS, DataError, load_data
from emotion_transfer.loader import make_datasets
from emotion_transfer.plots.data import plot_image_grid
from emotion_transfer.plots.style import save_figure
from emotion_transfer.sample import summarise_sizes, write_split_tables
from emotion_transfer.sources import SPLIT, WHERE, Source, absolute, in_threads, read_source

SHARES = (80.0, 5.0, 15.0)  # of train, val and test; EmoSet's own
HEAD_BYTES = 16384  # files that differ in these need not be read to the end
WRITTEN = ("val.csv", "test.csv", "label_map.json", "stats.json", "train.csv")  # train.csv last
DEFAULT_OUTPUT = str(EnhancedConfig.__dataclass_fields__["DATA_ROOT"].default)


# --- splitting ----------------------------------------------------------------------------------


def assign_splits(source: Source, shares: Sequence[float], seed: int) -> tuple[pd.DataFrame, str]:
    """The table with every SPLIT filled, and in words how that came about.

    A source with no split at all is divided by `shares`; where only val lacks, it is taken out of
    the training images. Both are stratified by label. Byte-identical images stay in one split.

    Raises:
        DataError: if another split lacks, or a class is too small to be in every one.
    """
    table = source.table.copy()
    given = set(table[SPLIT])
    train, val, test = (share / sum(shares) for share in shares)
    if given == set(SPLITS):
        return table, "as given by the source"
    if given == {""}:
        rows, parts = table, {"test": test, "val": val}
        how = f"made here by label, {train:.0%}/{val:.0%}/{test:.0%}, seed {seed}"
    elif given == {"train", "test"}:
        rows, parts = table.loc[table[SPLIT] == "train"], {"val": val / (train + val)}
        how = f"train and test as given, {parts['val']:.1%} of train made val by label, seed {seed}"
    else:
        lacking = ", ".join(sorted(set(SPLITS) - given))
        raise DataError(
            f"{source.origin} has no images for {lacking}; add them, or give one unsplit set and "
            "let it be split here"
        )
    names, copies = split_rows(source, rows, parts, seed)
    table.loc[rows.index, SPLIT] = names
    return table, how + (f"; {copies} identical copies kept with their twins" if copies else "")


def split_rows(
    source: Source, rows: pd.DataFrame, parts: Mapping[str, float], seed: int
) -> tuple[Any, int]:
    """Take each of `parts` (name: share of all rows) out of `rows`; what is left is "train".

    Returns the split of each row (array of str) and how many rows are copies of another.
    """
    twins = identical_images([source.images_root / path for path in rows["path"]])
    rest = leaders = np.flatnonzero(twins == np.arange(len(rows)))
    labels = rows["label"].to_numpy(dtype=str)
    names = np.full(len(rows), "train", dtype=object)
    for part, share in parts.items():
        try:
            rest, taken = train_test_split(
                rest,
                test_size=round(share * len(leaders)),
                stratify=labels[rest],
                random_state=seed,
            )
        except ValueError as error:
            raise _too_few(source, labels[leaders], part, str(error)) from error
        names[taken] = part
        if absent := sorted(set(labels[leaders]) - set(labels[taken])):
            raise _too_few(source, labels[leaders], part, f"{absent[0]} would be absent in {part}")
    return names[twins], len(rows) - len(leaders)


def _too_few(source: Source, labels: Any, part: str, reason: str) -> DataError:
    number, smallest = min((n, name) for name, n in Counter(labels.tolist()).items())
    return DataError(
        f"{source.origin} has too few images to split by label ({reason.rstrip('.')}). The "
        f"smallest class, {smallest}, has {number}, copies aside; add some, remove it, or give "
        f"{part} a larger share, e.g. --split 70 15 15"
    )


def identical_images(paths: Sequence[Path]) -> Any:
    """For each file the position of the first one with the same bytes: int64 [N].

    Only files that agree in length and in their first bytes are read to the end.
    """
    starts = in_threads(_first_bytes, paths, "looking for identical images")
    counts = Counter(starts)
    alike = [i for i, start in enumerate(starts) if counts[start] > 1 and start[0] > HEAD_BYTES]
    ends = dict(zip(alike, in_threads(_all_bytes, [paths[i] for i in alike]), strict=True))
    first: dict[Any, int] = {}
    keys = [(start, ends.get(i)) for i, start in enumerate(starts)]
    return np.array([first.setdefault(key, i) for i, key in enumerate(keys)], dtype=np.int64)


def _first_bytes(path: Path) -> tuple[int, bytes]:
    try:
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(HEAD_BYTES)).digest()
            return os.fstat(file.fileno()).st_size, head
    except OSError:  # missing: reported with all the others, by look_at_images
        return -1, os.fsencode(path)


def _all_bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


# --- looking at the images ----------------------------------------------------------------------


def image_header(path: Path) -> tuple[int, int] | str:
    """Width and height from the file's header, else why there is none ("missing", ...)."""
    if not path.is_file():
        return "missing"
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # a decoder may raise anything on a damaged file
        return f"{type(error).__name__}: {error}"


def look_at_images(
    source: Source, table: pd.DataFrame, *, sizes: bool, skip_missing: bool
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The rows whose image exists, and what stats.json says of the images.

    An image that exists but has no readable header stays in: the notebook names it, and decides by
    MAX_BAD_FRACTION.

    Raises:
        DataError: if an image is missing, unless `skip_missing`.
    """
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
        raise DataError(
            f"{table[WHERE].iloc[missing[0]]}: the image {paths[missing[0]]} is missing "
            f"({len(missing)} of {len(table)} are); restore it, or leave such rows out with "
            "--skip-missing"
        )
    bad = [
        f"{path}: {head}"
        for path, head in zip(paths, heads, strict=True)
        if isinstance(head, str) and head not in ("", "missing")
    ]
    stats: dict[str, Any] = {"left_out_missing": len(missing)}
    if sizes:
        stats["image_sizes"] = summarise_sizes([h for h in heads if not isinstance(h, str)])
        stats["unreadable"] = {"images": len(bad), "first": bad[:10]}
    return table.drop(index=table.index[missing]), stats


# --- writing ------------------------------------------------------------------------------------


def prepare(
    source: Path,
    output: Path,
    *,
    images: str = "reference",
    images_root: Path | None = None,
    shares: Sequence[float] = SHARES,
    seed: int = 42,
    attributes: bool = True,
    sizes: bool = True,
    skip_missing: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write the data folder `output` from `source`, and return what its stats.json says.

    Args:
        images: "reference" leaves them where they are, "copy" and "link" (symbolic) bring them to
            `output/images`.
        images_root: where the paths in a CSV start (default: the folder of the CSV).
        shares: of train, val and test, in any unit; used only where the source is not split.

    Raises:
        DataError: naming the file, the row and the fix; `output` is then as it was.
    """
    found = read_source(source, images_root=images_root, attributes=attributes)
    output = absolute(output)
    table, how = assign_splits(found, shares, seed)
    table, seen = look_at_images(found, table, sizes=sizes, skip_missing=skip_missing)
    origins = [found.images_root / path for path in table["path"]]
    table["path"], root = place_images(found, table["path"], output, images)
    columns = [c for c in table.columns if c not in ("path", "label", SPLIT, WHERE)]
    parts = {split: table.loc[table[SPLIT] == split] for split in SPLITS}
    tables = {split: part[["path", "label", *columns]] for split, part in parts.items()}
    if empty := [split for split in SPLITS if tables[split].empty]:
        raise DataError(f"{found.origin} leaves no image for {', '.join(empty)}; add some")
    refuse_other_set(output, tables, images, overwrite)
    stats = {"source": f"{found.kind}: {found.origin}", "synthetic": False, "images": images}
    stats |= {"images_root": root, "split": how, **seen}
    draft = (output if output.exists() else output.parent) / f".prepare-{uuid.uuid4().hex}"
    draft.mkdir(parents=True)
    try:
        if images != "reference":
            bring_images(origins, [draft / path for path in table["path"]], images)
        write_split_tables(draft, tables, found.classes, stats)
        written: dict[str, Any] = json.loads((draft / "stats.json").read_text(encoding="utf-8"))
        put_in_place(draft, output)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return written


def place_images(
    found: Source, paths: "pd.Series[str]", output: Path, images: str
) -> tuple["pd.Series[str]", str]:
    """The paths as the CSVs will have them, and the folder they start from ("." for `output`)."""
    inside = found.images_root.is_relative_to(output)
    if images == "reference":
        if not inside:
            return paths, found.images_root.as_posix()
        below = found.images_root.relative_to(output)
        return paths.map(lambda path: (below / path).as_posix()), "."
    if inside or output.is_relative_to(found.images_root):
        raise DataError(
            f"--images {images}: {found.images_root} and {output} lie in one another; leave out "
            "--images, so that the images stay where they are, or choose another --output"
        )
    return "images/" + paths, "."


def refuse_other_set(
    output: Path, tables: Mapping[str, pd.DataFrame], images: str, overwrite: bool
) -> None:
    """Raise ``DataError`` if `output` holds something that this set would replace unasked."""
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder as --output")
    there = sorted(name for name in WRITTEN if (output / name).exists())
    same = len(there) == len(WRITTEN) and all(
        (output / f"{split}.csv").read_bytes()
        == table.to_csv(index=False, lineterminator="\n").encode()
        for split, table in tables.items()
    )
    if there and not same and not overwrite:
        raise DataError(
            f"{output} holds another data set already ({', '.join(there)}); add --overwrite to "
            "replace it, or choose another --output"
        )
    if images != "reference" and (output / "images").exists() and not _brought_here(output):
        raise DataError(
            f"{output / 'images'} was not written by this command; move it away, or choose another "
            "--output"
        )


def _brought_here(output: Path) -> bool:
    """Whether an earlier run copied or linked images into `output`."""
    try:
        stats = json.loads((output / "stats.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stats, dict) and stats.get("images") in ("copy", "link")


def bring_images(origins: Sequence[Path], targets: Sequence[Path], images: str) -> None:
    """Copy or link every image; raises ``DataError`` where the disk is too small or cannot link."""
    for folder in sorted({target.parent for target in targets}):
        folder.mkdir(parents=True, exist_ok=True)
    pairs = list(zip(origins, targets, strict=True))
    if images == "copy":
        needed = sum(in_threads(lambda path: path.stat().st_size, origins))
        free = shutil.disk_usage(targets[0].parent).free
        if needed > free:
            raise DataError(
                f"the copies need {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free; leave "
                "out --images copy, or use --images link"
            )
        in_threads(lambda pair: shutil.copyfile(*pair), pairs, "copying images")
        return
    try:
        in_threads(lambda pair: pair[1].symlink_to(pair[0]), pairs, "linking images")
    except (OSError, NotImplementedError) as error:
        raise DataError(f"symbolic links do not work here ({error}); use --images copy") from error


def put_in_place(draft: Path, output: Path) -> None:
    """Move what was written to `output`; a kill at any moment leaves no mixture of two sets.

    A new folder appears at once. In one that exists train.csv goes first and comes last: without
    it the notebook refuses the folder.
    """
    if not output.exists():
        draft.rename(output)
        return
    (output / "train.csv").unlink(missing_ok=True)
    if (draft / "images").exists():
        if (output / "images").exists():
            (output / "images").rename(draft / "images-before")
        (draft / "images").rename(output / "images")
    for name in WRITTEN:
        (draft / name).replace(output / name)


# --- the command line ---------------------------------------------------------------------------


def overrides_for(output: Path, images_root: str) -> dict[str, str]:
    """What OVERRIDES must say for the notebook to read `output`; nothing for the default folder."""
    home = project_root()

    def shown(folder: Path) -> str:
        inside = folder.is_relative_to(home)
        return (folder.relative_to(home) if inside else folder).as_posix()

    settings = {} if output == resolve_path(DEFAULT_OUTPUT) else {"DATA_ROOT": shown(output)}
    return settings if images_root == "." else settings | {"IMAGES_ROOT": shown(Path(images_root))}


def describe(stats: Mapping[str, Any], output: Path) -> str:
    """What was written, for people: counts, sizes, and the line for OVERRIDES."""
    counts = pd.DataFrame(stats["counts"])
    counts.loc["all"] = counts.sum()
    lines = [f"wrote {output}", f"from {stats['source']}; splits {stats['split']}", ""]
    lines += [counts.to_string(), ""]
    if width := stats.get("image_sizes", {}).get("width"):
        height = stats["image_sizes"]["height"]
        lines.append(
            f"sizes: median {width['median']:g}x{height['median']:g}, from {width['min']} to "
            f"{width['max']} pixels wide and {height['min']} to {height['max']} high"
        )
    if stats["left_out_missing"]:
        lines.append(f"left out: {stats['left_out_missing']} missing images")
    if (bad := stats.get("unreadable", {})).get("images"):
        lines.append(f"warning: {bad['images']} images cannot be read, e.g. {bad['first'][0]}")
    if settings := overrides_for(output, stats["images_root"]):
        line = json.dumps(settings, ensure_ascii=False)
        lines.append(f"In the notebook's parameters cell: OVERRIDES = {line}")
    else:
        lines.append("The notebook finds it without any setting.")
    return "\n".join(lines)


def audit_folder(output: Path, images_root: Path | None) -> int:
    """Check every image of the set in `output`, audit it, and print what was found.

    Look-alikes are kept as CSV and as a picture. Returns 1 where images are damaged or one stands
    in two splits, which a run would refuse.

    Raises:
        DataError: if the tables themselves cannot be used.
    """
    settings = {
        "DATA_ROOT": str(output), "DATASET": "files",
        "IMAGES_ROOT": str(images_root) if images_root else None,
        "CACHE": False, "IMG_SIZE": 112, "ALLOW_DUPLICATES": True, "MAX_BAD_FRACTION": 1.0,
    }  # fmt: skip
    cfg = make_config(settings)
    checked = check_images(cfg, load_data(cfg))
    datasets = make_datasets(cfg, checked)
    found = audit_data(cfg, datasets)
    for bad in checked.bad.to_dict("records"):
        place = f"{output / bad['split']}.csv row {bad['row']}"
        print(f"unusable: {place} ({bad['file']}): {bad['reason']}")
    for _, copies in checked.repeated.groupby("hash"):
        rows = copies.to_dict("records")
        places = [f"{row['split']}.csv row {row['row']} ({row['file']})" for row in rows]
        print("identical: " + " and ".join(places))
    print("\n".join(show_audit(found)))
    if len(found.pairs):
        folder = resolve_path(cfg.OUTPUT_ROOT) / f"audit-{output.name}"
        folder.mkdir(parents=True, exist_ok=True)
        found.pairs.to_csv(folder / "look_alikes.csv", index=False)
        pictures = plot_image_grid(*pair_pictures(datasets, found.pairs, 24), columns=4)
        save_figure(pictures, folder, "look_alikes", synthetic=False)
        print(f"look-alikes, as a table and as a picture: {folder}")
    return int(len(checked.bad) > 0 or len(checked.repeated) > 0)


def make_parser() -> argparse.ArgumentParser:
    """The options of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m emotion_transfer.prepare",
        description="Write train.csv, val.csv, test.csv, label_map.json and stats.json for the "
        "notebook from EmoSet-118K, from class folders or from a CSV.",
    )
    add = parser.add_argument
    source = "EmoSet-118K, a folder of class folders (split into train, val, test or not), or a CSV"
    add("source", type=Path, nargs="?", metavar="SOURCE", help=source)
    add("--output", type=Path, metavar="DIR", help=f"folder to write (default: {DEFAULT_OUTPUT})")
    bring = "leave the images where they are (default), copy them to DIR/images, or link to them"
    add("--images", choices=("reference", "copy", "link"), default="reference", help=bring)
    root = "where the paths in a CSV start (default: its folder)"
    add("--images-root", type=Path, metavar="DIR", help=root)
    split = "shares for a source that is not split (default: 80 5 15)"
    names = ("TRAIN", "VAL", "TEST")
    add("--split", type=float, nargs=3, metavar=names, default=SHARES, help=split)
    add("--seed", type=int, default=42, help="of that split (default: 42)")
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
    if not (np.isfinite(args.split).all() and min(args.split) > 0):
        parser.error(f"--split {' '.join(map(str, args.split))}: give three numbers above 0")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: give a number from 0 to {2**32 - 1}")
    if args.source is None and not args.audit:
        parser.error("name a SOURCE, or give --audit to look at what is prepared already")
    output = absolute(args.output) if args.output else resolve_path(DEFAULT_OUTPUT)
    try:
        if args.source is None:
            return audit_folder(output, args.images_root)
        stats = prepare(
            args.source,
            output,
            images=args.images,
            images_root=args.images_root,
            shares=args.split,
            seed=args.seed,
            attributes=not args.no_attributes,
            sizes=not args.no_sizes,
            skip_missing=args.skip_missing,
            overwrite=args.overwrite,
        )
        print(describe(stats, output))
        return audit_folder(output, None) if args.audit else 0
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
