"""Random numbers that are functions of a position, so that nothing random is carried along."""

from enum import IntEnum

import numpy as np
import numpy.typing as npt

WORDS_PER_BLOCK = 4  # Philox gives four 64-bit words for each value of its counter


class DrawStream(IntEnum):
    """What a number is drawn for; the numbers of different streams are independent."""

    AUGMENT = 0
    MIX = 1
    ORDER = 2
    STEP = 3


def philox_words(
    seed: int, epoch: int, stream: int, first_block: int, blocks: int
) -> npt.NDArray[np.uint64]:
    """Random words ``[blocks, 4]`` of the given blocks (Salmon et al. 2011, Philox4x64-10)."""
    counter = np.array([first_block, epoch, stream, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
    words = generator.random_raw(blocks * WORDS_PER_BLOCK)
    return np.asarray(words, dtype=np.uint64).reshape(blocks, WORDS_PER_BLOCK)


def draw_uniforms(
    seed: int, epoch: int, first: int, count: int, columns: int,
    stream: int = DrawStream.AUGMENT,
) -> npt.NDArray[np.float64]:  # fmt: skip
    """Uniform numbers in [0, 1), ``[count, columns]``, of positions `first` to `first + count`.

    Rows depend on (seed, epoch, stream, position, columns) alone: any slice of an epoch can be
    drawn by itself. Raises ``OverflowError`` for a negative argument.
    """
    blocks = -(-columns // WORDS_PER_BLOCK)
    words = philox_words(seed, epoch, stream, first * blocks, count * blocks)
    rows = words.reshape(count, blocks * WORDS_PER_BLOCK)[:, :columns]
    return (rows >> np.uint64(11)).astype(np.float64) * 2.0**-53


def epoch_order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """A random permutation of ``0 .. n - 1``, ``[n]``."""
    blocks = -(-n // WORDS_PER_BLOCK)
    words = philox_words(seed, epoch, DrawStream.ORDER, 0, blocks).ravel()[:n]
    return np.argsort(words, kind="stable").astype(np.int64)


def balanced_order(
    seed: int, epoch: int, labels: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.int64]:
    """`n` random indices into `labels`, so that all classes with an image come equally often."""
    by_class: npt.NDArray[np.int64] = np.argsort(labels, kind="stable").astype(np.int64)
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    uniforms = draw_uniforms(seed, epoch, 0, n, 2, stream=DrawStream.ORDER)
    chosen = (uniforms[:, 0] * len(sizes)).astype(np.int64)
    member = (uniforms[:, 1] * sizes[chosen]).astype(np.int64)
    return np.take(by_class, starts[chosen] + member)


def step_seed(seed: int, epoch: int, step: int) -> int:
    """A seed in [0, 2**63) for everything that PyTorch draws in one step."""
    return int(philox_words(seed, epoch, DrawStream.STEP, step, 1)[0, 0] >> np.uint64(1))
