"""What is suspicious about a data set: look-alikes, contradictions, images of one colour.

Nothing that is found stops a run. Look-alikes have close perceptual hashes (pHash, 64 bits, by
ImageHash): copies differ in few bits, different pictures in about 32.
"""

from collections.abc import Mapping

import imagehash
import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from emotion_toolbox.batches import EmotionDataset, batch_slices
from emotion_toolbox.measures import FEW_PER_CLASS

MOST_PAIRS = 100_000  # one picture a thousand times over makes half a million
BATCH = 256  # images in memory at a time


def audit_data(datasets: Mapping[str, EmotionDataset], bits: int) -> tuple[pd.DataFrame, list[str]]:
    """Look-alikes, whose hashes differ in at most `bits`, and all that was found, as lines of text.

    The table has a row a pair, the closest first: split_a, position_a, row_a, file_a, label_a, the
    same for b, and distance (in bits).
    """
    images = pd.concat([look_at(name, data) for name, data in datasets.items()], ignore_index=True)
    flat = images["contrast"] < 2  # one colour: it looks like every other such image
    telling = images[~flat].drop(columns="contrast").reset_index(drop=True)
    found = close_pairs(telling.pop("hash").to_numpy(np.uint64), bits)
    first, second = (telling.iloc[found[:, side]].reset_index(drop=True) for side in (0, 1))
    pairs = first.add_suffix("_a").join(second.add_suffix("_b")).assign(distance=found[:, 2])
    pairs = pairs.sort_values("distance", kind="stable", ignore_index=True)
    lines = describe_pairs(pairs)
    if flat.any():
        example = images[flat].iloc[0]
        lines.append(
            f"- {flat.sum()} images have hardly any contrast, such as {example['file']} "
            f"({example['split']} row {example['row']})"
        )
    if "val" in datasets and len(val := datasets["val"]) < FEW_PER_CLASS * len(val.classes):
        lines.append(
            f"- val has {len(val)} images of {len(val.classes)} classes: by so few, the choice of "
            "the best epoch is mostly chance"
        )
    return pairs, lines or ["- nothing suspicious was found"]


def look_at(name: str, dataset: EmotionDataset) -> pd.DataFrame:
    """A row an image: split, position, row, file, label, its hash and its contrast (0 to 127.5)."""
    split, names = dataset.split, np.array(dataset.classes, dtype=object)
    images = pd.DataFrame({"split": name, "position": np.arange(len(dataset)), "row": split.rows})
    images["file"], images["label"] = list(split.files), names[split.labels]
    hashes, contrast = [], []
    for batch in tqdm(batch_slices(np.arange(len(dataset)), BATCH), f"hashing {name}", leave=False):
        for pixels in dataset.pictures(batch):
            bits = imagehash.phash(Image.fromarray(pixels)).hash
            hashes.append(np.packbits(bits).view(">u8")[0])
            contrast.append(pixels.mean(axis=2).std())
    return images.assign(hash=np.array(hashes, np.uint64), contrast=contrast)


def close_pairs(
    hashes: npt.NDArray[np.uint64], bits: int, chunk: int = 256
) -> npt.NDArray[np.int64]:
    """Pairs (i, j, distance), i < j, of hashes that differ in at most `bits` bits, int64 [P, 3]."""
    found, count = [np.zeros((0, 3), np.int64)], 0
    for start in range(0, len(hashes), chunk):
        distance = np.bitwise_count(hashes[start : start + chunk, None] ^ hashes[None, start:])
        i, j = np.nonzero(np.triu(distance <= bits, k=1))
        found.append(np.stack([i + start, j + start, distance[i, j]], axis=1).astype(np.int64))
        count += len(i)
        if count > MOST_PAIRS:  # enough
            break
    return np.concatenate(found)


def describe_pairs(pairs: pd.DataFrame) -> list[str]:
    """How many look-alikes there are of each kind, and the first ten across splits."""
    across = pairs[pairs["split_a"] != pairs["split_b"]]
    labels = int((pairs["label_a"] != pairs["label_b"]).sum())
    lines = [f"- {len(across)} pairs of look-alikes stand in two splits"] if len(across) else []
    lines += [
        f"  {p['file_a']} ({p['split_a']} row {p['row_a']}, {p['label_a']}) and {p['file_b']} "
        f"({p['split_b']} row {p['row_b']}, {p['label_b']}): {p['distance']} of 64 bits differ"
        for p in across.head(10).to_dict("records")
    ]
    if labels:
        lines.append(f"- {labels} pairs of look-alikes have different labels")
    if len(pairs) > MOST_PAIRS:
        lines.append(f"- the search for look-alikes ended at {len(pairs)} pairs; there are more")
    return lines


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
