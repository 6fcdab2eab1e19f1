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
# - **No better than the linear probe?** With thousands of pictures the fine-tune has gone wrong:
#   look at the curves around the thaws, and try `LR_BACKBONE` three times higher and three times
#   lower ([Engine](#Engine) tests a range). With a few hundred it may be all there is
#   to have: the probe is hard to beat then, and more pictures help more than any setting.
# - **No better than the plain fine-tune?** Then the simpler recipe is as good here. `python -m
#   emotion_transfer ablate` leaves out one technique after the other, over several seeds, and says
#   what each is worth on your data.
# - **Before you publish a number**, train with three seeds (`SEED`) and give the mean with the
#   spread. One run is one draw.
