"""The learning rate as a pure function of the position in training."""

# %% [markdown]
# The learning rate falls along half a cosine ([Loshchilov and Hutter
# 2017](https://arxiv.org/abs/1608.03983)); in the first epoch it is faded in, linearly, on top of
# that (`WARMUP_EPOCHS` is something else: how long the head trains alone). Every thaw *restarts*
# the cosine at full height (`RESTARTS`), because newly thawed layers have learning to do, and the
# last one reaches `MIN_LR` exactly when training ends. It is a function of the position and of
# nothing else: there is no scheduler object whose state could be lost, rebuilt wrongly or stepped
# twice.

# %%
import math

from emotion_transfer.config import EnhancedConfig, thaw_epochs


def cycle_bounds(cfg: EnhancedConfig) -> list[tuple[int, int]]:
    """First and last-plus-one epoch of every cosine cycle."""
    starts = sorted({0, *(t for t in thaw_epochs(cfg) if cfg.RESTARTS and t < cfg.EPOCHS)})
    return list(zip(starts, [*starts[1:], cfg.EPOCHS], strict=True))


def learning_rate(cfg: EnhancedConfig, base: float, epoch: int, step: int, steps: int) -> float:
    """The rate for optimisation step `step` (from 0) of `steps` in `epoch` (from 0)."""
    start, end = next((a, b) for a, b in cycle_bounds(cfg) if a <= epoch < b)
    warm_up = min(1.0, (epoch * steps + step + 1) / steps)
    progress = ((epoch - start) * steps + step) / max(1, (end - start) * steps - 1)
    floor = min(cfg.MIN_LR, base)
    cosine = floor + (base - floor) * (1 + math.cos(math.pi * progress)) / 2
    return cosine * warm_up


# %% [markdown]
# Every step sets the rates of all parameter groups anew ([Engine](#Engine)); for the picture, they
# can be known beforehand.


# %%
def rates_at(cfg: EnhancedConfig, epoch: int, step: int, steps: int) -> tuple[float, float]:
    """The rates of head and backbone; NaN for a backbone that is frozen as a whole."""
    backbone = cfg.LR_BACKBONE if epoch >= thaw_epochs(cfg)[0] else math.nan
    head, backbone = (learning_rate(cfg, b, epoch, step, steps) for b in (cfg.LR_HEAD, backbone))
    return head, backbone
