"""The learning-rate finder: range tests of the rates of head and backbone, without a trace."""

# %% [markdown]
# #### The learning-rate finder
#
# Are the rates right for *these* pictures? A *range test*
# ([Smith 2017](https://arxiv.org/abs/1506.01186)) trains some steps on training pictures, at a rate
# that rises from far too low to far too high, and watches the loss: at first nothing happens, then
# it falls, then it explodes. Head and backbone want rates of their own, so each is tested by
# itself: the head as a run begins, on a frozen backbone; then the backbone with all that ever
# thaws, under a head that has trained a while and goes on, as after a thaw.
#
# From step to step the loss also jumps with the pictures of the batch, and falls for what *else*
# learns. So a *twin* takes the same steps on the same pictures, augmented alike, and only the rate
# under test is 0: the loss less that of the twin is what the rate does (`range_test??`). Both are
# copies, and the state of the random numbers is put back, so training is the same, to the last bit,
# with the test or without.

# %%
import copy
import dataclasses
from functools import partial

import torch

from emotion_toolbox.batches import Batch, EmotionDataset, training_order
from emotion_toolbox.device import choose_device, memory_advice, set_deterministic
from emotion_toolbox.measures import RangeTest, describe_rate, range_test, suggest_rate
from emotion_transfer.config import EnhancedConfig, train_size
from emotion_transfer.engine import Trainer, begin_epoch, train_step
from emotion_transfer.mixing import mixing_active
from emotion_transfer.model import EmotionClassifier, thaw_level


def loss_at(trainer: Trainer, epoch: int, part: str, step: int, rate: float) -> float:
    """The loss of a batch, before a step on it in which the groups of `part` have this `rate`."""
    cfg, labels = trainer.cfg, trainer.train.split.labels
    for group in trainer.optimizer.param_groups:
        if group["name"].startswith(part):
            group["base_lr"] = rate
    balanced = cfg.BALANCE == "sampler"  # each batch is the first of an order of its own
    order = training_order(labels, cfg.BATCH_SIZE, seed=cfg.SEED, epoch=step, balanced=balanced)
    chosen = trainer.train.batch(order[: cfg.BATCH_SIZE])
    trainer.meter.sums.zero_()
    train_step(trainer, Batch(*(t.to(trainer.device) for t in chosen)), epoch, step, steps=1)
    return trainer.meter.read().loss


# %% [markdown]
# The settings of the trial put the head alone into epoch 1 and all that ever thaws into epoch 2,
# and keep the rates from falling. No gradient is clipped, because the twin computes fewer of them,
# whose norm is another. (A head that is the linear probe and nothing else moves at the backbone's
# rate, and `LR_HEAD` is not tested.)


# %%
def find_rates(
    cfg: EnhancedConfig, model: EmotionClassifier, train: EmotionDataset, steps: int = 60
) -> dict[str, RangeTest]:
    """A range test of LR_HEAD, and of LR_BACKBONE if it ever thaws, on copies; says what it found.

    Raises ``DivergedError`` where the first loss is not finite, ``DataError`` if no batch is full.
    """
    level, mixes = thaw_level(cfg, cfg.EPOCHS - 1), mixing_active(cfg, 0)
    trial = dataclasses.replace(
        cfg, EPOCHS=3, THAW_EPOCHS=(2, 4 - level), MIX_OFF_EPOCHS=0 if mixes else 3, MIN_LR=1.0,
        EMA_DECAY=0.0, GRAD_CLIP=1e6, COMPILE=False,
    )  # fmt: skip
    tests = ("LR_HEAD", "head", 1, 1e-5, 1.0), ("LR_BACKBONE", "backbone", 2, 1e-6, 0.1)
    no_head = level > 0 and cfg.START == "probe" and cfg.HEAD != "progressive"  # at LR_BACKBONE
    set_deterministic(cfg.DETERMINISTIC)  # as `fit` does, before a GPU is first used
    device, found = choose_device(cfg.DEVICE), {}
    advice = memory_advice(cfg.BATCH_SIZE, cfg.ACCUMULATE, train_size(cfg))
    with torch.random.fork_rng([device] if device.type == "cuda" else []), advice:
        trainer = Trainer(trial, copy.deepcopy(model), train)
        begin_epoch(trainer, 1)
        for name, part, epoch, low, high in tests[no_head : 1 + (level > 0)]:
            for number in range(steps // 2 * (epoch - 1)):
                loss_at(trainer, 1, "head", number, cfg.LR_HEAD)
            begin_epoch(trainer, epoch)
            moving, twin = (copy.deepcopy(trainer, {id(train): train}) for _ in range(2))
            twin.model.backbone.requires_grad_(False)  # which has rate 0
            step, still = (partial(loss_at, one, epoch, part) for one in (moving, twin))
            table = range_test(step, still, low, high, steps)
            found[name] = RangeTest(table, getattr(cfg, name), suggest_rate(table))
            print(describe_rate(name, found[name]))
    return found
