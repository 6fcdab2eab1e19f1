"""Where a run keeps what it makes."""

import re
from pathlib import Path

from emotion_transfer.config import ConfigError, EnhancedConfig, config_hash, resolve_path
from emotion_transfer.data import EmotionData

# %% [markdown]
# #### A folder for every run
#
# Checkpoints, figures, predictions and the summary of a run lie together in one folder. Its name
# ends in a hash of the settings: change one that shapes the result and a new run begins beside the
# old one; run the same settings again and the run is found and resumed.


# %%
def run_name(cfg: EnhancedConfig, data: EmotionData) -> str:
    """``RUN_NAME``, or the data set, the model (the sample chooses later) and a hash."""
    if cfg.RUN_NAME != "auto":
        return cfg.RUN_NAME
    name = "sample" if data.synthetic else f"{data.root.name}-{cfg.MODEL_NAME}"
    return re.sub(r"[^\w.-]+", "_", f"{name}-{config_hash(cfg)}")


def make_run_folder(cfg: EnhancedConfig, data: EmotionData) -> Path:
    """Create the run's folder and return it; raises ``ConfigError`` if it cannot be written."""
    folder = resolve_path(cfg.OUTPUT_ROOT) / run_name(cfg, data)
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"OUTPUT_ROOT={cfg.OUTPUT_ROOT!r}: {folder} cannot be written ({error}); "
            "choose another folder"
        ) from error
    return folder
