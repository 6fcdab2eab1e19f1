# %% [markdown]
# ## Summary
#
# *What came out, and what next?* Written from the numbers of this run:

# %%
from IPython.display import Markdown

Markdown(closing_text(summary, run_dir))

# %% [markdown]
# - **On the sample?** Take your own pictures (`PICTURES`, in [Settings](#Settings)) or EmoSet-118K.
# - **A large gap?** More augmentation (`CROP_SCALE`, `MIX_PROB`), more `DROPOUT`, a smaller
#   `LR_BACKBONE`, or fewer epochs.
# - **No better than the linear probe?** The fine-tune has gone wrong: look at the curves around the
#   thaws, and try `LR_BACKBONE` three times higher and three times lower.
# - **No better than the plain fine-tune?** Then the simpler recipe is as good here. Switch the
#   techniques off one at a time to see which of them help on your data.
# - **Before you publish a number**, train with three seeds (`SEED`) and give the mean with the
#   spread. One run is one draw.
