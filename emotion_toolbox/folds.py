"""Folds for cross-validation: by class, and without tearing groups of images apart."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from emotion_toolbox.batches import EmotionDataset
from emotion_toolbox.cache import Positions, content_hash
from emotion_toolbox.errors import DataError
from emotion_toolbox.tables import Split, read_table

Labels = npt.NDArray[np.int64]


class Fold(NamedTuple):
    """Positions of the images to learn from, to choose the epoch by, and to judge by."""

    train: Positions
    val: Positions
    test: Positions


@dataclass(frozen=True)
class Grouping:
    """The group [N] of every image as a number, and their names; `column` None: each is its own."""

    numbers: Labels
    names: Sequence[str]
    column: str | None

    def in_words(self, number: int) -> str:
        """So many groups, or images, in words."""
        plural = "s" * (number != 1)
        what = f"group{plural} of {self.column!r}" if self.column else f"image{plural}"
        return f"{number} {what}"


def group_images(splits: Sequence[Split], column: str | None) -> Grouping:
    """The groups of the images of all `splits`, by a column of their CSV files; None: no groups.

    Raises ``DataError`` where a file has no such column, or an image no value in it.
    """
    if column is None:
        files = [file for split in splits for file in split.files]
        return Grouping(np.arange(len(files)), files, None)
    values: list[str] = []
    for split in splits:
        table = read_table(split.csv).set_index("row")
        if column not in table:
            have = ", ".join(table.columns)
            raise DataError(f"{split.csv} has no column {column!r} to group by; it has: {have}")
        of_split = table.loc[split.rows, column].str.strip().tolist()
        if "" in of_split:
            where = split.where(of_split.index(""))
            raise DataError(f"{where} has an empty {column}; fill it, or group by another column")
        values += of_split
    numbers, names = pd.factorize(np.array(values, dtype=object), sort=True)
    return Grouping(numbers.astype(np.int64), names.tolist(), column)


def make_folds(
    labels: Labels, groups: Grouping, classes: Sequence[str], folds: int, share: float, seed: int
) -> list[Fold]:
    """Cut N images into `folds`, each with about the same mixture of classes; no group is split.

    Of what is left for training, about a `share` chooses the epoch, cut in the same way. Raises
    ``DataError`` where a class has too few images or groups for so many.
    """
    refuse_few(labels, groups, classes, folds)
    made: list[Fold] = []
    for rest, test in _cut(labels, groups.numbers, folds, seed):
        left = count_groups(labels[rest], groups.numbers[rest], len(classes))
        short = np.flatnonzero(left < 2)
        if not len(short):
            parts = int(np.clip(round(1 / share), 2, left.min()))
            train, val = _inner_cut(labels[rest], groups.numbers[rest], parts, seed)
            short = np.setdiff1d(np.arange(len(classes)), labels[rest[train]])
        if len(short):
            raise DataError(
                f"fold {len(made) + 1} leaves too little of {classes[short[0]]} to learn from and "
                "to choose the epoch by; set another number of --folds or SEED, or add images"
            )
        made.append(Fold(rest[train], rest[val], test))
    return made


def count_groups(labels: Labels, groups: Labels, classes: int) -> Labels:
    """How many groups have an image of each class, [C]."""
    return np.array([len(np.unique(groups[labels == number])) for number in range(classes)])


def refuse_few(labels: Labels, groups: Grouping, classes: Sequence[str], folds: int) -> None:
    """Raise ``DataError`` if a class has fewer images, or groups, than there are `folds`."""
    counts = count_groups(labels, groups.numbers, len(classes))
    for number, (name, count) in enumerate(zip(classes, counts.tolist(), strict=True)):
        if count == 1 and groups.column:
            held = groups.names[groups.numbers[labels == number][0]]
            raise DataError(
                f"all images of {name} are in one group of {groups.column!r}, {held!r}, which "
                "cannot be both learnt and judged; --group by another column"
            )
        if count < folds:
            lower = f"set --folds {count}, or " if count > 1 else ""
            raise DataError(
                f"{name} has {groups.in_words(count)}, fewer than --folds {folds}; {lower}add some"
            )


def _cut(
    labels: Labels, groups: Labels, parts: int, seed: int
) -> list[tuple[Positions, Positions]]:
    """Each of `parts` with what is left without it."""
    alone = len(np.unique(groups)) == len(groups)
    cutter = (StratifiedKFold if alone else StratifiedGroupKFold)(
        parts, shuffle=True, random_state=seed
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few images of a class, which is refused in our words
        return list(cutter.split(labels, labels, groups))


def _inner_cut(
    labels: Labels, groups: Labels, parts: int, seed: int
) -> tuple[Positions, Positions]:
    """Training and validation part: of the possible cuts the first with most classes in both."""

    def classes_in(cut: tuple[Positions, Positions]) -> tuple[int, int]:
        train, val = (len(np.unique(labels[part])) for part in cut)
        return train, val

    return max(_cut(labels, groups, parts, seed), key=classes_in)


def refuse_repeats(dataset: EmotionDataset, folds: Sequence[Fold]) -> None:
    """Raise ``DataError`` if the same picture is in two folds, and so judged once it was learnt."""
    fold_of = np.empty(len(dataset), np.int64)
    for number, fold in enumerate(folds):
        fold_of[fold.test] = number
    seen: dict[str, int] = {}
    for i in range(len(dataset)):
        first = seen.setdefault(content_hash(dataset.pixels[np.array([i])].tobytes()), i)
        if fold_of[first] != fold_of[i]:
            files = " and ".join(dataset.split.files[j] for j in (first, i))
            raise DataError(
                f"{files} are the same picture, in two folds; remove one of them, --group by a "
                "column that holds them together, or set ALLOW_DUPLICATES=True"
            )
