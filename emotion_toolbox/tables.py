"""The splits of a data set: reading their tables strictly, and refusing what is wrong."""

import csv
import dataclasses
import hashlib
import io
import json
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from emotion_toolbox.emotions import order_of
from emotion_toolbox.errors import DataError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Split:
    """One of train, val, test: `files` (N paths as in the CSV), `labels` int64 [N], `rows` [N]."""

    name: str
    csv: Path
    images_root: Path
    files: Sequence[str]
    labels: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]  # line in the CSV; its header is line 1

    def __len__(self) -> int:
        return len(self.files)

    def path(self, index: int) -> Path:
        """The image file at position `index`."""
        return self.images_root / self.files[index]

    def where(self, index: int) -> str:
        """File and line of position `index`, for messages."""
        return f"{self.csv} row {self.rows[index]} ({self.files[index]})"

    def fingerprint(self, content: str = "") -> str:
        """Sixteen hex digits that change with the names, the labels, or the digest `content`."""
        digest = hashlib.sha256("\n".join([content, *self.files]).encode(errors="surrogateescape"))
        digest.update(self.labels.tobytes())
        return digest.hexdigest()[:16]

    def select(self, keep: npt.NDArray[Any]) -> "Split":
        """The split with only the positions `keep` (int or bool array)."""
        chosen = np.arange(len(self))[keep]
        files = [self.files[i] for i in chosen]
        return dataclasses.replace(
            self, files=files, labels=self.labels[chosen], rows=self.rows[chosen]
        )


@dataclass(frozen=True)
class EmotionData:
    """Three splits and the names of their classes, in the order of the class numbers."""

    name: str
    root: Path
    classes: tuple[str, ...]
    splits: Mapping[str, Split]
    synthetic: bool

    def counts(self) -> pd.DataFrame:
        """Images by class (index) and split (columns)."""
        sizes = {
            name: np.bincount(split.labels, minlength=len(self.classes))
            for name, split in self.splits.items()
        }
        return pd.DataFrame(sizes, index=pd.Index(self.classes, name="class"))


def load_splits(
    root: Path,
    images_root: Path | None = None,
    *,
    name: str | None = None,
    synthetic: bool = False,
) -> EmotionData:
    """Read the three splits in `root`, whose paths start at `images_root`.

    Raises:
        DataError: for a missing or malformed file, an unknown label, an empty split, or a path
            that occurs twice, or a class without a training image.
    """
    images_root = images_root or prepared_images_root(root)
    missing = [f"{s}.csv" for s in SPLITS if not (root / f"{s}.csv").is_file()]
    if missing:
        raise DataError(
            f"{root} lacks {', '.join(missing)}. Write it with `python -m emotion_transfer prepare "
            f'SOURCE --output {root}`, correct DATA_ROOT, or set DATASET="sample"'
        )
    tables = {s: read_table(root / f"{s}.csv") for s in SPLITS}
    classes = class_order(root, tables["train"])
    splits = {s: make_split(s, root, images_root, tables[s], classes) for s in SPLITS}
    refuse_repeated_paths(splits)
    refuse_untaught_classes(splits["train"], classes)
    return EmotionData(name or root.name, root, classes, splits, synthetic)


def prepared_images_root(root: Path) -> Path:
    """Where the paths of the CSVs in `root` start, according to its ``stats.json`` if it has one.

    Raises:
        DataError: if that file is there and is not what ``prepare`` writes.
    """
    file = root / "stats.json"
    if not file.is_file():
        return root
    try:
        return root / Path(json.loads(file.read_text(encoding="utf-8")).get("images_root", "."))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{file} is damaged ({error}); delete it and set IMAGES_ROOT") from error


PATH_COLUMNS = (
    *("path", "image_path", "filepath", "file"),
    *("filename", "file_name", "image", "img", "image_name"),
)
LABEL_COLUMNS = ("label", "emotion", "class", "target", "category")


OWN_COLUMNS = {"path", "label", "row"}


def read_csv_records(file: Path) -> list[tuple[int, list[str]]]:
    """Line and values of every record that is not blank; raises ``DataError`` if unreadable."""
    records, line = [], 1
    try:
        data = file.read_bytes()
        text = data.decode("utf-8-sig")
        if "\0" in text:
            line = text.count("\n", 0, text.index("\0")) + 1
            raise ValueError("NUL character; is it UTF-16?")
        head = text.lstrip().partition("\n")[0]
        delimiter = max(",;\t", key=head.count)  # of equals, the comma
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        for values in reader:
            if len(values) > 1 or "".join(values).strip():
                records.append((line, values))
            line = reader.line_num + 1
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file} row {line} is not UTF-8: {error.reason}") from error
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{file} row {line} cannot be read as CSV: {error}") from error
    return records


def read_table(file: Path) -> pd.DataFrame:
    """A table as text: columns `path` and `label`, `row` (its line), and any others it has.

    The one reader of the notebook and of ``prepare``. Raises ``DataError`` if it is bad.
    """
    records = read_csv_records(file)
    if not records:
        raise DataError(f"{file} is empty; its first line should be: path,label")
    header = [name.strip() for name in records.pop(0)[1]]
    chosen = [find_column(file, header, names) for names in (PATH_COLUMNS, LABEL_COLUMNS)]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise DataError(f"{file} row 1 names the column {twice[0]} twice; rename one of them")
    if not records:
        raise DataError(f"{file} lists no image; give every split at least one row")
    for line, values in records:
        if len(values) != len(header):
            raise DataError(
                f"{file} row {line} has {len(values)} values where the header has {len(header)}; "
                "a value that holds a comma needs double quotes around it"
            )
        for column, value in zip(("path", "label"), (values[i] for i in chosen), strict=True):
            if not value.strip():
                raise DataError(f"{file} row {line} has an empty {column}; fill or remove it")
            if "\n" in value or "\r" in value:
                raise DataError(
                    f"{file} row {line} has a line break in its {column}, {value[:40]!r}; is a "
                    "quotation mark missing?"
                )
    others = [i for i in range(len(header)) if i not in chosen and header[i] not in OWN_COLUMNS]
    columns = ["path", "label", *(header[i] for i in others)]
    rows = [[values[i] for i in (*chosen, *others)] for _, values in records]
    table = pd.DataFrame(rows, columns=columns, dtype=str)
    labels = table["label"].str.strip().str.normalize("NFC")
    return table.assign(label=labels, row=[line for line, _ in records])


def find_column(file: Path, header: Sequence[str], accepted: Sequence[str]) -> int:
    """Position in `header` of the first of the `accepted` names; ``DataError`` if none is there."""
    found = [name for name in accepted if name in header]
    if not found:
        have = ", ".join(header)
        raise DataError(f"{file} has no column {' or '.join(accepted)}; it has: {have}")
    return header.index(found[0])


def class_order(root: Path, train: pd.DataFrame) -> tuple[str, ...]:
    """The class names in the order of their numbers; raises ``DataError`` for a bad label map."""
    file = root / "label_map.json"
    if os.path.lexists(file):
        return read_label_map(file)
    labels = sorted(train["label"].unique())
    if len(labels) < 2:
        raise DataError(f"{root / 'train.csv'} has one class only ({labels[0]}); two are needed")
    return order_of(labels)


def read_label_map(file: Path) -> tuple[str, ...]:
    """The classes of a label map by their numbers; raises ``DataError`` where it is malformed."""
    try:
        # as pairs, because a name that stands there twice would overwrite itself
        content = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not JSON: {error}") from error
    pairs = [p for p in content if isinstance(p, tuple)] if isinstance(content, list) else []
    names, numbers = [name for name, _ in pairs], [number for _, number in pairs]
    wanted = '{"first class": 0, "second class": 1, ...}, numbered from 0 without gaps'
    if not pairs or len(pairs) < len(content) or any(type(n) is not int for n in numbers):
        raise DataError(f"{file} must be an object {wanted}")
    if sorted(numbers) != list(range(len(numbers))) or len(numbers) < 2:
        raise DataError(f"{file} must be {wanted}; it has the numbers {sorted(numbers)}")
    odd = [name for name in names if name != name.strip() or not name or names.count(name) > 1]
    if odd:
        raise DataError(
            f"{file} has the class name {odd[0]!r}, which is blank, twice there, or has spaces "
            "around it; correct it"
        )
    return tuple(name for _, name in sorted(zip(numbers, names, strict=True)))


def make_split(
    name: str, root: Path, images_root: Path, table: pd.DataFrame, classes: Sequence[str]
) -> Split:
    """A `Split` from the table of its CSV; raises ``DataError`` for a label not in `classes`."""
    file = root / f"{name}.csv"
    number = {label: i for i, label in enumerate(classes)}
    unknown = table.loc[~table["label"].isin(list(number))]
    if len(unknown):
        row, label = unknown.iloc[0][["row", "label"]]
        raise DataError(
            f"{file} row {row} has the unknown label {label!r} ({len(unknown)} such rows); "
            f"known: {', '.join(classes)}. Correct the row, or add the class to label_map.json"
        )
    labels = np.array([number[label] for label in table["label"]], dtype=np.int64)
    rows = np.array(table["row"], dtype=np.int64)
    return Split(name, file, images_root, table["path"].tolist(), labels, rows)


def refuse_repeated_paths(splits: Mapping[str, Split]) -> None:
    """Raise ``DataError`` if a path occurs twice, in one split or in two."""
    seen: dict[str, tuple[Split, int]] = {}
    for split in splits.values():
        for i, listed in enumerate(split.files):
            file = posixpath.normpath(listed)  # a/./b.jpg is a/b.jpg
            if file in seen:
                other, j = seen[file]
                raise DataError(
                    f"{split.where(i)} is listed already in {other.where(j)}; remove one of the "
                    "two: an image in two splits is tested on what it was trained on"
                )
            seen[file] = (split, i)


def refuse_untaught_classes(train: Split, classes: Sequence[str]) -> None:
    """Raise ``DataError`` if a class has no image in `train`."""
    counts = np.bincount(train.labels, minlength=len(classes))
    absent = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if absent:
        raise DataError(
            f"{train.csv} has no usable image of {', '.join(absent)}, which cannot be learnt then; "
            "add some, or remove the class: its rows, and its entry in label_map.json"
        )


def write_split_tables(
    folder: Path,
    tables: Mapping[str, pd.DataFrame],
    classes: Sequence[str],
    stats: Mapping[str, Any],
) -> None:
    """Write `<split>.csv` for each table (columns path, label, ...), label_map.json and stats.json.

    `stats` is extended by the classes and by the counts by split and class.
    """
    counts = {
        split: {name: int((table["label"] == name).sum()) for name in classes}
        for split, table in tables.items()
    }
    for split, table in tables.items():
        table.to_csv(folder / f"{split}.csv", index=False, lineterminator="\n")
    texts = {
        "label_map.json": {name: number for number, name in enumerate(classes)},
        "stats.json": {**stats, "classes": list(classes), "counts": counts},
    }
    for name, content in texts.items():
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8", newline="\n")


def summarise_sizes(sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Lowest, median and highest width and height in pixels, for stats.json."""
    table = np.array(sizes, dtype=int).reshape(-1, 2)
    summary: dict[str, Any] = {"images": len(table)}
    for name, column in zip(("width", "height"), table.T, strict=True):
        if len(column):
            low, middle, high = np.percentile(column, [0, 50, 100])
            summary[name] = {"min": int(low), "median": float(middle), "max": int(high)}
    return summary
