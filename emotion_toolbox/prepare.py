"""Pictures in folders, one folder a class, become the data folder that the notebook reads."""

import hashlib
import json
import os
import re
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from emotion_toolbox.decoding import image_suffixes
from emotion_toolbox.emotions import order_of
from emotion_toolbox.errors import DataError
from emotion_toolbox.files import absolute, in_threads, project_root, resolve_path
from emotion_toolbox.tables import SPLITS, load_splits, write_split_tables

Names = tuple[str, ...]  # of folders, the outermost first
SPLIT, WHERE = "__split", "__where"  # columns used on the way, never written
SPLIT_WORDS = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "publictest"), "val"),
    **dict.fromkeys(("test", "testing", "testset", "privatetest"), "test"),
}
LITTER = (
    *("__macosx", "@eadir", "#recycle", "@recycle", "$recycle.bin", "lost+found", "thumbs.db"),
    *("desktop.ini", "system volume information"),
)
FEW = 10  # validation images of a class; below that, the choice of epoch is mostly chance


@dataclass(frozen=True)
class Source:
    """Images and labels as found; `left_out` counts what was passed over, by suffix or name.

    `table` has a row an image: `path` (POSIX, from `images_root`), `label`, any further columns,
    SPLIT ("" where none is given) and WHERE (for messages).
    """

    kind: str
    origin: Path
    images_root: Path
    table: pd.DataFrame
    classes: Names = ()  # none: those of the training images, as ``order_of`` has them
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Of the folder, or of the file without its suffix."""
        return self.origin.name if self.origin.is_dir() else self.origin.stem


def split_of(name: str) -> str:
    """train, val or test, where `name` says one of them ("seg_train", "PublicTest"), else ""."""
    words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)}
    if {"public", "test"} <= words:  # FER2013's validation split
        return "val"
    found = {SPLIT_WORDS[word] for word in words & set(SPLIT_WORDS)}
    return found.pop() if len(found) == 1 else ""


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name was left by a system or a tool."""
    return name.startswith(".") or name.lower() in LITTER


def list_files(top: Path) -> tuple[list[Path], list[Path], Counter[str]]:
    """Images below `top`, other files, both in a fixed order, and litter, counted by name."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    images: list[Path] = []
    others: list[Path] = []
    litter, suffixes = Counter[str](), image_suffixes()
    for folder, below, names in os.walk(top, onerror=refuse, followlinks=True):
        if os.path.realpath(folder) in map(os.path.realpath, Path(folder).parents):
            below.clear()  # a link to a folder around it
            continue
        litter.update(filter(is_litter, (*below, *names)))
        litter["empty folder"] += not (below or names)
        below[:] = sorted(name for name in below if not is_litter(name))
        for path in (Path(folder, name) for name in sorted(names) if not is_litter(name)):
            (images if path.suffix.lower() in suffixes else others).append(path)
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

    Raises:
        DataError: for an image in no class folder, a class folder without images, and where it is
            not clear which folders are the classes; names the folder and what to do.
    """
    images, others, left_out = list_files(root)
    left_out += count_suffixes(others)
    home = {path: path.relative_to(root).parts[:-1] for path in (*images, *others)}
    placed = place_folders(root, {home[path] for path in images}, set(home.values()))
    known = {placed[home[path]][:2] for path in images}
    labels, rows = {label for _, label in known if label}, []
    for path in images:
        split, label, _ = placed[home[path]]
        if label:
            label = unicodedata.normalize("NFC", label.strip())
            rows.append((path.relative_to(root).as_posix(), label, split, str(path)))
        elif split or not home[path] or split_of(home[path][0]) or labels & {*home[path]}:
            raise DataError(
                f"{path} lies in no class folder, or beside the splits; move it into the folder of "
                "its class, or away"
            )
        else:
            left_out[f"in {home[path][0]}/"] += 1  # beside the splits, unlabelled
    for path in others:
        if placed[home[path]][1] and placed[home[path]][:2] not in known:
            kinds = in_words(count_suffixes(p for p in others if home[p] == home[path]))
            raise DataError(
                f"{path.parent} has no image that can be read, but {kinds}; if it is a class, "
                "convert them, else move it away"
            )
    table = pd.DataFrame(rows, columns=["path", "label", SPLIT, WHERE])
    return Source("class folders", root, root, table, left_out=left_out)


def place_folders(
    root: Path, filled: set[Names], every: set[Names]
) -> dict[Names, tuple[str, str, str]]:
    """(split, class, folder below) of `every` folder, of which `filled` hold images; "" for none.

    Folders around all classes are passed over. Raises ``DataError`` for ambiguous ones.
    """
    split = {h: next(filter(None, map(split_of, h)), "") if len(h) > 1 else "" for h in every}
    said, tops = {split[h] for h in filled}, {split_of(h[0]) for h in filled if h} - {""}
    given = len(tops) > 1 or "train" in said or "" not in said  # else classes are called so
    parents = {h[:-1] for h in filled}
    rest: dict[Names, Names] = {}
    for home in every:
        inner = tuple(n for n in home if not given or split_of(n) != split[home])
        inner = inner or home[-1:] * (home not in parents)  # pictures of trains in train/train/
        rest[home] = inner if split[home] or not given else ()
    listed = sorted(rest[home] for home in filled if rest[home])
    outer = tuple(os.path.commonprefix(listed))[: min(map(len, listed), default=1) - 1]
    placed: dict[Names, tuple[str, str, str]] = {}
    inside = defaultdict[str, set[str]](set)
    for home in sorted(every):
        names = rest[home][len(outer) :] if rest[home][: len(outer)] == outer else ()
        label, below = (*names, "", "")[:2]
        placed[home] = split[home] * given, label, below
        if home in filled and names:
            inside[""].add(label)
            inside[label].add(below)
    bare = [(name, below) for name, below in sorted(inside.items()) if "" not in below]
    for (one, first), (two, second) in combinations(bare, 2):
        if len(shared := sorted(first & second)) > 1:
            home = next(home for home in sorted(filled) if placed[home][1] == two)
            folder = root.joinpath(*home[: home.index(two) + 1])
            raise DataError(
                f"{folder} has no images of its own, and {', '.join(shared)} in it are also "
                f"{'in ' + one if one else 'beside it'}; if these are the classes, give {folder}, "
                "else put the images into the folders of their classes"
            )
    return placed


def find_lacking(source: Source, table: pd.DataFrame) -> list[str]:
    """Which of test and val have no image in `table`.

    Raises:
        DataError: if splits are given, and train or both of these lack.
    """
    given = sorted(set(table[SPLIT]) - {""})
    lacking = [part for part in ("test", "val") if part not in given]
    if given and ("train" not in given or len(lacking) > 1):
        raise DataError(
            f"{source.origin} has images for {' and '.join(given)} only; add the others, or have "
            "all split anew: --resplit, in a notebook resplit=True"
        )
    return lacking


def assign_splits(
    source: Source, table: pd.DataFrame, shares: Sequence[float] | None, seed: int
) -> tuple[pd.DataFrame, str]:
    """`table` with every SPLIT filled, and in words how that came about.

    What lacks of val and test is taken out of train, or of all where no split is given: of every
    class its part in `shares` (of train, val, test). The default is EmoSet's 80, 5, 15, where val
    gets ten images of a small class, but at most a fifth. Identical images stay in one split.

    Raises:
        DataError: if training images lack, or a class is too small to be in every split.
    """
    if not (lacking := find_lacking(source, table)):
        return table, "as given by the source"
    given = bool((table[SPLIT] != "").any())
    rows = table[table[SPLIT] == ("train" if given else "")]
    twins = identical_images([source.images_root / path for path in rows["path"]])
    labels, names = rows["label"].to_numpy(dtype=str), np.full(len(rows), "train", dtype=object)
    share = dict(zip(SPLITS, shares or (80, 5, 15), strict=True))
    whole, random = share["train"] + sum(share[p] for p in lacking), np.random.default_rng(seed)
    for label in np.unique(labels):
        own = np.flatnonzero((twins == np.arange(len(rows))) & (labels == label))
        wanted = {part: share[part] / whole * len(own) for part in lacking}
        if shares is None and "val" in wanted:
            wanted["val"] = max(wanted["val"], min(FEW, len(own) / 5))
        numbers = [max(1, round(number)) for number in wanted.values()]
        if len(own) <= sum(numbers):
            raise DataError(
                f"{source.origin} has {len(own)} images of {label}, copies aside, too few to be "
                f"in train and {' and '.join(lacking)}; add some, or remove the class"
            )
        names[random.permutation(own)[: sum(numbers)]] = np.repeat(lacking, numbers)
    taken = names[twins]
    counts = " and ".join(f"{(taken == part).sum()} {part}" for part in lacking)
    how = f"{counts} taken from {len(rows)}{' training' * given} images by label, seed {seed}"
    if (copies := len(rows) - len(np.unique(twins))) > 0:
        how += f"; {copies} identical copies kept with their twins"
    filled = table[SPLIT].copy()
    filled.loc[rows.index] = taken
    return table.assign(**{SPLIT: filled}), how


def identical_images(paths: Sequence[Path]) -> npt.NDArray[np.int64]:
    """For each file the position of the first one with the same bytes, int64 [N]."""

    def digest(path: Path) -> bytes:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()

    first: dict[bytes, int] = {}
    digests = in_threads(digest, paths, "looking for identical images")
    return np.array([first.setdefault(key, i) for i, key in enumerate(digests)], dtype=np.int64)


def write_data(
    source: Source,
    output: Path,
    *,
    shares: Sequence[float] | None = None,
    seed: int = 42,
    resplit: bool = False,
    overwrite: bool = False,
    bring: Callable[[Sequence[Path], Sequence[Path]], object] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write the data folder `output` from `source`, and return what its stats.json says.

    Args:
        shares: of train, val and test; `resplit`: whatever splits are given.
        bring: brings images (from, to) into ``output/images``; without it they stay.
        facts: more for stats.json.

    Raises:
        DataError: naming the file, the row and the fix; `output` is then as it was.
    """
    table = source.table.assign(**{SPLIT: ""}) if resplit else source.table
    find_lacking(source, table)  # before labels are compared with those of training images
    classes = source.classes or order_of(table.loc[table[SPLIT].isin(["", "train"]), "label"])
    unknown = table[~table["label"].isin(classes)]
    if len(unknown) or len(classes) < 2:
        where, label = unknown.iloc[0][[WHERE, "label"]] if len(unknown) else (source.origin, "")
        if len(unknown):
            known = ", ".join(classes)
            raise DataError(
                f"{where} has the unknown label {label!r}, which no training image has "
                f"({len(unknown)} such rows); known: {known}. Correct or remove it"
            )
        have = ", ".join(classes) or "none"
        raise DataError(
            f"{where} has fewer than two classes to train on ({have}); give the folder whose "
            "subfolders are the classes (CLASS/*.jpg or train/CLASS/*.jpg), or a table with labels"
        )
    table, how = assign_splits(source, table, shares, seed)
    output, root = absolute(output), source.images_root
    origins = [root / path for path in table["path"]]
    if bring or root.is_relative_to(output):
        inside = Path("images") if bring else root.relative_to(output)
        table = table.assign(path=[(inside / path).as_posix() for path in table["path"]])
        root = Path(".")
    tables = {s: table[table[SPLIT] == s].drop(columns=[SPLIT, WHERE]) for s in SPLITS}
    stats: dict[str, Any] = {
        "name": source.name,
        "source": f"{source.kind}: {source.origin}",
        "synthetic": False,
    }
    stats |= {"images_root": root.as_posix(), "split": how, "left_out": dict(source.left_out)}
    output.parent.mkdir(parents=True, exist_ok=True)
    disk = output if output.is_dir() else output.parent  # a link may lead to another disk
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=disk) as folder:
        draft = Path(folder)
        write_split_tables(draft, tables, classes, stats | dict(facts or {}))
        try:
            load_splits(draft)  # the notebook's own reader must take it
        except DataError as error:
            raise DataError(str(error).replace(str(draft), str(output))) from error
        refuse_other_set(draft, output, overwrite)
        if bring:
            bring(origins, [draft / path for path in table["path"]])
        written: dict[str, Any] = json.loads((draft / "stats.json").read_text(encoding="utf-8"))
        put_in_place(draft, output)
    return written


def refuse_other_set(draft: Path, output: Path, overwrite: bool) -> None:
    """Raise ``DataError`` if `output` holds something that `draft` would replace unasked."""
    if output.exists() and not output.is_dir():
        raise DataError(f"{output} is a file; give a folder as the output")
    names = [*(f"{split}.csv" for split in SPLITS), "label_map.json", "stats.json"]
    there = sorted(name for name in names if (output / name).exists())
    tables = [f"{split}.csv" for split in SPLITS]
    same = all(
        (output / name).is_file() and (output / name).read_bytes() == (draft / name).read_bytes()
        for name in tables
    )
    if there and not same and not overwrite:
        raise DataError(
            f"{output} holds another data set already ({', '.join(there)}); add --overwrite (in a "
            "notebook overwrite=True) to replace it, or choose another output"
        )


def put_in_place(draft: Path, output: Path) -> None:
    """Move what was written to `output`; without train.csv, which comes last, none can be read."""
    output.mkdir(exist_ok=True)
    (output / "train.csv").unlink(missing_ok=True)
    for path in sorted(draft.iterdir(), key=lambda path: path.name == "train.csv"):
        if (target := output / path.name).is_dir():
            target.rename(draft / "before")
        path.replace(target)


def describe(stats: Mapping[str, Any], output: Path) -> str:
    """What was written, for people, and the line for OVERRIDES."""
    counts = pd.DataFrame(stats["counts"])
    home, few = project_root(), counts["val"].min()
    shown = output.relative_to(home) if output.is_relative_to(home) else output
    lines = [f"wrote {output} from {stats['source']}", f"splits: {stats['split']}"]
    lines += [pd.concat([counts, counts.sum().to_frame("all images").T]).to_string()]
    if stats["left_out"]:
        lines.append(f"left out: {in_words(stats['left_out'])}")
    if few < FEW:
        lines.append(
            f"note: {counts['val'].idxmin()} has {few} validation images; with fewer than about "
            f"{FEW} a class, which epoch is the best is mostly chance"
        )
    line = json.dumps({"DATA_ROOT": shown.as_posix()}, ensure_ascii=False)
    return "\n".join([*lines, f"In the notebook's parameters cell: OVERRIDES = {line}"])


def prepare_folder(folder: str | Path, output: str | Path | None = None, **options: Any) -> Path:
    """Write the data folder `output` from class folders, say what it holds, and return it.

    Args:
        folder: with `CLASS/*.jpg` or `train/CLASS/*.jpg` and so on; relative to here.
        output: default ``data/processed/`` and the name of `folder`, in the project.
        options: `shares`, `seed`, `resplit` and `overwrite` of ``write_data``.

    Raises:
        DataError: naming the folder and the fix; nothing is written then.
    """
    source = absolute(Path(folder))
    if not source.is_dir():
        raise DataError(f"{source} is no folder; give one with a subfolder for each class")
    target = resolve_path(output or f"data/processed/{source.name}")
    print(describe(write_data(read_class_folders(source), target, **options), target))
    return target
