"""Random numbers that are functions of a position, so that nothing random is carried along."""

# %% [markdown]
# #### Random numbers without a state
#
# A usual random generator is a *state* that every draw moves on. A run that is killed loses it; a
# run spread over two processes has two of them; one more draw anywhere shifts all that follow.
# Here nothing random has a state. Every number is a function of *where it is used*: the seed, the
# epoch and the position in the epoch. So a run that resumes in the middle of an epoch draws what
# the uninterrupted one would have drawn, and two processes that take half a batch each draw what
# one process would.
#
# **Philox** makes this cheap. It is a *counter-based* generator: a block cipher applied to 0, 1,
# 2, ... whose output for any counter is computed at once, without the ones before it.

# %%
import os
import random
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch

WORDS_PER_BLOCK = 4  # Philox gives four 64-bit words for each value of its counter


class DrawStream(IntEnum):
    """What a number is drawn for; the numbers of different streams are independent."""

    AUGMENT = 0
    MIX = 1
    ORDER = 2
    STEP = 3


# %% [markdown]
# The counter has room for four 64-bit numbers. We write the block's index, the epoch and the stream
# into it, and the seed is the key of the cipher. Two different uses can never share a block, which
# hashing all of it into one seed could not promise.


# %%
def philox_words(
    seed: int, epoch: int, stream: int, first_block: int, blocks: int
) -> npt.NDArray[np.uint64]:
    """Random words ``[blocks, 4]`` of the given blocks (Salmon et al. 2011, Philox4x64-10)."""
    if min(seed, epoch, stream, first_block, blocks) < 0:
        raise ValueError(
            f"seed={seed}, epoch={epoch}, stream={stream}, first block {first_block} and "
            f"{blocks} blocks: none of them may be negative"
        )
    counter = np.array([first_block, epoch, stream, 0], dtype=np.uint64)
    generator = np.random.Philox(key=np.array([seed, 0], dtype=np.uint64), counter=counter)
    words = generator.random_raw(blocks * WORDS_PER_BLOCK)
    return np.asarray(words, dtype=np.uint64).reshape(blocks, WORDS_PER_BLOCK)


# %% [markdown]
# Each position of the epoch's order owns a row of uniform numbers, a whole number of blocks long.
# Drawing rows 64 to 95 therefore gives exactly rows 64 to 95 of drawing everything, and takes no
# longer in an epoch of a million images than in one of a hundred. What augmentation and mixing make
# of a row is then a plain function of it.


# %%
def draw_uniforms(
    seed: int,
    epoch: int,
    first: int,
    count: int,
    columns: int,
    stream: int = DrawStream.AUGMENT,
) -> npt.NDArray[np.float64]:
    """Uniform numbers in [0, 1), ``[count, columns]``, of positions `first` to `first + count`.

    Rows depend on (seed, epoch, stream, position, columns) alone: any slice of an epoch can be
    drawn by itself. Raises ``ValueError`` for a negative argument.
    """
    blocks = -(-columns // WORDS_PER_BLOCK)
    words = philox_words(seed, epoch, stream, first * blocks, count * blocks)
    rows = words.reshape(count, blocks * WORDS_PER_BLOCK)[:, :columns]
    return (rows >> np.uint64(11)).astype(np.float64) * 2.0**-53


# %% [markdown]
# The order of an epoch is that of one random word for each image: every permutation is equally
# likely, and each epoch has its own.


# %%
def epoch_order(seed: int, epoch: int, n: int) -> npt.NDArray[np.int64]:
    """A random permutation of ``0 .. n - 1``, ``[n]``."""
    blocks = -(-n // WORDS_PER_BLOCK)
    words = philox_words(seed, epoch, DrawStream.ORDER, 0, blocks).ravel()[:n]
    return np.argsort(words, kind="stable").astype(np.int64)


# %% [markdown]
# With `BALANCE = "sampler"` an epoch is drawn *with replacement*, so that all classes come up about
# equally often: choose a class, then one of its images.


# %%
def balanced_order(
    seed: int, epoch: int, labels: npt.NDArray[np.int64], n: int
) -> npt.NDArray[np.int64]:
    """`n` indices into `labels`, each drawn with a probability inverse to its class's frequency.

    Classes without an image are passed over. Raises ``ValueError`` where `labels` is empty.
    """
    if len(labels) == 0:
        raise ValueError("no labels to draw a balanced order from: the split is empty")
    by_class: npt.NDArray[np.int64] = np.argsort(labels, kind="stable").astype(np.int64)
    _, starts, sizes = np.unique(labels[by_class], return_index=True, return_counts=True)
    uniforms = draw_uniforms(seed, epoch, 0, n, 2, stream=DrawStream.ORDER)
    chosen = (uniforms[:, 0] * len(sizes)).astype(np.int64)
    member = (uniforms[:, 1] * sizes[chosen]).astype(np.int64)
    return np.take(by_class, starts[chosen] + member)


# %% [markdown]
# Dropout draws on the device, from PyTorch's own generator. `torch.manual_seed(step_seed(...))`
# before every step makes that a function of the position, too.


# %%
def step_seed(seed: int, epoch: int, step: int) -> int:
    """A seed in [0, 2**63) for everything that PyTorch draws in one step."""
    return int(philox_words(seed, epoch, DrawStream.STEP, step, 1)[0, 0] >> np.uint64(1))


# %% [markdown]
# What is drawn once, at the start (the head's first weights above all), needs only the seed.
# Repeating a run bit for bit *on a GPU* asks for more: some of CUDA's fastest algorithms add up
# numbers in whatever order they arrive. `DETERMINISTIC = True` forbids them, at some cost in speed.


# %%
def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's global generators (all devices)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def set_deterministic(flag: bool) -> None:
    """Allow only deterministic algorithms, or the fastest (`flag` False), from now on.

    Call it before the first work on the GPU: cuBLAS reads its setting only once.
    """
    if flag:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(flag)
    torch.backends.cudnn.deterministic = flag
    torch.backends.cudnn.benchmark = not flag
