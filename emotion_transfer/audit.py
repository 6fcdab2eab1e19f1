"""What is suspicious about a data set: duplicates, contradictions, gaps, odd images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import imagehash
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from emotion_transfer.config import EnhancedConfig
from emotion_transfer.loader import EmotionDataset

# %% [markdown]
# #### The audit: what is suspicious
#
# Nothing that the audit finds stops a run. It is what a careful person would look for before
# trusting a number: the same picture, slightly cropped or compressed anew, in training and in test;
# one picture under two labels; a class that a split has none of; images that are all one colour.
#
# Near duplicates are found by a *perceptual hash*: 64 bits that say how the large, coarse
# structures of an image lie (pHash, by the library ImageHash). Copies differ in few bits, different
# pictures in about 32. How many bits still count as a copy, `NEAR_DUPLICATE_BITS`, is a matter of
# measurement: among 1,713 product photographs, a limit of 8 bits flagged 15 pairs, 5 of them across
# splits and innocent; a limit of 4 flagged one pair, and none across splits.


# %%
def perceptual_hashes(dataset: EmotionDataset, batch: int = 256) -> npt.NDArray[np.uint64]:
    """The 64-bit pHash of every image of `dataset`, uint64 [N]."""
    hashes = np.zeros(len(dataset), dtype=np.uint64)
    label = f"hashing {dataset.split.name}"
    for start in tqdm(range(0, len(dataset), batch), label, unit="batch", leave=False):
        positions = np.arange(start, min(start + batch, len(dataset)))
        for position, pixels in zip(positions, dataset.pixels.gather(positions), strict=True):
            bits = imagehash.phash(Image.fromarray(pixels)).hash
            hashes[position] = np.packbits(bits).view(">u8")[0]
    return hashes


def image_contrast(dataset: EmotionDataset, batch: int = 256) -> npt.NDArray[np.float64]:
    """Standard deviation of the grey values of every image (0 to 127.5), float64 [N]."""
    contrast = np.zeros(len(dataset))
    for start in range(0, len(dataset), batch):
        positions = np.arange(start, min(start + batch, len(dataset)))
        contrast[positions] = dataset.pixels.gather(positions).mean(3).std(axis=(1, 2))
    return contrast


# %% [markdown]
# Every image is compared with every other: the exclusive or of two hashes has a one where they
# differ, and the ones are counted. A few hundred images at a time keep the memory small. On a set
# of a hundred thousand images the audit takes some minutes; `AUDIT=False` skips it.


# %%
MOST_PAIRS = 100_000


def close_pairs(
    hashes: npt.NDArray[np.uint64], bits: int, chunk: int = 256
) -> npt.NDArray[np.int64]:
    """Pairs (i, j, distance) with i < j whose hashes differ in at most `bits` bits, [P, 3].

    The search ends where it has found more than ``MOST_PAIRS``.
    """
    found, count = [], 0
    for start in range(0, len(hashes), chunk):
        part = hashes[start : start + chunk]
        distance = np.bitwise_count(part[:, None] ^ hashes[None, start:])
        i, j = np.nonzero(distance <= bits)
        later = j > i
        rows = (i[later] + start, j[later] + start, distance[i[later], j[later]])
        found.append(np.stack(rows, 1).astype(np.int64))
        count += len(found[-1])
        if count > MOST_PAIRS:  # one picture a thousand times over makes half a million
            break
    return np.concatenate(found) if found else np.zeros((0, 3), np.int64)


# %% [markdown]
# What was found is kept as tables, so that you can sort and filter them yourself.


# %%
@dataclass(frozen=True)
class Audit:
    """Findings: `pairs` of look-alikes, `odd` images, and `notes`, a sentence each."""

    pairs: pd.DataFrame  # split_a row_a file_a label_a, the same for b, distance, positions
    odd: pd.DataFrame  # split, row, file, reason
    notes: list[str]

    @property
    def leaks(self) -> pd.DataFrame:
        """Look-alikes in two different splits."""
        return self.pairs[self.pairs["split_a"] != self.pairs["split_b"]]

    @property
    def contradictions(self) -> pd.DataFrame:
        """Look-alikes with two different labels."""
        return self.pairs[self.pairs["label_a"] != self.pairs["label_b"]]


def audit_data(cfg: EnhancedConfig, datasets: Mapping[str, EmotionDataset]) -> Audit:
    """Look for near duplicates, contradictory labels, gaps between the splits and odd images."""
    hashes = np.concatenate([perceptual_hashes(dataset) for dataset in datasets.values()])
    contrast = np.concatenate([image_contrast(dataset) for dataset in datasets.values()])
    images = list_images(datasets)
    flat = contrast < 2.0  # one colour: its hash says nothing, and it looks like every other
    telling = np.flatnonzero(~flat)
    pairs = close_pairs(hashes[telling], cfg.NEAR_DUPLICATE_BITS)
    pairs[:, :2] = telling[pairs[:, :2]]
    odd = images[flat].assign(reason="hardly any contrast: one colour throughout")
    table = pair_table(images, pairs)
    notes = audit_notes(datasets, table, len(odd))
    return Audit(table, odd[["split", "row", "file", "reason"]], notes)


# %% [markdown]
# For the report, every look-alike is traced back to its split, row, file and label.


# %%
def list_images(datasets: Mapping[str, EmotionDataset]) -> pd.DataFrame:
    """All images, one row each: split, position, row, file, label."""
    parts = [
        pd.DataFrame(
            {
                "split": name,
                "position": np.arange(len(dataset)),
                "row": dataset.split.rows,
                "file": list(dataset.split.files),
                "label": np.array(dataset.classes)[dataset.split.labels],
            }
        )
        for name, dataset in datasets.items()
    ]
    return pd.concat(parts, ignore_index=True)


def pair_table(images: pd.DataFrame, pairs: npt.NDArray[np.int64]) -> pd.DataFrame:
    """`pairs` of row numbers of `images` as a table, closest first."""
    sides = [
        images.iloc[pairs[:, side]].reset_index(drop=True).add_suffix(f"_{name}")
        for side, name in ((0, "a"), (1, "b"))
    ]
    table = pd.concat(sides, axis=1).assign(distance=pairs[:, 2])
    return table.sort_values("distance", kind="stable").reset_index(drop=True)


# %% [markdown]
# Finally the proportions: a class that is missing from a split cannot be learnt or tested there,
# and where the largest class is more than twenty times the smallest, accuracy says little.

# %%
EXTREME_IMBALANCE = 20


def audit_notes(datasets: Mapping[str, EmotionDataset], pairs: pd.DataFrame, odd: int) -> list[str]:
    """What was found, a sentence each."""
    across = int((pairs["split_a"] != pairs["split_b"]).sum())
    labels = int((pairs["label_a"] != pairs["label_b"]).sum())
    notes = [f"{across} pairs of look-alikes stand in two splits"] if across else []
    if len(pairs) > MOST_PAIRS:
        notes.append(f"the search for look-alikes ended at {len(pairs)} pairs; there are more")
    if labels:
        notes.append(f"{labels} pairs of look-alikes have different labels")
    if odd:
        notes.append(f"{odd} images have hardly any contrast")
    for name, dataset in datasets.items():
        counts = np.bincount(dataset.split.labels, minlength=len(dataset.classes))
        absent = [dataset.classes[i] for i in np.flatnonzero(counts == 0)]
        if absent:
            notes.append(f"{name} has no image of {', '.join(absent)}")
        if counts.max() > EXTREME_IMBALANCE * max(1, counts[counts > 0].min()):
            largest, least = counts.max(), counts[counts > 0].min()
            notes.append(f"{name}: the largest class has {largest} images, the smallest {least}")
    return notes or ["nothing suspicious was found"]


def pair_pictures(
    datasets: Mapping[str, EmotionDataset], pairs: pd.DataFrame, limit: int = 8
) -> tuple[list[npt.NDArray[np.uint8]], list[str]]:
    """Images of the first `limit` pairs, side by side in a list, and a title for each."""
    pictures, titles = [], []
    for pair in pairs.head(limit).to_dict("records"):
        for side in ("a", "b"):
            dataset = datasets[str(pair[f"split_{side}"])]
            position = np.array([pair[f"position_{side}"]], dtype=np.int64)
            pictures.append(dataset.pixels.gather(position)[0])
            where = f"{pair[f'split_{side}']} row {pair[f'row_{side}']}"
            titles.append(f"{where}: {pair[f'label_{side}']}")
    return pictures, titles


def show_audit(audit: Audit) -> Sequence[str]:
    """The notes, then the first look-alikes across splits, as lines to print."""
    lines = [f"- {note}" for note in audit.notes]
    for pair in audit.leaks.head(10).to_dict("records"):
        lines.append(
            f"  {pair['file_a']} ({pair['split_a']} row {pair['row_a']}, {pair['label_a']}) and "
            f"{pair['file_b']} ({pair['split_b']} row {pair['row_b']}, {pair['label_b']}): "
            f"{pair['distance']} of 64 bits differ"
        )
    return lines
