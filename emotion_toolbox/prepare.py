"""Pictures in folders, one folder a class, become the data folder that the notebook reads."""

import filecmp
import hashlib
import json
import os
import re
import shutil
import unicodedata
import uuid
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from emotion_toolbox.decoding import image_suffixes
from emotion_toolbox.errors import DataError
from emotion_toolbox.files import absolute, in_threads, project_root, resolve_path
from emotion_toolbox.tables import SPLITS, load_splits, order_of, write_split_tables

Names = tuple[str, ...]  # of folders, the outermost first
Shares = Sequence[float] | None  # of train, val and test
SPLIT, WHERE = "__split", "__where"  # columns used on the way, never written
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "validate", "dev", "publictest"), "val"),
    **dict.fromkeys(("eval", "evaluation", "evaluate"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "holdout", "privatetest"), "test"),
}
LITTER = frozenset(
    ("__macosx", "__pycache__", "#recycle", "#snapshot", "$recycle.bin", "recycler", "lost+found")
    + ("network trash folder", "temporary items", "system volume information", "desktop.ini")
    + ("thumbs.db", "ehthumbs.db", "icon\r")
)
FEW = 10  # validation images of a class; below that, the choice of epoch is mostly chance


@dataclass(frozen=True)
class Source:
    """Images and labels as found, and `facts` about them for stats.json.

    `table` has a row an image: `path` (POSIX, from `images_root`), `label`, any further columns,
    SPLIT ("train" where none is given) and WHERE (for messages).
    """

    kind: str
    origin: Path
    images_root: Path
    table: pd.DataFrame
    classes: Names = ()  # none: those of the training images, as ``order_of`` has them
    facts: Mapping[str, Any] = field(default_factory=dict)


def split_of(name: str) -> str:
    """train, val or test, where `name` says one of them ("seg_train", "PublicTest"), else ""."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    if {"public", "test"} <= words:  # FER2013's validation split
        return "val"
    found = {SPLIT_WORDS[word] for word in words & set(SPLIT_WORDS)}
    return found.pop() if len(found) == 1 else ""


def is_litter(name: str) -> bool:
    """Whether a system or a tool leaves files or folders of this name."""
    return re.match(r"\.|@[\w-]+$", name) is not None or name.lower() in LITTER


def list_files(top: Path) -> tuple[list[Path], list[Path], Counter[str]]:
    """Images below `top`, other files, both in a fixed order, and litter, counted by name."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    images, others, litter = list[Path](), list[Path](), Counter[str]()
    for folder, below, names in os.walk(top, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in map(os.path.realpath, Path(folder).parents):
            below.clear()  # a link to a folder around it
            continue
        litter.update(name.strip() for name in (*below, *names) if is_litter(name))
        litter["empty folder"] += not (below or names)
        below[:] = sorted(name for name in below if not is_litter(name))
        for path in (Path(folder, name) for name in sorted(names) if not is_litter(name)):
            (images if path.suffix.lower() in image_suffixes() else others).append(path)
    return images, others, +litter


def count_suffixes(files: Iterable[Path]) -> Counter[str]:
    """The number of files of each suffix, as ``*.txt``."""
    return Counter(f"*{path.suffix.lower()}" if path.suffix else "without suffix" for path in files)


def in_words(left_out: Mapping[str, int]) -> str:
    """What was left out, and what would read HEIC."""
    text = ", ".join(f"{number} {name}" for name, number in sorted(left_out.items())) or "nothing"
    return text + " (for HEIC: pip install pillow-heif, restart)" * ("*.heic" in left_out)


def read_class_folders(root: Path) -> Source:
    """Read `root/CLASS/**`, `root/SPLIT/CLASS/**` or `root/CLASS/SPLIT/**`.

    Raises ``DataError`` for an image in no class folder, and a folder of none among the classes.
    """
    images, others, left_out = list_files(root)
    left_out += count_suffixes(others)
    home = {path: path.relative_to(root).parts[:-1] for path in images}
    placed = place_folders(root, set(home.values()))
    labels, rows = {label for _, label in placed.values() if label}, []
    for path in images:
        split, label = placed[home[path]]
        if label:
            label = unicodedata.normalize("NFC", label.strip())
            rows.append((path.relative_to(root).as_posix(), label, split or "train", str(path)))
        elif split or not home[path] or split_of(home[path][0]) or labels & {*home[path]}:
            raise DataError(f"{path} lies in no class folder, or beside the splits; move it")
        else:
            left_out[f"in {home[path][0]}/"] += 1  # beside the splits, unlabelled
    tops = {root.joinpath(*h[: h.index(label)]) for h, (_, label) in placed.items() if label}
    used = {os.path.realpath(f) for f in {f for path in images for f in path.parents}}
    for folder in (folder for top in sorted(tops) for folder in sorted(top.iterdir())):
        if folder.is_dir() and os.path.realpath(folder) not in used and not is_litter(folder.name):
            kinds = in_words(count_suffixes(p for p in others if p.is_relative_to(folder)))
            text = f"other files: {kinds}; if it is a class, add or convert some, else move it away"
            raise DataError(f"{folder} has no image that can be read, {text}")
    table = pd.DataFrame(rows, columns=["path", "label", SPLIT, WHERE])
    return Source("class folders", root, root, table, facts={"left_out": dict(left_out)})


def place_folders(root: Path, homes: set[Names]) -> dict[Names, tuple[str, str]]:
    """(split, class) of the folders with images, "" for none; those around all are passed over.

    Raises ``DataError`` if it is not clear which are the classes.
    """
    split = {h: next(filter(None, map(split_of, h)), "") if len(h) > 1 else "" for h in homes}
    said, tops = set(split.values()), {split_of(h[0]) for h in homes if h} - {""}
    given = len(tops) > 1 or "train" in said or "" not in said  # else classes are called so
    parents = {h[:-1] for h in homes}
    rest: dict[Names, Names] = {}
    for home in homes:
        inner = tuple(n for n in home if not given or split_of(n) != split[home])
        inner = inner or home[-1:] * (home not in parents)  # pictures of trains in train/train/
        rest[home] = inner if split[home] or not given else ()
    listed = sorted(filter(None, rest.values()))
    depth = len(os.path.commonprefix(listed)[: min(map(len, listed), default=1) - 1])
    placed = {h: (split[h] * given, rest[h][depth] if rest[h] else "") for h in homes}
    inside = defaultdict[str, set[str]](set)
    for names in filter(None, rest.values()):
        inside[""].add(names[depth])
        inside[names[depth]].add((*names, "")[depth + 1])
    bare = [(name, below) for name, below in sorted(inside.items()) if "" not in below]
    for (one, first), (two, second) in combinations(bare, 2):
        shared = ", ".join(sorted(first & second - {two}))
        if shared and len(first | second) > 1:  # cats/images with dogs/images is clear
            home = next(home for home in sorted(homes) if placed[home][1] == two)
            folder = root.joinpath(*home[: home.index(two) + 1])
            raise DataError(
                f"{folder} has no images of its own, and {shared} in it as {one or root.name} has; "
                f"give {folder} if these are the classes, else put the images into class folders"
            )
    return placed


def find_classes(source: Source) -> Names:
    """The classes in order; ``DataError`` for fewer than two, or a label only in val or test."""
    table, left_out = source.table, in_words(source.facts.get("left_out", {}))
    classes = source.classes or order_of(table.loc[table[SPLIT] == "train", "label"])
    known, unknown = ", ".join(classes) or "none", table[~table["label"].isin(classes)]
    if len(classes) < 2:
        raise DataError(
            f"{source.origin} has fewer than two classes to train on ({known}; left out: "
            f"{left_out}); give the folder of the class folders, or a table with labels, or have "
            "all split anew: --resplit, in a notebook resplit=True"
        )
    if len(unknown):
        where, label = unknown.iloc[0][[WHERE, "label"]]
        raise DataError(
            f"{where} has the unknown label {label!r}, which no training image has "
            f"({len(unknown)} such rows); known: {known}. Correct or remove it"
        )
    return classes


def fill_splits(source: Source, shares: Shares, seed: int) -> tuple[pd.DataFrame, str]:
    """The table with images in val and test, and in words how they came there.

    What lacks gets of every class its part in `shares` out of train: EmoSet's 80, 5, 15 unless
    given, but for val ten images of a small class, at most a fifth of it. Identical images stay
    together. Raises ``DataError`` if a class is too small to be in every split.
    """
    table = source.table.reset_index(drop=True)
    lacking = [part for part in ("test", "val") if part not in set(table[SPLIT])]
    if not lacking:
        return table, "as given by the source"
    rows = table[table[SPLIT] == "train"]
    paths = [source.images_root / path for path in rows["path"]]
    digests = pd.Series(in_threads(digest_file, paths, "looking for identical images"), rows.index)
    originals = rows[~digests.duplicated()]
    splits = pd.Series("train", digests[originals.index])
    share = dict(zip(SPLITS, shares or (80, 5, 15), strict=True))
    whole = share["train"] + sum(share[part] for part in lacking)
    random = np.random.default_rng(seed)
    for label, own in digests[originals.index].groupby(originals["label"]):
        wanted = {part: share[part] / whole * len(own) for part in lacking}
        if shares is None and "val" in wanted:
            wanted["val"] = max(wanted["val"], min(FEW, len(own) / 5))
        numbers = [max(1, round(number)) for number in wanted.values()]
        if len(own) <= sum(numbers):
            raise DataError(
                f"{source.origin} has {len(own)} images of {label}, copies aside, too few to be "
                f"in train and {' and '.join(lacking)}; add some, or remove the class"
            )
        splits[random.permutation(own)[: sum(numbers)]] = np.repeat(lacking, numbers)
    table.loc[rows.index, SPLIT], given = digests.map(splits), len(rows) < len(table)
    counts = " and ".join(f"{(table[SPLIT] == part).sum()} {part}" for part in lacking)
    how = f"{counts} taken from {len(rows)}{' training' * given} images by label, seed {seed}"
    if given and "test" in lacking:
        how += "; fewer to train on, and figures that are not those of an official test"
    if copies := len(rows) - len(originals):
        how += f"; {copies} identical copies kept with their twins"
    return table, how


def digest_file(path: Path) -> str:
    """The SHA-256 of a file, in hex digits; raises ``DataError`` if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; restore or delete it") from error


def write_data(
    source: Source, draft: Path, output: Path, *, shares: Shares = None, seed: int = 42,
    resplit: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Write into `draft` (of ``drafting``) what `output` is to hold, and return its stats.json.

    `resplit`: whatever splits are given. Raises ``DataError`` with the fix.
    """
    if resplit:
        source = replace(source, table=source.table.assign(**{SPLIT: "train"}))
    classes = find_classes(source)
    table, how = fill_splits(source, shares, seed)
    root = source.images_root
    for home in (draft, output):
        if root.is_relative_to(home):  # the folder can be moved as a whole
            inside, root = root.relative_to(home), Path(".")
            table = table.assign(path=[(inside / path).as_posix() for path in table["path"]])
    tables = {s: table[table[SPLIT] == s].drop(columns=[SPLIT, WHERE]) for s in SPLITS}
    stats = {"source": f"{source.kind}: {source.origin}", "synthetic": False, "split": how}
    stats |= {"images_root": root.as_posix(), **source.facts}
    written = write_split_tables(draft, tables, classes, stats)
    load_splits(draft)  # the notebook's own reader must take it
    return written


@contextmanager
def drafting(output: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill, whose content goes to `output` at the end, unless something is raised.

    Without `overwrite`, ``DataError`` if that would replace another data set.
    """
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder as the output")
    disk = next(folder for folder in (output, *output.parents) if folder.is_dir())
    draft, tables = disk / f".prepare-{uuid.uuid4().hex}", [f"{split}.csv" for split in SPLITS]
    try:
        yield draft
        there = ", ".join(sorted(p.name for p in draft.iterdir() if (output / p.name).exists()))
        same = filecmp.cmpfiles(draft, output, tables, shallow=False)[0] == tables
        if there and not same and not overwrite:
            raise DataError(
                f"{output} holds another data set already ({there}); add --overwrite (in a "
                "notebook overwrite=True) to replace it, or choose another output"
            )
        output.mkdir(parents=True, exist_ok=True)
        (output / "train.csv").unlink(missing_ok=True)  # without it, which comes last, none is read
        for path in sorted(draft.iterdir(), key=lambda path: path.name == "train.csv"):
            if (target := output / path.name).is_dir():
                target.rename(draft / "before")
            path.replace(target)
    except DataError as error:
        raise DataError(str(error).replace(str(draft), str(output))) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def describe(stats: Mapping[str, Any], output: Path) -> str:
    """What was written, for people, and the line for OVERRIDES."""
    counts = pd.DataFrame(stats["counts"])
    home, few = project_root(), counts["val"].min()
    shown = output.relative_to(home) if output.is_relative_to(home) else output
    lines = [f"wrote {output} from {stats['source']}", f"splits: {stats['split']}"]
    lines.append(pd.concat([counts, counts.sum().to_frame("all images").T]).to_string())
    if left_out := stats.get("left_out"):
        lines.append(f"left out: {in_words(left_out)}")
    if few < FEW:
        lines.append(
            f"note: {counts['val'].idxmin()} has {few} validation images; with fewer than about "
            f"{FEW} a class, which epoch is the best is mostly chance"
        )
    line = json.dumps({"DATA_ROOT": shown.as_posix()}, ensure_ascii=False)
    return "\n".join([*lines, f"In the notebook's parameters cell: OVERRIDES = {line}"])


def prepare_folder(folder: str | Path, *, overwrite: bool = False, **options: Any) -> Path:
    """List class folders in ``data/processed/``, say what they hold, and return that list's folder.

    `folder`, relative to here, has `CLASS/*.jpg`, `train/CLASS/*.jpg` or the like; `options` are
    `shares`, `seed`, `resplit` of ``write_data``. Raises ``DataError``; nothing is written then.
    """
    source = absolute(Path(folder))
    if not source.is_dir():
        raise DataError(f"{source} is no folder; give one with a subfolder for each class")
    target = absolute(resolve_path(f"data/processed/{source.name}"))
    with drafting(target, overwrite=overwrite) as draft:
        stats = write_data(read_class_folders(source), draft, target, **options)
    print(describe(stats, target))
    return target
