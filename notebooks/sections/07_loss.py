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

# %% [markdown]
# > **Try it:** set `LABEL_SMOOTHING` and `MIX_PROB` to 0. Is the network better? Is it surer?
# >
# > <details><summary>What you should see</summary>On the sample it is as good within the noise
# > (88 % against 89 % of the test pictures), and surer: its training loss ends at 0.14 instead of
# > 0.64. Its calibration error is no worse for that, 0.06 against 0.08, for smoothed targets had
# > made it too modest.</details>
