# %% [markdown]
# ## Loss
#
# *What exactly is made small?* Three things are asked of the loss at once. Rare classes should
# count more (*class weights*); the target should not be absolute certainty (*label smoothing*,
# [Szegedy et al. 2015](https://arxiv.org/abs/1512.00567)); and mixed pictures have two labels.
# PyTorch's `CrossEntropyLoss` accepts all three, but changes its meaning in between: for hard
# labels it divides by the sum of the weights, for soft ones by the number of pictures, and its
# weights also change the smoothing. Ours is one formula. With $q_a$ the smoothed target of class
# $a$ and $w_a$ its weight, a picture mixed from $a$ and $b$ with share $\lambda$ costs
#
# $$\lambda\, w_a H(q_a, p) + (1-\lambda)\, w_b H(q_b, p)$$
#
# where $H$ is the cross-entropy, and a batch costs the mean over its pictures.

# %%
from emotion_transfer.losses import class_weights

# %% [markdown]
# The weights that this training split leads to. They average 1 over the pictures, so switching
# them on does not change the learning rate by stealth.

# %%
import pandas as pd

weight = class_weights(train.split.labels, len(classes)).numpy().round(2)
pd.DataFrame({"images": data.counts()["train"], "weight": weight}).T
