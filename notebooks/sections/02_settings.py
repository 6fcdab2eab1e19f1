# %% [markdown]
# ## Settings
#
# *What can I change, and where?* **Here.** What you put into `OVERRIDES` replaces the default of
# that name; all names stand in the class below. Some to try, one at a time:
#
# | to | write |
# |---|---|
# | train on your own pictures, in a folder with a subfolder a class | `PICTURES = "my_pictures"` |
# | train on EmoSet-118K, once `prepare` has made its folder (README) | `{"DATA_ROOT": "folder"}` |
# | use the smaller network | `OVERRIDES = {"MODEL_NAME": "efficientnet_b0"}` |
# | fit into less memory | `{"ACCUMULATE": 2}`, or `{"BATCH_SIZE": 16}` |
# | see in a minute whether all of it runs | `{"DEBUG": True, "EPOCHS": 1}` |
# | get the same bits again on a GPU | `{"DETERMINISTIC": True}` (slower) |
# | come back to the drawn sample | `{"DATASET": "sample"}` |
#
# Any classes will do, from two on; of each some ten pictures at the very least, better a hundred.
# The *Try it* boxes below ask for a setting too: write it here, and run all again. With
# `"BASELINES": ()` beside it that takes half the time.

# %% tags=["parameters"]
from typing import Any

OVERRIDES: dict[str, Any] = {}
PICTURES = ""

# %% [markdown]
# All settings, with their defaults:

# %%
from emotion_transfer.config import EnhancedConfig, cache_size, make_config

# %% [markdown]
# Now yours are checked. A wrong name or an impossible value stops the notebook here, with the list
# of what would work. (`forget` takes away what earlier settings made, so that nothing below can run
# with it by mistake. With `PICTURES`, `prepare_folder` writes three lists of images, for training,
# validation and test, and leaves the pictures where they are.)

# %%
from emotion_toolbox.prepare import prepare_folder
from emotion_toolbox.settings import forget, settings_among

forget(globals(), "cfg listed run_dir keep_figure datasets data train classes model result")
settings = settings_among(EnhancedConfig, globals(), OVERRIDES)
if PICTURES:
    settings["DATA_ROOT"] = str(prepare_folder(PICTURES))
cfg = make_config(settings)
print(f"{len(settings)} of {len(EnhancedConfig.__dataclass_fields__)} settings are yours")
