# %% [markdown]
# ## 7. Training engine
#
# The loop that follows is longer than the usual tutorial's, because a night of training is worth
# protecting: every part of it can be interrupted, and everything random in it can be repeated.

# %%
from emotion_transfer.checkpoint import load_newest

# %%
from emotion_transfer.precision import choose_device

# %%
from emotion_transfer.evaluation import predict

# %%
from emotion_transfer.engine import fit

# %% [markdown]
# That was the engine. Before it starts, this is where it will run:

# %%
print(choose_device(cfg))
