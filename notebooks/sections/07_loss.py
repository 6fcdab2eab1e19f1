# %% [markdown]
# ## Loss
#
# *What exactly is made small?* The **cross-entropy**: minus the logarithm of the probability that
# the network gives to the right class, in the mean over the pictures of a batch. It is near 0 where
# the network is right and sure of it, and grows without bound where it is sure and wrong.

# %%
from emotion_transfer.losses import class_weights

# %% [markdown]
# The weights that this training split leads to:

# %%
import pandas as pd

weight = class_weights(train.split.labels, len(classes)).numpy().round(2)
pd.DataFrame({"images": data.counts()["train"], "weight": weight}).T
