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
# TODO

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
