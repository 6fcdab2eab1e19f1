# %% [markdown]
# ## Rates
#
# *How fast does which part learn?* A rate that is too high destroys what the backbone knows, one
# that is too low learns nothing in the time there is. The head is new and learns much faster
# (`LR_HEAD`, by default a hundred times, on the sample ten) than the backbone, which only adjusts
# (`LR_BACKBONE`): *differential learning rates*
# ([Howard and Ruder 2018](https://arxiv.org/abs/1801.06146)).

# %%
from emotion_transfer.schedule import rates_at

# %% [markdown]
# (Are these the right ones? [Engine](#Engine) ends with a test of both.)
#
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

# %% [markdown]
# > **Try it:** set `LR_BACKBONE` to 0.003, the head's own rate. What happens at the thaw?
# >
# > <details><summary>What you should see</summary>On the sample the macro F1 falls from 0.81 to
# > 0.10 in the first epoch after the thaw, and the validation loss explodes: what ImageNet taught
# > is gone, and is not learnt again. The best model is that of epoch 1, from before the
# > thaw.</details>
