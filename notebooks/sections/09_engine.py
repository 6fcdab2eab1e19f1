# %% [markdown]
# ## Engine
#
# *What happens in one step, and in one epoch?* Here is the loop, smallest part first: a batch is
# augmented, goes forward and back, and moves the weights; an epoch is many such steps and a look at
# the validation pictures; a run is many epochs.

# %%
from emotion_transfer.engine import fit

# %%
from emotion_transfer.finder import find_rates

# %% [markdown]
# Each dot is a step, the line smooths them; below 0 the rate has helped, where the line rises it is
# too high. *Suggested* is the rate that brings half of what the best one brings, about where the
# line falls most steeply: what goes well for a few steps may be too much for thousands. Nothing is
# suggested where the line falls by less than the dots scatter about it, as on the sample for the
# backbone: its features serve well as they are, and the picture only says from where on they break.
#
# So few steps tell a rate that is ten times wrong, not which of two like ones is better (that takes
# short runs with each: `python -m emotion_transfer lr --runs`, in a checkout of the project). A
# suggestion is only that, and nothing has been changed: to follow it, write
# `OVERRIDES = {"LR_HEAD": 0.001}`, say, into [Settings](#Settings) and run all again.

# %%
from emotion_toolbox.figures import plot_range_tests

range_tests = find_rates(cfg, model, train, steps=4 if cfg.DEBUG else 40)
keep_figure(plot_range_tests(range_tests), name="range_tests")

# %% [markdown]
# > **Try it:** press *stop* while the cell below trains, then run it again.
# >
# > <details><summary>What you should see</summary>The step in hand is finished, the state saved,
# > and one line says so. Run again, the cell says <code>resuming at epoch ..., step ...</code> and
# > ends with the same figures, to the last bit, as a run that was never stopped.</details>
