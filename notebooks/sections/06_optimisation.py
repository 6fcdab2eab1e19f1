# %% [markdown]
# ## 6. Optimisation
#
# What is minimised, and how fast each part may move.

# %%
from emotion_transfer.losses import SoftTargetLoss, class_weights

# %% [markdown]
# The weights this split leads to. With balanced classes they would all be 1.

# %%
weights = class_weights(train.split.labels, len(data.classes))
pd.Series(weights.numpy().round(3), index=list(data.classes), name="class weight")

# %%
from emotion_transfer.schedule import schedule_table

# %%
from emotion_transfer.plots.training import plot_schedule

# %% [markdown]
# ### The plan, before training starts
#
# Head and backbone follow the same curve at very different heights. Marked are the epochs at which
# the next stages thaw, and those in which no images are mixed any more.

# %%
from emotion_transfer.config import thaw_epochs
from emotion_transfer.loader import steps_per_epoch

steps = steps_per_epoch(cfg, len(train))
first_thaw, full_thaw = thaw_epochs(cfg)
thaws = [(first_thaw, "last stages thaw"), (full_thaw, "all layers thaw")]
thaws = [(epoch, label) for epoch, label in thaws if 0 < epoch < cfg.EPOCHS]
schedule = schedule_table(cfg, steps)
mix_off = max(0, cfg.EPOCHS - cfg.MIX_OFF_EPOCHS)
print(f"{cfg.EPOCHS} epochs of {steps} steps with {cfg.BATCH_SIZE} images each")
keep_figure(plot_schedule(schedule, thaws=thaws, mix_off=mix_off), name="schedule")
