# %% [markdown]
# ## Engine
#
# *What happens in one step, and in one epoch?* Here is the loop, smallest part first: a batch is
# augmented, goes forward and back, and moves the weights; an epoch is many such steps and a look at
# the validation pictures; a run is many epochs.

# %%
from emotion_transfer.engine import fit

# %% [markdown]
# > **Try it:** press *stop* while the cell below trains, then run it again.
# >
# > <details><summary>What you should see</summary>The step in hand is finished, the state saved,
# > and one line says so. Run again, the cell says <code>resuming at epoch ..., step ...</code> and
# > ends with the same figures, to the last bit, as a run that was never stopped.</details>
