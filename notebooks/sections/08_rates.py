# %% [markdown]
# ## Rates
#
# *How fast does which part learn?* The head starts from nothing and learns much faster (`LR_HEAD`)
# than the backbone, which only adjusts (`LR_BACKBONE`): *differential learning rates*
# ([Howard and Ruder 2018](https://arxiv.org/abs/1801.06146)). Both rise linearly over the first
# epoch and then fall along half a cosine ([Loshchilov and Hutter
# 2017](https://arxiv.org/abs/1608.03983)). Every thaw starts a new cosine at full height, because
# newly thawed layers have learning to do, and the last one ends exactly when training does. The
# rate is a function of the position and of nothing else: there is no scheduler whose state could be
# lost, rebuilt wrongly or stepped twice.

# %%
from emotion_transfer.schedule import rates_at

# %% [markdown]
# The plan, before training starts: marked are the epochs at which the next stages thaw, and those
# in which no pictures are mixed any more, so that training ends on pictures like those of the test.

# %%
from emotion_toolbox.batches import steps_per_epoch
from emotion_toolbox.figures import plot_schedule

thaws = list(zip(thaw_epochs(cfg), ("last stages thaw", "all layers thaw"), strict=True))
thaws = [(epoch, what) for epoch, what in thaws if 0 < epoch < cfg.EPOCHS]
steps = steps_per_epoch(len(train), cfg.BATCH_SIZE)
mix_off = max(0, cfg.EPOCHS - cfg.MIX_OFF_EPOCHS)
print(f"{cfg.EPOCHS} epochs of {steps} steps with {cfg.BATCH_SIZE} images each")
rates = partial(rates_at, cfg, steps=steps)
keep_figure(plot_schedule(rates, cfg.EPOCHS, steps, thaws, mix_off), name="schedule")
