"""What is suspicious about a data set: look-alikes, contradictions, gaps, odd images.

Nothing that is found stops a run. Look-alikes have close perceptual hashes (pHash, 64 bits, by
ImageHash): copies differ in few bits, different pictures in about 32.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import imagehash
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from emotion_toolbox.batches import EmotionDataset

MOST_PAIRS = 100_000  # one picture a thousand times over makes half a million
EXTREME_IMBALANCE = 20  # beyond that, accuracy says little
FEW_PER_CLASS = 10  # validation images; below that, the choice of epoch is mostly chance
BATCH = 256


@dataclass(frozen=True)
class Audit:
    """Findings: `pairs` of look-alikes, `odd` images, and `notes`, a sentence each."""

    pairs: pd.DataFrame  # split_a position_a row_a file_a label_a, the same for b, distance
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

    def lines(self) -> list[str]:
        """The notes, then the first look-alikes across splits, to print."""
        shown = [
            f"  {p['file_a']} ({p['split_a']} row {p['row_a']}, {p['label_a']}) and {p['file_b']} "
            f"({p['split_b']} row {p['row_b']}, {p['label_b']}): {p['distance']} of 64 bits differ"
            for p in self.leaks.head(10).to_dict("records")
        ]
        return [f"- {note}" for note in self.notes] + shown


def audit_data(datasets: Mapping[str, EmotionDataset], bits: int) -> Audit:
    """Look for pairs whose hashes differ in at most `bits`, contradictions, gaps, odd images."""
    images = pd.concat([look_at(name, data) for name, data in datasets.items()], ignore_index=True)
    flat = images["contrast"].to_numpy() < 2  # one colour: it looks like every other such image
    odd = images.loc[flat, ["split", "row", "file"]]
    odd = odd.assign(reason="hardly any contrast: one colour throughout")
    telling = np.flatnonzero(~flat)
    found = close_pairs(images["hash"].to_numpy(np.uint64)[telling], bits)
    sides = [
        images.drop(columns=["hash", "contrast"]).iloc[telling[found[:, side]]]
        .reset_index(drop=True).add_suffix(f"_{name}")
        for side, name in ((0, "a"), (1, "b"))
    ]  # fmt: skip
    pairs = pd.concat(sides, axis=1).assign(distance=found[:, 2])
    pairs = pairs.sort_values("distance", kind="stable", ignore_index=True)
    return Audit(pairs, odd, audit_notes(datasets, pairs, len(odd)))


def look_at(name: str, dataset: EmotionDataset) -> pd.DataFrame:
    """A row an image: split, position, row, file, label, its hash and its contrast (0 to 127.5)."""
    hashes, contrast = np.zeros(len(dataset), np.uint64), np.zeros(len(dataset))
    for start in tqdm(range(0, len(dataset), BATCH), f"hashing {name}", leave=False):
        positions = np.arange(start, min(start + BATCH, len(dataset)))
        pictures = dataset.pictures(positions)
        contrast[positions] = pictures.mean(3).std(axis=(1, 2))
        for position, pixels in zip(positions, pictures, strict=True):
            bits = imagehash.phash(Image.fromarray(pixels)).hash
            hashes[position] = np.packbits(bits).view(">u8")[0]
    split, names = dataset.split, np.array(dataset.classes, dtype=object)
    facts = {"row": split.rows, "file": list(split.files), "label": names[split.labels]}
    places = pd.DataFrame({"split": name, "position": np.arange(len(dataset)), **facts})
    return places.assign(hash=hashes, contrast=contrast)


def close_pairs(
    hashes: npt.NDArray[np.uint64], bits: int, chunk: int = 256
) -> npt.NDArray[np.int64]:
    """Pairs (i, j, distance), i < j, of hashes that differ in at most `bits` bits, int64 [P, 3].

    The search ends where it has found more than ``MOST_PAIRS``.
    """
    found, count = [np.zeros((0, 3), np.int64)], 0
    for start in range(0, len(hashes), chunk):
        distance = np.bitwise_count(hashes[start : start + chunk, None] ^ hashes[None, start:])
        i, j = np.nonzero(distance <= bits)
        later = j > i
        rows = (i[later] + start, j[later] + start, distance[i[later], j[later]])
        found.append(np.stack(rows, 1).astype(np.int64))
        if (count := count + len(found[-1])) > MOST_PAIRS:
            break
    return np.concatenate(found)


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
        largest, least = counts.max(), counts[counts > 0].min()
        if absent := [dataset.classes[i] for i in np.flatnonzero(counts == 0)]:
            notes.append(f"{name} has no image of {', '.join(absent)}")
        if largest > EXTREME_IMBALANCE * least:
            notes.append(f"{name}: the largest class has {largest} images, the smallest {least}")
        if name == "val" and len(dataset) < FEW_PER_CLASS * len(dataset.classes):
            notes.append(
                f"val has {len(dataset)} images of {len(dataset.classes)} classes: by so few, the "
                "choice of the best epoch is mostly chance"
            )
    return notes or ["nothing suspicious was found"]


def look_alikes(
    datasets: Mapping[str, EmotionDataset], pairs: pd.DataFrame, limit: int = 8
) -> tuple[list[npt.NDArray[np.uint8]], list[str]]:
    """Images of the first `limit` pairs, side by side in a list, and a title for each."""
    pictures, titles = [], []
    for pair in pairs.head(limit).to_dict("records"):
        for side in ("a", "b"):
            split, position = str(pair[f"split_{side}"]), int(pair[f"position_{side}"])
            pictures.append(datasets[split].pictures([position])[0])
            titles.append(f"{split} row {pair[f'row_{side}']}\n{pair[f'label_{side}']}")
    return pictures, titles
