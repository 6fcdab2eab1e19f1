# %% [markdown]
# ## 2. Configuration
#
# **This is the cell to edit.** Whatever you put into `OVERRIDES` replaces the default of that name;
# the defaults are in the class below it. A few you might try, one at a time:
#
# | to | set |
# |---|---|
# | train on your own pictures | `{"DATA_ROOT": "data/processed/pictures"}` |
# | use the smaller network | `{"MODEL_NAME": "efficientnet_b0"}` |
# | fit into less memory | `{"ACCUMULATE": 2}`, or `{"BATCH_SIZE": 16}` |
# | see in a minute whether all of it runs | `{"DEBUG": True, "EPOCHS": 1}` |
# | get the same bits again on a GPU | `{"DETERMINISTIC": True}` (slower) |

# %% tags=["parameters"]
from typing import Any

OVERRIDES: dict[str, Any] = {}

# %% [markdown]
# The rest of this section defines the settings and checks yours.

# %%
from emotion_transfer.config import EnhancedConfig, make_config

# %% [markdown]
# Your settings are checked now. A wrong name or an impossible value stops the notebook here, with
# the list of what would work.

# %%
cfg = make_config(OVERRIDES)
print(f"{len(OVERRIDES)} of {len(EnhancedConfig.__dataclass_fields__)} settings are yours")
